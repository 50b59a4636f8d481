"""Towers: one modality's micro-batch to unit vectors in the shared space."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gigabatch.data.errors import GigabatchError
from gigabatch.data.rng import key
from gigabatch.trainer.config import Config
from gigabatch.trainer.config.more import (
    AudioTower,
    OtherModuleTower,
    VectorsTower,
    VectorTower,
)
from gigabatch.trainer.config.tower import (
    HeadSettings,
    HuggingFaceTower,
    ModuleTower,
    TextTower,
    Tower,
)
from gigabatch.trainer.config.towers import ConvTower
from gigabatch.trainer.towers.audio import AudioEncoder, LogMel
from gigabatch.trainer.towers.conv import ConvEncoder, TokenEncoder
from gigabatch.trainer.towers.external import huggingface_encoder, module_encoder
from gigabatch.trainer.towers.vectors import VectorEncoder, VectorsEncoder


class Towers(nn.Module):
    """All towers of a run. `autocast`: the precision inside, if lower; weights stay float32.
    `heads`: of each modality; and where they are asked for, of its tokens and its second one
    (`text.tokens`, in the dict `text-tokens`). `shared`: modality -> the one whose weights read it
    too, which are held, trained and saved once."""

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
        """The modality under whose name its weights are."""
        return self.shared.get(modality, modality)

    def forward(
        self,
        inputs: Mapping[str, tuple[Tensor, ...]],
        stream: int | None = None,
        taps: Sequence[str] = (),
    ) -> dict[str, Tensor]:
        """modality -> float32 [B, D] of unit length; `inputs`: modality -> its encoder's arguments.

        `taps`: plain names of others to come along: `image.encoder` [B, width],
        `image.projection` [B, D], `text.tokens` [B, T, D], of unit length too. `stream` keys all
        randomness inside: each tower starts from its own seed, so that a second pass over the same
        micro-batch repeats the first. None (evaluation) leaves it alone.
        """
        out: dict[str, Tensor] = {}
        for name, arguments in inputs.items():
            if stream is not None:
                seed_everything(key(stream, name))
            device = arguments[0].device.type
            with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
                found = self._places(name, arguments, taps)
            out |= {tap: F.normalize(vectors.float(), dim=-1) for tap, vectors in found.items()}
        return out

    def _places(
        self, name: str, arguments: tuple[Tensor, ...], taps: Sequence[str]
    ) -> dict[str, Tensor]:
        owner, own, second = self.owner(name), f"{name}.tokens", f"{name}.projection"
        encoder = self.encoders[owner]
        if own in taps:
            pooled, tokens = encoder(*arguments, tokens=True)
            found = {own: self.heads[further_head(owner, "tokens")](tokens)}
        else:
            pooled, found = encoder(*arguments), {}
        if second in taps:
            found[second] = self.heads[further_head(owner, "projection")](pooled)
        if f"{name}.encoder" in taps:
            found[f"{name}.encoder"] = pooled
        return {name: self.heads[owner](pooled), **found}

    def train(self, mode: bool = True) -> Towers:
        super().train(mode)
        for encoder in self.encoders.values():
            if getattr(encoder, "frozen", False):
                encoder.eval()
        return self


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and `random`: some models draw from numpy's global generator."""
    torch.manual_seed(seed % (1 << 63))
    np.random.seed(seed % (1 << 32))
    random.seed(seed)


def build_towers(config: Config, vocab_size: int) -> Towers:
    """The towers of the modalities that the objective reads, with their initial weights, a function
    of `run.seed`. Raises GigabatchError."""
    encoders, heads = {}, {}
    for name in config.modalities:
        if name in config.shared:
            continue
        settings = config.tower(name)
        where = f"more.{name}" if name in config.towers.more else name
        seed_everything(key(config.run.seed, "init", name))
        encoder = _encoder(settings, where, config, vocab_size, config.text_length(name))
        if settings.checkpoint_activations:
            _checkpoint_activations(encoder, where)
        if settings.freeze:
            encoder.requires_grad_(False)
            encoder.frozen = True
        _refuse_unsound(encoder, where)
        encoders[name] = encoder
        heads[name] = _head(encoder.width, config.towers.width, settings.head)
        if (name, "tokens") in config.places:
            heads[further_head(name, "tokens")] = _token_head(
                encoder, name, config.towers.width, settings
            )
        if (name, "projection") in config.places:
            heads[further_head(name, "projection")] = _head(
                encoder.width, config.towers.width, settings.head
            )
    autocast = torch.bfloat16 if config.train.precision == "bf16" else None
    return Towers(encoders, heads, autocast, config.shared)


