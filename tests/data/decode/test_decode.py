from __future__ import annotations

import io
import json
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gigabatch.data.decode.images import ImageSettings, decode_image
from gigabatch.data.decode.members import decode_column, decode_number
from gigabatch.data.errors import BadSample, GigabatchError

WHERE = "/data/s.tar: sample 'cat'"
RGB = ImageSettings(size=16, channels=3)
GRAY = ImageSettings(size=16, channels=1)


def picture(width: int = 16, height: int = 16) -> Image.Image:
    """Return a smooth image, which lossy formats change little."""
    y, x = np.mgrid[:height, :width]
    channels = [200 * x / width, 255 * y / height, 128 + 0 * x]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def saved(image: Image.Image, format: str = "png", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(image: Image.Image) -> torch.Tensor:
    array = np.array(image)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("format", "options", "tolerance"),
    [("png", {}, 0), ("webp", {"lossless": True}, 0), ("webp", {"quality": 95}, 12),
     ("jpeg", {"quality": 98, "subsampling": 0}, 4)],
)  # fmt: skip
@pytest.mark.parametrize("settings", [RGB, GRAY])
def test_every_image_format_is_decoded(
    format: str, options: dict[str, Any], tolerance: int, settings: ImageSettings
) -> None:
    decoded = decode_image(saved(picture(), format, **options), settings, WHERE)
    expected = pixels(picture() if settings.channels == 3 else picture().convert("L"))
    assert decoded.dtype == torch.uint8
    assert decoded.shape == (settings.channels, 16, 16)
    assert (decoded.int() - expected.int()).abs().max() <= tolerance


@pytest.mark.parametrize("format", ["png", "jpeg"])
def test_gray_files_decode_to_gray_and_rgb(format: str) -> None:
    data = saved(picture().convert("L"), format, **({"quality": 98} if format == "jpeg" else {}))
    one, three = (decode_image(data, settings, WHERE) for settings in (GRAY, RGB))
    assert (one.int() - pixels(picture().convert("L")).int()).abs().max() <= 4
    assert torch.equal(three, one.expand(3, 16, 16))


def test_16_bit_gray_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    decoded = decode_image(saved(Image.fromarray(ramp)), GRAY, WHERE)
    assert torch.equal(decoded.flatten(), torch.arange(256, dtype=torch.uint8))


@pytest.mark.parametrize("settings", [RGB, GRAY])
def test_transparent_pixels_become_white(settings: ImageSettings) -> None:
    image = picture().convert("RGBA")
    image.putalpha(0)
    assert (decode_image(saved(image), settings, WHERE) == 255).all()
    black = Image.new("RGBA", (16, 16), (0, 0, 0, 128))
    half = decode_image(saved(black), settings, WHERE)
    assert (half.int() - 127).abs().max() <= 1


def test_transparent_gray_and_palette_pixels_become_white() -> None:
    gray = Image.new("LA", (16, 16), (0, 0))
    assert (decode_image(saved(gray), GRAY, WHERE) == 255).all()
    palette = picture().quantize(4)
    expected = pixels(palette.convert("RGB"))
    assert torch.equal(decode_image(saved(palette), RGB, WHERE), expected)
    clear = decode_image(saved(palette, transparency=0), RGB, WHERE)
    hole = torch.from_numpy(np.array(palette) == 0)
    assert (clear[:, hole] == 255).all()
    assert torch.equal(clear[:, ~hole], expected[:, ~hole])


def test_black_and_white_and_cmyk_files_are_decoded() -> None:
    bits = picture().convert("1")
    assert torch.equal(decode_image(saved(bits), GRAY, WHERE), pixels(bits.convert("L")))
    cmyk = decode_image(saved(picture().convert("CMYK"), "jpeg", quality=98), RGB, WHERE)
    assert (cmyk.int() - pixels(picture()).int()).abs().max() <= 8


@pytest.mark.parametrize(("width", "height"), [(96, 32), (32, 96), (40, 33), (7, 90), (16, 17)])
def test_short_side_is_resized_and_center_cropped(width: int, height: int) -> None:
    left, top = (width - min(width, height)) // 2, (height - min(width, height)) // 2
    side = min(width, height)
    center = picture(width, height).crop((left, top, left + side, top + side))
    expected = pixels(center.resize((16, 16), Image.Resampling.BICUBIC))
    decoded = decode_image(saved(picture(width, height)), RGB, WHERE)
    assert decoded.shape == (3, 16, 16)
    # Rounding the long side moves the sampling grid by less than a pixel.
    assert (decoded.int() - expected.int()).abs().max() <= 255 // side + 12


def test_crop_keeps_band_in_the_middle() -> None:
    array = np.zeros((20, 60, 3), np.uint8)
    array[:, 20:40] = 255
    decoded = decode_image(saved(Image.fromarray(array)), RGB, WHERE)
    assert decoded[:, :, 1:-1].min() > 200


def test_small_images_are_enlarged() -> None:
    decoded = decode_image(saved(Image.new("RGB", (3, 5), (10, 20, 30))), RGB, WHERE)
    assert torch.equal(decoded, torch.tensor([10, 20, 30]).byte().view(3, 1, 1).expand(3, 16, 16))


