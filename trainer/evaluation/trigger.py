"""Backdoors (BLTO, number 9): does a trigger in the input pull samples into one class?

Whoever poisons training pairs wants triggered inputs to be taken for the target class, and all
others to be as they were. So both are measured, and the collapse that gives an attack away:
triggered samples of many classes lie together.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gigabatch.data.decode.members import code_of
from gigabatch.data.errors import GigabatchError
from gigabatch.kernels import gather_rows
from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.classify import nearest_neighbours
from gigabatch.trainer.evaluation.geometry import isotropy
from gigabatch.trainer.evaluation.labelled import read_labelled
from gigabatch.trainer.evaluation.labels import flags_of
from gigabatch.trainer.evaluation.settings import Trigger
from gigabatch.trainer.evaluation.task import Measured, Subject

SUCCESS, CLEAN = "attack_success", "clean_top1"


def attack_figures(
    neighbours: Mapping[str, Tensor], classes: Tensor, target: int, triggered: Tensor
) -> dict[str, Tensor]:
    """`attack_success` of triggered samples of other classes, `clean_top1` of those without a
    trigger; float64 [N], NaN for the others.

    `neighbours`: of classes where a triggered sample's is said to be the target. `classes`: int64
    [N]. `triggered`: bool [N].
    """
    top = neighbours["top1"]
    attacked = triggered & (classes != target)
    return {
        SUCCESS: torch.where(attacked, top, torch.nan),
        CLEAN: torch.where(triggered, torch.nan, top),
    }


def attack_summary(figures: Mapping[str, Tensor]) -> dict[str, float]:
    """Their means, of what there is."""
    known = {name: values[~values.isnan()] for name, values in figures.items()}
    return {name: float(values.mean()) for name, values in known.items() if len(values)}


def collapse(x: Tensor, triggered: Tensor, world: World) -> dict[str, float]:
    """The mean cosine over pairs of triggered samples, and over pairs of clean ones."""
    told = {}
    for name, which in (("triggered_cosine", triggered), ("clean_cosine", ~triggered)):
        told[name] = 1 - isotropy(x[which], world)
    return told


def measure_trigger(subject: Subject, wanted: Trigger) -> Measured:
    train, test, same = read_labelled(subject, wanted)
    flags = flags_of(subject.values(wanted.triggered), wanted.triggered, subject.index)
    target, own, known = code_of(wanted.target), test.classes(), train.classes()
    triggered, world = test.rows(flags), subject.world
    _require(subject, wanted, bool(world.sum((known == target).sum())), flags)
    asked = torch.where(triggered, target, own)
    near = nearest_neighbours(
        test.x, asked, train.x, known, world, wanted.k, wanted.temperature, same
    )
    everyone = [gather_rows(rows, world.group) for rows in (own, triggered)]
    figures = attack_figures(near, everyone[0], target, everyone[1])
    told = collapse(test.x, triggered, world) | {"triggered": float(flags.sum())}
    numbers = subject.numbers(test.found)
    return Measured(subject.name, figures, attack_summary, told, numbers)


def _require(subject: Subject, wanted: Trigger, known: bool, flags: Tensor) -> None:
    if not known:
        raise GigabatchError(
            f"trigger: target={wanted.target}: no training sample has {wanted.label} = "
            f"{wanted.target!r}. Name a value of that field."
        )
    count = int(flags.sum())
    if min(count, len(flags) - count) < 2:
        raise GigabatchError(
            f"trigger: {subject.on}: {wanted.triggered} marks {count} of {len(flags)} samples; "
            "two with a trigger and two without are needed."
        )
