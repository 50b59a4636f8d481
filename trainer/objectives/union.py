"""Pydantic type of any objective's settings, selected by `name`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Union

from pydantic import BeforeValidator, Field

from gigabatch.trainer.objectives.registry import DEFAULT
from gigabatch.trainer.objectives.settings import ObjectiveSettings


def union_of(kinds: Iterable[type[ObjectiveSettings]]) -> Any:
    """Return the union of settings classes, discriminated by `name`.

    Without `name`, it is "module" if the key `module` is set, else DEFAULT.
    """
    union: Any = Union[tuple(kinds)]  # noqa: UP007
    return Annotated[Annotated[union, Field(discriminator="name")], BeforeValidator(_with_name)]


def _with_name(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {"name": "module" if "module" in value else DEFAULT, **value}
