"""A contrastive loss against the whole data set with small batches (SogCLR, Yuan et al. 2022;
iSogCLR, Qiu et al. 2023; FastCLIP, Wei et al. 2024).

The loss of sample i on one side, with h_ij = s_ij - s_ii:

    tau_i (log mean_{j != i} exp(h_ij / tau_i) + rho)

The mean is over the data set. A batch's mean g_i would bias the gradient through the logarithm. So
each sample keeps a running estimate, u_i <- (1 - gamma) u_i + gamma g_i, and the gradient is that
of tau_i g_i / u_i with u_i fixed. The table stores log u_i, which cannot overflow. So LibAUC's
offset, which differs between its ranks, is not needed.

Two modalities are two sides with separate estimates. Two views of one modality are one side with
one u_i: g_i is the mean over both views of i, each against both views of all others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gigabatch.kernels import Lse, Ne, key_source, lse_stats
from gigabatch.trainer.fields import Amount, Fraction, Pair
from gigabatch.trainer.objectives.base import Card, Context, Loss, Needs, Objective, Updates
from gigabatch.trainer.objectives.common import clamp_inward, count_same, mean_metric, valid_pairs
from gigabatch.trainer.objectives.reference import Benchmark, Example, ReferenceBatch, Value
from gigabatch.trainer.objectives.registry import register
from gigabatch.trainer.objectives.settings import CachedSettings, named_fields
from gigabatch.trainer.taps import parse_tap

LOG_U, TAU, MOMENTUM = range(3)
"""Kinds of table columns: estimate, temperature, and momentum of the temperature's gradient."""


class SogCLRSettings(CachedSettings):
    name: Literal["sogclr"]
    """A contrastive loss against the whole data set. A running estimate per sample removes the bias
    of small batches."""
    taps: Pair = ("image", "text")
    """The two tower outputs to compare. With two views of one modality, such as `[image, image@1]`,
    each view is compared with both views of all other samples; a sample has one estimate."""
    positives: str | None = None
    """A json field; samples with equal values are not negatives of each other."""
    temperatures: Literal["fixed", "shared", "individual"] = "fixed"
    """fixed: SogCLR, FastCLIP-v1. shared: one trained temperature, FastCLIP-v3. individual: one
    trained temperature per sample and side, iSogCLR, FastCLIP-v2."""
    temperature: float = Field(0.07, gt=0)
    """Initial temperature."""
    temperature_min: float = Field(0.01, gt=0)
    """shared, individual: lower limit of a temperature."""
    temperature_max: float = Field(1.0, gt=0)
    """shared, individual: upper limit of a temperature."""
    rho: float = Field(6.5, ge=0)
    """Penalty on temperatures; a larger value makes trained temperatures smaller."""
    gamma: float = Field(0.9, gt=0, le=1)
    """Weight of the batch's estimate in a sample's running estimate."""
    gamma_epochs: Amount = 0
    """Epochs over which that weight falls from 1 to `gamma` along a cosine; 0: always `gamma`."""
    temperature_lr: float = Field(0.01, gt=0)
    """individual: learning rate of a sample's temperature."""
    temperature_momentum: Fraction = 0.9
    """individual: momentum of the temperatures' gradients."""

    def columns(self) -> tuple[str, ...]:
        return named_fields(self.positives)

    def positives_field(self) -> str | None:
        return self.positives

    @model_validator(mode="after")
    def _check_temperatures(self) -> Self:
        if not self.temperature_min <= self.temperature <= self.temperature_max:
            raise ValueError("temperature must lie between temperature_min and temperature_max")
        return self


