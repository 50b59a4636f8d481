"""Pixels of images: equal to torchvision's and Hugging Face's, pinned for old runs, bounded."""

from __future__ import annotations

import hashlib
import io
import json
import resource
import struct
import time
import warnings
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from pydantic import ValidationError

from gigabatch.data.decode.images import ImageSettings, decode_image, normalize
from gigabatch.data.errors import BadSample

REFERENCES = np.load(Path(__file__).with_name("pixel_references.npz"))
ENDS = np.cumsum([0, *REFERENCES["lengths"]]).tolist()
FILES = {
    str(name): REFERENCES["files"][begin:end].tobytes()
    for name, (begin, end) in zip(REFERENCES["names"], pairwise(ENDS), strict=True)
}
OLD_DIGESTS = json.loads(Path(__file__).with_name("pixel_digests_v1.json").read_text())
EXACT = ImageSettings(size=20, draft=False)
WHERE = "s.tar: sample 'cat'"


def decoded(data: bytes, settings: ImageSettings) -> np.ndarray[Any, Any]:
    """Return int64 [S, S, C]."""
    return decode_image(data, settings, WHERE).permute(1, 2, 0).numpy().astype(int)


def saved(image: Image.Image, format: str = "png", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("reference", "changes"),
    [
        ("torchvision", {}),
        ("huggingface", {"crop": "huggingface"}),
        ("bilinear", {"interpolation": "bilinear"}),
        ("lanczos", {"interpolation": "lanczos"}),
        ("nearest", {"interpolation": "nearest"}),
        ("pad", {"resize": "pad"}),
        ("squash", {"resize": "squash"}),
        ("squash bilinear", {"resize": "squash", "interpolation": "bilinear"}),
    ],
)
def test_pixels_equal_those_of_other_libraries(reference: str, changes: dict[str, str]) -> None:
    settings = EXACT.model_copy(update=changes)
    expected = REFERENCES[reference].astype(int)
    assert len(expected) == (50 if reference in ("torchvision", "huggingface") else 13)
    differences = {
        name: int(abs(decoded(data, settings) - pixels).max())
        for (name, data), pixels in zip(FILES.items(), expected, strict=False)
    }
    assert {name: most for name, most in differences.items() if most > 1} == {}


@pytest.mark.parametrize("size", [(61, 97), (97, 61), (64, 97), (97, 64), (500, 375), (375, 500)])
@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P"])
def test_noise_is_resized_whole_and_cropped(size: tuple[int, int], mode: str) -> None:
    """Pillow's two passes round in between, in an order that depends on the shape."""
    noise = np.random.default_rng(0).integers(0, 2, (*size[::-1], 3), np.uint8) * 255
    image = Image.fromarray(noise).convert(mode)
    data = saved(image, transparency=0) if mode == "P" else saved(image)
    if mode == "P":
        image = Image.open(io.BytesIO(data)).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", size, "white"), image)
    side = 32
    width, height = (int(side * length / min(size)) for length in size)
    whole = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    expected = np.asarray(whole.crop((left, top, left + side, top + side)), np.int64)
    assert (decoded(data, ImageSettings(size=side, draft=False)) == expected).all()


def test_references_tell_crops_apart() -> None:
    one, other = REFERENCES["torchvision"], REFERENCES["huggingface"]
    assert sum((one != other).any((1, 2, 3))) >= 5


def test_pixels_of_version_1_have_the_digests_of_old_runs() -> None:
    digests = {
        name: [
            hashlib.sha256(
                decode_image(data, ImageSettings(size=size, channels=channels, version=1), WHERE)
                .permute(1, 2, 0).contiguous().numpy().tobytes()
            ).hexdigest()[:16]
            for size, channels in ((20, 3), (20, 1), (64, 3))
        ]
        for name, data in FILES.items()
    }  # fmt: skip
    assert digests == OLD_DIGESTS


CORNERS = np.zeros((90, 120, 3), np.uint8)  # red, green / blue, black
CORNERS[:45, :60, 0] = CORNERS[:45, 60:, 1] = CORNERS[45:, :60, 2] = 250
EXIF_ORDER = {1: "rgbk", 2: "grkb", 3: "kbgr", 4: "bkrg", 5: "rbgk", 6: "brkg", 7: "kgbr",
              8: "gkrb"}  # fmt: skip
"""Orientation -> colors of the corners as a viewer shows them: top left, top right, bottom ..."""


