from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from gigabatch.data.augment import Augmentation, augment
from gigabatch.data.image_ops import ImageTransforms, apply_transforms

FIRST_VERSION = {
    "zoom": 0.9, "aspect": 0.9, "rotate": 45, "shear": 20, "shift": 0.3, "flip": 1.0,
    "brightness": 0.5, "contrast": 0.8, "saturation": 1.0, "hue": 120, "noise": 0.3,
}  # fmt: skip
STRONG = FIRST_VERSION | {"crop": 0.1, "grey": 1.0, "blur": 2.0, "erase": 1.0}
ALL_STRONG = Augmentation(**STRONG)


def images(batch: int = 6, channels: int = 3, height: int = 12, width: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    shape = (batch, channels, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def smooth_disc(side: int = 33) -> Tensor:
    """Return a soft bright disc, uint8 [1, 3, side, side]; rotation does not change it."""
    axis = torch.linspace(-1, 1, side)
    radius = (axis[:, None] ** 2 + axis[None] ** 2).sqrt()
    return (255 * torch.exp(-8 * radius**2)).byte().expand(1, 3, side, side).contiguous()


def test_strong_settings_cover_every_field() -> None:
    assert set(STRONG) == set(Augmentation.model_fields)


@pytest.mark.parametrize("channels", [1, 3])
def test_zero_settings_return_the_image(channels: int) -> None:
    data = images(channels=channels)
    assert torch.equal(augment(data, Augmentation(), 7), data.float() / 255)


@pytest.mark.parametrize("field", STRONG)
def test_setting_changes_pixels_as_function_of_key(field: str) -> None:
    settings = Augmentation(**{field: STRONG[field]})
    data = images()
    one = augment(data, settings, 1)
    assert one.dtype == torch.float32
    assert one.shape == data.shape
    assert one.isfinite().all()
    assert not torch.allclose(one, data.float() / 255, atol=0.01)
    assert torch.equal(augment(data, settings, 1), one)
    if field not in ("flip", "grey"):  # at probability 1 they do not depend on the key
        assert not torch.allclose(augment(data, settings, 2), one, atol=0.01)


@pytest.mark.parametrize("field", sorted(set(STRONG) - {"flip", "grey"}))
def test_rows_of_batch_get_different_changes(field: str) -> None:
    copies = images(batch=1).expand(4, -1, -1, -1).contiguous()
    changed = augment(copies, Augmentation(**{field: STRONG[field]}), 1)
    for other in range(1, 4):
        assert not torch.allclose(changed[other], changed[0], atol=0.01)


def test_augment_does_not_use_global_random_state() -> None:
    data = images()
    torch.manual_seed(0)
    np.random.seed(0)
    first = augment(data, ALL_STRONG, 5)
    state = (torch.initial_seed(), torch.rand(1), np.random.rand())
    torch.manual_seed(0)
    np.random.seed(0)
    assert (torch.initial_seed(), torch.rand(1), np.random.rand()) == state
    torch.manual_seed(99)
    assert torch.equal(augment(data, ALL_STRONG, 5), first)


@pytest.mark.parametrize(
    ("more", "pixel", "means"),
    [
        (
            {},
            [0.27967, 0.05917, 0.23442, 0.15525, 0.21344, 1.06283],
            [0.13785, 0.59841, 0.38076, 0.05880, 0.50793, 1.04324],
        ),
        (
            {"crop": 0.1, "grey": 0.5, "blur": 2.0, "erase": 0.8},
            [0.50000, 0.71839, 0.29906, 0.13783, 0.38760, 1.26301],
            [0.24726, 0.64380, 0.38360, 0.07654, 0.48308, 0.90948],
        ),
    ],
)
def test_golden_pixels(more: dict[str, float], pixel: list[float], means: list[float]) -> None:
    """Old runs resume only if later settings leave these values unchanged."""
    changed = augment(images(), Augmentation(**FIRST_VERSION | more), 7)
    torch.testing.assert_close(changed[:, 1, 5, 4], torch.tensor(pixel), atol=1e-4, rtol=0)
    torch.testing.assert_close(changed.mean((1, 2, 3)), torch.tensor(means), atol=1e-4, rtol=0)


def test_large_batch_matches_single_rows() -> None:
    batch = 100  # more rows than one block holds
    generator = torch.Generator().manual_seed(1)
    data = images(batch, 3, 64, 64)
    transforms = ImageTransforms(
        affine=torch.randn(batch, 2, 3, generator=generator),
        blur_kernel=torch.full((batch, 5), 0.2),
        color_matrix=torch.randn(batch, 3, 3, generator=generator),
        color_offset=torch.randn(batch, 1, 1, generator=generator),
        noise=torch.randn(batch, 3, 64, 64, generator=generator),
        erase_box=torch.rand(batch, 4, generator=generator),
    )
    rows = [slice(row, row + 1) for row in range(batch)]
    expected = torch.cat([apply_transforms(data[row], transforms.rows(row)) for row in rows])
    torch.testing.assert_close(apply_transforms(data, transforms), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rng_key", [0, 1, 2**63, 2**64 - 1])
def test_64_bit_keys_give_finite_pixels(rng_key: int) -> None:
    assert augment(images(), ALL_STRONG, rng_key).isfinite().all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(12, 12), (8, 20)])
def test_augment_keeps_shape(channels: int, height: int, width: int) -> None:
    data = images(1, channels, height, width)
    changed = augment(data, ALL_STRONG, 4)
    assert changed.shape == data.shape
    assert changed.isfinite().all()


def test_first_rows_do_not_depend_on_batch_size() -> None:
    # Without noise: its generator draws for the full batch at once.
    settings = ALL_STRONG.model_copy(update={"noise": 0.0})
    data = images(batch=6)
    part = augment(data[:2], settings, 8)
    torch.testing.assert_close(augment(data, settings, 8)[:2], part, atol=1e-5, rtol=0)


@pytest.mark.parametrize("width", [12, 13])
def test_flip_with_probability_one_mirrors_image(width: int) -> None:
    data = images(width=width)
    flipped = augment(data, Augmentation(flip=1.0), 3)
    torch.testing.assert_close(flipped, (data.float() / 255).flip(-1), atol=1e-5, rtol=0)


def test_flip_with_probability_one_third_mirrors_one_third() -> None:
    data = images(batch=1, channels=1, height=8, width=8).expand(3000, -1, -1, -1).contiguous()
    changed = augment(data, Augmentation(flip=1 / 3), 3)
    flipped = (changed - data.flip(-1) / 255).abs().amax((1, 2, 3)) < 1e-4
    unchanged = (changed - data / 255).abs().amax((1, 2, 3)) < 1e-4
    assert (flipped ^ unchanged).all()
    assert abs(flipped.float().mean().item() - 1 / 3) < 5 * (2 / 9 / 3000) ** 0.5


def test_rotation_keeps_centered_disc() -> None:
    disc = smooth_disc()
    for rng_key in range(8):
        turned = augment(disc, Augmentation(rotate=180), rng_key)
        assert (turned - disc / 255).abs().max() < 0.02


def test_quarter_turn_matches_rot90() -> None:
    data = images(batch=1)
    many = augment(data.expand(4000, -1, -1, -1).contiguous(), Augmentation(rotate=180), 1)
    quarter = torch.rot90(data.float() / 255, 1, (-2, -1))
    # One of the many random angles is close to a quarter turn.
    distance = (many - quarter).abs().mean((1, 2, 3))
    assert distance.min() < 0.01
    assert distance.median() > 0.1


def test_zoom_keeps_center_and_scales_disc() -> None:
    disc = smooth_disc()
    axis = torch.linspace(-1, 1, 33)
    for rng_key in range(8):
        zoomed = augment(disc, Augmentation(zoom=0.3), rng_key)[0, 0]
        mass = zoomed.sum()
        assert abs((zoomed.sum(0) * axis).sum() / mass) < 1e-3
        assert abs((zoomed.sum(1) * axis).sum() / mass) < 1e-3
        # The variance of the Gaussian exp(-8 r^2) is 1/16 per axis, times the zoom squared.
        deviation = ((zoomed.sum(0) * axis**2).sum() / mass).sqrt().item() * 4
        assert np.exp(-0.32) < deviation < np.exp(0.32)


def test_shift_moves_by_fraction_of_side() -> None:
    disc = smooth_disc()
    axis = torch.linspace(-0.5, 0.5, 33)
    moved = augment(disc.expand(200, -1, -1, -1).contiguous(), Augmentation(shift=0.1), 1)[:, 0]
    centers = torch.stack([(moved.sum(d) * axis).sum(1) for d in (1, 2)], 1)
    centers = centers / moved.sum((1, 2))[:, None]
    assert centers.abs().max() < 0.105
    assert centers.abs().amax(0).min() > 0.09
    assert centers.mean(0).abs().max() < 0.02


def test_pixels_from_outside_repeat_border() -> None:
    flat = torch.full((4, 3, 12, 12), 200, dtype=torch.uint8)
    geometric = Augmentation(
        rotate=90, shift=0.5, zoom=0.9, shear=60, aspect=0.9, flip=0.5, crop=0.01, blur=3
    )
    torch.testing.assert_close(augment(flat, geometric, 2), flat / 255)


@pytest.mark.parametrize("field", ["hue", "saturation", "grey"])
def test_color_settings_keep_gray_images(field: str) -> None:
    gray = images(channels=1).expand(-1, 3, -1, -1).contiguous()
    changed = augment(gray, Augmentation(**{field: STRONG[field]}), 1)
    torch.testing.assert_close(changed, gray / 255, atol=1e-5, rtol=0)


@pytest.mark.parametrize("field", ["hue", "saturation", "grey"])
def test_color_settings_keep_channel_mean(field: str) -> None:
    data = images()
    changed = augment(data, Augmentation(**{field: STRONG[field]}), 1)
    torch.testing.assert_close(changed.mean(1), (data / 255).mean(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("field", ["hue", "saturation", "grey"])
def test_color_settings_keep_single_channel_images(field: str) -> None:
    data = images(channels=1)
    torch.testing.assert_close(augment(data, Augmentation(**{field: STRONG[field]}), 1), data / 255)


def test_brightness_and_contrast_match_between_one_and_three_channels() -> None:
    data = images(channels=1)
    settings = Augmentation(brightness=0.5, contrast=0.8)
    three = augment(data.expand(-1, 3, -1, -1).contiguous(), settings, 1)
    torch.testing.assert_close(
        augment(data, settings, 1).expand_as(three), three, atol=1e-5, rtol=0
    )


def test_contrast_scales_about_mid_gray_and_brightness_shifts() -> None:
    levels = torch.tensor([0, 51, 204, 255], dtype=torch.uint8).view(1, 1, 2, 2)
    contrast = augment(levels, Augmentation(contrast=0.5), 1).flatten() - 0.5
    gain = contrast / (levels.flatten() / 255 - 0.5)
    torch.testing.assert_close(gain, gain[:1].expand(4))
    assert np.exp(-0.5) <= gain[0] <= np.exp(0.5)
    added = (augment(levels, Augmentation(brightness=0.2), 1) - levels / 255).flatten()
    torch.testing.assert_close(added, added[:1].expand(4))
    assert abs(added[0]) <= 0.2


def crops(count: int, settings: Augmentation) -> tuple[Tensor, Tensor]:
    """Return sides and centers of crops, [count, 2] (x, y) each, as shares of the image."""
    # The values of a ramp in x and one in y show which part of the image was kept.
    ramp = (4 * torch.arange(64)).byte()
    data = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64)])
    data = torch.cat([data, data[:1]]).expand(count, 3, 64, 64).contiguous()
    at = augment(data, settings, 4) * 255 / 4
    low = torch.stack([at[:, 0, 32, 16], at[:, 1, 16, 32]], 1)
    high = torch.stack([at[:, 0, 32, 47], at[:, 1, 47, 32]], 1)
    return (high - low) / 31, ((high + low) / 2 + 0.5) / 64


