"""Towers: one modality's micro-batch to unit vectors in the shared space."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gigabatch.data.errors import GigabatchError
from gigabatch.data.keyed import key
from gigabatch.trainer.config import Config
from gigabatch.trainer.config.towers import (
    ConvTower,
    HeadSettings,
    HuggingFaceTower,
    ModuleTower,
    TextTower,
    Tower,
)
from gigabatch.trainer.towers.foreign import huggingface_encoder, module_encoder
from gigabatch.trainer.towers.small import ConvEncoder, TokenEncoder

MODALITIES = ("image", "text")


class Towers(nn.Module):
    """All towers of a run. `autocast`: the precision inside, if lower; weights stay float32."""

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        heads: Mapping[str, nn.Module],
        autocast: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.autocast = autocast
        self.encoders, self.heads = nn.ModuleDict(encoders), nn.ModuleDict(heads)

    def forward(
        self, inputs: Mapping[str, tuple[Tensor, ...]], stream: int | None = None
    ) -> dict[str, Tensor]:
        """modality -> float32 [B, D] of unit length; `inputs`: modality -> its encoder's arguments.

        `stream` keys all randomness inside: each tower starts from its own seed, so that a second
        pass over the same micro-batch repeats the first. None (evaluation) leaves it alone.
        """
        out = {}
        for name, arguments in inputs.items():
            if stream is not None:
                seed_everything(key(stream, name))
            device = arguments[0].device.type
            with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
                vectors = self.heads[name](self.encoders[name](*arguments))
            out[name] = F.normalize(vectors.float(), dim=-1)
        return out

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
    """The towers with their initial weights, a function of `run.seed`. Raises GigabatchError."""
    encoders, heads = {}, {}
    for name in MODALITIES:
        settings: Tower = getattr(config.towers, name)
        seed_everything(key(config.run.seed, "init", name))
        encoder = _encoder(settings, name, config, vocab_size)
        if settings.checkpoint_activations:
            _checkpoint_activations(encoder, name)
        if settings.freeze:
            encoder.requires_grad_(False)
            encoder.frozen = True
        _refuse_unsound(encoder, name)
        encoders[name] = encoder
        heads[name] = _head(encoder.width, config.towers.width, settings.head)
    autocast = torch.bfloat16 if config.train.precision == "bf16" else None
    return Towers(encoders, heads, autocast)


def _encoder(settings: Tower, name: str, config: Config, vocab_size: int) -> Any:
    image, text = config.data.image, config.data.text
    match settings:
        case ConvTower():
            return ConvEncoder(
                image.channels, image.size, settings.widths, settings.depths, settings.dropout
            )
        case TextTower():
            return TokenEncoder(
                vocab_size, text.length, settings.width, settings.layers, settings.dropout
            )
        case HuggingFaceTower():
            return huggingface_encoder(settings, name, config.data, vocab_size)
        case ModuleTower():
            return module_encoder(settings, name)
    raise AssertionError(f"no encoder for {settings!r}")


def _head(inner: int, outer: int, settings: HeadSettings) -> nn.Sequential:
    widths = [inner, *[settings.hidden] * (settings.layers - 1), outer]
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        layers += [nn.GELU()] if i else []
        layers.append(nn.Linear(a, b, bias=i < len(widths) - 2))
    return nn.Sequential(*layers)


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