def corners(pixels: np.ndarray[Any, Any]) -> str:
    side = len(pixels)
    first, last = side // 8, side - 1 - side // 8
    points = [pixels[y, x] for y in (first, last) for x in (first, last)]
    return "".join("rgb"[int(p.argmax())] if p.max() > 120 else "k" for p in points)


def exif(value: Any) -> bytes:
    data = Image.Exif()
    data[ExifTags.Base.Orientation] = value
    return data.tobytes()


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("resize", ["shortest", "squash", "pad"])
def test_every_orientation_is_shown_upright(format: str, resize: Any) -> None:
    settings = ImageSettings(size=16, resize=resize, fill=255)  # with draft: 120 x 90 is reduced
    picture = Image.fromarray(CORNERS)
    for value, order in EXIF_ORDER.items():
        data = saved(picture, format, exif=exif(value))
        if resize != "pad":
            assert corners(decoded(data, settings)) == order, value
        old = decoded(data, ImageSettings(size=16, version=1))
        assert corners(old) == "rgbk", value


@pytest.mark.parametrize(
    "options",
    [
        {"exif": exif(9)},
        {"exif": exif(0)},
        {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x09damaged"},
        {"exif": b"Exif\0\0not a TIFF header"},
        {"xmp": b"<x tiff:Orientation='upside down'>"},
    ],
)
def test_invalid_orientation_leaves_image_as_stored(options: dict[str, bytes]) -> None:
    data = saved(Image.fromarray(CORNERS), "jpeg", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's "Corrupt EXIF data"
        assert corners(decoded(data, EXACT)) == "rgbk"


def test_orientation_of_xmp_is_applied() -> None:
    data = saved(Image.fromarray(CORNERS), "jpeg", xmp=b'<x tiff:Orientation="6">')
    assert corners(decoded(data, EXACT)) == EXIF_ORDER[6]


def test_padding_is_centered_and_has_the_fill_color() -> None:
    wide = saved(Image.new("RGB", (40, 10), (10, 20, 30)))
    settings = ImageSettings(size=16, resize="pad", fill=(1, 2, 3))
    pixels = decoded(wide, settings)
    assert (pixels[[*range(6), *range(10, 16)]] == (1, 2, 3)).all()
    assert (pixels[6:10] == (10, 20, 30)).all()
    gray = decoded(wide, ImageSettings(size=16, resize="pad", channels=1, fill=7))
    assert gray[0, 0].tolist() == [7]


@pytest.mark.parametrize("resize", ["shortest", "squash", "pad"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_draft_changes_pixels_little_and_false_not_at_all(resize: Any, orientation: int) -> None:
    y, x = np.mgrid[:301, :401]  # at 1/8, the last column covers an eighth of a pixel
    smooth = np.stack([x * 255 // 401, y * 255 // 301, (x + y) // 3], -1).astype(np.uint8)
    data = saved(Image.fromarray(smooth), "jpeg", quality=98, exif=exif(orientation))
    full = saved(Image.open(io.BytesIO(data)), exif=exif(orientation))
    settings = ImageSettings(size=32, resize=resize)
    exact_settings = settings.model_copy(update={"draft": False})
    exact = decoded(full, exact_settings)
    assert (decoded(data, exact_settings) == exact).all()
    difference = abs(decoded(data, settings) - exact).max(-1)
    assert difference.any()
    assert difference.max() <= 3


def with_size(data: bytes, width: int, height: int) -> bytes:
    """Return a PNG, JPEG or WebP file whose header states another size."""
    if data.startswith(b"\x89PNG"):
        header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
        return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    at = max(data.find(b"\xff\xc0\0"), data.find(b"\xff\xc2\0"))
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


FOUR = Image.new("RGBA", (8, 8))
COLOR = Image.new("RGB", (8, 8))
GRAY_16 = Image.fromarray(np.zeros((8, 8), np.uint16))
BOMBS = {
    "RGBA": (saved(FOUR), 13_000, 13_000, True),
    "gray": (saved(COLOR.convert("L")), 30_000, 30_000, True),
    "bits": (saved(COLOR.convert("1")), 65_000, 65_000, True),
    "16 bits": (saved(GRAY_16), 9_000, 9_000, True),
    "palette": (saved(COLOR.quantize(2), transparency=0), 15_000, 15_000, True),
    "JPEG at full scale": (saved(COLOR, "jpeg"), 30_000, 30_000, False),
    "CMYK": (saved(COLOR.convert("CMYK"), "jpeg"), 9_000, 9_000, False),
    "progressive JPEG": (saved(COLOR, "jpeg", progressive=True), 30_000, 30_000, True),
}


@pytest.mark.parametrize("name", BOMBS)
def test_decompression_bomb_is_refused_from_its_header(name: str) -> None:
    small, width, height, draft = BOMBS[name]
    data = with_size(small, width, height)
    begin, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadSample) as error:
        decode_image(data, ImageSettings(size=16, draft=draft), WHERE)
    assert time.monotonic() - begin < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100 << 10  # KiB
    message = str(error.value)
    assert message.startswith(f"{WHERE}: the image is too large: {width} x {height} pixels")
    assert "data.image.max_decoded_mib=512" in message


@pytest.mark.parametrize(
    ("image", "options", "bytes_per_pixel"),
    [
        (COLOR.convert("L"), {"format": "png"}, 5),
        (COLOR, {"format": "png"}, 4),
        (FOUR, {"format": "png"}, 8),
        (COLOR.quantize(2), {"format": "png", "transparency": 0}, 5),
        (GRAY_16, {"format": "png"}, 7),
        (COLOR.convert("CMYK"), {"format": "jpeg"}, 8),
        (COLOR, {"format": "webp"}, 16),
        (COLOR, {"format": "jpeg", "progressive": True, "subsampling": 0}, 10),
        (COLOR, {"format": "jpeg", "exif": exif(6)}, 8),
    ],
)
def test_bound_counts_the_copies_of_a_conversion(
    image: Image.Image, options: dict[str, Any], bytes_per_pixel: int
) -> None:
    data = saved(image.resize((256, 256)), **options)
    mib = bytes_per_pixel * 256 * 256 / (1 << 20)
    decode_image(data, ImageSettings(size=16, draft=False, max_decoded_mib=mib), WHERE)
    with pytest.raises(BadSample, match="256 x 256 pixels"):
        decode_image(data, ImageSettings(size=16, draft=False, max_decoded_mib=mib * 0.99), WHERE)


def test_bound_holds_at_the_reduced_scale_of_a_jpeg() -> None:
    data = saved(COLOR.resize((512, 512)), "jpeg")
    tight = ImageSettings(size=16, max_decoded_mib=0.1)
    decode_image(data, tight, WHERE)
    with pytest.raises(BadSample, match="too large"):
        decode_image(data, tight.model_copy(update={"draft": False}), WHERE)


def test_limit_of_pillow_does_not_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for format in ("png", "jpeg"):
            data = saved(Image.fromarray(CORNERS), format)
            decode_image(data, ImageSettings(size=16), WHERE)
    with pytest.raises(BadSample, match=r"too large: over 20 pixels \(WebP\)"):
        decode_image(saved(Image.fromarray(CORNERS), "webp"), ImageSettings(size=16), WHERE)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "lanczos"])
@pytest.mark.parametrize("resize", ["shortest", "pad"])
def test_narrow_image_takes_little_memory(interpolation: Any, resize: Any) -> None:
    data = saved(Image.new("RGB", (1, 60_000), (10, 20, 30)))
    settings = ImageSettings(size=224, interpolation=interpolation, resize=resize)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert decoded(data, settings)[112, 111].tolist() == [10, 20, 30]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100 << 10  # KiB


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": [0.5, 0.5]}, "data.image.mean: 2 numbers for 3 channels"),
        ({"std": [1, 0, 1]}, "data.image.std: must be above 0"),
        ({"std": 0}, "data.image.std: must be above 0"),
        ({"channels": 1, "std": [1, 1, 1]}, "data.image.std: 3 numbers for 1 channels"),
        ({"fill": 256}, "data.image.fill: must be from 0 to 255"),
        ({"version": 1, "crop": "huggingface"}, "crop: has no effect with data.image.version=1"),
        ({"version": 1, "resize": "pad"}, "resize: has no effect with data.image.version=1"),
        ({"version": 1, "max_decoded_mib": 9}, "max_decoded_mib: has no effect with"),
    ],
)
def test_values_that_do_not_fit_raise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ImageSettings.model_validate(changes)


def test_normalization_of_one_number_keeps_its_bits_and_a_list_is_per_channel() -> None:
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    one = ImageSettings(size=8, mean=0.481, std=0.268)
    assert torch.equal(normalize(pixels, one), (pixels - 0.481) / 0.268)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    result = normalize(pixels, ImageSettings(size=8, mean=mean, std=std))
    for channel in range(3):
        expected = (pixels[:, channel].double() - mean[channel]) / std[channel]
        torch.testing.assert_close(result[:, channel].double(), expected, rtol=1e-5, atol=1e-6)