@register
class SogCLR(Objective[SogCLRSettings]):
    Settings = SogCLRSettings
    card = Card(
        "SogCLR, FastCLIP: a running estimate for each sample instead of a huge batch",
        "SogCLR, Yuan et al. 2022; iSogCLR, Qiu et al. 2023; FastCLIP, Wei et al. 2024",
        "mean_i tau_i (log mean_{j != i} exp((s_ij - s_ii) / tau_i) + rho), summed over both "
        "directions; its gradient is that of tau_i g_i / u_i, u_i <- (1 - gamma) u_i + gamma g_i. "
        "For two views of one modality, g_i is the mean over both views of i and the 2 N - 2 views "
        "of other samples",
        "4; for two views 16",
        "small batches, small GPUs: B = 16 estimates the gradient as B = 128 does; individual "
        "temperatures if concepts have a long tail",
        ("fastclip", "isogclr", "gcl"),
    )
    examples = {
        "": Example({"gamma": 0.6}),
        "falling gamma, labels": Example(
            {"gamma": 0.3, "gamma_epochs": 2, "positives": "concept"}, missing=True
        ),
        "fastclip v3": Example({"gamma": 0.5, "temperatures": "shared", "rho": 2.0}),
        "isogclr": Example(
            {"gamma": 0.5, "temperatures": "individual", "rho": 2.0, "temperature_lr": 0.002,
             "temperature": 0.05}
        ),
        "isogclr, rows missing": Example(
            {"temperatures": "individual", "temperature_lr": 0.05}, missing=True
        ),
        "two views": Example({"taps": ["image", "image@1"], "gamma": 0.6}, missing=True),
        "isogclr, two views, labels": Example(
            {"taps": ["image", "image@1"], "gamma": 0.5, "rho": 0.3, "temperatures": "individual",
             "temperature": 0.1, "temperature_min": 0.05, "temperature_max": 0.7,
             "positives": "concept"}
        ),
    }  # fmt: skip
    benchmarks = {
        "": Benchmark(),
        "individual": Benchmark({"temperatures": "individual"}),
        "two views": Benchmark({"taps": ("image", "image@1")}, share=0.5),
    }

    def __init__(self, settings: SogCLRSettings) -> None:
        super().__init__(settings)
        one, other = (parse_tap(tap).base for tap in settings.taps)
        self.sides = 1 if one == other else 2
        row, tau = [-math.inf] * self.sides, settings.temperature
        if settings.temperatures == "individual":
            row += [tau] * self.sides + [0.0] * self.sides
        self.needs = Needs(settings.taps, settings.columns(), tables={"state": tuple(row)})
        if settings.temperatures == "shared":
            self.log_temperature = nn.Parameter(torch.tensor(math.log(tau)))

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        return 4 if self.sides == 2 else 16

    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        settings = self.settings
        pairs = valid_pairs(outputs, meta, settings.taps, settings, self.needs.columns)
        q, k = pairs.vectors
        ids = pairs.columns[settings.positives or "sample"]
        state = meta["state"][pairs.valid]
        taus = self.temperatures(state)
        same, total = count_same(ids, ctx)
        negatives = total - same
        log_sums = (self._views if self.sides == 1 else self._modalities)(q, k, ids, taus, ctx)
        gamma, new_log_us, terms = self._gamma(ctx.epoch), [], []
        log_us = state[:, self._fields(LOG_U)].unbind(1)
        for log_sum, tau, log_u in zip(log_sums, taus, log_us, strict=True):
            term, new_log_u = _estimate(log_sum, tau, log_u, negatives, gamma, settings.rho)
            terms.append(term)
            new_log_us.append(new_log_u)
        value = ctx.world_size * torch.stack(terms).sum() / max(1, total)

        def updates() -> Updates:
            new = state.clone()
            new[:, self._fields(LOG_U)] = torch.stack(new_log_us, 1)
            if settings.temperatures == "individual":
                self._step_temperatures(new, taus, total / ctx.world_size)
            table = meta["state"].clone()
            table[pairs.valid] = new
            return {"state": table}

        mean_tau = torch.stack([mean_metric(tau.expand(len(q)), ctx) for tau in taus]).mean()
        return Loss(value, {"temperature": mean_tau}, updates)

    def sample_values(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        state = tables["state"].double()
        by_side = {"log_u": state[:, self._fields(LOG_U)]}
        seen = (by_side["log_u"] > -math.inf).all(1)
        if self.settings.temperatures == "individual":
            by_side["temperature"] = state[:, self._fields(TAU)]
        values = {
            f"{tap}_{name}": sides[:, side]
            for name, sides in by_side.items()
            for side, tap in enumerate(self.settings.taps)
            if self.sides > 1
        }
        values |= {name: sides.mean(1) for name, sides in by_side.items()}
        return {name: torch.where(seen, value, torch.nan) for name, value in values.items()}

    @torch.no_grad()
    def mean_temperature(self, tables: Mapping[str, Tensor]) -> float | None:
        return float(torch.stack([t.mean() for t in self.temperatures(tables["state"])]).mean())

    def _modalities(
        self, q: Tensor, k: Tensor, ids: Tensor, taus: list[Tensor], ctx: Context
    ) -> list[Tensor]:
        """Return [n] for each side: log sum_j exp(h_ij / tau_i) over the other side's negatives."""
        settings, negatives = self.settings, (Ne(ids, "id"),)
        keys = key_source(k, {"id": ids}, ctx.group, settings.gather_mode)
        scales = [1 / tau for tau in dict.fromkeys(taus)] * 2  # both sides may share one tensor
        lses = [
            Lse("rows", scales[0], None, negatives), Lse("columns", scales[1], None, negatives),
        ]  # fmt: skip
        stats = lse_stats(
            q, keys, lses, backend=settings.backend, cache_bytes=2**20 * settings.cache_mib
        )
        positive = (q.float() * k.float()).sum(1)
        return [z - positive / tau for z, tau in zip(stats.z, taus, strict=True)]

    def _views(
        self, q: Tensor, k: Tensor, ids: Tensor, taus: list[Tensor], ctx: Context
    ) -> list[Tensor]:
        """Like `_modalities`, for two views of one modality: each view of i is compared with both
        views of every negative; the result is averaged over all four combinations."""
        settings, z = self.settings, torch.cat([q, k])
        ids = torch.cat([ids, ids])
        keys = key_source(z, {"id": ids}, ctx.group, settings.gather_mode)
        scale = torch.cat([1 / taus[0]] * 2) if taus[0].ndim else 1 / taus[0]
        lse = Lse("rows", scale, None, (Ne(ids, "id"),))
        stats = lse_stats(
            z, keys, [lse], backend=settings.backend, cache_bytes=2**20 * settings.cache_mib
        )
        positive = (q.float() * k.float()).sum(1)
        # A row without negatives has z = -inf, whose gradient would be NaN.
        lses = torch.where(stats.z[0] > -torch.inf, stats.z[0], 0)
        return [torch.logaddexp(*lses.chunk(2)) - positive / taus[0] - math.log(4)]

    def _fields(self, kind: int) -> slice:
        """Return the table's columns of one kind, one per side."""
        return slice(kind * self.sides, (kind + 1) * self.sides)

    def temperatures(self, state: Tensor) -> list[Tensor]:
        """Return each side's temperature: 0-dimensional, or, if individual, a leaf tensor [n]."""
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
        """Step each sample's temperature by projected gradient descent with momentum, in place.
        Multiplying by `rows` undoes the division of the loss by the number of rows."""
        settings = self.settings
        for side, tau in enumerate(taus):
            gradient = torch.zeros_like(tau) if tau.grad is None else tau.grad * rows
            momentum = state[:, self._fields(MOMENTUM)][:, side]
            momentum.lerp_(gradient, 1 - settings.temperature_momentum)
            moved = tau.detach() - settings.temperature_lr * momentum
            state[:, self._fields(TAU)][:, side] = moved.clamp(
                settings.temperature_min, settings.temperature_max
            )

    @staticmethod
    def reference(settings: SogCLRSettings, batch: ReferenceBatch) -> Value:
        one, other = (tap.partition("@")[0] for tap in settings.taps)
        gamma = settings.gamma
        if batch.step - 1 < settings.gamma_epochs:
            cosine = math.cos(math.pi * (batch.step - 1) / settings.gamma_epochs)
            gamma += (1 - gamma) * (1 + cosine) / 2
        return (_reference_views if one == other else _reference_pairs)(settings, batch, gamma)


def _estimate(
    z: Tensor, tau: Tensor, log_u: Tensor, negatives: Tensor, gamma: float, rho: float
) -> tuple[Tensor, Tensor]:
    """Return the sum of a side's terms, and the new log u [n].

    `z` [n] is the log of the sum of exp(h / tau) over negatives. A row without negatives keeps its
    estimate and adds nothing.
    """
    has_negative = negatives > 0
    log_g = torch.where(has_negative, z, 0) - negatives.clamp(min=1).log()
    with torch.no_grad():
        kept = math.log(1 - gamma) if gamma < 1 else -math.inf
        blended = torch.logaddexp(log_u + kept, log_g + math.log(gamma))
        # A sample's first estimate is that of the batch.
        first_or_blended = torch.where(log_u == -math.inf, log_g, blended)
        new = torch.where(has_negative, first_or_blended, log_u)
        share = torch.exp(log_g - new)
    surrogate = tau.detach() * share * log_g + tau * (new + rho)
    term = surrogate - surrogate.detach() + tau.detach() * (new + rho)
    return torch.where(has_negative, term, 0).sum(), new


def _reference_pairs(settings: SogCLRSettings, batch: ReferenceBatch, gamma: float) -> Value:
    """Compute the reference for two modalities, where each side of each sample has its own u and
    temperature."""
    valid, memory = batch.complete(*settings.taps), batch.memory
    samples = batch.meta["sample"][valid].tolist()
    ids = batch.meta[settings.positives or "sample"][valid]
    image, text = (batch.outputs[tap][valid] for tap in settings.taps)
    scores, negative = image @ text.T, ids[:, None] != ids[None]
    value = surrogate = torch.zeros((), dtype=torch.float64)
    written = {}
    for side, s in enumerate((scores, scores.T)):
        h = s - s.diagonal()[:, None]
        for i, sample in enumerate(samples):
            u, tau, momentum = memory.get((sample, side), (None, settings.temperature, 0.0))
            temperature = torch.tensor(tau, dtype=torch.float64)
            if settings.temperatures == "shared":
                temperature = batch.parameters["log_temperature"].exp()
            fixed = temperature.detach()
            others = h[i][negative[i]]
            if len(others) == 0:
                continue
            g = torch.exp(others / fixed).mean()
            new, tau_gradient = _reference_update(u, g, others, fixed, gamma, settings.rho)
            # The gradient as the papers write it: of tau g / u in the features, and in tau.
            surrogate = surrogate + fixed * g / new
            if settings.temperatures == "shared":
                surrogate = surrogate + tau_gradient * temperature
            value = value + fixed * (new.log() + settings.rho)
            written[sample, side] = (new, *_reference_step(settings, tau, momentum, tau_gradient))
    memory |= written
    return value.detach() / len(samples), surrogate / len(samples)


def _reference_views(settings: SogCLRSettings, batch: ReferenceBatch, gamma: float) -> Value:
    """Compute the reference for two views of one modality, with one u and one temperature per
    sample."""
    valid, memory = batch.complete(*settings.taps), batch.memory
    samples = batch.meta["sample"][valid].tolist()
    ids = batch.meta[settings.positives or "sample"][valid]
    views = [batch.outputs[tap][valid] for tap in settings.taps]
    positive = (views[0] * views[1]).sum(1)
    value = surrogate = torch.zeros((), dtype=torch.float64)
    written = {}
    for i, sample in enumerate(samples):
        u, tau, momentum = memory.get(sample, (None, settings.temperature, 0.0))
        others = ids != ids[i]
        h = torch.stack([view @ anchor[i] for anchor in views for view in views])[:, others]
        h = h - positive[i]
        g = torch.exp(h / tau).mean()
        fixed = torch.tensor(tau, dtype=torch.float64)
        new, tau_gradient = _reference_update(u, g, h.flatten(), fixed, gamma, settings.rho)
        surrogate = surrogate + tau * g / new
        value = value + tau * (new.log() + settings.rho)
        written[sample] = (new, *_reference_step(settings, tau, momentum, tau_gradient))
    memory |= written
    return value.detach() / len(samples), surrogate / len(samples)


def _reference_update(
    u: Tensor | None, g: Tensor, h: Tensor, tau: Tensor, gamma: float, rho: float
) -> tuple[Tensor, Tensor]:
    """Return the new u, and the gradient with respect to tau."""
    new = g.detach() if u is None else (1 - gamma) * u + gamma * g.detach()
    share = torch.exp(h.detach() / tau) / (h.numel() * new)
    return new, new.log() + rho - (share * h.detach()).sum() / tau


def _reference_step(
    settings: SogCLRSettings, tau: float, momentum: float, gradient: Tensor
) -> tuple[float, float]:
    """Return a sample's next temperature and momentum."""
    kept = settings.temperature_momentum
    momentum = kept * momentum + (1 - kept) * float(gradient)
    if settings.temperatures != "individual":
        return tau, momentum
    low, high = settings.temperature_min, settings.temperature_max
    return min(max(tau - settings.temperature_lr * momentum, low), high), momentum
