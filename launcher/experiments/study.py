"""Description of an experiment: its data, variants, metrics and thresholds.

A `Study` only describes; `run.run_study` trains and measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

DATA = "{data}"
"""Placeholder in config strings, replaced by the path of the seed's data folder."""

WriteData = Callable[[Path, np.random.Generator, str], None]
"""Function that writes the data sets of one seed: (folder, random generator,
`Variant.data_kind`)."""


@dataclass(frozen=True)
class Variant:
    """A variant of training, such as the baseline or the paper's method.

    Attributes:
        name: Label in tables, and part of the run folder's name.
        config: Dotted config keys that this variant sets in addition to the study's.
        data_kind: Passed to `Study.write`, for studies that train on several kinds of data.
        init_from: Name of the variant whose run provides the towers' initial weights.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    data_kind: str = ""
    init_from: str | None = None


@dataclass(frozen=True)
class Metric:
    """A number read from the evaluation results of a run.

    Attributes:
        name: Column heading; checks refer to it.
        task: Evaluation task; `history` gives the best and final values during training.
        dataset: Set of the variant's data to evaluate on.
        tag: Tag of the value, after `eval/SET/`.
        settings: KEY=VALUE settings of the task.
        variants: Names of the variants to measure; empty for all.
    """

    name: str
    task: str
    dataset: str
    tag: str
    settings: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()

    def applies_to(self, variant: Variant) -> bool:
        return not self.variants or variant.name in self.variants


@dataclass(frozen=True)
class Estimate:
    """The values of a metric over seeds.

    Attributes:
        values: One value per seed.
        low: Lower end of the 95 % interval over queries, averaged over seeds; None without one.
        high: Upper end of that interval.
    """

    values: tuple[float, ...]
    low: float | None = None
    high: float | None = None

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def std(self) -> float:
        """Sample standard deviation over seeds; 0 for one seed."""
        return stdev(self.values) if len(self.values) > 1 else 0.0


Results = Mapping[str, Mapping[str, Estimate]]
"""Variant name -> metric name -> estimate."""
MeanOf = Callable[[str, str], float]
"""Function that returns a mean over seeds: (variant name, metric name)."""
Formula = Callable[[MeanOf], float]


@dataclass(frozen=True)
class Check:
    """A condition on the means over seeds: minimum <= formula <= maximum.

    Attributes:
        name: Variants compared, then the metric, such as `robust - plain, final R@1`.
        formula: Computes the value from the means.
        minimum: Smallest passing value; None for no lower threshold.
        maximum: Largest passing value; None for no upper threshold.
        baseline: Whether the check guards against a weak baseline, which any method would beat.
    """

    name: str
    formula: Formula
    minimum: float | None = None
    maximum: float | None = None
    baseline: bool = False

    def value(self, results: Results) -> float:
        return self.formula(lambda variant, metric: results[variant][metric].mean)

    def passes(self, results: Results) -> bool:
        value = self.value(results)
        above = self.minimum is None or value >= self.minimum
        return above and (self.maximum is None or value <= self.maximum)


@dataclass(frozen=True)
class Study:
    """One experiment.

    Attributes:
        name: Slug on the command line and prefix of the run folders' names.
        papers: Titles from `papers.PAPERS`.
        claim: The effect tested, in one sentence.
        setting: The data, the variants and the metric, in a few sentences.
        write: Writes the data of one seed.
        config: Dotted config keys that all variants share.
        variants: Variants, in the order in which they are trained for every seed.
        metrics: Metrics to measure on every finished run.
        checks: Checks, all of which must pass.
        intervals: JSON field whose values are resampled, each with all its queries, for 95 %
            intervals; None for no intervals.
    """

    name: str
    papers: tuple[str, ...]
    claim: str
    setting: str
    write: WriteData
    config: Mapping[str, Any]
    variants: tuple[Variant, ...]
    metrics: tuple[Metric, ...]
    checks: tuple[Check, ...]
    intervals: str | None = None