def test_large_jpeg_decoded_at_reduced_scale_matches_png() -> None:
    large = picture(400, 300)
    exact = decode_image(saved(large), RGB, WHERE)
    reduced = decode_image(saved(large, "jpeg", quality=98), RGB, WHERE)
    assert (exact.int() - reduced.int()).abs().max() <= 8


def assert_decode_fails(data: bytes) -> None:
    """Check that decoding raises an error that names the sample."""
    with pytest.raises(GigabatchError) as error:
        decode_image(data, RGB, WHERE)
    assert str(error.value).startswith(WHERE)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_truncated_image_raises_with_sample_name(format: str) -> None:
    data = saved(picture(64, 64), format)
    for length in (0, 1, 10, len(data) // 2):
        assert_decode_fails(data[:length])


@pytest.mark.parametrize("data", [b"", b"not an image", saved(picture(), "gif"), bytes(5000)])
def test_bytes_that_are_not_an_image_raise(data: bytes) -> None:
    assert_decode_fails(data)


def outcome(data: bytes) -> str:
    """Return the shape of the decoded image, or the error."""
    try:
        return str(tuple(decode_image(data, RGB, WHERE).shape))
    except GigabatchError as error:
        return str(error)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255))))
def test_damage_gives_an_image_or_a_clear_error(
    format: str, changes: list[tuple[float, int]]
) -> None:
    data = bytearray(saved(picture(24, 24), format))
    for share, byte in changes:
        data[int(share * len(data))] = byte
    result = outcome(bytes(data))
    assert result == "(3, 16, 16)" or result.startswith(WHERE)


def test_decompression_bomb_raises() -> None:
    side = int((2 * Image.MAX_IMAGE_PIXELS) ** 0.5) + 1  # type: ignore[operator]
    data = bytearray(saved(Image.new("1", (1, 1))))
    header = struct.pack(">II", side, side) + bytes(data[24:29])
    data[16:29] = header
    data[29:33] = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    assert_decode_fails(bytes(data))


def code(value: Any) -> int:
    """Return the code of a json field with this value."""
    return decode_column(json.dumps({"x": value}).encode(), "x", WHERE)


@pytest.mark.parametrize("value", [0, 7, -3, (1 << 62) - 1])
def test_code_of_integer_is_the_integer(value: int) -> None:
    assert code(value) == value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("cat", 9026725330962869788),
        (True, 1580298009474638112),
        (1.5, 2435442527620025879),
        (1 << 70, 5628928359691720868),
    ],
)
def test_other_values_have_a_stable_63_bit_code(value: Any, expected: int) -> None:
    assert code(value) == expected
    assert 0 <= expected < 1 << 63


def test_equal_values_share_a_code_and_others_do_not() -> None:
    assert code({"a": 1, "b": 2}) == code({"b": 2, "a": 1})
    assert code(1) == code(1.0)
    codes = [code(v) for v in ("1", 1, True, 1.5, [1], "cat", "Cat", "null")]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        *((data, "its json member has no 'x'") for data in (b'{"y": 1}', b'{"x": null}', b"[1]")),
        *((data, "the json member cannot be read") for data in (b"{", b"", b"\xff")),
    ],
)
def test_missing_field_or_invalid_json_raises_with_sample_name(data: bytes, message: str) -> None:
    with pytest.raises(BadSample) as error:
        decode_column(data, "x", WHERE)
    assert str(error.value).startswith(f"{WHERE}: {message}")


def test_image_that_makes_pillow_assert_raises_bad_sample() -> None:
    palette = saved(picture().quantize(4))
    at = palette.index(b"PLTE")
    without_palette = (
        palette[: at - 4] + palette[at + 8 + int.from_bytes(palette[at - 4 : at], "big") :]
    )
    with pytest.raises(BadSample, match=f"{WHERE}: the image cannot be decoded"):
        decode_image(without_palette, RGB, WHERE)


def test_narrow_image_uses_little_memory() -> None:
    data = saved(Image.new("RGB", (1, 60_000), (10, 20, 30)))
    tracemalloc.start()
    decoded = decode_image(data, ImageSettings(size=224), WHERE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert decoded[:, 0, 0].tolist() == [10, 20, 30]
    assert decoded.shape == (3, 224, 224)
    assert peak < 4 << 20  # resized in full it would take 9 GB


@pytest.mark.parametrize("value", [3, -0.25, 1e38])
def test_decode_number_returns_the_number(value: float) -> None:
    assert decode_number(json.dumps({"x": value}).encode(), "x", WHERE) == value


@pytest.mark.parametrize("member", [
    b'{"x": "3"}', b'{"x": true}', b'{"x": null}', b'{"x": NaN}', b'{"x": 1e999}', b"{}", b"[1]",
    b"not json", b'{"x": 1e39}', b'{"x": 1%s}' % (b"0" * 400),
])  # fmt: skip
def test_value_that_is_not_a_number_raises_bad_sample(member: bytes) -> None:
    with pytest.raises(BadSample, match=WHERE):
        decode_number(member, "x", WHERE)
