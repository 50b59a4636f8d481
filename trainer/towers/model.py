"""Module with all towers of a run: encoders and projection heads by modality."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigabatch.data.rng import key


class Towers(nn.Module):
    """All towers of a run.

    Args:
        encoders: Encoder per modality.
        heads: Projection heads: `image`, and where an objective reads them, `image-tokens` and
            `image-projection` (see `further_head`).
        autocast: Precision inside the towers, if lower than float32. Weights stay float32.
        shared: Modality -> the modality whose weights it uses. Shared weights are stored, trained
            and saved once.
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        heads: Mapping[str, nn.Module],
        autocast: torch.dtype | None,
        shared: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.autocast, self.shared = autocast, dict(shared or {})
        self.encoders, self.heads = nn.ModuleDict(encoders), nn.ModuleDict(heads)

    def owner(self, modality: str) -> str:
        """Return the modality under whose name this modality's weights are stored."""
        return self.shared.get(modality, modality)

    def forward(
        self,
        inputs: Mapping[str, tuple[Tensor, ...]],
        rng_key: int | None = None,
        taps: Sequence[str] = (),
    ) -> dict[str, Tensor]:
        """Embed one micro-batch.

        Args:
            inputs: Modality -> the arguments of its encoder.
            rng_key: RNG key of the micro-batch. Each tower seeds all generators from it, so that a
                second pass repeats the first. None (evaluation) does not seed the generators.
            taps: Names of further outputs without a view: `image.encoder` [B, width],
                `image.projection` [B, D], `text.tokens` [B, T, D].

        Returns:
            Output name -> float32 vectors of unit length. Each modality's name is included, with
            [B, D].
        """
        outputs: dict[str, Tensor] = {}
        for name, arguments in inputs.items():
            if rng_key is not None:
                seed_everything(key(rng_key, name))
            device = arguments[0].device.type
            with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
                raw = self._run_tower(name, arguments, taps)
            outputs |= {tap: F.normalize(vectors.float(), dim=-1) for tap, vectors in raw.items()}
        return outputs

    def _run_tower(
        self, name: str, arguments: tuple[Tensor, ...], taps: Sequence[str]
    ) -> dict[str, Tensor]:
        """Run one encoder and the heads that `taps` name; vectors are not normalized yet."""
        owner, tokens_tap, projection_tap = self.owner(name), f"{name}.tokens", f"{name}.projection"
        encoder = self.encoders[owner]
        outputs: dict[str, Tensor] = {}
        if tokens_tap in taps:
            pooled, tokens = encoder(*arguments, tokens=True)
            outputs[tokens_tap] = self.heads[further_head(owner, "tokens")](tokens)
        else:
            pooled = encoder(*arguments)
        if projection_tap in taps:
            outputs[projection_tap] = self.heads[further_head(owner, "projection")](pooled)
        if f"{name}.encoder" in taps:
            outputs[f"{name}.encoder"] = pooled
        return {name: self.heads[owner](pooled), **outputs}

    def train(self, mode: bool = True) -> Towers:
        """Set training mode; frozen encoders stay in evaluation mode."""
        super().train(mode)
        for encoder in self.encoders.values():
            if getattr(encoder, "frozen", False):
                encoder.eval()
        return self


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and `random`; some models draw from numpy's global generator."""
    torch.manual_seed(seed % (1 << 63))
    np.random.seed(seed % (1 << 32))
    random.seed(seed)


def further_head(modality: str, output: str) -> str:
    """Return the key in `Towers.heads` of a modality's token head or second projection head."""
    return f"{modality}-{output}"  # Names of submodules must not contain dots.
