"""The encoders and their heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from torch.nn import ModuleDict

from gigabatch.data.settings import Settings
from gigabatch.trainer.config.fields import Amount, Count, Fraction
from gigabatch.trainer.config.more import OtherTower
from gigabatch.trainer.config.tower import OwnModule, Stages, Tower

ModalityName = Annotated[str, Field(pattern=r"^[a-z]+$")]
TAKEN = {"image", "text", "sample", "teacher", *filter(str.isalpha, dir(ModuleDict()))}
"""Names that stand for something else in a micro-batch, a tap, or a dict of modules."""


class ConvTower(Tower, Stages):
    kind: Literal["conv"] = "conv"
    """A small residual convolutional encoder that trains well on a CPU."""
    dropout: Fraction = 0.0
    """Of the pooled features, while training."""


class TextTower(Tower):
    kind: Literal["conv"] = "conv"
    """A small residual convolutional encoder over the caption's tokens."""
    width: Count = 128
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