def _encoder(settings: Tower, name: str, config: Config, vocab_size: int, length: int) -> Any:
    image = config.data.image
    match settings:
        case ConvTower():
            return ConvEncoder(
                image.channels, image.size, settings.widths, settings.depths, settings.dropout
            )
        case TextTower():
            return TokenEncoder(
                vocab_size, length, settings.width, settings.layers, settings.dropout
            )
        case HuggingFaceTower():
            return huggingface_encoder(settings, name, config.data, vocab_size, length)
        case ModuleTower() | OtherModuleTower():
            return module_encoder(settings, f"towers.{name}.module")
        case AudioTower():
            window, hop = (
                max(2, round(settings.rate * ms / 1000))
                for ms in (settings.window_ms, settings.hop_ms)
            )
            spectrum = LogMel(settings.rate, window, hop, settings.mels)
            return AudioEncoder(
                spectrum, settings.mels, settings.widths, settings.depths, settings.dropout
            )
        case VectorTower():
            return VectorEncoder(
                settings.size, settings.width, settings.layers, settings.dropout,
                settings.mean, settings.std,
            )  # fmt: skip
        case VectorsTower():
            return VectorsEncoder(
                settings.size, settings.length, settings.width, settings.layers, settings.heads,
                settings.kind == "sequence", settings.pool == "attention", settings.dropout,
                settings.mean, settings.std,
            )  # fmt: skip
    raise AssertionError(f"no encoder for {settings!r}")


def _head(inner: int, outer: int, settings: HeadSettings) -> nn.Sequential:
    widths = [inner, *[settings.hidden] * (settings.layers - 1), outer]
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        layers += [nn.GELU()] if i else []
        layers.append(nn.Linear(a, b, bias=i < len(widths) - 2))
    return nn.Sequential(*layers)


def further_head(modality: str, place: str) -> str:
    """How a modality's head of its tokens, or its second one, is called among the heads."""
    return f"{modality}-{place}"  # a module's name may not hold a dot


def _token_head(encoder: Any, name: str, outer: int, settings: Tower) -> nn.Sequential:
    width = getattr(encoder, "token_width", None)
    if not isinstance(width, int):
        raise GigabatchError(
            f"objective.taps: {name}.tokens: the tower's {type(encoder).__name__} has "
            "no integer attribute `token_width`. Give it one, and let its forward, called with "
            "tokens=True, return (pooled [B, width], tokens [B, T, token_width])."
        )
    return _head(width, outer, settings.head)


def _checkpoint_activations(encoder: Any, name: str) -> None:
    if hasattr(encoder, "checkpoint_activations"):
        encoder.checkpoint_activations()
    elif isinstance(getattr(encoder, "blocks", None), nn.ModuleList):
        for block in encoder.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    else:
        raise GigabatchError(
            f"towers.{name}.checkpoint_activations: {type(encoder).__name__} has neither a method "
            "of that name nor an nn.ModuleList called `blocks`; add one, or turn it off."
        )


def _refuse_unsound(encoder: nn.Module, name: str) -> None:
    for path, module in encoder.named_modules():
        running = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        if running and not getattr(encoder, "frozen", False):
            raise GigabatchError(
                f"towers.{name}: {path} is a batch norm with running statistics: the two passes of "
                "a step would count each sample twice. Freeze the tower, or use another norm."
            )
    for path, parameter in encoder.named_parameters():
        if parameter.ndim == 0:
            raise GigabatchError(
                f"towers.{name}: parameter {path} is 0-dimensional, which DeepSpeed cannot train "
                "in bf16. Give it the shape [1], or let the objective hold it."
            )
