"""Contrast against the whole data set with small batches (SogCLR, Yuan et al. 2022; iSogCLR, Qiu et
al. 2023, number 14; FastCLIP, Wei et al. 2024).

The loss of sample i on one side, h_ij = s_ij - s_ii:

    tau_i (log mean_{j != i} exp(h_ij / tau_i) + rho)

The mean is over the data set; a batch's own mean g_i would bias the gradient through the
logarithm. So each sample keeps a running estimate, u_i <- (1 - gamma) u_i + gamma g_i, and the
gradient is that of tau_i g_i / u_i, u_i fixed. Here u_i is kept as its logarithm: nothing
overflows, and LibAUC's offset, which its ranks do not share, is not needed.

Two modalities are two sides, each with estimates of its own. Two views of one modality are one: g_i
is the mean over both views of i, each against both views of all others, and there is one u_i.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gigabatch.kernels import Lse, Ne, key_source, lse_stats
from gigabatch.trainer.config import SogCLRSettings
from gigabatch.trainer.objectives.base import About, Context, Loss, Needs, Objective, Updates
from gigabatch.trainer.objectives.common import clamp_inward, count_same, mean_metric, paired
from gigabatch.trainer.taps import parse_tap

LOG_U, TAU, MOMENTUM = range(3)  # the kinds of the table's fields


class SogCLR(Objective):
    about = About(
        "SogCLR, FastCLIP: a running estimate for each sample in place of a huge batch",
        "iSogCLR, Qiu et al. 2023, 14; SogCLR, Yuan et al. 2022; FastCLIP, Wei et al. 2024",
        "mean_i tau_i (log mean_{j != i} exp((s_ij - s_ii) / tau_i) + rho), summed over both ways; "
        "gradient of tau_i g_i / u_i with u_i <- (1 - gamma) u_i + gamma g_i. Two views of one "
        "modality: g_i over both views of i and of the 2 N - 2 others",
        "4; of two views 16",
        "small batches, small GPUs: B = 16 estimates the gradient as B = 128 does; temperatures "
        "for each sample where frequencies have a long tail",
    )

    def __init__(self, settings: SogCLRSettings, group: str | None, width: int) -> None:
        super().__init__()
        self.settings = settings
        one, other = (parse_tap(tap).base for tap in settings.taps)
        self.sides = 1 if one == other else 2
        row, tau = [-math.inf] * self.sides, settings.temperature
        if settings.temperatures == "individual":
            row += [tau] * self.sides + [0.0] * self.sides
        columns = (settings.positives,) if settings.positives else ()
        self.needs = Needs(settings.taps, columns, tables={"state": tuple(row)})
        if settings.temperatures == "shared":
            self.log_temperature = nn.Parameter(torch.tensor(math.log(tau)))

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        return 4 if self.sides == 2 else 16

    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        settings = self.settings
        rows = paired(outputs, meta, settings.taps, settings, self.needs.columns)
        q, k = rows.vectors
        ids = rows.columns[settings.positives or "sample"]
        state, taus = meta["state"][rows.here], self.temperatures(meta["state"][rows.here])
        same, total = count_same(ids, ctx)
        negatives = total - same
        means = (self._views if self.sides == 1 else self._modalities)(q, k, ids, taus, ctx)
        gamma, known, terms = self._gamma(ctx.epoch), [], []
        log_us = state[:, self._fields(LOG_U)].unbind(1)
        for log_sum, tau, log_u in zip(means, taus, log_us, strict=True):
            term, log_u = _estimate(log_sum, tau, log_u, negatives, gamma, settings.rho)
            terms.append(term)
            known.append(log_u)
        value = ctx.world_size * torch.stack(terms).sum() / max(1, total)

        def updates() -> Updates:
            new = state.clone()
            new[:, self._fields(LOG_U)] = torch.stack(known, 1)
            if settings.temperatures == "individual":
                self._step_temperatures(new, taus, total / ctx.world_size)
            table = meta["state"].clone()
            table[rows.here] = new
            return {"state": table}

        mean_tau = torch.stack([mean_metric(tau.expand(len(q)), ctx) for tau in taus]).mean()
        return Loss(value, {"temperature": mean_tau}, updates)

    def of_samples(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        state = tables["state"].double()
        told = {"log_u": state[:, self._fields(LOG_U)]}
        seen = (told["log_u"] > -math.inf).all(1)
        if self.settings.temperatures == "individual":
            told["temperature"] = state[:, self._fields(TAU)]
        found = {
            f"{tap}_{name}": sides[:, side]
            for name, sides in told.items()
            for side, tap in enumerate(self.settings.taps)
            if self.sides > 1
        }
        found |= {name: sides.mean(1) for name, sides in told.items()}
        return {name: torch.where(seen, values, torch.nan) for name, values in found.items()}

    def _modalities(
        self, q: Tensor, k: Tensor, ids: Tensor, taus: list[Tensor], ctx: Context
    ) -> list[Tensor]:
        """Of each side [n]: log sum_j exp(h_ij / tau_i) over the other side's negatives."""
        settings, others = self.settings, (Ne(ids, "id"),)
        keys = key_source(k, {"id": ids}, ctx.group, settings.gather_mode)
        scales = [1 / tau for tau in dict.fromkeys(taus)] * 2  # one, if they share it
        lses = [Lse("rows", scales[0], None, others), Lse("columns", scales[1], None, others)]
        stats = lse_stats(
            q, keys, lses, backend=settings.backend, cache_bytes=2**20 * settings.cache_mib
        )
        own = (q.float() * k.float()).sum(1)
        return [z - own / tau for z, tau in zip(stats.z, taus, strict=True)]

    def _views(
        self, q: Tensor, k: Tensor, ids: Tensor, taus: list[Tensor], ctx: Context
    ) -> list[Tensor]:
        """[n]: the same over both views of the negatives, the mean of both views of i; halved,
        since there are two of each negative."""
        settings, z = self.settings, torch.cat([q, k])
        ids = torch.cat([ids, ids])
        keys = key_source(z, {"id": ids}, ctx.group, settings.gather_mode)
        scale = torch.cat([1 / taus[0]] * 2) if taus[0].ndim else 1 / taus[0]
        lse = Lse("rows", scale, None, (Ne(ids, "id"),))
        stats = lse_stats(
            z, keys, [lse], backend=settings.backend, cache_bytes=2**20 * settings.cache_mib
        )
        own = (q.float() * k.float()).sum(1)
        each = torch.where(stats.z[0] > -torch.inf, stats.z[0], 0)  # rows without a negative
        return [torch.logaddexp(*each.chunk(2)) - own / taus[0] - math.log(4)]

    def _fields(self, kind: int) -> slice:
        """The table's fields of one kind, of each side."""
        return slice(kind * self.sides, (kind + 1) * self.sides)

    def temperatures(self, state: Tensor) -> list[Tensor]:
        """Of each side: 0-dimensional, or [n], each a leaf."""
        settings = self.settings
        if settings.temperatures == "individual":
            return [tau.clone().requires_grad_() for tau in state[:, self._fields(TAU)].unbind(1)]
        if settings.temperatures == "fixed":
            return [torch.tensor(settings.temperature, device=state.device)] * self.sides
        low, high = math.log(settings.temperature_min), math.log(settings.temperature_max)
        return [clamp_inward(self.log_temperature, low, high).exp()] * self.sides

    def _gamma(self, epoch: int) -> float:
        settings = self.settings
        if epoch >= settings.gamma_epochs:
            return settings.gamma
        falling = (1 + math.cos(math.pi * epoch / settings.gamma_epochs)) / 2
        return settings.gamma + (1 - settings.gamma) * falling

    def _step_temperatures(self, state: Tensor, taus: list[Tensor], rows: float) -> None:
        """Projected descent with momentum, of each sample alone. `rows`: what undoes the mean."""
        settings = self.settings
        for side, tau in enumerate(taus):
            slope = torch.zeros_like(tau) if tau.grad is None else tau.grad * rows
            momentum = state[:, self._fields(MOMENTUM)][:, side]
            momentum.lerp_(slope, 1 - settings.temperature_momentum)
            moved = tau.detach() - settings.temperature_lr * momentum
            state[:, self._fields(TAU)][:, side] = moved.clamp(
                settings.temperature_min, settings.temperature_max
            )


def _estimate(
    z: Tensor, tau: Tensor, log_u: Tensor, negatives: Tensor, gamma: float, rho: float
) -> tuple[Tensor, Tensor]:
    """The sum of a side's terms, and the new log u [n]. `z`: log sum over negatives of
    exp(h / tau); a row that has none keeps its estimate and counts nothing."""
    has = negatives > 0
    log_g = torch.where(has, z, 0) - negatives.clamp(min=1).log()
    with torch.no_grad():
        kept = math.log(1 - gamma) if gamma < 1 else -math.inf
        blended = torch.logaddexp(log_u + kept, log_g + math.log(gamma))
        # The first estimate of a sample is the batch's own.
        new = torch.where(has, torch.where(log_u == -math.inf, log_g, blended), log_u)
        share = torch.exp(log_g - new)
    slope = tau.detach() * share * log_g + tau * (new + rho)
    term = slope - slope.detach() + tau.detach() * (new + rho)
    return torch.where(has, term, 0).sum(), new
