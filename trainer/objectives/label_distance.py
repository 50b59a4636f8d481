"""Contrast by continuous labels (SupReMix, Wu et al. 2024, number 42): weights, which carry its
gain, and mixtures of rows as further keys.

Mixtures are constants, not brought back to unit length. A hard negative of row i is lam z_i + (1 -
lam) z_j, for every j of another label: its label lies at (1 - lam) |y_i - y_j| from i's, and its
score is lam s_ii + (1 - lam) s_ij, a scale a row and a constant of the scores that are there. A
hard positive is lam z_j + (1 - lam) z_k of two rows whose labels lie on either side of y_i, within
the window, lam such that the mixture's is y_i. The paper takes all such pairs, N^2 a row; here each
row takes some, drawn by seed and step. In hard negatives each row has one lam.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gigabatch.data.rng import key, uniforms
from gigabatch.kernels import AbsDiff, Lse, Ne, gather_rows, key_source, lse_stats, take
from gigabatch.kernels.loss_terms import cross_entropy
from gigabatch.kernels.sources import KeySource, all_sum, global_row_indices
from gigabatch.trainer.config import LabelDistanceSettings
from gigabatch.trainer.objectives.base import About, Context, Loss, Needs
from gigabatch.trainer.objectives.common import Scaled, over_widths, present, weighted_mean
from gigabatch.trainer.objectives.supcon import among

BETA = (2, 8)
"""Of lam in hard negatives: the second smallest of nine uniform numbers."""


class LabelDistance(Scaled):
    about = About(
        "SupCon for continuous labels: the farther a label, the stronger a negative",
        "SupReMix, 42",
        "mean_i [log sum_{j != i} (1 + distance |y_i - y_j|) exp(l_ij) - mean_{p != i, y_p = y_i} "
        "l_ip]; mixed_negatives adds keys lam z_i + (1 - lam) z_j, mixed_positives positives "
        "lam z_j + (1 - lam) z_k with y_j < y_i < y_k",
        "4 T^2 for T taps; with mixed_negatives 7 T^2",
        "regression: ages, depths, doses, prices",
    )

    def __init__(self, settings: LabelDistanceSettings, group: str | None, width: int) -> None:
        super().__init__(settings)
        self.settings = settings
        self.needs = Needs(settings.taps, numbers=(settings.label,))

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        return (4 + 3 * self.settings.mixed_negatives) * len(self.settings.taps) ** 2

    @over_widths
    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        scale, settings = self.scale(), self.settings
        found = [
            present(outputs, meta, tap, settings, {"label": settings.label})
            for tap in settings.taps
        ]
        z, y = torch.cat([rows for rows, _ in found]), torch.cat([c["label"] for _, c in found])
        rule = (AbsDiff(y, "id", torch.full_like(y, settings.distance)),)
        total, positive, weight = among(z, y, rule, scale, settings, ctx)
        if settings.mixed_negatives or settings.mixed_positives:
            keys = key_source(z.detach(), {"label": y}, ctx.group, settings.gather_mode)
            rows = Rows(z, y, keys, _numbers([len(r) for r, _ in found], z.device, ctx))
            parts = [total[None]]
            if settings.mixed_negatives:
                parts.append(self._negatives(rows, scale, ctx)[None])
            if settings.mixed_positives:
                scores, real = self._positives(rows, ctx)
                parts.append((scale * scores).masked_fill(~real, -torch.inf).T)
                positive = positive + (scale * scores * real).sum(1)
                weight = weight + real.sum(1)
            total = _logsumexp(torch.cat(parts))
        each = cross_entropy(total, positive, weight)
        value = weighted_mean(each, (weight > 0).float(), ctx)
        return Loss(value, {"logit_scale": scale.detach()})

    def _negatives(self, rows: Rows, scale: Tensor, ctx: Context) -> Tensor:
        """[n]: the log-sum-exp of a row's mixtures with all rows of other labels."""
        a, b = BETA
        drawn = rows.uniforms(key(ctx.seed, "mixed negatives", ctx.step), a + b - 1)
        lam = drawn.sort(1).values[:, a - 1]
        distance = AbsDiff(rows.y, "label", (1 - lam) * self.settings.distance)
        lse = Lse("rows", scale * (1 - lam), None, (distance, Ne(rows.y, "label")))
        (z,) = lse_stats(rows.z, rows.keys, [lse], backend=self.settings.backend).z
        own = (rows.z.float() * rows.z.detach().float()).sum(1)
        return z + scale * lam * own

    def _positives(self, rows: Rows, ctx: Context) -> tuple[Tensor, Tensor]:
        """[n, mixtures]: scores with mixtures of a row's own label, and whether there are any."""
        settings, count = self.settings, self.settings.mixed_positives
        stream = key(ctx.seed, "mixed positives", ctx.step)
        drawn = rows.uniforms(stream, 2 * count).view(-1, count, 2)
        y, everyone = rows.y[:, None], gather_rows(rows.y, ctx.group)
        numbers = gather_rows(rows.numbers, ctx.group)
        order = numbers.argsort()  # the same for any number of ranks
        order = order[everyone[order].argsort(stable=True)]
        labels, empty = everyone[order].contiguous(), y.new_zeros(len(y), count)
        below = _drawn(labels, y - settings.window, y, False, drawn[..., 0])
        above = _drawn(labels, y, y + settings.window, True, drawn[..., 1])
        real = (below >= 0) & (above >= 0)
        if not len(order):
            return empty, real
        index = torch.stack([torch.where(real, at, 0) for at in (below, above)])
        y_j, y_k = labels[index]
        lam = torch.where(real, (y_k - y) / (y_k - y_j), 0).unsqueeze(2)
        chosen = torch.where(real, order[index], -1).flatten()
        z_j, z_k = take(rows.keys, chosen).keys.float().view(2, *real.shape, rows.z.shape[1])
        mixed = (lam * z_j + (1 - lam) * z_k).detach()
        return (rows.z.float().unsqueeze(1) * mixed).sum(2), real


