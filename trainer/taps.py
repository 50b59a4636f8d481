"""Taps: names of the tower outputs that an objective or an evaluation reads.

image              after the projection head, in the shared space
image.encoder      before the projection head
image.projection   after a second projection head, so that a loss between views does not shape the
                   shared space
text.tokens        one vector per token, after a separate token head
image@1            from a second augmented view (text: with different dropout)
teacher.image      from the momentum tower
sensor             from a tower of `towers.more`; also `sensor.encoder` and so on
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

TEACHER = "teacher."
PATTERN = r"^[a-z]+(\.encoder|\.projection|\.tokens)?(@[1-9])?$"


class Tap(NamedTuple):
    """A parsed tap name.

    Attributes:
        modality: Name of the tower.
        output: `head`, `encoder`, `projection` or `tokens`.
        view: Number of the augmented view, from 0.
    """

    modality: str
    output: str
    view: int

    @property
    def base(self) -> str:
        """The name without the view, as in the result of `Towers.forward`."""
        return self.modality if self.output == "head" else f"{self.modality}.{self.output}"


def parse_tap(name: str) -> Tap:
    """Parse a tap name, with or without the prefix `teacher.`.

    Raises:
        ValueError: if the name does not match `PATTERN`.
    """
    if not re.match(PATTERN, plain := name.removeprefix(TEACHER)):
        raise ValueError(f"{name!r} is not a tap, such as image, text.tokens or image@1")
    rest, _, view = plain.partition("@")
    modality, _, output = rest.partition(".")
    return Tap(modality, output or "head", int(view or 0))


def with_view(base: str, view: int) -> str:
    """Return the tap name of a base name in a view."""
    return f"{base}@{view}" if view else base


def count_views(taps: Iterable[str]) -> int:
    """Return the number of views that the taps refer to, at least 1."""
    return 1 + max((parse_tap(tap).view for tap in taps), default=0)


def bases_in_view(taps: Iterable[str], view: int) -> tuple[str, ...]:
    """Return the distinct base names of the taps of one view, in order."""
    parsed = (parse_tap(name) for name in taps)
    return tuple(dict.fromkeys(tap.base for tap in parsed if tap.view == view))
