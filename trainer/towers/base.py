"""Interface of a tower kind, and registry of all kinds.

A tower kind is one class in one file of this folder: its fields are the keys under `towers.NAME`,
its docstrings are the documentation, and `build` makes the encoder. Importing the file registers
the class; a new file needs no change anywhere else.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar, get_args

from pydantic import Field, model_validator
from torch import Tensor, nn

from gigabatch.data.decode.fields import ExtraModality
from gigabatch.data.decode.images import ImageSettings
from gigabatch.data.settings import Settings
from gigabatch.trainer.fields import Amount, Count

Slot = Literal["image", "text", "more"]
"""Config section in which a kind can be used: `towers.image`, `towers.text` (and `tower` of an
extra text), or an entry of `towers.more`."""
Encoded = Tensor | tuple[Tensor, Tensor]
"""Result of an encoder: pooled [B, width], or with `tokens=True` (pooled, tokens [B, T, C])."""


@dataclass(frozen=True)
class TowerInput:
    """The input of one tower, as the run's data settings define it.

    Attributes:
        key: Config key of the tower for error messages, such as `towers.image`.
        slot: Section of the config that describes the tower.
        image: Size and channels of the images.
        vocab_size: Number of tokens of the run's tokenizer.
        text_length: Tokens per text.
        text_length_key: Config key that sets `text_length`.
    """

    key: str
    slot: Slot
    image: ImageSettings
    vocab_size: int
    text_length: int
    text_length_key: str


class HeadSettings(Settings):
    """The projection head, which maps an encoder's output to the shared space."""

    layers: Count = 1
    """Linear layers of the projection head, with GELU between them. The default 1 is a linear
    map."""
    hidden: Count = 512
    """Width between the layers of a projection head with two or more layers."""


class TowerKind(Settings):
    """Base class of all tower kinds. A subclass adds a `kind` field and its own keys."""

    head: HeadSettings = HeadSettings()
    freeze: bool = False
    """Keep the encoder's weights fixed; the projection head still trains."""
    checkpoint_activations: bool = False
    """Recompute the encoder's activations in the backward pass: less memory, more time."""

    @abstractmethod
    def build(self, data: TowerInput) -> nn.Module:
        """Build the encoder; its initial weights come from torch's global generator.

        The arguments of the encoder depend on its slot:

        - image: float32 [B, C, S, S], normalized;
        - text: int64 [B, L] token ids and a bool mask [B, L];
        - more: what `decode_settings` describes. Audio: float32 [B, T] and int64 lengths [B].
          A vector: float32 [B, size]. Vectors: float32 [B, L, size] and a bool mask [B, L].

        It returns [B, width] and has the integer attribute `width`. If it has the integer
        attribute `token_width`, it is also called with `tokens=True` and then returns
        (pooled [B, width], tokens [B, T, token_width]). For `checkpoint_activations` it needs an
        nn.ModuleList `blocks`, or a method `checkpoint_activations()`.

        Raises:
            GigabatchError: if the encoder does not fit `data`.
        """

    def decode_settings(self) -> ExtraModality:
        """Return the settings that decode a sample for this tower. Only for slot `more`."""
        if not isinstance(self, ExtraModality):
            raise TypeError(
                f"{type(self).__name__} must extend one of the settings classes of `data`"
            )
        return self

    def user_modules(self) -> tuple[str, ...]:
        """Return the user's own classes that the settings name, as `package.mod:Class`."""
        return ()

    def with_absolute_paths(self) -> Self:
        """Return these settings with absolute local paths; workers start in other folders."""
        return self


class StageSettings(Settings):
    """Keys of a convolutional encoder with stages."""

    widths: tuple[Count, ...] = Field((32, 64, 128), min_length=1)
    """Channels of each convolutional stage. Each stage halves both sides of its input (of audio:
    mel bands and time)."""
    depths: tuple[Amount, ...] = (1, 1, 2)
    """Residual blocks of each convolutional stage; one number per entry of `widths`."""

    @model_validator(mode="after")
    def _one_depth_per_width(self) -> Self:
        if len(self.widths) != len(self.depths):
            raise ValueError(
                f"{len(self.widths)} widths but {len(self.depths)} depths; give one depth per width"
            )
        return self


def reason(error: BaseException) -> str:
    """Return the type, text and notes of another library's exception in one line."""
    parts = (str(error), *getattr(error, "__notes__", ()))
    text = " ".join(". ".join(part.rstrip(". \n") for part in parts).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


_KINDS: dict[Slot, dict[str, type[TowerKind]]] = {slot: {} for slot in get_args(Slot)}
K = TypeVar("K", bound=TowerKind)


def tower_kind(*slots: Slot) -> Callable[[type[K]], type[K]]:
    """Return a class decorator that registers a tower kind in these slots.

    Raises:
        TypeError: if the class has no `kind: Literal[...]` field, or a different class of the
            slot has the same kind.
    """

    def register(cls: type[K]) -> type[K]:
        field = cls.model_fields.get("kind")
        names = get_args(field.annotation) if field else ()
        if not names:
            raise TypeError(f"{cls.__name__} needs a field `kind: Literal[...]`")
        for slot in slots:
            for name in names:
                if name in _KINDS[slot]:
                    taken = _KINDS[slot][name].__name__
                    raise TypeError(f"{cls.__name__}: {taken} is already kind {name!r} of {slot}")
                _KINDS[slot][name] = cls
        return cls

    return register


def kinds_of(slot: Slot) -> dict[str, type[TowerKind]]:
    """Return the tower kinds of a slot by name, sorted, after importing every file of this folder.

    Two names may share a class.
    """
    package: Any = importlib.import_module(__package__)
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda module: module.name):
        importlib.import_module(f"{__package__}.{module.name}")
    return dict(sorted(_KINDS[slot].items()))
