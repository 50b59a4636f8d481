"""What the towers of all modalities have in common."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from gigabatch.data.settings import Settings
from gigabatch.trainer.config.fields import Amount, Count


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
