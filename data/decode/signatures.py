"""Name what a file really is, from its first bytes, for errors about unreadable files."""

from __future__ import annotations

import re
from collections.abc import Sequence

_HEAD = 512
_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x1f\x8b", "gzip-compressed data"),
    (0, b"\x28\xb5\x2f\xfd", "zstd-compressed data"),
    (0, b"BZh", "bzip2-compressed data"),
    (0, b"\xfd7zXZ\x00", "xz-compressed data"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"PK\x05\x06", "an empty zip archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"Rar!\x1a\x07", "a RAR archive"),
    (257, b"ustar", "a tar file"),
    (0, b"\x89PNG\r\n\x1a\n", "a PNG"),
    (0, b"\xff\xd8\xff", "a JPEG"),
    (8, b"WEBP", "a WebP"),
    (0, b"GIF87a", "a GIF"),
    (0, b"GIF89a", "a GIF"),
    (0, b"II*\x00", "a TIFF"),
    (0, b"MM\x00*", "a TIFF"),
    (0, b"II+\x00", "a TIFF"),
    (0, b"\x00\x00\x01\x00", "an ICO"),
    (0, b"8BPS", "a Photoshop file"),
    (0, b"\xff\x0a", "a JPEG XL"),
    (0, b"\x00\x00\x00\x0cJXL ", "a JPEG XL"),
    (0, b"\x00\x00\x00\x0cjP  ", "a JPEG 2000"),
    (0, b"%PDF-", "a PDF"),
    (8, b"WAVE", "a WAV"),
    (8, b"AVI ", "an AVI video"),
    (0, b"fLaC", "a FLAC"),
    (0, b"OggS", "an Ogg file"),
    (0, b"ID3\x02", "an MP3"),
    (0, b"ID3\x03", "an MP3"),
    (0, b"ID3\x04", "an MP3"),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"PAR1", "a Parquet file"),
    (0, b"ARROW1", "an Arrow file"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (0, b"SQLite format 3\x00", "an SQLite database"),
    (0, b"version https://git-lfs.github.com/spec/", "a Git LFS pointer (fetch it: git lfs pull)"),
)  # fmt: skip
"""(offset, bytes at this offset, name)."""
_BRANDS = {
    b"avif": "an AVIF", b"avis": "an AVIF", b"heic": "a HEIC", b"heix": "a HEIC",
    b"heim": "a HEIC", b"hevc": "a HEIC", b"mif1": "a HEIF", b"msf1": "a HEIF",
    b"M4A ": "an M4A", b"qt  ": "a QuickTime video",
}  # fmt: skip
"""Brand of an ISO media file (`ftyp` at byte 4) -> name; all others are MP4 videos."""
_OBJECT = re.compile(r"<[\w.]+ object at 0x[0-9a-fA-F]+>")
_HTML = re.compile(rb"<(!doctype\s+html|html|head|body|title|script|meta)\b", re.IGNORECASE)
_SVG = re.compile(rb"<svg\b", re.IGNORECASE)


def describe_bytes(data: bytes) -> str | None:
    """Name the type of a file, such as "a GIF" or "an HTML page"; None if it is unknown.

    The answer depends on the bytes alone, so it is the same in every run.

    Args:
        data: Contents of the file, or its first 512 bytes.
    """
    if not data:
        return "0 bytes"
    head = bytes(data[:_HEAD])
    for at, magic, name in _MAGIC:
        if head.startswith(magic, at):
            return name
    if head[4:8] == b"ftyp":
        return _iso_media(head)
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in (12, 40, 56, 108, 124):
        return "a BMP"
    if not head.strip(b"\x00"):
        return "zeros"
    return _describe_text(head)


def explain_failure(data: bytes, formats: Sequence[str], error: Exception) -> str:
    """Return why a file cannot be decoded, in the same words in each run.

    Args:
        data: Contents of the file.
        formats: Names of the formats that the decoder reads, such as PNG.
        error: What the decoder raised.

    Returns:
        What the file is, if it is not of these formats; else the error's message without memory
        addresses.
    """
    kind = describe_bytes(data)
    readable = {name.lower() for name in formats}
    if kind is not None and kind.rpartition(" ")[2].lower() not in readable:
        return f"it is {kind}" if kind != "0 bytes" else "the file has 0 bytes"
    message = _OBJECT.sub("the file", str(error)) or type(error).__name__
    if kind is None and message.startswith("cannot identify image file"):
        return f"not a {', '.join(formats)} file"
    return message.rstrip(" .")


def _iso_media(head: bytes) -> str:
    """Name an ISO media file from its brands; the major brand of an AVIF may be `mif1`."""
    size = max(16, min(int.from_bytes(head[:4], "big"), len(head)))
    brands = [head[8:12], *(head[at : at + 4] for at in range(16, size, 4))]
    if head[8:12] in (b"mif1", b"msf1"):
        brands.sort(key=lambda brand: brand in (b"mif1", b"msf1"))
    return next((_BRANDS[brand] for brand in brands if brand in _BRANDS), "an MP4 video")


def _describe_text(head: bytes) -> str | None:
    """Name a text; None for binary data."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"<"):
        if _HTML.search(text):
            return "an HTML page"
        if _SVG.search(text):
            return "an SVG"
        if text.startswith(b"<?xml") or re.match(rb"<[A-Za-z][\w:.-]*[\s/>]", text):
            return "an XML document"
    try:
        decoded = text.decode()
    except UnicodeDecodeError as error:
        if error.start < len(text) - 3:  # not a character that the end of `head` cut
            return None
        decoded = text[: error.start].decode()
    if not decoded or any(ord(c) < 32 and c not in "\t\r\n\f" for c in decoded):
        return None
    words = " ".join(decoded.split())
    return f"a text that starts with {words[:40]!r}"
