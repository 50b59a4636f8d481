"""Settings of a user's own objective, named by `package.mod:Class`."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from gigabatch.data.decode.vectors import VectorSettings
from gigabatch.data.imports import OBJECT_PATH
from gigabatch.trainer.objectives.registry import load_class, name_of
from gigabatch.trainer.objectives.settings import ObjectiveSettings, SingleSettings

if TYPE_CHECKING:
    from gigabatch.trainer.config import Config


class ModuleSettings(ObjectiveSettings):
    name: Literal["module"]
    """Your own objective."""
    module: str = Field(pattern=OBJECT_PATH)
    """`package.mod:Class`, a subclass of `gigabatch.trainer.objectives.base.Objective`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keys of its `Settings`."""
    _settings: ObjectiveSettings = PrivateAttr()

    @field_validator("module")
    @classmethod
    def _check_module(cls, path: str) -> str:
        load_class(path)  # here, so that the message has the key of the path
        return path

    @model_validator(mode="after")
    def _load(self) -> Self:
        kind = load_class(self.module).Settings
        try:
            self._settings = kind.model_validate({"name": name_of(kind), **self.args})
        except ValidationError as error:
            lines = (_explain(kind, line) for line in error.errors())
            raise ValueError(f"{self.module}: {'; '.join(lines)}") from error
        return self

    def resolved(self) -> ObjectiveSettings:
        return self._settings

    def singles(self) -> tuple[SingleSettings, ...]:
        return self._settings.singles()

    def columns(self) -> tuple[str, ...]:
        return self._settings.columns()

    def numbers(self) -> tuple[str, ...]:
        return self._settings.numbers()

    def flags(self) -> tuple[str, ...]:
        return self._settings.flags()

    def ordered_texts(self) -> tuple[str, ...]:
        return self._settings.ordered_texts()

    def positives_field(self) -> str | None:
        return self._settings.positives_field()

    def vectors(self) -> dict[str, VectorSettings]:
        return self._settings.vectors()

    def momentum_tower(self) -> float | None:
        return self._settings.momentum_tower()

    def user_modules(self) -> tuple[str, ...]:
        return (self.module,)

    def for_any_device(self) -> ObjectiveSettings:
        return self._settings.for_any_device()

    def check(self, config: Config) -> None:
        self._settings.check(config)


def _explain(settings: type[ObjectiveSettings], error: ErrorDetails) -> str:
    """Return the key in `args` and what is wrong with it; a wrong key with those that exist."""
    key = ".".join(map(str, error["loc"]))
    if error["type"] != "extra_forbidden" or len(error["loc"]) != 1:
        message = error["msg"].removeprefix("Value error, ")
        return f"args.{key}: {message}" if key else message
    known = [name for name in settings.model_fields if name != "name"]
    close = difflib.get_close_matches(key, known, 1, 0.6)
    hint = f"Did you mean {close[0]}?" if close else f"Its keys: {', '.join(known)}"
    return f"args.{key}: unknown key. {hint}"