@dataclass(frozen=True)
class Rows:
    """This rank's rows `z` [n, D] with labels `y`; `keys`: all ranks' as constants. `numbers`: of
    the rows, the same for any number of ranks."""

    z: Tensor
    y: Tensor
    keys: KeySource
    numbers: Tensor

    def uniforms(self, stream: int, columns: int) -> Tensor:
        """float32 [n, columns] in [0, 1), by the rows' numbers."""
        drawn = torch.from_numpy(uniforms(stream, self.keys.total, columns))
        return drawn[self.numbers.cpu()].to(self.z.device)


def _numbers(sizes: Sequence[int], device: torch.device, ctx: Context) -> Tensor:
    """The numbers of this rank's rows, of several taps: one's of all ranks, then another's."""
    found, first = [], 0
    for size in sizes:
        found.append(first + global_row_indices(size, device, ctx.group))
        first += int(all_sum(torch.tensor(size, device=device), ctx.group))
    return torch.cat(found)


def _drawn(labels: Tensor, low: Tensor, high: Tensor, above: bool, u: Tensor) -> Tensor:
    """Places [n, m] in sorted labels, one of those in [low, high), or `above` (low, high], for each
    of `u` in [0, 1); -1 where there is none."""
    first, last = (torch.searchsorted(labels, y, right=above) for y in (low, high))
    count = last - first
    at = torch.minimum((u * count).long(), count - 1)
    return torch.where(count > 0, first + at, -1)


def _logsumexp(parts: Tensor) -> Tensor:
    """Over parts [p, n]; -inf, without a gradient, where all are."""
    some = (parts > -torch.inf).any(0)
    found = torch.where(some, parts, 0).logsumexp(0)
    return torch.where(some, found, -torch.inf)
