"""Hostile inputs: random contents of members, json of all shapes, and configs; seeded."""

from __future__ import annotations

import io
import random
import struct
import wave
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

NAMES = ("caption", "captions", "a", "id", "label", "vector", "", "ä", "a.b", "0", "__key__")
TEXTS = ("", " ", "a red square", "\x00", "\ud800", "\u202e\u0000", "ﷺ" * 50, "nan", "null", "-0",
         "\n", "\ufeff", "😀" * 30, "1e999", "a" * 5000)  # fmt: skip
NUMBERS = ("0", "-0", "7", "7.0", "1e400", "-1e-400", "9" * 401, "9" * 5000, "-" + "9" * 30, "NaN",
           "Infinity", "-Infinity", "9007199254740993", "0.1", "1E5", "4611686018427387904",
           "01", "+1", "0x10", "1_000")  # fmt: skip


def json_text(rng: random.Random, depth: int = 0) -> str:
    """Return a json value, or nearly one."""
    kind = rng.randrange(12)
    if kind < 3 and depth < 5:
        items = [json_text(rng, depth + 1) for _ in range(rng.randrange(5))]
        return f"[{', '.join(items)}]"
    if kind < 7 and depth < 5:
        pairs = [f"{quoted(rng.choice(NAMES))}: {json_text(rng, depth + 1)}"
                 for _ in range(rng.randrange(6))]  # fmt: skip
        return f"{{{', '.join(pairs)}}}"
    if kind == 7:
        return quoted(rng.choice(TEXTS))
    if kind == 8:
        return rng.choice(NUMBERS)
    if kind == 9:
        levels = rng.choice([10, 1000, 100_000])
        opening, closing = rng.choice([("[", "]"), ('{"a":', "}")])
        return opening * levels + "1" + closing * rng.choice([levels, 0])
    return rng.choice(["null", "true", "false", '"a text"', "[]", "{}", '[""]', "[null]", ""])


def quoted(text: str) -> str:
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\x00": "\\u0000", "\ud800": "\\ud800"}
    return '"' + "".join(escapes.get(c, c) for c in text) + '"'


def json_bytes(rng: random.Random) -> bytes:
    text = json_text(rng) if rng.random() < 0.5 else record_text(rng)
    encoded = text.encode(rng.choice(["utf-8"] * 6 + ["utf-16", "utf-32", "utf-7"]), "replace")
    return mutated(rng, encoded) if rng.random() < 0.2 else encoded


def record_text(rng: random.Random) -> str:
    """Return a json object with the fields that are read, most of them ordinary."""
    ordinary = {
        "caption": rng.choice(['"a text"', '["one", "two"]', '{"a": "inner"}']),
        "id": rng.choice(["7", '"x1"', "true", "7.5"]),
        "label": rng.choice(["3", "0.25"]),
        "a": '{"b": "deep"}',
        "0": '"zero"',
    }
    pairs = [
        f'"{name}": {value if rng.random() < 0.85 else json_text(rng, 2)}'
        for name, value in ordinary.items()
    ]
    return "{" + ", ".join(pairs) + "}"


