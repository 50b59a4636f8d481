"""Construction of a run's towers from its config."""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gigabatch.data.errors import GigabatchError
from gigabatch.data.rng import key
from gigabatch.trainer.towers.base import HeadSettings, Slot, TowerInput, TowerKind, reason
from gigabatch.trainer.towers.model import Towers, further_head, seed_everything

if TYPE_CHECKING:  # The config imports the tower kinds; this avoids an import cycle.
    from gigabatch.trainer.config import Config


def build_towers(config: Config, vocab_size: int) -> Towers:
    """Build the towers of all modalities that the objective reads.

    The initial weights depend only on `run.seed` and the modality's name.

    Args:
        config: The run.
        vocab_size: Number of tokens of the run's tokenizer.

    Raises:
        GigabatchError: if an encoder cannot be built or cannot be trained exactly.
    """
    encoders, heads = {}, {}
    for name in config.modalities:
        if name in config.shared:
            continue
        settings = config.tower(name)
        data = _tower_input(config, name, vocab_size)
        seed_everything(key(config.run.seed, "init", name))
        encoder = _encoder(settings, data)
        if settings.checkpoint_activations:
            _checkpoint_activations(encoder, data.key)
        if settings.freeze:
            encoder.requires_grad_(False)
            encoder.frozen = True
        _check_exact(encoder, data.key)
        encoders[name] = encoder
        heads[name] = _head(encoder.width, config.towers.width, settings.head)
        if (name, "tokens") in config.outputs_read:
            heads[further_head(name, "tokens")] = _token_head(
                encoder, name, config.towers.width, settings
            )
        if (name, "projection") in config.outputs_read:
            heads[further_head(name, "projection")] = _head(
                encoder.width, config.towers.width, settings.head
            )
    autocast = torch.bfloat16 if config.train.precision == "bf16" else None
    return Towers(encoders, heads, autocast, config.shared)


def _encoder(settings: TowerKind, data: TowerInput) -> Any:
    try:
        return settings.build(data)
    except GigabatchError:
        raise
    except Exception as error:  # whatever a library raises becomes one message
        raise GigabatchError(
            f"{data.key}: building the encoder of {type(settings).__name__} failed: "
            f"{reason(error)}. Fix the keys of {data.key}."
        ) from error


def _tower_input(config: Config, name: str, vocab_size: int) -> TowerInput:
    entry, is_text = config.towers.more.get(name), name in config.texts
    length_set = getattr(entry, "length", None) is not None
    slot: Slot = "text" if is_text else "image" if entry is None else "more"
    return TowerInput(
        key=config.tower_key(name),
        slot=slot,
        image=config.data.image,
        vocab_size=vocab_size,
        text_length=config.text_length(name),
        text_length_key=f"towers.more.{name}.length" if length_set else "data.text.length",
    )


def _head(encoder_width: int, width: int, settings: HeadSettings) -> nn.Sequential:
    """Build a projection head [..., encoder_width] -> [..., width]."""
    widths = [encoder_width, *[settings.hidden] * (settings.layers - 1), width]
    layers: list[nn.Module] = []
    for i, (inner, outer) in enumerate(pairwise(widths)):
        layers += [nn.GELU()] if i else []
        layers.append(nn.Linear(inner, outer, bias=i < len(widths) - 2))
    return nn.Sequential(*layers)


def _token_head(encoder: Any, name: str, width: int, settings: TowerKind) -> nn.Sequential:
    token_width = getattr(encoder, "token_width", None)
    if not isinstance(token_width, int):
        raise GigabatchError(
            f"objective.taps: {name}.tokens: the encoder {type(encoder).__name__} has no integer "
            "attribute `token_width`. Add it, and let forward(..., tokens=True) return "
            "(pooled [B, width], tokens [B, T, token_width])."
        )
    return _head(token_width, width, settings.head)


def _checkpoint_activations(encoder: Any, tower_key: str) -> None:
    """Make the encoder recompute its activations in the backward pass."""
    if hasattr(encoder, "checkpoint_activations"):
        encoder.checkpoint_activations()
    elif isinstance(getattr(encoder, "blocks", None), nn.ModuleList):
        for block in encoder.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    else:
        raise GigabatchError(
            f"{tower_key}.checkpoint_activations: {type(encoder).__name__} has neither a method "
            "checkpoint_activations() nor an nn.ModuleList `blocks`. Add one, or set the key to "
            "false."
        )


def _check_exact(encoder: nn.Module, tower_key: str) -> None:
    """Reject modules that the two-pass step or DeepSpeed cannot train exactly."""
    for path, module in encoder.named_modules():
        running = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        if running and not getattr(encoder, "frozen", False):
            raise GigabatchError(
                f"{tower_key}: {path} is a batch norm with running statistics. A step embeds each "
                "micro-batch twice and would count its samples twice. Set "
                f"{tower_key}.freeze=true, or use a different norm."
            )
    for path, parameter in encoder.named_parameters():
        if parameter.ndim == 0:
            raise GigabatchError(
                f"{tower_key}: parameter {path} is 0-dimensional, which DeepSpeed cannot train in "
                "bf16. Give it the shape [1], or move it to the objective."
            )
