"""What an experiment is: data, ways of training on it, what is measured, and what must hold.

A `Study` is a description; `run.run_study` trains and measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

DATA = "{data}"
"""In a text of a config: the folder of the start's data."""

Write = Callable[[Path, np.random.Generator, str], None]
"""Writes the sets of one start into a folder: (folder, random, variant of the data)."""


@dataclass(frozen=True)
class Arm:
    """One way of training. `config`: dotted keys that it sets beyond the study's. `data`: the
    variant that it is trained on. `begins_with`: the arm whose run its towers start from."""

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""
    begins_with: str | None = None


@dataclass(frozen=True)
class Measure:
    """A figure that is read of a run's evaluation: `metric` is the tag after `eval/SET/`. `arms`:
    those that are measured so; none: all. `on` names a set of the arm's data."""

    figure: str
    task: str
    on: str
    metric: str
    settings: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()

    def is_of(self, arm: Arm) -> bool:
        return not self.arms or arm.name in self.arms


@dataclass(frozen=True)
class Figure:
    """A figure over the starts. `low`, `high`: the ends of its 95 % interval over queries, each
    the mean over the starts; None where it has none."""

    values: tuple[float, ...]
    low: float | None = None
    high: float | None = None

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over the starts, of a sample; 0 of one start."""
        return stdev(self.values) if len(self.values) > 1 else 0.0


Figures = Mapping[str, Mapping[str, Figure]]
"""arm -> figure -> its values."""
Of = Callable[[Callable[[str, str], float]], float]


@dataclass(frozen=True)
class Bar:
    """What must hold of the means over starts: `of(mean)` lies between `least` and `most`, where
    `mean(arm, figure)` gives one. `baseline`: it asks whether the baseline is as strong as the
    catalogue's, without which the effect would say nothing."""

    what: str
    of: Of
    least: float | None = None
    most: float | None = None
    baseline: bool = False

    def value(self, figures: Figures) -> float:
        return self.of(lambda arm, figure: figures[arm][figure].mean)

    def holds(self, figures: Figures) -> bool:
        value = self.value(figures)
        above = self.least is None or value >= self.least
        return above and (self.most is None or value <= self.most)

    @property
    def bound(self) -> str:
        parts = [f">= {self.least:g}"] if self.least is not None else []
        parts += [f"<= {self.most:g}"] if self.most is not None else []
        return " and ".join(parts)


@dataclass(frozen=True)
class Study:
    """`papers`: numbers in the catalogue. `setting`: one sentence on the data and the arms.
    `intervals`: the json field whose values are resampled, with all their queries, for 95 %
    intervals of the figures; None: no intervals."""

    name: str
    papers: tuple[int, ...]
    claim: str
    setting: str
    write: Write
    config: Mapping[str, Any]
    arms: tuple[Arm, ...]
    measures: tuple[Measure, ...]
    bars: tuple[Bar, ...]
    intervals: str | None = None
