"""Where the members of a tar file lie, from its headers, and on request the checksum of each.

Standard library `tarfile` is ten times slower and silently ends at the first damaged header. This
walk reads many small members at once and refuses anything it does not understand, naming the byte
offset. The headers in what was read are verified together: a damaged size leads the walk astray,
and then the first header whose own checksum fails is the one to name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from gigabatch.data.errors import GigabatchError

BLOCK = 512
RECORD = 20 * BLOCK  # what writers fill up by default; others take a power of two from 32 KiB on
LARGE = 16 << 20  # bytes of a member read at a time
WINDOW, WIDE = 4 << 10, 64 << 10  # bytes read at a time: a call costs as much as some KB
NEAR = 16 << 10  # bytes from one window's end to the next header, within which they are wide
TOGETHER = 1 << 14  # headers verified at a time: 8 MiB
_FILES = (0x30, 0)  # types "0" and NUL: regular files
_LONG_NAME, _PAX, _PAX_GLOBAL, _FOLDER = b"L", b"x", b"g", b"5"
_OCTAL = 8 ** np.arange(5, -1, -1)


@dataclass(frozen=True)
class Members:
    """The regular files of a tar, in order, a list a field. `offsets`, `sizes`: of the data, in
    bytes; `checksums`: CRC-32C, or empty where it was not asked for."""

    names: list[str]
    offsets: list[int]
    sizes: list[int]
    checksums: list[int]


@dataclass
class _Walk:
    """What a walk has gathered. `headers`: of files, those not yet verified; `extended`: names
    from a header before the file's own."""

    file: int
    where: str
    total: int
    names: list[str] = field(default_factory=list)  # of the files verified
    headers: list[bytes] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # of headers
    sizes: list[int] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)
    extended: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Extended:
    """What an extended header says of the file after it."""

    name: str | None = None
    size: int | None = None


def walk(file: int, where: str, checksums: bool = False) -> Members:
    """The members of the tar open as file descriptor `file`; `where` names it in errors.

    Raises GigabatchError, with the byte offset, for a damaged header, a member cut short, a
    missing end mark, or a member that is neither a file nor a folder (links, devices).
    """
    gathered = _Walk(file, where, os.fstat(file).st_size)
    try:
        _gather(gathered, checksums)
    except GigabatchError:
        _verify(gathered)  # an earlier header may be what led the walk astray
        raise
    _verify(gathered)
    offsets = [start + BLOCK for start in gathered.starts]
    return Members(gathered.names, offsets, gathered.sizes, gathered.checksums)


def _gather(walk: _Walk, checksums: bool) -> None:
    file, total = walk.file, walk.total
    starts, headers, sizes, sums = walk.starts, walk.headers, walk.sizes, walk.checksums
    window, start, position = b"", 0, 0  # bytes of the file from `start` on
    pending: _Extended | None = None
    while True:
        at = position - start
        if at + BLOCK > len(window):
            # Small members come many at a time, of large ones little more than the header.
            length = WIDE if position - start - len(window) < NEAR else WINDOW
            window, start, at = os.pread(file, length, position), position, 0
            if len(window) < BLOCK:
                what = "the file ends without an end mark: it was cut short"
                raise _damage(walk.where, position, what)
            if len(headers) >= TOGETHER:
                _verify(walk)
        try:
            size = int(window[at + 124 : at + 135], 8)
        except ValueError:
            header = window[at : at + BLOCK]
            if not header.strip(b"\x00"):
                return _end(walk, position)
            size = _size(header, walk.where, position)
        if pending and pending.size is not None:
            size = pending.size
        follows = position + BLOCK + ((size + BLOCK - 1) & -BLOCK)
        if size < 0 or follows > total:
            what = f"a member of {size} bytes is cut short: it was truncated"
            raise _damage(walk.where, position + BLOCK, what)
        if window[at + 156] not in _FILES:
            pending = _special(walk, window[at : at + BLOCK], position, size, pending)
            position = follows
            continue
        if pending:
            if pending.name:
                walk.extended[len(starts)] = pending.name
            pending = None
        starts.append(position)
        headers.append(window[at : at + BLOCK])
        sizes.append(size)
        if checksums:
            if at + BLOCK + size > len(window) and size <= LARGE:
                length = follows - position + WINDOW
                window, start, at = os.pread(file, length, position), position, 0
            if at + BLOCK + size <= len(window):
                sums.append(google_crc32c.value(window[at + BLOCK : at + BLOCK + size]))
            else:
                sums.append(checksum_of(file, position + BLOCK, size))
        position = follows


def checksum_of(file: int, offset: int, size: int) -> int:
    """CRC-32C of `size` bytes from `offset`, in the memory of one piece."""
    running = google_crc32c.Checksum()
    for start in range(0, size, LARGE):
        running.update(os.pread(file, min(LARGE, size - start), offset + start))
    return int.from_bytes(running.digest(), "big")