def test_crop_keeps_minimum_area_and_stays_inside() -> None:
    sides, centers = crops(2000, Augmentation(crop=0.2, aspect=0.5))
    area, stretch = sides.prod(1), (sides[:, 0] / sides[:, 1]).log()
    assert 0.199 < area.min() < 0.21
    assert 0.97 < area.max() < 1.001
    assert abs(area.mean() - 0.6) < 5 * 0.8 / (12 * 2000) ** 0.5
    assert -0.501 < stretch.min() < -0.45
    assert 0.45 < stretch.max() < 0.501
    assert (centers - sides / 2 > -1e-3).all()
    assert (centers + sides / 2 < 1 + 1e-3).all()
    roomy = sides.amax(1) < 0.9
    position = ((centers - sides / 2) / (1 - sides))[roomy]  # 0 to 1 in the free space
    assert position.amin(0).max() < 0.02
    assert position.amax(0).min() > 0.98
    assert (position.mean(0) - 0.5).abs().max() < 5 / (12 * len(position)) ** 0.5


def test_flip_applies_to_cropped_image() -> None:
    data = images(batch=200)
    cropped = augment(data, Augmentation(crop=0.1, aspect=0.3), 6)
    flipped = augment(data, Augmentation(crop=0.1, aspect=0.3, flip=1.0), 6)
    torch.testing.assert_close(flipped, cropped.flip(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("aspect", [0.0, 0.9])
def test_crop_of_full_area_returns_the_image(aspect: float) -> None:
    data = images()
    cropped = augment(data, Augmentation(crop=1.0, aspect=aspect), 3)
    torch.testing.assert_close(cropped, data / 255, atol=1e-4, rtol=0)


def test_grey_with_probability_one_third_grays_one_third() -> None:
    data = images(batch=1, height=8, width=8).expand(3000, -1, -1, -1).contiguous()
    changed = augment(data, Augmentation(grey=1 / 3), 3)
    mean = (data / 255).mean(1, keepdim=True).expand_as(data)
    gray = (changed - mean).abs().amax((1, 2, 3)) < 1e-5
    unchanged = (changed - data / 255).abs().amax((1, 2, 3)) < 1e-5
    assert (gray ^ unchanged).all()
    assert abs(gray.float().mean().item() - 1 / 3) < 5 * (2 / 9 / 3000) ** 0.5


def test_blur_turns_point_into_gaussian() -> None:
    point = torch.zeros(300, 1, 31, 31, dtype=torch.uint8)
    point[:, :, 15, 15] = 255
    blurred = augment(point, Augmentation(blur=2.0), 1)[:, 0].double()
    torch.testing.assert_close(blurred.sum((1, 2)), torch.ones(300).double(), atol=1e-6, rtol=0)
    # Neighbors on the axis differ by exp(1 / (2 sigma^2)); a tiny sigma leaves no neighbor.
    ratio = blurred[:, 15, 15] / blurred[:, 15, 16].clamp(min=1e-300)
    sigma = (1 / (2 * ratio.log())).sqrt()
    assert sigma.max() < 2.001
    assert sigma.max() > 1.95
    assert abs(sigma.mean() - 1) < 5 * 2 / (12 * 300) ** 0.5
    axis = (torch.arange(31) - 15).double()
    line = torch.exp(-(axis**2) / (2 * sigma[:, None] ** 2)) * (axis.abs() <= 6)
    line = line / line.sum(1, keepdim=True)
    torch.testing.assert_close(blurred, line[:, :, None] * line[:, None], atol=1e-5, rtol=0)


def test_tiny_blur_returns_the_image() -> None:
    torch.testing.assert_close(augment(images(), Augmentation(blur=1e-30), 1), images() / 255)


def test_blur_repeats_border() -> None:
    data = images()
    padded = torch.nn.functional.pad(data.float(), (9, 9, 9, 9), mode="replicate").byte()
    settings = Augmentation(blur=3.0)
    torch.testing.assert_close(
        augment(padded, settings, 2)[:, :, 9:-9, 9:-9], augment(data, settings, 2)
    )


def holes(count: int, settings: Augmentation) -> Tensor:
    """Return which pixels of white images were erased, bool [count, 100, 100]."""
    white = torch.full((count, 1, 100, 100), 255, dtype=torch.uint8)
    changed = augment(white, settings, 2)[:, 0]
    assert ((changed == 0.5) | (changed == 1)).all()
    return changed == 0.5


def test_erased_area_is_rectangle_within_limits() -> None:
    hole = holes(1500, Augmentation(erase=1.0))
    lines, columns = hole.any(2), hole.any(1)
    assert torch.equal(hole, lines[:, :, None] & columns[:, None])
    assert ((lines.int().diff(dim=1) != 0).sum(1) <= 2).all()
    assert ((columns.int().diff(dim=1) != 0).sum(1) <= 2).all()
    high, wide = lines.sum(1), columns.sum(1)  # within a pixel of the drawn side
    assert ((high + 1) * (wide + 1) >= 200).all()
    assert ((high - 1) * (wide - 1) <= 3300).all()
    assert abs((high * wide).float().mean() / 1e4 - 0.175) < 5 * 0.31 / (12 * 1500) ** 0.5
    stretch = (wide / high).log()
    assert stretch.abs().max() < np.log(1 / 0.3) + 0.1
    assert stretch.min() < -1.1
    assert stretch.max() > 1.1
    assert lines.any(0).all()  # erased boxes reach every line
    assert columns.any(0).all()


def test_erase_with_probability_one_third_erases_one_third() -> None:
    erased = holes(1500, Augmentation(erase=1 / 3)).any(2).any(1)
    assert abs(erased.float().mean().item() - 1 / 3) < 5 * (2 / 9 / 1500) ** 0.5


def test_erase_applies_after_all_other_changes() -> None:
    changed = augment(images(batch=50), ALL_STRONG, 2)
    erased = (changed == 0.5).all(1).sum((1, 2))
    assert (erased > 0).float().mean() > 0.9  # the smallest boxes may fall between pixels


@pytest.mark.parametrize(
    "settings",
    [{"zoom": -0.1}, {"zoom": 1}, {"flip": 1.5}, {"rotate": 181}, {"zoon": 0.1},
     {"noise": float("nan")}, {"crop": 1.1}, {"grey": 2}, {"blur": -1}, {"blur": 33},
     {"erase": 1.1}],
)  # fmt: skip
def test_invalid_settings_raise_validation_error(settings: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Augmentation(**settings)
