"""Read members by byte offset, and verify the checksum of each.

No tar file is ever extracted, and no path inside one is ever opened.
"""

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
MAX_GAP = 1 << 16
"""Maximum number of bytes between the members of a sample that a single read may include."""
RETRY_WAITS_S = (0.1, 1.0, 5.0)
"""Seconds to wait before each retry of a failed read."""
RETRIED_ERRORS = (
    errno.EIO, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.ESTALE, errno.ENETDOWN,
)  # fmt: skip


class DamagedMember(NamedTuple):
    """A member whose bytes differ from the indexed ones; `why` names shard, byte and sample."""

    why: str


class _Span(NamedTuple):
    """Location of a member in its shard, and its CRC-32C if the index has one."""

    member: str
    offset: int
    size: int
    crc: int | None


class Reader:
    """Reads members of one indexed set and keeps the most recently used shards open.

    Not safe for use by several threads at once.

    Args:
        index: The set.
        cache: Cache of remote shards; None uses this node's cache.
    """

    OPEN_SHARDS = 64

    def __init__(self, index: Index, cache: ShardCache | None = None) -> None:
        self.index = index
        self.cache = cache or node_cache()
        self._files: dict[int, int] = {}
        self._dropped: set[int] = set()

    def read(self, row: int, member: str) -> bytes:
        """Read one member of one sample.

        Args:
            row: The sample's row in the index.
            member: The member's extension, such as `png`.

        Raises:
            GigabatchError: if the sample lacks the member, the shard cannot be read, or the bytes
                differ from the indexed ones.
        """
        data = self.read_batch(np.array([row]), [member])[0].get(member)
        if data is None:
            raise GigabatchError(f"{self.index.where(row)} has no .{member} member.")
        if isinstance(data, DamagedMember):
            raise GigabatchError(data.why)
        return data

    def read_batch(
        self, rows: I64, members: Sequence[str]
    ) -> list[dict[str, bytes | DamagedMember]]:
        """Read some members of several samples; sorted rows are fastest.

        Args:
            rows: int64 [n], rows of the index.
            members: Extensions; a sample may lack some.

        Returns:
            For each row, extension -> bytes, for the members that the sample has.

        Raises:
            GigabatchError: if a shard cannot be read, after retries, or has become shorter.
        """
        index = self.index
        shards = np.searchsorted(index.shard_starts, rows, side="right") - 1
        columns = []
        for member in members:
            offsets = index.take(f"{member}.offset", rows).tolist()
            sizes = index.take(f"{member}.size", rows).tolist()
            crcs = [None] * len(rows)
            if index.settings.checksums:
                crcs = index.take(f"{member}.crc", rows).tolist()
            columns.append((member, offsets, sizes, crcs))
        out = []
        for n, (shard, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
            # A member that the sample lacks has offset 0.
            spans = [_Span(m, o[n], s[n], crc[n]) for m, o, s, crc in columns if o[n]]
            out.append(self._read_sample(shard, row, spans))
        return out

    def _read_sample(
        self, shard: int, row: int, spans: Sequence[_Span]
    ) -> dict[str, bytes | DamagedMember]:
        """Read and check the members of one sample."""
        if not spans:
            return {}
        begin = min(span.offset for span in spans)
        end = max(span.offset + span.size for span in spans)
        together = end - begin <= MAX_GAP + sum(span.size for span in spans)
        data = self._pread(shard, begin, end - begin) if together else b""
        out: dict[str, bytes | DamagedMember] = {}
        for member, offset, size, crc in spans:
            if together:
                part = data[offset - begin : offset - begin + size]
            else:
                part = self._pread(shard, offset, size)
            if len(part) < size:
                raise GigabatchError(self._why(shard, row, member, part))
            intact = crc is None or google_crc32c.value(part) == crc
            if not intact and self._drop_cached_copy(shard):
                return self._read_sample(shard, row, spans)
            out[member] = part if intact else DamagedMember(self._why(shard, row, member, part))
        return out

    def _drop_cached_copy(self, shard: int) -> bool:
        """Drop the local copy of a remote shard, once per shard; return whether it was dropped."""
        # The copy may have been damaged on this machine while the original is intact.
        info = self.index.shards[shard]
        if shard in self._dropped or not is_remote(info.name):
            return False
        self._dropped.add(shard)
        self._close(shard)
        self.cache.drop(info.name, info.bytes, info.version)
        return True

    def _why(self, shard: int, row: int, member: str, part: bytes) -> str:
        """Return a description of what is wrong with the bytes `part` of a member."""
        offset, size = self.index.member_span(row, member)
        if len(part) < size:
            what = f"is truncated ({len(part)} of {size} bytes)"
        else:
            what = "is not what was indexed (its CRC-32C differs)"
        return (
            f"{self.index.shards[shard].name}: at byte {offset}: member .{member} of sample "
            f"{self.index.key(row)!r} {what}. The shard was damaged or replaced after it was "
            "indexed; restore it."
        )

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        """Read `size` bytes; fewer only at the end of the file."""
        data = self._pread_with_retries(shard, offset, size)
        while 0 < len(data) < size:  # one system call returns at most 2 GiB
            more = self._pread_with_retries(shard, offset + len(data), size - len(data))
            if not more:
                break
            data += more
        return data

    def _pread_with_retries(self, shard: int, offset: int, size: int) -> bytes:
        """Make one read call; retry after an error that may be temporary."""
        name = self.index.shards[shard].name
        for wait in (*RETRY_WAITS_S, None):
            try:
                return os.pread(self._file(shard), size, offset)
            except OSError as error:
                if wait is None or error.errno not in RETRIED_ERRORS:
                    raise GigabatchError(
                        f"{name}: the shard cannot be read: {error.strerror or error}. It existed "
                        "when it was indexed; restore it, or check the file system."
                    ) from error
                log.warning("%s: read failed: %s; retrying in %s s", name, error.strerror, wait)
                self._close(shard)
                time.sleep(wait)
        raise AssertionError("unreachable")

    def _file(self, shard: int) -> int:
        """Return the descriptor of a shard; open the shard if needed."""
        if shard in self._files:
            self._files[shard] = self._files.pop(shard)  # now the most recently used
        else:
            if len(self._files) >= self.OPEN_SHARDS:
                self._close(next(iter(self._files)))
            self._files[shard] = self._open(shard)
        return self._files[shard]

    def _open(self, shard: int) -> int:
        info = self.index.shards[shard]
        if is_remote(info.name):
            return self.cache.open(info.name, info.bytes, info.version)
        return os.open(info.name, os.O_RDONLY | os.O_CLOEXEC)

    def _close(self, shard: int) -> None:
        if shard in self._files:
            os.close(self._files.pop(shard))

    def close(self) -> None:
        """Close all shards."""
        for shard in list(self._files):
            self._close(shard)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
