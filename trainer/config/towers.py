"""Config section `towers`: one tower per modality, of any registered kind."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from torch.nn import ModuleDict

from gigabatch.data.decode.fields import Other
from gigabatch.data.settings import Settings
from gigabatch.data.text.captions import OneText
from gigabatch.trainer.fields import Count
from gigabatch.trainer.towers.base import Slot, TowerKind, kinds_of
from gigabatch.trainer.towers.conv import ConvTextTower, ConvTower

ModalityName = Annotated[str, Field(pattern=r"^[a-z]+$")]
RESERVED = {"image", "text", "sample", "teacher", *filter(str.isalpha, dir(ModuleDict()))}
"""Names with another meaning in a micro-batch, a tap, or a dict of modules."""


def _any_kind_of(slot: Slot, *others: type[Settings]) -> Any:
    """Return the union of all tower kinds of a slot, and of `others`."""
    classes = dict.fromkeys([*kinds_of(slot).values(), *others])
    return functools.reduce(operator.or_, classes)


def _conv_by_default(value: Any) -> Any:
    return {"kind": "conv", **value} if isinstance(value, Mapping) else value


if TYPE_CHECKING:  # mypy cannot follow a union that the registry makes.
    ImageTower = TowerKind
    TextTower = TowerKind
else:
    ImageTower = Annotated[_any_kind_of("image"), Field(discriminator="kind")]
    TextTower = Annotated[_any_kind_of("text"), Field(discriminator="kind")]


class FurtherText(OneText):
    """A further text, such as the query of a passage."""

    kind: Literal["text"]
    """Kind of further tower; text: a further text, split by the run's tokenizer."""
    share: Literal["text"] | None = None
    """Tower to share, head included; text: the tower of the captions. Set either this or
    `tower`."""
    tower: Annotated[TextTower, BeforeValidator(_conv_by_default)] | None = None
    """A separate tower for this further text, described as `towers.text` is. Set either this or
    `share`."""

    @model_validator(mode="after")
    def _one_tower(self) -> Self:
        if (self.share is None) == (self.tower is None):
            raise ValueError(
                "set either `share: text` (the same weights) or `tower`, such as {kind: conv}"
            )
        return self

    def decode_settings(self) -> Other:
        """Return how this text is read from a sample."""
        return self


if TYPE_CHECKING:
    FurtherTower = TowerKind | FurtherText
else:
    FurtherTower = Annotated[_any_kind_of("more", FurtherText), Field(discriminator="kind")]


class TowersSettings(Settings):
    """The towers of a run."""

    width: Count = 256
    """Dimension of the shared embedding space."""
    image: ImageTower = ConvTower()
    text: TextTower = ConvTextTower()
    more: dict[ModalityName, FurtherTower] = Field(default_factory=dict)
    """Towers of further modalities by names of your choice, which are also the names of their
    outputs in `objective.taps`."""

    @model_validator(mode="before")
    @classmethod
    def _default_kind(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {k: v if k == "more" else _conv_by_default(v) for k, v in values.items()}

    @model_validator(mode="after")
    def _names_are_free(self) -> Self:
        if taken := sorted(RESERVED & set(self.more)):
            raise ValueError(f"towers.more: {taken[0]!r} is a reserved name; choose another")
        return self
