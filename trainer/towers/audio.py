"""The built-in encoder of sound: a log-mel spectrogram, then a small convolutional network."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.towers.conv import residual_stages


class LogMel(nn.Module):
    """Waves float32 [B, T] -> [B, mels, 1 + T // hop]: log10 of the power in each band, no lower
    than 8 below the sample's highest, brought to about [-1, 1] (Radford et al. 2023)."""

    window: Tensor
    bands: Tensor

    def __init__(self, rate: int, window: int, hop: int, mels: int) -> None:
        super().__init__()
        self.hop, self.fft = hop, 1 << (window - 1).bit_length()
        bands = mel_bands(rate, self.fft, mels)
        if not bool(bands.sum(1).all()):
            raise GigabatchError(
                f"towers: {mels} mel bands are too many for windows of {window} samples at {rate} a"
                " second: some hold no frequency. Set fewer `mels` or a longer `window_ms`."
            )
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        self.register_buffer("bands", bands, persistent=False)

    def forward(self, waves: Tensor) -> Tensor:
        found = torch.stft(
            waves, self.fft, self.hop, len(self.window), self.window, pad_mode="constant",
            return_complex=True,
        )  # fmt: skip
        power = self.bands @ (found.real.square() + found.imag.square())
        log = power.clamp(min=1e-10).log10()
        return (torch.maximum(log, log.amax((1, 2), keepdim=True) - 8) + 4) / 4


def mel_bands(rate: int, fft: int, mels: int) -> Tensor:
    """float32 [mels, fft // 2 + 1]: triangles, evenly spaced from 0 to rate / 2 on the mel scale,
    each of area 1 over its frequencies in Hz (so that its width does not count)."""
    top = 2595 * math.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, mels + 2, dtype=torch.float64) / 2595) - 1)
    at = torch.linspace(0, rate / 2, fft // 2 + 1, dtype=torch.float64)
    low, mid, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    shape = torch.minimum((at - low) / (mid - low), (high - at) / (high - mid)).clamp(min=0)
    return (shape * 2 / (high - low)).float()


class AudioEncoder(nn.Module):
    """Waves float32 [B, T], real lengths int64 [B] -> [B, width]: residual stages over the
    spectrogram, then the mean and the maximum over the times that hold sound."""

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
        with torch.autocast(waves.device.type, enabled=False):  # its range is beyond bf16's steps
            x = self.spectrum(waves)
        x = self.stem(x.unsqueeze(1).contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = block(x)
        x = F.relu(self.norm(x)).flatten(1, 2)  # [B, channels and bands, times]
        step = self.spectrum.hop * 2**self.stages
        times = torch.div(lengths + step - 1, step, rounding_mode="floor").clamp(1, x.shape[-1])
        real = (torch.arange(x.shape[-1], device=x.device) < times[:, None])[:, None]
        mean = (x * real).sum(-1) / times[:, None]
        return self.dropout(torch.cat([mean, (x * real).amax(-1)], dim=-1))  # x is at least 0
