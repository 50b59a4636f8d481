"""Task `history`: best and last step of the evaluations made while training.

With noisy pairs, a model first learns and then memorizes the noise. The drop from the best to the
last step shows this (PC2); neither value alone does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.evaluation.registry import register
from gigabatch.trainer.evaluation.task import RunTask

if TYPE_CHECKING:
    from gigabatch.trainer.run.folder import RunFolder

LOWER_IS_BETTER = ("mean_rank", "median_rank", "mrv", "alignment", "uniformity", "gap")
"""Substrings that identify lower-is-better metrics."""


@register
class History(RunTask):
    """Best and last step of the evaluations made while training. Needs no --on."""

    name = "history"
    summary = "best and last step of the evaluations made while training; without --on"

    def read(self, run: RunFolder) -> dict[str, float]:
        """Read the evaluations of the run."""
        return best_and_last(run)


def lower_is_better(metric: str) -> bool:
    """Return whether a metric is better when lower: ranks, their variance, distances."""
    name = metric.rsplit("/", 1)[-1]
    return any(part in name for part in LOWER_IS_BETTER)


def best_and_last(run: RunFolder, prefix: str = "eval/") -> dict[str, float]:
    """Return the best and the last value of each metric that was measured while training.

    Args:
        run: Folder of the run.
        prefix: Prefix of the metrics' tags.

    Returns:
        `METRIC/best`, `METRIC/best_step`, `METRIC/last`, `METRIC/last_step`; if values are equal,
        the first step is the best.

    Raises:
        GigabatchError: if nothing was measured.
    """
    history: dict[str, list[tuple[int, float]]] = {}
    for step in run.steps_evaluated():
        for metric, value in run.evaluation(step).items():
            if metric.startswith(prefix) and isinstance(value, int | float):
                history.setdefault(metric, []).append((step, value))
    if not history:
        raise GigabatchError(
            f"{run.path}: no evaluation of {prefix}... was made while it trained. Set eval.sets "
            "and eval.every_steps."
        )
    out: dict[str, float] = {}
    for metric, values in history.items():
        sign = 1 if lower_is_better(metric) else -1
        step, best = min(values, key=lambda pair: (sign * pair[1], pair[0]))
        out |= {f"{metric}/best": best, f"{metric}/best_step": step}
        out |= {f"{metric}/last": values[-1][1], f"{metric}/last_step": values[-1][0]}
    return out
