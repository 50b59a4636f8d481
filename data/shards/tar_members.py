"""List the members of a tar file: names, offsets, sizes and, on request, checksums.

The standard library's `tarfile` is ten times slower and silently stops at the first damaged header.
This parser reads many small members at once and rejects everything it does not understand, naming
the byte offset. Headers are verified in groups after they are parsed. A damaged size field makes
the parser read file data as headers, so the error names the first header whose checksum is wrong.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from gigabatch.data.decode.signatures import describe_bytes
from gigabatch.data.errors import GigabatchError

BLOCK = 512
RECORD = 20 * BLOCK  # writers pad to this by default; some to a power of two, 32 KiB or more
PIECE = 16 << 20  # bytes of a large member read at a time
# Bytes read at a time. A call costs as much as a few KB, so one call reads many small members.
SMALL_WINDOW, LARGE_WINDOW = 4 << 10, 64 << 10
NEAR = 16 << 10  # a header this close to the end of the window means that members are small
VERIFY_AT_ONCE = 1 << 14  # headers verified at a time: 8 MiB
_FILE_TYPES = (0x30, 0)  # "0" and NUL: regular files
_LONG_NAME, _PAX, _PAX_GLOBAL, _FOLDER = b"L", b"x", b"g", b"5"
_UNPACK = {
    "gzip-compressed data": (".gz", "gunzip"),
    "zstd-compressed data": (".zst", "zstd -d --rm"),
    "bzip2-compressed data": (".bz2", "bunzip2"),
    "xz-compressed data": (".xz", "unxz"),
}  # fmt: skip
"""What a compressed tar file is -> the suffix that its program needs, and the program."""
_OCTAL = 8 ** np.arange(5, -1, -1)


@dataclass(frozen=True)
class Members:
    """The regular files of a tar file, in order.

    Attributes:
        names: Their names.
        offsets: Byte offset at which the data of each file starts.
        sizes: Sizes of the data, in bytes.
        checksums: CRC-32C of the data; empty if not requested.
    """

    names: list[str]
    offsets: list[int]
    sizes: list[int]
    checksums: list[int]


@dataclass
class _Parser:
    """State of a pass over one tar file.

    Attributes:
        file: File descriptor.
        where: Name of the shard, for errors.
        total: Size of the shard, in bytes.
        names: Names of the files whose headers are verified.
        headers: Headers of the files after those, not verified yet.
        starts: Byte offset of the header of every file.
        sizes: Size of every file, in bytes.
        checksums: CRC-32C of every file, if requested.
        long_names: File number -> the name from an extended header.
    """

    file: int
    where: str
    total: int
    names: list[str] = field(default_factory=list)
    headers: list[bytes] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)
    long_names: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _ExtendedHeader:
    """Name and size of the next file, where its own header cannot hold them."""

    name: str | None = None
    size: int | None = None


def read_members(file: int, where: str, checksums: bool = False) -> Members:
    """List the regular files of a tar file.

    Args:
        file: Descriptor of the open tar file.
        where: Name of the tar file, for errors.
        checksums: Also compute the CRC-32C of every file, which reads all data.

    Raises:
        GigabatchError: if a header is damaged, a member is truncated, the end mark is missing, or a
            member is neither a file nor a folder, such as a link. The message names the byte
            offset.
    """
    parser = _Parser(file, where, os.fstat(file).st_size)
    try:
        _parse(parser, checksums)
    except GigabatchError:
        _verify_headers(parser)  # an earlier damaged header may be the cause; name that one
        raise
    _verify_headers(parser)
    offsets = [start + BLOCK for start in parser.starts]
    return Members(parser.names, offsets, parser.sizes, parser.checksums)


def _parse(parser: _Parser, checksums: bool) -> None:
    """Collect headers, sizes and checksums up to the end mark."""
    file, total = parser.file, parser.total
    starts, headers, sizes, sums = parser.starts, parser.headers, parser.sizes, parser.checksums
    window, start, position = b"", 0, 0  # `window`: bytes of the file from `start` on
    extended: _ExtendedHeader | None = None
    while True:
        at = position - start
        if at + BLOCK > len(window):
            length = LARGE_WINDOW if position - start - len(window) < NEAR else SMALL_WINDOW
            window, start, at = os.pread(file, length, position), position, 0
            if len(window) < BLOCK:
                what = "the file ends without an end mark: it was truncated"
                if position == 0 and describe_bytes(window) not in (None, "a tar file"):
                    raise _not_a_tar(parser.where, window)
                raise _damage(parser.where, position, what)
            if len(headers) >= VERIFY_AT_ONCE:
                _verify_headers(parser)
        try:
            size = int(window[at + 124 : at + 135], 8)
        except ValueError:
            header = window[at : at + BLOCK]
            if not header.strip(b"\x00"):
                return _check_end(parser, position)
            size = _unusual_size(header, parser.where, position)
        if extended and extended.size is not None:
            size = extended.size
        next_header = position + BLOCK + ((size + BLOCK - 1) & -BLOCK)
        if size < 0 or next_header > total:
            what = f"the file ends inside a member of {size} bytes: it was truncated"
            raise _damage(parser.where, position + BLOCK, what)
        if window[at + 156] not in _FILE_TYPES:
            header = window[at : at + BLOCK]
            extended = _read_special(parser, header, position, size, extended)
            position = next_header
            continue
        if extended:
            if extended.name:
                parser.long_names[len(starts)] = extended.name
            extended = None
        starts.append(position)
        headers.append(window[at : at + BLOCK])
        sizes.append(size)
        if checksums:
            checksum, window, start = _checksum(file, window, start, position, size)
            sums.append(checksum)
        position = next_header


def _checksum(
    file: int, window: bytes, start: int, position: int, size: int
) -> tuple[int, bytes, int]:
    """Return the CRC-32C of the file whose header is at `position`, and the window after it."""
    at = position - start
    if at + BLOCK + size > len(window) and size <= PIECE:
        padded = (size + BLOCK - 1) & -BLOCK
        window = os.pread(file, BLOCK + padded + SMALL_WINDOW, position)
        start, at = position, 0
    if at + BLOCK + size <= len(window):
        return google_crc32c.value(window[at + BLOCK : at + BLOCK + size]), window, start
    return checksum_of(file, position + BLOCK, size), window, start


def checksum_of(file: int, offset: int, size: int) -> int:
    """Return the CRC-32C of `size` bytes from `offset`, reading one piece at a time."""
    checksum = google_crc32c.Checksum()
    for start in range(0, size, PIECE):
        checksum.update(os.pread(file, min(PIECE, size - start), offset + start))
    return int.from_bytes(checksum.digest(), "big")


def _read_special(
    parser: _Parser, header: bytes, position: int, size: int, extended: _ExtendedHeader | None
) -> _ExtendedHeader | None:
    """Read a member that is not a regular file; return what applies to the next file."""
    _verify_header(header, parser.where, position)
    kind, data = header[156:157], position + BLOCK
    if kind == _LONG_NAME:
        name = os.pread(parser.file, size, data).rstrip(b"\x00")
        text = _decode_name(name, parser.where, data)
        return _ExtendedHeader(text, extended.size if extended else None)
    if kind == _PAX:
        fields = _pax_fields(os.pread(parser.file, size, data), parser.where, data)
        return _ExtendedHeader(
            fields.get("path"), int(fields["size"]) if "size" in fields else None
        )
    if kind == _FOLDER:
        return None
    if kind == _PAX_GLOBAL:
        return extended
    raise _damage(
        parser.where, position, f"a member has type {kind!r}; only files and folders may occur"
    )


def _check_end(parser: _Parser, position: int) -> None:
    """Require that only zeros follow the end mark, no more than the padding of a tar writer."""
    for start in range(position, parser.total, PIECE):
        if os.pread(parser.file, PIECE, start).strip(b"\x00"):
            raise _damage(parser.where, position, "a block of zeros is followed by more data")
    zeros = parser.total - position
    powers = [1 << power for power in range(15, 21) if parser.total % (1 << power) == 0]
    if zeros > max([RECORD, *powers]) + 2 * BLOCK:
        what = f"zeros up to the end, {zeros:,} bytes: more than a tar ends with, so data was lost"
        raise _damage(parser.where, position, what)


def _verify_headers(parser: _Parser) -> None:
    """Verify the checksums of the collected headers, all at once, and decode their names."""
    first = len(parser.names)
    headers = np.frombuffer(b"".join(parser.headers), np.uint8).reshape(-1, BLOCK)
    sums = headers.sum(axis=1, dtype=np.uint32) - headers[:, 148:156].sum(axis=1, dtype=np.uint32)
    digits = headers[:, 148:154] - np.uint8(0x30)
    correct = (digits < 8).all(axis=1) & (sums + 8 * 32 == digits @ _OCTAL)
    for row in np.flatnonzero(~correct).tolist():  # written in a different form, or wrong
        _verify_header(parser.headers[row], parser.where, parser.starts[first + row])
    parser.names += _names(parser, headers, first)
    parser.headers.clear()


def _verify_header(header: bytes, where: str, position: int) -> None:
    """Raise GigabatchError if the checksum in a header is wrong."""
    try:
        stored = _number(header[148:156], where, position)
    except GigabatchError:
        if position == 0:
            raise _not_a_tar(where, header) from None
        raise
    if stored != sum(header) - sum(header[148:156]) + 8 * 32:
        if position == 0:
            raise _not_a_tar(where, header)
        raise _damage(where, position, "the header's checksum is wrong: the block is damaged")


def _unusual_size(header: bytes, where: str, position: int) -> int:
    """Return a size that is not eleven octal digits, after verifying the header."""
    _verify_header(header, where, position)
    return _number(header[124:136], where, position)


def _number(digits: bytes, where: str, position: int) -> int:
    """Parse a number of a header: octal, or base 256."""
    if digits[0] & 0x80:  # GNU base 256, for sizes of 8 GiB and more
        return int.from_bytes(bytes([digits[0] & 0x7F]) + digits[1:], "big")
    try:
        return int(digits.strip(b" \x00") or b"0", 8)
    except ValueError:
        raise _damage(where, position, "the header is damaged") from None


def _names(parser: _Parser, headers: NDArray[np.uint8], first: int) -> list[str]:
    """Decode the names in uint8 headers [n, BLOCK]; row 0 is file number `first`."""
    raw_names = np.ascontiguousarray(headers[:, :100]).view("S100")[:, 0].tolist()
    # Only POSIX headers end their mark with a zero byte: GNU headers store times at the prefix.
    posix = (headers[:, 257:263] == np.frombuffer(b"ustar\x00", np.uint8)).all(axis=1)
    for row in np.flatnonzero(posix & (headers[:, 345] != 0)).tolist():
        prefix = headers[row, 345:500].tobytes().split(b"\x00", 1)[0]
        raw_names[row] = prefix + b"/" + raw_names[row].split(b"\x00", 1)[0]
    names = []
    for number, raw in enumerate(raw_names, first):
        try:
            names.append(parser.long_names.get(number) or raw.split(b"\x00", 1)[0].decode())
        except UnicodeDecodeError:
            raise _not_utf8(raw, parser.where, parser.starts[number]) from None
    return names


def _decode_name(name: bytes, where: str, position: int) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise _not_utf8(name, where, position) from None


def _not_utf8(name: bytes, where: str, position: int) -> GigabatchError:
    return _damage(where, position, f"the name {name!r} is not UTF-8")


def _pax_fields(records: bytes, where: str, position: int) -> dict[str, str]:
    """Return `path` and `size` of a PAX header."""
    fields = {}
    for name, value in _pax_records(records, where, position):
        if name in (b"path", b"size"):  # other fields may hold anything, such as binary attributes
            fields[name.decode()] = _decode_name(value, where, position)
    return fields


def _pax_records(records: bytes, where: str, position: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield (name, value) of a PAX header."""
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


def _not_a_tar(where: str, head: bytes) -> GigabatchError:
    """Return the error for a file that does not start with a tar header.

    Args:
        where: Name of the file.
        head: Its first 512 bytes, or all of them if there are fewer.
    """
    kind = describe_bytes(head)
    if kind is None or kind == "a tar file":
        return _damage(where, 0, "this is not a tar file")
    if kind not in _UNPACK:
        return _damage(where, 0, f"this is not a tar file but {kind}")
    suffix, command = _UNPACK[kind]
    fix = "Unpack it at its source"
    if "://" not in where:
        old, new = shlex.quote(where), shlex.quote(where + suffix)
        fix = f"Unpack it: `mv {old} {new} && {command} {new}`"
        if where.endswith(suffix):
            fix = f"Unpack it: `{command} {old}`, and use {where.removesuffix(suffix)}"
    return GigabatchError(
        f"{where}: at byte 0: this is not a tar file but {kind}; samples are read by their offset, "
        f"which compression does not allow. {fix}."
    )


def _damage(where: str, position: int, what: str) -> GigabatchError:
    return GigabatchError(
        f"{where}: at byte {position}: {what}. Restore the shard from its source, or remove it "
        "from the set; nothing of it was used."
    )
