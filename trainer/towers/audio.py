"""Tower kind `audio`: a log-mel spectrogram, then a small convolutional network."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from gigabatch.data.decode.audio import AudioSettings
from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.fields import Count, Fraction
from gigabatch.trainer.towers.base import StageSettings, TowerInput, TowerKind, tower_kind
from gigabatch.trainer.towers.conv import residual_stages


@tower_kind("more")
class AudioTower(TowerKind, AudioSettings, StageSettings):
    """A small convolutional network over an audio clip's log-mel spectrogram."""

    kind: Literal["audio"]
    """Kind of extra tower; audio: wav, flac, ogg or mp3, through a small convolutional network
    over the log-mel spectrogram."""
    mels: Count = 64
    """Bands of the spectrogram, evenly spaced on the mel scale from 0 Hz to half the sampling
    rate."""
    window_ms: float = Field(25.0, gt=0)
    """Length in milliseconds of the window of one column of the spectrogram."""
    hop_ms: float = Field(10.0, gt=0)
    """Milliseconds from one window of the spectrogram to the next."""
    dropout: Fraction = 0.0
    """Dropout rate of the audio encoder's pooled features while training."""

    def build(self, data: TowerInput) -> nn.Module:
        window, hop = (max(2, round(self.rate * ms / 1000)) for ms in (self.window_ms, self.hop_ms))
        spectrum = LogMel(self.rate, window, hop, self.mels)
        return AudioEncoder(spectrum, self.mels, self.widths, self.depths, self.dropout)


class LogMel(nn.Module):
    """Log-mel spectrogram: waves float32 [B, T] to [B, mels, 1 + T // hop].

    Values are log10 of the power in each band, clipped at 8 below the sample's maximum and scaled
    to about [-1, 1] (Radford et al. 2023).

    Args:
        rate: Samples per second.
        window: Window length in samples.
        hop: Samples from one window to the next.
        mels: Number of mel bands.

    Raises:
        GigabatchError: if a band contains no frequency of the transform.
    """

    window: Tensor
    bands: Tensor

    def __init__(self, rate: int, window: int, hop: int, mels: int) -> None:
        super().__init__()
        self.hop, self.fft = hop, 1 << (window - 1).bit_length()
        bands = mel_bands(rate, self.fft, mels)
        if not bool(bands.sum(1).all()):
            raise GigabatchError(
                f"towers: {mels} mel bands are too many for windows of {window} samples at {rate} "
                "samples per second: some bands contain no frequency. Set fewer `mels` or a longer "
                "`window_ms`."
            )
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        self.register_buffer("bands", bands, persistent=False)

    def forward(self, waves: Tensor) -> Tensor:
        spectrum = torch.stft(
            waves, self.fft, self.hop, len(self.window), self.window, pad_mode="constant",
            return_complex=True,
        )  # fmt: skip
        power = self.bands @ (spectrum.real.square() + spectrum.imag.square())
        log = power.clamp(min=1e-10).log10()
        return (torch.maximum(log, log.amax((1, 2), keepdim=True) - 8) + 4) / 4


def mel_bands(rate: int, fft: int, mels: int) -> Tensor:
    """Return triangular filters float32 [mels, fft // 2 + 1].

    Their peaks are evenly spaced on the mel scale from 0 to rate / 2. Each filter has area 1 over
    its frequencies in Hz, so wide bands are not louder.
    """
    top = 2595 * math.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, mels + 2, dtype=torch.float64) / 2595) - 1)
    frequency = torch.linspace(0, rate / 2, fft // 2 + 1, dtype=torch.float64)
    low, mid, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (frequency - low) / (mid - low), (high - frequency) / (high - mid)
    shape = torch.minimum(rising, falling).clamp(min=0)
    return (shape * 2 / (high - low)).float()


class AudioEncoder(nn.Module):
    """Encode waves float32 [B, T] of real lengths int64 [B] to [B, width].

    Residual stages run over the spectrogram; the mean and the maximum over the real times are
    concatenated.
    """

    def __init__(
        self, spectrum: LogMel, mels: int, widths: tuple[int, ...], depths: tuple[int, ...],
        dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.spectrum, self.stages = spectrum, len(widths)
        self.stem = nn.Conv2d(1, widths[0], 3, stride=2, padding=1)
        self.blocks = residual_stages(widths, depths)
        high = -(-mels // 2**self.stages)
        self.norm, self.dropout = nn.GroupNorm(1, widths[-1]), nn.Dropout(dropout)
        self.width = 2 * widths[-1] * high

    def forward(self, waves: Tensor, lengths: Tensor) -> Tensor:
        # bf16 is too coarse for the spectrogram's range.
        with torch.autocast(waves.device.type, enabled=False):
            x = self.spectrum(waves)
        x = self.stem(x.unsqueeze(1).contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = block(x)
        x = F.relu(self.norm(x)).flatten(1, 2)  # [B, channels * bands, times]
        step = self.spectrum.hop * 2**self.stages
        times = torch.div(lengths + step - 1, step, rounding_mode="floor").clamp(1, x.shape[-1])
        real = (torch.arange(x.shape[-1], device=x.device) < times[:, None])[:, None]
        mean = (x * real).sum(-1) / times[:, None]
        # x is at least 0, so zeros past the end never exceed the maximum.
        pooled: Tensor = self.dropout(torch.cat([mean, (x * real).amax(-1)], dim=-1))
        return pooled
