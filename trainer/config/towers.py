"""Config section `towers`: one tower per modality, of any registered kind."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from torch.nn import ModuleDict

from gigabatch.data.decode.fields import ExtraModality
from gigabatch.data.settings import Settings
from gigabatch.data.text.captions import ExtraText
from gigabatch.trainer.fields import Count
from gigabatch.trainer.towers.base import Slot, TowerKind, kinds_of
from gigabatch.trainer.towers.conv import ConvTextTower, ConvTower

ModalityName = Annotated[str, Field(pattern=r"^[a-z]+$")]
RESERVED = {"image", "text", "sample", "teacher", *filter(str.isalpha, dir(ModuleDict()))}
"""Names that have a meaning in a micro-batch, a tap or an `nn.ModuleDict`."""


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


class ExtraTextTower(ExtraText):
    """An extra text, such as the query of a passage."""

    kind: Literal["text"]
    """Kind of extra tower; text: an extra text, split by the run's tokenizer."""
    share: Literal["text"] | None = None
    """Tower to share, head included; text: the tower of the captions. Set either this or
    `tower`."""
    tower: Annotated[TextTower, BeforeValidator(_conv_by_default)] | None = None
    """A separate tower for this extra text, described as `towers.text` is. Set either this or
    `share`."""

    @model_validator(mode="after")
    def _one_tower(self) -> Self:
        if (self.share is None) == (self.tower is None):
            raise ValueError(
                "set either `share: text` (the same weights) or `tower`, such as {kind: conv}"
            )
        return self

    def decode_settings(self) -> ExtraModality:
        """Return the settings with which this text is read from a sample."""
        return self

    def with_absolute_paths(self) -> Self:
        """Return these settings with absolute local paths."""
        tower = self.tower and self.tower.with_absolute_paths()
        return self.model_copy(update={"tower": tower})


if TYPE_CHECKING:
    ExtraTower = TowerKind | ExtraTextTower
else:
    ExtraTower = Annotated[_any_kind_of("more", ExtraTextTower), Field(discriminator="kind")]


class TowersSettings(Settings):
    """The towers of a run."""

    width: Count = 256
    """Dimension of the shared embedding space."""
    image: ImageTower = ConvTower()
    text: TextTower = ConvTextTower()
    more: dict[ModalityName, ExtraTower] = Field(default_factory=dict)
    """Towers of extra modalities by names of your choice, which are also the names of their
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
            raise ValueError(
                f"towers.more: {taken[0]!r} is a reserved name; choose a different one"
            )
        return self

    def kinds(self) -> dict[str, TowerKind]:
        """Return the towers with separate weights, by config key."""
        kinds = {"towers.image": self.image, "towers.text": self.text}
        for name, entry in self.more.items():
            if isinstance(entry, TowerKind):
                kinds[f"towers.more.{name}"] = entry
            elif entry.tower is not None:
                kinds[f"towers.more.{name}.tower"] = entry.tower
        return kinds

    def with_absolute_paths(self) -> Self:
        """Return these settings with absolute local paths; workers start in other folders."""
        update = {
            "image": self.image.with_absolute_paths(),
            "text": self.text.with_absolute_paths(),
            "more": {name: entry.with_absolute_paths() for name, entry in self.more.items()},
        }
        return self.model_copy(update=update)