def _special(
    walk: _Walk, header: bytes, position: int, size: int, before: _Extended | None
) -> _Extended | None:
    """Anything but a regular file: what it says of the next one."""
    _verify_one(header, walk.where, position)
    kind, data = header[156:157], position + BLOCK
    if kind == _LONG_NAME:
        name = os.pread(walk.file, size, data).rstrip(b"\x00")
        return _Extended(_text(name, walk.where, data), before.size if before else None)
    if kind == _PAX:
        fields = _pax(os.pread(walk.file, size, data), walk.where, data)
        return _Extended(fields.get("path"), int(fields["size"]) if "size" in fields else None)
    if kind == _FOLDER:
        return None
    if kind == _PAX_GLOBAL:
        return before
    raise _damage(walk.where, position, f"a member of type {kind!r}; only files may be read")


def _end(walk: _Walk, position: int) -> None:
    """Nothing but zeros may follow the end mark, and no more than writers pad a tar with."""
    for start in range(position, walk.total, LARGE):
        if os.pread(walk.file, LARGE, start).strip(b"\x00"):
            raise _damage(walk.where, position, "a block of zeros is followed by more data")
    left = walk.total - position
    records = [RECORD, *(1 << power for power in range(15, 21) if walk.total % (1 << power) == 0)]
    if left > max(records) + 2 * BLOCK:
        what = f"zeros up to the end, {left:,} bytes: more than a tar ends with, so data was lost"
        raise _damage(walk.where, position, what)


def _verify(walk: _Walk) -> None:
    """The checksums in the headers that are held, all at once; then their names."""
    first = len(walk.names)
    headers = np.frombuffer(b"".join(walk.headers), np.uint8).reshape(-1, BLOCK)
    sums = headers.sum(axis=1, dtype=np.uint32) - headers[:, 148:156].sum(axis=1, dtype=np.uint32)
    digits = headers[:, 148:154] - np.uint8(0x30)
    plain = (digits < 8).all(axis=1) & (sums + 8 * 32 == digits @ _OCTAL)
    for row in np.flatnonzero(~plain).tolist():  # written otherwise, or wrong
        _verify_one(walk.headers[row], walk.where, walk.starts[first + row])
    walk.names += _names(walk, headers, first)
    walk.headers.clear()


def _verify_one(header: bytes, where: str, position: int) -> None:
    stored = _number(header[148:156], where, position)
    if stored != sum(header) - sum(header[148:156]) + 8 * 32:
        if position == 0:
            raise _damage(where, 0, "this is not a tar file")
        raise _damage(where, position, "the header's checksum is wrong: the block is damaged")


def _size(header: bytes, where: str, position: int) -> int:
    """A size that is not eleven octal digits; of a header that is sound."""
    _verify_one(header, where, position)
    return _number(header[124:136], where, position)


def _number(digits: bytes, where: str, position: int) -> int:
    if digits[0] & 0x80:  # GNU base-256, for sizes from 8 GiB
        return int.from_bytes(bytes([digits[0] & 0x7F]) + digits[1:], "big")
    try:
        return int(digits.strip(b" \x00") or b"0", 8)
    except ValueError:
        what = "this is not a tar file" if position == 0 else "the header is damaged"
        raise _damage(where, position, what) from None


def _names(walk: _Walk, headers: NDArray[np.uint8], first: int) -> list[str]:
    """The names in the headers [n, BLOCK], whose first is member number `first`."""
    raws = np.ascontiguousarray(headers[:, :100]).view("S100")[:, 0].tolist()
    # Only POSIX headers end their mark with a zero byte: GNU's have times where the prefix is.
    posix = (headers[:, 257:263] == np.frombuffer(b"ustar\x00", np.uint8)).all(axis=1)
    for row in np.flatnonzero(posix & (headers[:, 345] != 0)).tolist():
        prefix = headers[row, 345:500].tobytes().split(b"\x00", 1)[0]
        raws[row] = prefix + b"/" + raws[row].split(b"\x00", 1)[0]
    names = []
    for index, raw in enumerate(raws, first):
        try:
            names.append(walk.extended.get(index) or raw.split(b"\x00", 1)[0].decode())
        except UnicodeDecodeError:
            raise _not_utf8(raw, walk.where, walk.starts[index]) from None
    return names


def _text(name: bytes, where: str, position: int) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise _not_utf8(name, where, position) from None


def _not_utf8(name: bytes, where: str, position: int) -> GigabatchError:
    return _damage(where, position, f"the name {name!r} is not UTF-8")


def _pax(records: bytes, where: str, position: int) -> dict[str, str]:
    fields = {}
    for name, value in _pax_records(records, where, position):
        if name in (b"path", b"size"):  # others may hold anything, such as binary attributes
            fields[name.decode()] = _text(value, where, position)
    return fields


def _pax_records(records: bytes, where: str, position: int) -> Iterator[tuple[bytes, bytes]]:
    while records:
        try:
            length = int(records.split(b" ", 1)[0])
            if length <= 0:
                raise ValueError(length)
            name, value = records[:length].split(b" ", 1)[1].rstrip(b"\n").split(b"=", 1)
            if name == b"size":
                int(value)
        except (ValueError, IndexError):
            raise _damage(where, position, "an extended header cannot be read") from None
        yield name, value
        records = records[length:]


def _damage(where: str, position: int, what: str) -> GigabatchError:
    return GigabatchError(
        f"{where}: at byte {position}: {what}. Restore the shard from its source, or remove it "
        "from the set; nothing of it was used."
    )
