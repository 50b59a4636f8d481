"""The built-in encoders of audio, vectors, sets and sequences."""

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


def mask_of(*counts: int) -> Tensor:
    """Return a mask bool [rows, 5], true for each row's first `count` vectors."""
    return torch.arange(5) < torch.tensor(counts)[:, None]


def test_vector_encoder_standardizes_its_input() -> None:
    baseline = VectorEncoder(3, 8, 2, 0.0, 0.0, 1.0)
    encoder = VectorEncoder(3, 8, 2, 0.0, (1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    encoder.load_state_dict(baseline.state_dict())  # mean and std are not part of the state
    x = torch.randn(7, 3)
    moved = x * torch.tensor([4.0, 5.0, 6.0]) + torch.tensor([1.0, 2.0, 3.0])
    assert encoder(moved).shape == (7, encoder.width) == (7, 8)
    assert encoder(moved).dtype == torch.float32
    torch.testing.assert_close(encoder(moved), baseline(x))


@pytest.mark.parametrize("attend", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_padding_does_not_change_a_set_or_sequence(ordered: bool, attend: bool) -> None:
    encoder = vectors_encoder(ordered=ordered, attend=attend, layers=2)
    x, mask = torch.randn(3, 5, 3), mask_of(1, 3, 5)
    other = torch.where(mask[..., None], x, torch.randn(3, 5, 3) * 100)
    pooled, tokens = encoder(x, mask, tokens=True)
    assert pooled.shape == (3, encoder.width)
    assert tokens.shape == (3, 5, encoder.token_width)
    torch.testing.assert_close(pooled, encoder(other, mask))
    # The other samples of the micro-batch have no effect either.
    torch.testing.assert_close(pooled[1:2], encoder(x[1:2], mask[1:2]))


def test_permuted_vectors_change_a_sequence_but_not_a_set() -> None:
    x, mask = torch.randn(2, 5, 3), mask_of(4, 4)
    permuted = x.clone()
    permuted[:, :4] = x[:, [2, 0, 3, 1]]
    for ordered in (False, True):
        encoder = vectors_encoder(ordered=ordered, attend=True)
        same = torch.allclose(encoder(x, mask), encoder(permuted, mask), atol=1e-5)
        assert same != ordered


@pytest.mark.parametrize("attend", [False, True])
def test_row_without_vectors_has_zero_gradients(attend: bool) -> None:
    """A NaN in the backward pass would remain after multiplication by zero."""
    encoder = vectors_encoder(attend=attend, layers=2, dropout=0.5)
    pooled = encoder(torch.zeros(2, 5, 3), mask_of(0, 2))
    (pooled * 0.0).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in encoder.parameters())


def test_mean_pooling_without_blocks_equals_masked_mean() -> None:
    encoder = vectors_encoder(layers=0)
    pooled, tokens = encoder(torch.randn(2, 5, 3), mask_of(2, 5), tokens=True)
    torch.testing.assert_close(pooled[0], tokens[0, :2].mean(0))
    torch.testing.assert_close(pooled[1], tokens[1].mean(0))


def test_mel_bands_are_non_overlapping_triangles_of_area_one() -> None:
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
def test_log_mel_of_a_tone_peaks_in_its_band(frequency: float) -> None:
    spectrum = LogMel(RATE, 200, 80, 24)
    wave = torch.sin(torch.arange(RATE) * 2 * math.pi * frequency / RATE)
    log_mel = spectrum(wave[None])
    assert log_mel.shape == (1, 24, 101)
    edges = 2595 * math.log10(1 + RATE / 2 / 700) * torch.arange(26) / 25
    mel = 2595 * math.log10(1 + frequency / 700)
    nearest = int((edges[1:-1] - mel).abs().argmin())
    assert abs(int(log_mel[0, :, 50].argmax()) - nearest) <= 1
    assert torch.isfinite(spectrum(torch.zeros(1, RATE))).all()


def test_audio_encoder_ignores_samples_past_the_real_length() -> None:
    encoder = AudioEncoder(LogMel(RATE, 200, 80, 16), 16, (4, 8), (1, 1), 0.0)
    waves = torch.randn(3, RATE // 2)
    pooled = encoder(waves, torch.tensor([RATE // 2, 1000, 0]))
    assert pooled.shape == (3, encoder.width) == (3, 2 * 8 * 4)
    assert torch.isfinite(pooled).all()
    torch.testing.assert_close(pooled[:1], encoder(waves[:1], torch.tensor([RATE // 2])))
    assert not torch.allclose(pooled[1:2], encoder(waves[1:2], torch.tensor([RATE // 2])))


def test_log_mel_with_too_many_bands_raises() -> None:
    with pytest.raises(GigabatchError, match="Set fewer `mels`"):
        LogMel(RATE, 64, 32, 200)
