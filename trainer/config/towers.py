"""The encoders and their heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from torch.nn import ModuleDict

from gigabatch.data.settings import Settings
from gigabatch.trainer.config.more import OtherTower
from gigabatch.trainer.config.tower import (
    HuggingFaceTower,
    ModuleTower,
    Stages,
    TextTower,
    Tower,
)
from gigabatch.trainer.fields import Count, Fraction

ModalityName = Annotated[str, Field(pattern=r"^[a-z]+$")]
TAKEN = {"image", "text", "sample", "teacher", *filter(str.isalpha, dir(ModuleDict()))}
"""Names that stand for something else in a micro-batch, a tap, or a dict of modules."""


class ConvTower(Tower, Stages):
    kind: Literal["conv"] = "conv"
    """A small residual convolutional encoder that trains well on a CPU."""
    dropout: Fraction = 0.0
    """Of the pooled features, while training."""


_ANY = HuggingFaceTower | ModuleTower


class TowersSettings(Settings):
    width: Count = 256
    """D: width of the shared space."""
    image: Annotated[ConvTower | _ANY, Field(discriminator="kind")] = ConvTower()
    text: Annotated[TextTower | _ANY, Field(discriminator="kind")] = TextTower()
    more: dict[ModalityName, OtherTower] = Field(default_factory=dict)
    """Towers of further modalities, by names of your own, which are their taps' names."""

    @model_validator(mode="before")
    @classmethod
    def _default_kind(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {
            k: {"kind": "conv", **v} if isinstance(v, Mapping) and k != "more" else v
            for k, v in values.items()
        }

    @model_validator(mode="after")
    def _names_are_free(self) -> Self:
        if taken := sorted(TAKEN & set(self.more)):
            raise ValueError(f"towers.more: {taken[0]!r} has a meaning already; take another name")
        return self
