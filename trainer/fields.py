"""Field types that several settings classes share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from gigabatch.trainer.taps import PATTERN

Count = Annotated[int, Field(ge=1, strict=True)]
"""An integer of at least 1."""
Amount = Annotated[int, Field(ge=0, strict=True)]
"""An integer of at least 0."""
Fraction = Annotated[float, Field(ge=0, lt=1)]
"""A number in [0, 1)."""
Tap = Annotated[str, Field(pattern=PATTERN)]
"""The name of a tower output, such as `image.encoder@1`."""
Pair = tuple[Tap, Tap]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


ONE_OR_MORE = BeforeValidator(_as_list)
"""Validator of a tuple of strings that also accepts a single string without brackets."""
