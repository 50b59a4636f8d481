"""Encoders from elsewhere: `transformers` models, and any importable `nn.Module`."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.config import DataSettings, HuggingFaceTower
from gigabatch.trainer.config.tower import OwnModule


class HuggingFaceEncoder(nn.Module):
    """A `transformers` model as an encoder: its pooled output, or as `pool` says, or the mean of
    its last states; with `tokens`, those states too, [B, T, token_width]."""

    def __init__(self, model: Any, modality: str, pool: str = "own") -> None:
        super().__init__()
        self.model, self.modality, self.pool = model, modality, pool
        self.width: int = model.config.hidden_size
        self.token_width = self.width

    def forward(
        self, x: Tensor, mask: Tensor | None = None, tokens: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        if self.modality == "image":
            out = self.model(pixel_values=x)
        else:
            out = self.model(input_ids=x, attention_mask=mask)
        states = out.last_hidden_state
        if states.ndim == 4:  # the map of a convolutional network
            states = states.flatten(2).mT
        pooled = self._pool(getattr(out, "pooler_output", None), states, mask)
        return (pooled, states) if tokens else pooled

    def _pool(self, pooled: Tensor | None, states: Tensor, mask: Tensor | None) -> Tensor:
        if pooled is not None and self.pool == "own":
            return pooled.flatten(1)
        if self.pool == "first":
            return states[:, 0]
        if mask is None:
            return states.mean(1)
        real = mask.unsqueeze(-1)
        return (states * real).sum(1) / real.sum(1).clamp(min=1)

    def checkpoint_activations(self) -> None:
        # Renamed within version 5; its default is the non-reentrant kind, which ours needs.
        model = self.model
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()


def huggingface_encoder(
    settings: HuggingFaceTower, modality: str, data: DataSettings, vocab_size: int, length: int
) -> HuggingFaceEncoder:
    """Build or load the model. Of a two-tower model (CLIP, SigLIP) only this modality's half is
    made, which also leaves its 0-dimensional logit scale behind."""
    from transformers import AutoConfig

    where = f"towers.{modality}"
    try:
        if settings.name is not None:
            config = AutoConfig.from_pretrained(settings.name)
        else:
            keys = dict(settings.config or {})
            config = AutoConfig.for_model(keys.pop("model_type"), **keys)
        half = getattr(config, "vision_config" if modality == "image" else "text_config", config)
        kind = _model_class(half)
        if settings.name is None:
            model = getattr(kind, "from_config", kind)(half)
        else:
            model = kind.from_pretrained(settings.name, config=half)
    except (OSError, ValueError, TypeError, KeyError) as error:
        what = settings.name or (settings.config or {}).get("model_type")
        raise GigabatchError(f"{where}: {what!r} cannot be made: {str(error).strip()}") from error
    _refuse_misfit(where, half, data, vocab_size, length)
    # One dtype for all weights: checkpoints and ZeRO keep float32, autocast lowers it in use.
    return HuggingFaceEncoder(model.to(torch.float32), modality, settings.pool)


def _model_class(config: Any) -> Any:
    """What makes the model of a config. AutoModel lacks some halves, such as SiglipTextModel."""
    import transformers

    if type(config) in transformers.MODEL_MAPPING:
        return transformers.AutoModel
    name = type(config).__name__.removesuffix("Config") + "Model"
    return getattr(transformers, name, transformers.AutoModel)


def _refuse_misfit(
    where: str, model: Any, data: DataSettings, vocab_size: int, length: int
) -> None:
    """Compare the model's own sizes with the data's: it would fail at its first batch, vaguely."""
    image = data.image
    own_length = "data.text.length" if length == data.text.length else "its length"
    exact = {
        "image_size": (image.size, "data.image.size"),
        "num_channels": (image.channels, "data.image.channels"),
    }
    for name, (ours, key) in exact.items():
        own = getattr(model, name, None)
        if isinstance(own, int) and own != ours:
            raise GigabatchError(
                f"{where}: its {name} is {own}, but {key} is {ours}; set {key}={own}."
            )
    least = {
        "vocab_size": (vocab_size, "the tokeniser has", "take its own by data.text.tokenizer"),
        "max_position_embeddings": (length, f"{own_length} is", "shorten that"),
    }
    for name, (ours, what, remedy) in least.items():
        own = getattr(model, name, None)
        if isinstance(own, int) and own < ours:
            raise GigabatchError(f"{where}: its {name} is {own}, but {what} {ours}; {remedy}.")


def module_encoder(settings: OwnModule, where: str) -> nn.Module:
    """Import `package.mod:Class` and call it with `args`. `where`: the key that names it."""
    module_name, _, class_name = settings.module.partition(":")
    try:
        made: Any = getattr(importlib.import_module(module_name), class_name)(**settings.args)
    except (ImportError, AttributeError) as error:
        raise GigabatchError(
            f"{where}: {settings.module!r} cannot be imported: {error}. It must be on PYTHONPATH "
            "or installed, on every node."
        ) from error
    except TypeError as error:
        raise GigabatchError(f"{where}: {class_name}(**args) failed: {error}") from error
    if not isinstance(made, nn.Module) or not isinstance(getattr(made, "width", None), int):
        raise GigabatchError(
            f"{where}: {settings.module!r} must be an nn.Module with an integer attribute `width`, "
            "the size of the vectors that it returns."
        )
    return made
