"""InfoNCE with a queue of negatives and a momentum tower (MoCo, He et al. 2020; CoCoSoDa, number
6), and with a queue for each group (CCP, number 46).

What enters the queue is the momentum tower's, gathered from all ranks first, so that the queue is
the same on each of them. Right answers are seen by both towers (CoCoSoDa): were they the trained
towers' alone, the loss could be lowered by telling the two apart.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gigabatch.kernels import Eq, Local, Lse, Ne, gather_rows, key_source, lse_stats
from gigabatch.kernels.loss_terms import cross_entropy
from gigabatch.kernels.rules import combine_ids
from gigabatch.trainer.config import QueueSettings
from gigabatch.trainer.objectives.base import About, Context, Loss, Needs, Updates
from gigabatch.trainer.objectives.common import Scaled, paired, rounded, weighted_mean
from gigabatch.trainer.taps import TEACHER


class Queue(Scaled):
    about = About(
        "MoCo: InfoNCE against the batch and a queue, filled by a momentum tower",
        "MoCo, He et al. 2020; CoCoSoDa, 6; a queue for each language, CCP, 46",
        "mean_i [log (sum_j exp(l_ij) + sum_{j in queue} exp(l_ij)) - l_ii], both ways, with j of "
        "the batch once as the towers see it and once as the momentum tower does; the mean of four",
        "10 + 6 size / N, and one more forward pass of the towers",
        "small GPUs, where the batch is too small to hold enough negatives",
    )

    def __init__(self, settings: QueueSettings, group: str | None, width: int) -> None:
        super().__init__(settings)
        self.settings, self.within = settings, settings.within or group
        columns = tuple(dict.fromkeys(c for c in (settings.positives, self.within) if c))
        teacher = tuple(dict.fromkeys(settings.taps))
        self.needs = Needs(settings.taps, columns, teacher=teacher, momentum=settings.momentum)
        for side in (0, 1):
            self.register_buffer(f"queue{side}", torch.zeros(settings.size, width))
        self.register_buffer("queued", torch.zeros(settings.size, 2, dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        return 10 + 6 * self.settings.size / len(outputs[self.settings.taps[0]])

    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        scale, settings = self.scale(), self.settings
        taps = (*settings.taps, *(TEACHER + tap for tap in settings.taps))
        rows = paired(outputs, meta, taps, settings, self.needs.columns)
        q, k, *slow = rows.vectors
        ids = rows.columns[settings.positives or "sample"]
        groups = rows.columns[self.within] if self.within else torch.zeros_like(ids)
        within = (Eq(groups, "group"),) if self.within else ()
        ids = combine_ids(ids, groups) if self.within else ids
        keys = key_source(k, {"id": ids, "group": groups}, ctx.group, settings.gather_mode)
        lses = [Lse("rows", scale, None, within), Lse("columns", scale, None, within)]
        stats = lse_stats(
            q, keys, lses, Eq(ids, "id"), settings.backend, 2**20 * settings.cache_mib
        )
        older = self._older(q, k, scale, ids, groups)
        ways = [*zip(stats.z, stats.positive, stats.weight, older, strict=True)]
        for mine, theirs, old in zip((q, k), reversed(slow), older, strict=True):
            taught = key_source(
                theirs, {"id": ids, "group": groups}, ctx.group, settings.gather_mode
            )
            own = lse_stats(
                mine, taught, [Lse("rows", scale, None, within)], Eq(ids, "id"), settings.backend
            )
            ways.append((own.z[0], own.positive[0], own.weight[0], old))
        losses = [
            weighted_mean(cross_entropy(torch.logaddexp(z, old), p, w), (w > 0).float(), ctx)
            for z, p, w, old in ways
        ]

        def updates() -> Updates:
            new = [gather_rows(each.detach().float(), ctx.group) for each in slow]
            told = gather_rows(torch.stack([ids, groups], 1), ctx.group)
            size = min(settings.size, int(self.get_buffer("filled")) + len(told))
            moved = {f"queue{side}": _pushed(self.get_buffer(f"queue{side}"), new[side])
                     for side in (0, 1)}  # fmt: skip
            return {**moved, "queued": _pushed(self.get_buffer("queued"), told),
                    "filled": torch.tensor(size)}  # fmt: skip

        metrics = {"logit_scale": scale.detach(), "queue": self.get_buffer("filled").clone()}
        return Loss(torch.stack(losses).mean(), metrics, updates)

    def _older(
        self, q: Tensor, k: Tensor, scale: Tensor, ids: Tensor, groups: Tensor
    ) -> list[Tensor]:
        """The log-sum-exps of each side over the other's queue, of its own group, without samples
        of its own id."""
        filled = int(self.get_buffer("filled"))
        told = self.get_buffer("queued")[len(self.get_buffer("queued")) - filled :]
        columns = {"id": told[:, 0].contiguous(), "group": told[:, 1].contiguous()}
        rule = [Ne(ids, "id"), *([Eq(groups, "group")] if self.within else [])]
        found = []
        for mine, side in ((q, 1), (k, 0)):
            queue = self.get_buffer(f"queue{side}")
            keys = Local(rounded(queue[len(queue) - filled :], self.settings), columns)
            lse = Lse("rows", scale, None, rule)
            (z,) = lse_stats(mine, keys, [lse], backend=self.settings.backend).z
            found.append(z)
        return found


def _pushed(queue: Tensor, new: Tensor) -> Tensor:
    """The queue with new rows at its end, the oldest gone."""
    return torch.cat([queue, new.to(queue.dtype)])[-len(queue) :]
