"""Taps: the named places of the towers whose outputs an objective or an evaluation may read.

image              after the head, in the shared space
image.encoder      before the head
image.projection   after a second head: a loss between views need not bend the shared space
text.tokens        a vector of each token, through a head of its own
image@1            of a second augmented view (text: with other dropout)
teacher.image      of the momentum tower
sensor             of a tower of `towers.more`; `sensor.encoder` and so on alike
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

TEACHER = "teacher."
PATTERN = r"^[a-z]+(\.encoder|\.projection|\.tokens)?(@[1-9])?$"


class Tap(NamedTuple):
    """`place`: head, encoder, projection or tokens. `view`: from 0."""

    modality: str
    place: str
    view: int

    @property
    def plain(self) -> str:
        """Its name in a pass of one view: without the view."""
        return self.modality if self.place == "head" else f"{self.modality}.{self.place}"


def parse_tap(name: str) -> Tap:
    """A tap by its name, which must match PATTERN; of a teacher's, what it is in the teacher."""
    if not re.match(PATTERN, plain := name.removeprefix(TEACHER)):
        raise ValueError(f"{name!r} is not a tap, such as image, text.tokens or image@1")
    rest, _, view = plain.partition("@")
    modality, _, place = rest.partition(".")
    return Tap(modality, place or "head", int(view or 0))


def in_view(name: str, view: int) -> str:
    """The name of a plain tap in one of the views."""
    return f"{name}@{view}" if view else name


def views_of(taps: Iterable[str]) -> int:
    """How many views the taps speak of, at least one."""
    return 1 + max((parse_tap(tap).view for tap in taps), default=0)


def plain_of(taps: Iterable[str], view: int) -> tuple[str, ...]:
    """The plain names of the taps that are of one view."""
    found = (tap for name in taps if (tap := parse_tap(name)).view == view)
    return tuple(dict.fromkeys(tap.plain for tap in found))
