"""Bytes of samples' members, by offset, each checked. No tar is ever extracted, no path in one
ever opened."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote.cache import ShardCache, node_cache
from gigabatch.data.remote.locations import is_remote
from gigabatch.data.shards.index import I64, Index

log = logging.getLogger(__name__)
NEAR = 1 << 16
"""Bytes between members up to which one read fetches both."""
WAITS = (0.1, 1.0, 5.0)
"""Seconds before a failed read is tried again."""
RETRIED = (errno.EIO, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.ESTALE, errno.ENETDOWN)


class Damaged(NamedTuple):
    """A member whose bytes are not those that were indexed. `why` names shard, byte and sample."""

    why: str


class Reader:
    """Reads members of one indexed set; keeps the most recently used shards open.

    Not for several threads at once.
    """

    OPEN_SHARDS = 64

    def __init__(self, index: Index, cache: ShardCache | None = None) -> None:
        self.index = index
        self.cache = cache or node_cache()
        self._files: dict[int, int] = {}
        self._dropped: set[int] = set()

    def read(self, sample: int, member: str) -> bytes:
        """The bytes of `member` (an extension) of sample number `sample`.

        Raises GigabatchError where they are not those that were indexed.
        """
        data = self.read_batch(np.array([sample]), [member])[0].get(member)
        if data is None:
            raise GigabatchError(f"{self.index.where(sample)} has no .{member} member.")
        if isinstance(data, Damaged):
            raise GigabatchError(data.why)
        return data

    def read_batch(self, samples: I64, members: Sequence[str]) -> list[dict[str, bytes | Damaged]]:
        """For each sample, those of `members` that it has. Best sorted: then shards are read in
        runs. Raises GigabatchError for a shard that cannot be read, after some tries."""
        index = self.index
        shards = np.searchsorted(index.first_sample, samples, side="right") - 1
        offsets = [index.take(f"{m}.offset", samples).tolist() for m in members]
        sizes = [index.take(f"{m}.size", samples).tolist() for m in members]
        sums = [
            index.take(f"{m}.crc", samples).tolist() if index.settings.checksums else None
            for m in members
        ]
        return [
            self._sample(shard, sample, row, members, offsets, sizes, sums)
            for row, (shard, sample) in enumerate(
                zip(shards.tolist(), samples.tolist(), strict=True)
            )
        ]

    def _sample(
        self,
        shard: int,
        sample: int,
        row: int,
        members: Sequence[str],
        offsets: Sequence[list[int]],
        sizes: Sequence[list[int]],
        sums: Sequence[list[int] | None],
    ) -> dict[str, bytes | Damaged]:
        held = [k for k in range(len(members)) if offsets[k][row]]
        if not held:
            return {}
        begin = min(offsets[k][row] for k in held)
        end = max(offsets[k][row] + sizes[k][row] for k in held)
        together = end - begin <= NEAR + sum(sizes[k][row] for k in held)
        data = self._pread(shard, begin, end - begin) if together else b""
        out: dict[str, bytes | Damaged] = {}
        for k in held:
            offset, size = offsets[k][row], sizes[k][row]
            if together:
                part = data[offset - begin : offset - begin + size]
            else:
                part = self._pread(shard, offset, size)
            if len(part) < size:
                raise GigabatchError(self._why(shard, sample, members[k], part))
            told = sums[k]
            sound = told is None or google_crc32c.value(part) == told[row]
            if not sound and self._fetch_again(shard):
                return self._sample(shard, sample, row, members, offsets, sizes, sums)
            out[members[k]] = part if sound else Damaged(self._why(shard, sample, members[k], part))
        return out

    def _fetch_again(self, shard: int) -> bool:
        """Whether a copy of a remote shard was dropped, once a shard: it may have gone bad here."""
        of = self.index.shards[shard]
        if shard in self._dropped or not is_remote(of.name):
            return False
        self._dropped.add(shard)
        self._close(shard)
        self.cache.drop(of.name, of.bytes, of.version)
        return True

    def _why(self, shard: int, sample: int, member: str, part: bytes) -> str:
        offset, size = self.index.span(sample, member)
        if len(part) < size:
            what = f"is cut short ({len(part)} of {size} bytes)"
        else:
            what = "is not what was indexed (its CRC-32C differs)"
        return (
            f"{self.index.shards[shard].name}: at byte {offset}: member .{member} of sample "
            f"{self.index.key(sample)!r} {what}. The shard was damaged or replaced after it was "
            "indexed; restore it."
        )

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        """Up to `size` bytes; fewer only at the end of the file."""
        data = self._once(shard, offset, size)
        while 0 < len(data) < size:  # the system gives at most 2 GiB at a time
            more = self._once(shard, offset + len(data), size - len(data))
            if not more:
                break
            data += more
        return data

    def _once(self, shard: int, offset: int, size: int) -> bytes:
        """One read, tried again after an error that may pass."""
        name = self.index.shards[shard].name
        for wait in (*WAITS, None):
            try:
                return os.pread(self._file(shard), size, offset)
            except OSError as error:
                if wait is None or error.errno not in RETRIED:
                    raise GigabatchError(
                        f"{name}: the shard cannot be read: {error.strerror or error}. It was "
                        "there when it was indexed; restore it, or look to the file system."
                    ) from error
                log.warning("%s: %s; trying again in %s s", name, error.strerror, wait)
                self._close(shard)
                time.sleep(wait)
        raise AssertionError("unreachable")

    def _file(self, shard: int) -> int:
        if shard in self._files:
            self._files[shard] = self._files.pop(shard)  # now the most recent
        else:
            if len(self._files) >= self.OPEN_SHARDS:
                self._close(next(iter(self._files)))
            self._files[shard] = self._open(shard)
        return self._files[shard]

    def _open(self, shard: int) -> int:
        of = self.index.shards[shard]
        if is_remote(of.name):
            return self.cache.open(of.name, of.bytes, of.version)
        return os.open(of.name, os.O_RDONLY | os.O_CLOEXEC)

    def _close(self, shard: int) -> None:
        if shard in self._files:
            os.close(self._files.pop(shard))

    def close(self) -> None:
        for shard in list(self._files):
            self._close(shard)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
