"""What the parts of the description share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from gigabatch.trainer.taps import PATTERN

Count = Annotated[int, Field(ge=1, strict=True)]
Amount = Annotated[int, Field(ge=0, strict=True)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Tap = Annotated[str, Field(pattern=PATTERN)]
Pair = tuple[Tap, Tap]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


ONE_OR_MORE = BeforeValidator(_listed)
"""Of a tuple of names: one alone may be written without brackets."""
