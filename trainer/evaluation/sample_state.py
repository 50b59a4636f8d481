"""What the objective's tables say of the samples that a run is trained on: learnt temperatures,
running estimates, losses, how likely a pair is clean (iSogCLR, number 14; PC2, number 1).

Nothing is embedded: the newest checkpoint has it all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.evaluation.labels import flags_of
from gigabatch.trainer.evaluation.settings import Table
from gigabatch.trainer.evaluation.statistics import auc
from gigabatch.trainer.evaluation.tags import MOST_SLICES
from gigabatch.trainer.evaluation.task import Measured, Subject
from gigabatch.trainer.inference import load_objective
from gigabatch.trainer.inputs import open_train

QUANTILES = {"p05": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95}


def measure_table(subject: Subject, wanted: Table) -> Measured:
    every = _figures(subject)
    known = ~torch.stack([values.isnan() for values in every.values()]).any(0)
    samples = known.nonzero().flatten()
    if not len(samples):
        raise GigabatchError(f"table: no sample of {subject.on} has been trained on yet.")
    figures = {name: values[samples].double() for name, values in every.items()}
    told = {"seen": float(len(samples)), "samples": float(len(known))}
    if wanted.label:
        values = subject.values(wanted.label)
        told |= by_value(figures, [values[i] for i in samples.tolist()], wanted.label)
    if wanted.auc:
        flags = flags_of(subject.values(wanted.auc), wanted.auc, subject.index)[samples]
        told |= {f"{name}/auc": auc(values, flags) for name, values in figures.items()}
    return Measured(subject.name, figures, spread, told, samples)


def spread(figures: Mapping[str, Tensor]) -> dict[str, float]:
    """`NAME/mean`, `/min`, `/max` and quantiles (between two samples, on the line)."""
    told: dict[str, float] = {}
    for name, values in figures.items():
        each = values.numpy()
        quantiles = np.quantile(each, list(QUANTILES.values())).tolist()
        found = {"mean": each.mean(), "min": each.min(), "max": each.max()}
        found |= dict(zip(QUANTILES, quantiles, strict=True))
        told |= {f"{name}/{what}": float(value) for what, value in found.items()}
    return told


def by_value(figures: Mapping[str, Tensor], values: Sequence[Any], label: str) -> dict[str, float]:
    """By the value of a field that each sample has: `LABEL=VALUE/NAME`, the mean of each figure,
    `LABEL=VALUE/count`, of as many values as can be told; and `NAME/log_frequency_correlation`,
    Pearson's over values, of that mean with log count, where counts and means differ."""
    names, place = np.unique([str(value) for value in values], return_inverse=True)
    counts = np.bincount(place)
    few = len(names) <= MOST_SLICES
    told: dict[str, float] = {f"{label}/values": float(len(names))}
    if few:
        told |= {f"{label}={v}/count": float(n) for v, n in zip(names, counts, strict=True)}
    for figure, each in figures.items():
        means = np.bincount(place, each.numpy()) / counts
        if few:
            told |= {f"{label}={v}/{figure}": float(m) for v, m in zip(names, means, strict=True)}
        if len(set(counts.tolist())) > 1 and float(np.ptp(means)) > 0:
            found = np.corrcoef(means, np.log(counts))[0, 1]
            told[f"{figure}/log_frequency_correlation"] = float(found)
    return told


def _figures(subject: Subject) -> dict[str, Tensor]:
    """Of every sample of the set, by name, floats [N], NaN where it has not come yet."""
    run, config = subject.run, subject.config
    data = open_train(config)
    if data.digest != run.data_digest():
        raise GigabatchError(
            f"{run.path}: the shards of {', '.join(data.names)} are not those that the run was "
            "trained on, so its tables cannot be read. Restore them."
        )
    digests = [index.digest for index in data.indexes]
    if subject.index.digest not in digests:
        raise GigabatchError(
            f"table: the run was not trained on {subject.on}, but on {', '.join(data.names)}; name "
            "one of these with --on."
        )
    objective, tables = load_objective(run, subject.step)
    source = digests.index(subject.index.digest)
    first = sum(data.sizes[:source])
    own = {name: rows[first : first + data.sizes[source]] for name, rows in tables.items()}
    found = objective.sample_values(own)
    if not found:
        raise GigabatchError(
            "table: the run's objective keeps nothing of single samples; sogclr and noisy do."
        )
    return found
