"""Names of what a file really is, and the errors that contain them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gigabatch.data.decode.audio import AudioSettings, decode_audio
from gigabatch.data.decode.images import ImageSettings, decode_image
from gigabatch.data.decode.signatures import describe_bytes
from gigabatch.data.errors import BadSample


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(file, kind)
    return file.getvalue()


def iso(major: bytes, *brands: bytes) -> bytes:
    body = b"ftyp" + major + b"\0\0\0\0" + b"".join(brands)
    return (len(body) + 4).to_bytes(4, "big") + body + b"\0\0\0\x20moov" + bytes(99)


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "a")
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    return file.getvalue()


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.ones(3))
    return file.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
NOT_IMAGES = {
    "0 bytes": b"",
    "an HTML page": b"\xef\xbb\xbf\n <!DOCTYPE html>\n<title>404</title>",
    "an HTML page ": b"<!-- moved --><HTML><body>gone</body></HTML>",
    "a GIF": picture("GIF"),
    "a BMP": picture("BMP"),
    "a TIFF": picture("TIFF"),
    "a JPEG 2000": b"\x00\x00\x00\x0cjP  \r\n\x87\n",
    "an AVIF": iso(b"avif", b"mif1", b"miaf"),
    "an AVIF ": iso(b"mif1", b"avif", b"miaf"),
    "a HEIC": iso(b"heic", b"mif1"),
    "an MP4 video": iso(b"isom", b"iso2", b"mp41"),
    "a PDF": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "a zip archive": zipped(),
    "a tar file": tarred(),
    "gzip-compressed data": gzip.compress(b"x" * 99),
    "bzip2-compressed data": bz2.compress(b"x" * 99),
    "xz-compressed data": lzma.compress(b"x" * 99),
    "an SVG": b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
    "an XML document": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "a NumPy array": npy(),
    "a Git LFS pointer (fetch it: git lfs pull)": LFS,
    "zeros": bytes(4096),
    "a text that starts with 'Not Found'": b"Not Found\n",
    'a text that starts with \'{"error": "größer"}\'': '{"error": "größer"}'.encode(),
}


@pytest.mark.parametrize("kind", NOT_IMAGES)
def test_file_is_named_in_the_error_of_an_image(kind: str) -> None:
    data = NOT_IMAGES[kind]
    assert describe_bytes(data) == kind.strip()
    assert describe_bytes(data[:512]) == kind.strip()
    messages = set()
    for _ in range(2):
        with pytest.raises(BadSample) as error:
            decode_image(data, ImageSettings(size=8), "s.tar: sample 'a'")
        messages.add(str(error.value))
    (message,) = messages
    named = "the file has 0 bytes" if not data else f"it is {kind.strip()}"
    assert message.startswith(f"s.tar: sample 'a': the image cannot be decoded: {named}. Restore")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_image_has_the_decoders_reason(kind: str) -> None:
    data = picture(kind)
    with pytest.raises(BadSample) as error:
        decode_image(data[: len(data) * 2 // 3], ImageSettings(size=8), "a")
    assert "0x" not in str(error.value)
    assert "it is" not in str(error.value)


@pytest.mark.parametrize(
    "data",
    [bytes(range(1, 200)), b"\x80abc\xff" * 20, b"RIFF1234abcd\x00"],
    ids=["bytes", "high", "riff"],
)
def test_unknown_bytes_are_not_guessed(data: bytes) -> None:
    assert describe_bytes(data) is None
    for version in (1, 2):
        with pytest.raises(
            BadSample, match=r"(?i)decoded: not a PNG, JPEG[a-z, ]+WebP file\. Restore"
        ):
            decode_image(data, ImageSettings(size=8, version=version), "a")


@pytest.mark.parametrize("kind", ["0 bytes", "an HTML page", "a PDF", "an MP4 video"])
def test_file_is_named_in_the_error_of_audio(kind: str) -> None:
    with pytest.raises(BadSample) as error:
        decode_audio(NOT_IMAGES[kind], AudioSettings(seconds=0.1), "a")
    assert ("the file has 0 bytes" if kind == "0 bytes" else f"it is {kind}.") in str(error.value)


def test_any_cut_of_a_character_is_still_a_text() -> None:
    for length in range(505, 520):
        data = (b"x" * (length - 3) + "ü".encode() * 9)[:512]
        assert str(describe_bytes(data)).startswith("a text that starts with 'xxx")


@settings(max_examples=50)
@given(st.binary(max_size=600), st.sampled_from(sorted(NOT_IMAGES)))
def test_any_bytes_have_a_short_name_or_none(data: bytes, kind: str) -> None:
    for content in (data, NOT_IMAGES[kind][:20] + data):
        name = describe_bytes(content)
        assert name is None or (0 < len(name) < 200 and "\n" not in name)
