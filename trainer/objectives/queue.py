"""InfoNCE with a queue of negatives and a momentum tower (MoCo, He et al. 2020; CoCoSoDa). There
may be one queue per group (CCP).

The queue receives the momentum tower's embeddings of all ranks, so it is the same on every rank. As
in CoCoSoDa, batch keys are embedded by both the towers and the momentum tower; the loss is the mean
of the four terms (two kinds of keys, two directions). If positives came from the towers only and
queued negatives from the momentum tower only, distinguishing the two would lower the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

import torch
from torch import Tensor

from gigabatch.kernels import Eq, Local, Lse, Ne, gather_rows, key_source, lse_stats
from gigabatch.kernels.loss_terms import cross_entropy
from gigabatch.kernels.rules import combine_ids
from gigabatch.trainer.fields import Count, Fraction, Pair
from gigabatch.trainer.objectives.base import Card, Context, Loss, Needs, Updates
from gigabatch.trainer.objectives.common import (
    Scaled,
    to_loss_dtype,
    valid_pairs,
    weighted_mean,
)
from gigabatch.trainer.objectives.reference import Benchmark, Example, ReferenceBatch, Value
from gigabatch.trainer.objectives.registry import register
from gigabatch.trainer.objectives.settings import (
    CachedSettings,
    ScaledSettings,
    named_fields,
    unique,
)
from gigabatch.trainer.taps import TEACHER


class QueueSettings(ScaledSettings, CachedSettings):
    takes_groups = True

    name: Literal["queue"]
    """InfoNCE whose negatives are the batch and a queue of earlier samples, embedded by a slowly
    moving copy of the towers (MoCo)."""
    taps: Pair = ("image", "text")
    """The two tower outputs to compare."""
    positives: str | None = None
    """A json field; samples with equal values are positives of each other, and not negatives in the
    queue."""
    within: str | None = None
    """A json field; only samples with equal values are compared, so that each language or domain
    has its own queue. Unset: `data.group`."""
    size: Count = 4096
    """Number of samples in the queue."""
    momentum: Fraction = 0.999
    """Momentum of the copy's weights, per step. A short run may need a smaller value; much smaller
    values make the queue inconsistent."""

    def columns(self) -> tuple[str, ...]:
        return named_fields(self.positives, self.within)

    def positives_field(self) -> str | None:
        return self.positives

    def momentum_tower(self) -> float | None:
        return self.momentum


@register
class Queue(Scaled[QueueSettings]):
    Settings = QueueSettings
    card = Card(
        "MoCo: InfoNCE against the batch and a queue, filled by a momentum tower",
        "MoCo, He et al. 2020; CoCoSoDa; one queue per language, CCP",
        "mean_i [log (sum_j exp(l_ij) + sum_{j in queue} exp(l_ij)) - l_ii]; batch keys are "
        "embedded by both the towers and the momentum tower; the loss is the mean of the four "
        "terms, over both embeddings and both directions",
        "10 + 6 size / N, and one more forward pass of the towers",
        "small GPUs, whose batch is too small to hold enough negatives",
        ("moco", "memory_bank", "xbm"),
    )
    examples = {
        "": Example({"size": 15}),
        "positives, within": Example(
            {"size": 40, "positives": "concept", "within": "lang"}, missing=True
        ),
    }
    benchmarks = {
        "": Benchmark({"size": 4096}),
        "within": Benchmark({"size": 4096, "within": "lang"}),
    }

    def __init__(self, settings: QueueSettings, group: str | None, width: int) -> None:
        super().__init__(settings)
        self.within = settings.within or group
        columns = named_fields(settings.positives, self.within)
        teacher = unique(settings.taps)
        self.needs = Needs(settings.taps, columns, teacher=teacher, momentum=settings.momentum)
        for side in (0, 1):
            self.register_buffer(f"queue{side}", torch.zeros(settings.size, width))
        self.register_buffer("queued", torch.zeros(settings.size, 2, dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    @classmethod
    def build(cls, settings: QueueSettings, *, group: str | None = None, width: int = 0) -> Self:
        return cls(settings, group, width)

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        return 10 + 6 * self.settings.size / len(outputs[self.settings.taps[0]])

    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        scale, settings = self.scale(), self.settings
        taps = (*settings.taps, *(TEACHER + tap for tap in settings.taps))
        pairs = valid_pairs(outputs, meta, taps, settings, self.needs.columns)
        q, k, *teacher = pairs.vectors
        ids = pairs.columns[settings.positives or "sample"]
        groups = pairs.columns[self.within] if self.within else torch.zeros_like(ids)
        rule = (Eq(groups, "group"),) if self.within else ()
        ids = combine_ids(ids, groups) if self.within else ids
        columns = {"id": ids, "group": groups}
        keys = key_source(k, columns, ctx.group, settings.gather_mode)
        lses = [Lse("rows", scale, None, rule), Lse("columns", scale, None, rule)]
        stats = lse_stats(
            q, keys, lses, Eq(ids, "id"), settings.backend, 2**20 * settings.cache_mib
        )
        queue_lses = self._queue_lses(q, k, scale, ids, groups)
        terms = [*zip(stats.z, stats.positive, stats.weight, queue_lses, strict=True)]
        for rows, targets, queue_lse in zip((q, k), reversed(teacher), queue_lses, strict=True):
            teacher_keys = key_source(targets, columns, ctx.group, settings.gather_mode)
            teacher_stats = lse_stats(
                rows, teacher_keys, [Lse("rows", scale, None, rule)], Eq(ids, "id"),
                settings.backend,
            )  # fmt: skip
            terms.append(
                (
                    teacher_stats.z[0],
                    teacher_stats.positive[0],
                    teacher_stats.weight[0],
                    queue_lse,
                )
            )
        losses = [
            weighted_mean(cross_entropy(torch.logaddexp(z, queue_lse), p, w), (w > 0).float(), ctx)
            for z, p, w, queue_lse in terms
        ]

        def updates() -> Updates:
            rows = [gather_rows(side.detach().float(), ctx.group) for side in teacher]
            new_columns = gather_rows(torch.stack([ids, groups], 1), ctx.group)
            filled = min(settings.size, int(self.get_buffer("filled")) + len(new_columns))
            queues = {f"queue{side}": _push(self.get_buffer(f"queue{side}"), rows[side])
                      for side in (0, 1)}  # fmt: skip
            return {**queues, "queued": _push(self.get_buffer("queued"), new_columns),
                    "filled": torch.tensor(filled)}  # fmt: skip

        metrics = {"logit_scale": scale.detach(), "queue": self.get_buffer("filled").clone()}
        return Loss(torch.stack(losses).mean(), metrics, updates)

    def _queue_lses(
        self, q: Tensor, k: Tensor, scale: Tensor, ids: Tensor, groups: Tensor
    ) -> list[Tensor]:
        """Compute each side's log-sum-exps [n] over the other side's queue, without samples of
        other groups or with the row's id."""
        filled = int(self.get_buffer("filled"))
        queued = self.get_buffer("queued")[len(self.get_buffer("queued")) - filled :]
        columns = {"id": queued[:, 0].contiguous(), "group": queued[:, 1].contiguous()}
        rule = [Ne(ids, "id"), *([Eq(groups, "group")] if self.within else [])]
        lses = []
        for rows, side in ((q, 1), (k, 0)):
            queue = self.get_buffer(f"queue{side}")
            keys = Local(to_loss_dtype(queue[len(queue) - filled :], self.settings), columns)
            lse = Lse("rows", scale, None, rule)
            (z,) = lse_stats(rows, keys, [lse], backend=self.settings.backend).z
            lses.append(z)
        return lses

    @staticmethod
    def reference(settings: QueueSettings, batch: ReferenceBatch) -> Value:
        valid, rows = batch.complete(*settings.taps), batch.outputs
        ids = batch.meta[settings.positives or "sample"][valid]
        within = settings.within
        groups = batch.meta[within][valid] if within else torch.zeros_like(ids)
        queue = batch.memory.setdefault("queue", [])
        losses = []
        for tap, other, side in ((*settings.taps, 1), (*settings.taps[::-1], 0)):
            width = rows[tap].shape[1]
            old = torch.stack([e[side] for e in queue]) if queue else torch.zeros(0, width).double()
            old_ids, old_groups = (torch.tensor([e[i] for e in queue]).long() for i in (2, 3))
            same = (ids[:, None] == ids[None]) & (groups[:, None] == groups[None])
            allowed = torch.cat([torch.ones_like(same), ids[:, None] != old_ids[None]], 1)
            allowed = allowed & (groups[:, None] == torch.cat([groups, old_groups])[None])
            for candidates in (rows[other], rows[TEACHER + other]):
                logits = batch.scale * rows[tap][valid] @ torch.cat([candidates[valid], old]).T
                log_probability = logits.masked_fill(~allowed, -torch.inf).log_softmax(1)
                positive = torch.where(same, log_probability[:, : len(ids)], 0)
                losses.append((-positive.sum(1) / same.sum(1)).mean())
        teacher = (rows[TEACHER + tap][valid] for tap in settings.taps)
        queue += [(q, k, int(i), int(g)) for q, k, i, g in zip(*teacher, ids, groups, strict=True)]
        batch.memory["queue"] = queue[-settings.size :]
        return torch.stack(losses).mean(), None


def _push(queue: Tensor, new: Tensor) -> Tensor:
    """Append new rows to the queue and drop the oldest."""
    return torch.cat([queue, new.to(queue.dtype)])[-len(queue) :]
