"""What the towers of all modalities have in common."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from gigabatch.data.settings import Settings
from gigabatch.trainer.fields import Amount, Count, Fraction


class HeadSettings(Settings):
    layers: Count = 1
    """1: a linear map. More: that many linear layers with GELU between them."""
    hidden: Count = 512
    """Width between the layers."""


class Tower(Settings):
    head: HeadSettings = HeadSettings()
    freeze: bool = False
    """Keep the encoder as it is; the head still trains."""
    checkpoint_activations: bool = False
    """Recompute the encoder's activations in the backward pass: less memory, more time."""


class Stages(Settings):
    """Of a convolutional encoder."""

    widths: tuple[Count, ...] = Field((32, 64, 128), min_length=1)
    """Channels of each stage; each stage halves the side (of sound: bands and times)."""
    depths: tuple[Amount, ...] = (1, 1, 2)
    """Residual blocks of each stage."""

    @model_validator(mode="after")
    def _stages_match(self) -> Self:
        if len(self.widths) != len(self.depths):
            raise ValueError(
                f"{len(self.widths)} widths and {len(self.depths)} depths; give as many"
            )
        return self


class OwnModule(Settings):
    module: str = Field(pattern=r"^[\w.]+:\w+$")
    """`package.mod:Class`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of its constructor."""


class TextTower(Tower):
    kind: Literal["conv"] = "conv"
    """A small residual convolutional encoder over the caption's tokens."""
    width: Count = 128
    """Channels of the encoder."""
    layers: Amount = 1
    """Convolutions of width 3; 0 is a bag of tokens with positions."""
    dropout: Fraction = 0.0
    """Of the pooled features, while training."""


class HuggingFaceTower(Tower):
    kind: Literal["huggingface"]
    """A `transformers` model; of a two-tower model such as CLIP, this modality's half."""
    name: str | None = None
    """A pretrained model: a local folder, or a name on the hub. Or give `config`."""
    config: dict[str, Any] | None = None
    """`model_type` and that model's own keys: random weights, nothing downloaded."""
    pool: Literal["own", "mean", "first"] = "own"
    """How its last states become one vector. own: as the model does, or else their mean; mean: over
    the real tokens (E5); first: that of the first token."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.name is None) == (self.config is None):
            raise ValueError("give either `name` (pretrained) or `config` (random weights)")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("`config` needs `model_type`, such as vit, bert or clip_text_model")
        return self


class ModuleTower(Tower, OwnModule):
    kind: Literal["module"]
    """Your own `nn.Module`: called with images, or tokens and mask; returns [B, self.width]."""