def text_bytes(rng: random.Random) -> bytes:
    text = rng.choice(TEXTS) + rng.choice(TEXTS)
    encoding = rng.choice(["utf-8", "utf-16", "latin-1", "cp1252"])
    encoded = text.encode(encoding, "replace")
    return mutated(rng, encoded) if rng.random() < 0.3 else encoded


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Return data with some bytes changed, removed, repeated or cut off."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(6):
            case 0 if out:
                out[min(at, len(out) - 1)] ^= 1 << rng.randrange(8)
            case 1:
                out[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 2:
                del out[at : at + rng.randrange(1, 50)]
            case 3:
                del out[at:]
            case 4:
                out[at:at] = out[at : at + rng.randrange(1, 200)]
            case _:
                extreme = rng.choice(
                    [b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(4), b"\x00\x00\xea\x60"]
                )
                out[at : at + 4] = extreme
    return bytes(out)


def base_images() -> list[bytes]:
    """Return small valid images of several formats and modes."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 4), dtype=np.uint8)
    rgba = Image.fromarray(pixels)
    made: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (rgba, "PNG", {}),
        (rgba.convert("RGB"), "PNG", {"transparency": (1, 2, 3)}),
        (rgba.convert("P"), "PNG", {"transparency": 0}),
        (rgba.convert("1"), "PNG", {}),
        (rgba.convert("LA"), "PNG", {}),
        (Image.fromarray(pixels[..., 0].astype(np.uint16) * 200), "PNG", {}),
        (rgba.convert("RGB"), "JPEG", {}),
        (rgba.convert("CMYK"), "JPEG", {}),
        (rgba.convert("L"), "JPEG", {"progressive": True}),
        (rgba, "WEBP", {"lossless": True}),
        (rgba.convert("RGB"), "WEBP", {}),
        (rgba.convert("P"), "GIF", {}),
        (rgba.convert("RGB"), "TIFF", {}),
        (rgba.convert("RGB"), "BMP", {}),
    ]
    exif = Image.Exif()
    exif[0x0112] = 6
    made.append((rgba.convert("RGB"), "JPEG", {"exif": exif}))
    return [encoded(*image) for image in made]


def encoded(image: Image.Image, kind: str, options: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def image_bytes(rng: random.Random, bases: list[bytes]) -> bytes:
    kind = rng.randrange(10)
    if kind == 0:
        return rng.randbytes(rng.choice([0, 1, 8, 100]))
    if kind == 1:
        return rng.choice([b"<!DOCTYPE html><html>", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"RIFF",
                           b"\xff\xd8\xff\xe0", b"\x00\x00\x00\x20ftypavif"])  # fmt: skip
    if kind == 2:
        return claimed_png(rng)
    return mutated(rng, rng.choice(bases))


def claimed_png(rng: random.Random) -> bytes:
    """Return a PNG with a valid header and any claimed size, depth and color type."""
    side = [1, 8, 100, 2000, 60_000, 1 << 31, 0, 0xFFFFFFFF]
    header = struct.pack(
        ">IIBBBBB", rng.choice(side), rng.choice(side), rng.choice([1, 2, 4, 8, 16, 3, 0]),
        rng.choice([0, 2, 3, 4, 6, 1]), 0, 0, rng.choice([0, 1]),
    )  # fmt: skip
    chunks = [(b"IHDR", header)]
    if rng.random() < 0.5:
        chunks.append((b"PLTE", rng.randbytes(rng.choice([3, 9, 10]))))
    if rng.random() < 0.5:
        chunks.append((b"tRNS", rng.randbytes(rng.choice([0, 1, 2, 6, 256]))))
    if rng.random() < 0.3:
        chunks.append((b"eXIf", b"II*\0" + rng.randbytes(30)))
    chunks.append((b"IDAT", zlib.compress(bytes(rng.choice([0, 100, 100_000])))))
    out = b"\x89PNG\r\n\x1a\n"
    for name, content in chunks:
        crc = zlib.crc32(name + content)
        out += struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)
    return out


def array_bytes(rng: random.Random) -> bytes:
    """Return a .npy file, or nearly one."""
    if rng.random() < 0.4:
        return npy_with_header(rng)
    makers: list[Callable[[], Any]] = [
        lambda: np.ones(8, np.float32), lambda: np.ones((3, 8), ">f8"), lambda: np.float32(1),
        lambda: np.full(8, np.nan), lambda: np.ones((0, 8), np.float16),
        lambda: np.array(["a", "b"]), lambda: np.ones(8, np.complex64),
        lambda: np.zeros(3, "datetime64[s]"), lambda: np.zeros(3, [("x", "f4"), ("y", "i4")]),
        lambda: np.full(8, 1e300), lambda: np.ones(8, bool), lambda: np.ones((8, 3)).T,
    ]  # fmt: skip
    file = io.BytesIO()
    array = rng.choice(makers)()
    (np.savez if rng.random() < 0.15 else np.save)(file, array)
    return mutated(rng, file.getvalue()) if rng.random() < 0.5 else file.getvalue()


def npy_with_header(rng: random.Random) -> bytes:
    """Return a .npy file whose header claims anything."""
    shape = rng.choice(
        ["(8,)", "(1000000000000,)", "(-1,)", "()", "(8", "(99999, 99999)", "8", "(8.0,)"]
    )
    dtype = rng.choice(["'<f4'", "'|O'", "'<U1000000'", "'f9'", "[('a', '<f4')]", "None", "'>i8'"])
    order = rng.choice(["False", "1", "x"])
    text = f"{{'descr': {dtype}, 'fortran_order': {order}, 'shape': {shape}}}"
    if rng.random() < 0.1:
        text = "(" * rng.choice([10, 5000]) + text
    header = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) & 0xFFFF) + header + bytes(32)


def wav_bytes(rng: random.Random) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        layout = rng.choice([1, 2, 6]), rng.choice([1, 2, 3, 4]), rng.choice([1, 8000, 44100])
        out.setparams((*layout, 0, "NONE", ""))
        out.writeframes(rng.randbytes(rng.choice([0, 12, 480])))
    return mutated(rng, file.getvalue()) if rng.random() < 0.7 else file.getvalue()
