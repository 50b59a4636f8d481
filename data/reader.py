"""Bytes of a sample's members, by offset. No tar is ever extracted, no path in one ever opened."""

from __future__ import annotations

import os

from gigabatch.data.errors import GigabatchError
from gigabatch.data.index import Index


class Reader:
    """Reads members of one indexed set; keeps the most recently used shards open."""

    OPEN_SHARDS = 64

    def __init__(self, index: Index) -> None:
        self.index = index
        self._files: dict[int, int] = {}

    def read(self, sample: int, member: str) -> bytes:
        """The bytes of `member` (an extension) of sample number `sample`."""
        offset, size = self.index.span(sample, member)
        shard = self.index.shard_of(sample)
        path = self.index.root / self.index.shards[shard]
        try:
            data = os.pread(self._file(shard), size, offset)
        except OSError as error:
            raise GigabatchError(f"{path}: the shard cannot be read: {error}.") from error
        if len(data) != size:
            raise GigabatchError(
                f"{self.index.root / self.index.shards[shard]}: at byte {offset}: member "
                f".{member} of sample {self.index.key(sample)!r} is cut short ({len(data)} of "
                f"{size} bytes). The shard changed after it was indexed; restore it."
            )
        return data

    def _file(self, shard: int) -> int:
        if shard in self._files:
            self._files[shard] = self._files.pop(shard)  # now the most recent
        else:
            if len(self._files) >= self.OPEN_SHARDS:
                os.close(self._files.pop(next(iter(self._files))))
            path = self.index.root / self.index.shards[shard]
            try:
                self._files[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise GigabatchError(f"{path}: the shard cannot be read: {error}.") from error
        return self._files[shard]

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
