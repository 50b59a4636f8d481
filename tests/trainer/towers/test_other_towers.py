"""The built-in encoders of vectors, sets, sequences and sound."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.towers.audio import AudioEncoder, LogMel, mel_bands
from gigabatch.trainer.towers.vectors import VectorEncoder, VectorsEncoder

RATE = 8000


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def vectors_encoder(**changed: Any) -> VectorsEncoder:
    settings: dict[str, Any] = {
        "size": 3, "length": 5, "width": 8, "layers": 1, "heads": 2, "ordered": False,
        "attend": False, "dropout": 0.0, "mean": 0.0, "std": 1.0,
    }  # fmt: skip
    return VectorsEncoder(**settings | changed)


def masked(*counts: int) -> Tensor:
    return torch.arange(5) < torch.tensor(counts)[:, None]


def test_a_vector_is_standardised() -> None:
    plain = VectorEncoder(3, 8, 2, 0.0, 0.0, 1.0)
    ours = VectorEncoder(3, 8, 2, 0.0, (1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    ours.load_state_dict(plain.state_dict())  # the config's numbers are no weights
    x = torch.randn(7, 3)
    moved = x * torch.tensor([4.0, 5.0, 6.0]) + torch.tensor([1.0, 2.0, 3.0])
    assert ours(moved).shape == (7, ours.width) == (7, 8)
    assert ours(moved).dtype == torch.float32
    torch.testing.assert_close(ours(moved), plain(x))


@pytest.mark.parametrize("attend", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_what_pads_a_set_is_not_seen(ordered: bool, attend: bool) -> None:
    encoder = vectors_encoder(ordered=ordered, attend=attend, layers=2)
    x, mask = torch.randn(3, 5, 3), masked(1, 3, 5)
    other = torch.where(mask[..., None], x, torch.randn(3, 5, 3) * 100)
    pooled, tokens = encoder(x, mask, tokens=True)
    assert pooled.shape == (3, encoder.width)
    assert tokens.shape == (3, 5, encoder.token_width)
    torch.testing.assert_close(pooled, encoder(other, mask))
    # A sample's embedding does not depend on its micro-batch.
    torch.testing.assert_close(pooled[1:2], encoder(x[1:2], mask[1:2]))


def test_only_a_sequence_has_an_order() -> None:
    x, mask = torch.randn(2, 5, 3), masked(4, 4)
    turned = x.clone()
    turned[:, :4] = x[:, [2, 0, 3, 1]]
    for ordered in (False, True):
        encoder = vectors_encoder(ordered=ordered, attend=True)
        same = torch.allclose(encoder(x, mask), encoder(turned, mask), atol=1e-5)
        assert same != ordered


@pytest.mark.parametrize("attend", [False, True])
def test_a_row_without_vectors_has_finite_gradients(attend: bool) -> None:
    """Times zero, a NaN would still be one."""
    encoder = vectors_encoder(attend=attend, layers=2, dropout=0.5)
    pooled = encoder(torch.zeros(2, 5, 3), masked(0, 2))
    (pooled * 0.0).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in encoder.parameters())


def test_mean_pooling_without_blocks_is_a_masked_mean() -> None:
    encoder = vectors_encoder(layers=0)
    pooled, tokens = encoder(torch.randn(2, 5, 3), masked(2, 5), tokens=True)
    torch.testing.assert_close(pooled[0], tokens[0, :2].mean(0))
    torch.testing.assert_close(pooled[1], tokens[1].mean(0))


def test_mel_bands_are_triangles_of_equal_area() -> None:
    bands = mel_bands(RATE, 1024, 20).double().numpy()
    assert bands.shape == (20, 513)
    np.testing.assert_allclose(bands.sum(1) * RATE / 1024, 1.0, rtol=0.05)
    peaks = bands.argmax(1) * RATE / 1024
    mels = 2595 * np.log10(1 + peaks / 700)
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    assert np.abs(mels - top * np.arange(1, 21) / 21).max() < 12
    for low, high in zip(bands[:-2], bands[2:], strict=True):
        assert not (low * high).any()


@pytest.mark.parametrize("frequency", [300.0, 1000.0, 3000.0])
def test_a_tone_is_loudest_in_its_band(frequency: float) -> None:
    spectrum = LogMel(RATE, 200, 80, 24)
    wave = torch.sin(torch.arange(RATE) * 2 * math.pi * frequency / RATE)
    found = spectrum(wave[None])
    assert found.shape == (1, 24, 101)
    edges = 2595 * math.log10(1 + RATE / 2 / 700) * torch.arange(26) / 25
    own = 2595 * math.log10(1 + frequency / 700)
    near = int((edges[1:-1] - own).abs().argmin())
    assert abs(int(found[0, :, 50].argmax()) - near) <= 1
    silent = spectrum(torch.zeros(1, RATE))
    assert torch.isfinite(silent).all()


def test_silence_after_the_end_is_not_pooled() -> None:
    encoder = AudioEncoder(LogMel(RATE, 200, 80, 16), 16, (4, 8), (1, 1), 0.0)
    waves = torch.randn(3, RATE // 2)
    found = encoder(waves, torch.tensor([RATE // 2, 1000, 0]))
    assert found.shape == (3, encoder.width) == (3, 2 * 8 * 4)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[:1], encoder(waves[:1], torch.tensor([RATE // 2])))
    assert not torch.allclose(found[1:2], encoder(waves[1:2], torch.tensor([RATE // 2])))


def test_too_many_bands_are_refused() -> None:
    with pytest.raises(GigabatchError, match="Set fewer `mels`"):
        LogMel(RATE, 64, 32, 200)
