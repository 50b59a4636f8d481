"""What is told of a measurement: flat tags, as TensorBoard and eval/*.json have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.evaluation.statistics import intervals, slices
from gigabatch.trainer.evaluation.task import Measured

MOST_SLICES = 1000


def tags(
    task: str, measured: Measured, seed: int | None, groups: Tensor | None = None
) -> dict[str, float]:
    """`eval/SET/METRIC`, or `eval/SET/TASK/METRIC` for any but retrieval. With a `seed` also
    `.../low` and `.../high`, a 95 % interval over resampled queries, or over resampled `groups` of
    them: int64 [N]."""
    under = f"eval/{measured.name}/" + (f"{task}/" if task != "retrieval" else "")
    told = {f"{under}{name}": value for name, value in measured.metrics().items()}
    if seed is not None:
        told |= _ends(under, measured.figures, measured, seed, groups)
    return told


def sliced_tags(
    task: str, measured: Measured, field: str, values: Sequence[Any], seed: int | None,
    groups: Tensor | None = None,
) -> dict[str, float]:  # fmt: skip
    """`eval/SET/[TASK/]FIELD=VALUE/METRIC`, and `count`, by the value of each sample's field.
    Candidates stay those of the whole set. `seed`, `groups`: as in `tags`. Raises GigabatchError
    for a field of too many values."""
    if measured.samples is None or not measured.figures:
        raise GigabatchError(f"--slice {field}: {task} has no figure of single samples to slice.")
    own = [values[number] for number in measured.samples.tolist()]
    cut = slices(own, measured.figures)
    together = {} if groups is None else slices(own, {"": groups})
    if len(cut) > MOST_SLICES:
        raise GigabatchError(
            f"--slice {field}: it has {len(cut)} values, more than {MOST_SLICES}. Slice by a field "
            "of groups."
        )
    under = f"eval/{measured.name}/" + (f"{task}/" if task != "retrieval" else "")
    told: dict[str, float] = {}
    for value, figures in cut.items():
        place = f"{under}{field}={value}/"
        count = len(next(iter(figures.values())))
        metrics = measured.tell(figures) | {"count": float(count)}
        told |= {f"{place}{name}": metric for name, metric in metrics.items()}
        if seed is not None:
            mine = together[value][""] if together else None
            told |= _ends(place, figures, measured, seed, mine)
    return told


def _ends(
    under: str, figures: Any, measured: Measured, seed: int, groups: Tensor | None
) -> dict[str, float]:
    held: dict[str, Tensor] = dict(figures)
    found = intervals(held, measured.tell, seed, groups=groups) if held else {}
    moving = {
        name: ends for name, ends in found.items() if name not in ("candidates", *measured.told)
    }
    return {
        f"{under}{name}/{end}": value
        for name, ends in moving.items()
        for end, value in zip(("low", "high"), ends, strict=True)
    }
