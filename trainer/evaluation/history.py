"""Best against last: what a run's evaluations were at their best step, and at the last one.

On noisy pairs a model first learns, then memorises the noise: the fall from best to last is the
effect (PC2, number 1), and a report of either alone hides it.
"""

from __future__ import annotations

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.run.folder import RunFolder


def lower_is_better(metric: str) -> bool:
    """Ranks, their spread and distances fall as a model gets better; all else rises."""
    name = metric.rsplit("/", 1)[-1]
    falling = ("mean_rank", "median_rank", "mrv", "alignment", "uniformity", "gap")
    return any(part in name for part in falling)


def best_and_last(run: RunFolder, prefix: str = "eval/") -> dict[str, float]:
    """`METRIC/best`, `METRIC/best_step`, `METRIC/last`, `METRIC/last_step` of every metric under
    `prefix` that was measured while training; of equal values the first step is the best.

    Raises GigabatchError where nothing was measured.
    """
    seen: dict[str, list[tuple[int, float]]] = {}
    for step in run.steps_evaluated():
        for metric, value in run.evaluation(step).items():
            if metric.startswith(prefix) and isinstance(value, int | float):
                seen.setdefault(metric, []).append((step, value))
    if not seen:
        raise GigabatchError(
            f"{run.path}: no evaluation of {prefix}... was made while it was trained. Set "
            "eval.sets and eval.every_steps."
        )
    out: dict[str, float] = {}
    for metric, found in seen.items():
        sign = 1 if lower_is_better(metric) else -1
        step, value = min(found, key=lambda each: (sign * each[1], each[0]))
        out |= {f"{metric}/best": value, f"{metric}/best_step": step}
        out |= {f"{metric}/last": found[-1][1], f"{metric}/last_step": found[-1][0]}
    return out
