"""Each objective written from its formula in float64, with whole matrices and plain autograd.

Shares nothing with the product. A formula gets the batch's rows by tap, the objective's parameters,
the metadata, what was kept so far (`memory`, which it changes), and the step, from 1; it returns
the value, and where the gradient is not the value's own, a scalar that has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Rows = dict[str, Tensor]
Memory = dict[str, Any]
Formula = Callable[..., tuple[Tensor, Tensor | None]]


def here(meta: Rows) -> Tensor:
    """Rows that have both modalities."""
    everyone = torch.ones_like(meta["sample"], dtype=torch.bool)
    return meta.get("image_present", everyone) & meta.get("text_present", everyone)


def infonce(
    rows: Rows, p: Rows, meta: Rows, memory: Memory, step: int,
    taps: tuple[str, str] = ("image", "text"), label: str = "sample", smoothing: float = 0.0,
    within: str | None = None,
) -> tuple[Tensor, None]:  # fmt: skip
    logits = p["log_scale"].exp() * rows[taps[0]] @ rows[taps[1]].T
    same = meta[label][:, None] == meta[label][None]
    allowed = torch.ones_like(same)
    if within:
        allowed = meta[within][:, None] == meta[within][None]
    target = same.double() / same.sum(1, keepdim=True)
    target = (1 - smoothing) * target + smoothing / len(same)
    halves = []
    for x in (logits, logits.T):
        logp = x.masked_fill(~allowed, -torch.inf).log_softmax(1)
        halves.append(-(target * torch.where(target > 0, logp, 0)).sum(1).mean())
    return (halves[0] + halves[1]) / 2, None


def siglip(
    rows: Rows, p: Rows, meta: Rows, memory: Memory, step: int, label: str = "sample"
) -> tuple[Tensor, None]:
    keep = here(meta)
    image, text, ids = rows["image"][keep], rows["text"][keep], meta[label][keep]
    logits = p["log_scale"].exp() * image @ text.T + p["bias"]
    own = torch.eye(len(ids), dtype=torch.bool)
    each = F.softplus(torch.where(own, -logits, logits))
    counts = own | (ids[:, None] != ids[None])
    return (each * counts).sum() / len(ids), None


def supcon(
    rows: Rows, p: Rows, meta: Rows, memory: Memory, step: int, taps: tuple[str, ...],
    label: str = "sample",
) -> tuple[Tensor, None]:  # fmt: skip
    z = torch.cat([rows[tap] for tap in taps])
    ids = torch.cat([meta[label]] * len(taps))
    itself = torch.eye(len(z), dtype=torch.bool)
    logp = (p["log_scale"].exp() * z @ z.T).masked_fill(itself, -torch.inf).log_softmax(1)
    positive = (ids[:, None] == ids[None]) & ~itself
    count = positive.sum(1)
    each = -torch.where(positive, logp, 0).sum(1) / count.clamp(min=1)
    return each[count > 0].mean(), None


def sogclr(
    rows: Rows, p: Rows, meta: Rows, memory: Memory, step: int, gamma: float,
    gamma_epochs: int = 0, kind: str = "fixed", tau: float = 0.07, rho: float = 6.5,
    lr: float = 0.0, label: str = "sample", low: float = 0.01, high: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    keep = here(meta)
    names = meta["sample"][keep].tolist()
    ids = meta[label][keep]
    scores = rows["image"][keep] @ rows["text"][keep].T
    if step - 1 < gamma_epochs:
        gamma += (1 - gamma) * (1 + math.cos(math.pi * (step - 1) / gamma_epochs)) / 2
    negative = ids[:, None] != ids[None]
    value = slope = torch.zeros((), dtype=torch.float64)
    written: Memory = {}
    for side, s in enumerate((scores, scores.T)):
        h = s - s.diagonal()[:, None]
        for i, name in enumerate(names):
            u, t, momentum = memory.get((name, side), (None, tau, 0.0))
            temperature = torch.tensor(t, dtype=torch.float64)
            if kind == "shared":
                temperature = p["log_temperature"].exp()
            fixed = temperature.detach()
            others = h[i][negative[i]]
            if len(others) == 0:
                continue
            g = torch.exp(others / fixed).mean()
            new = g.detach() if u is None else (1 - gamma) * u + gamma * g.detach()
            p_ij = torch.exp(others.detach() / fixed) / (len(others) * new)
            slope_tau = new.log() + rho - (p_ij * others.detach()).sum() / fixed
            # The gradient as the papers write it: of tau g / u in the features, and in tau.
            slope = slope + (fixed * g / new + (slope_tau * temperature if kind == "shared" else 0))
            value = value + fixed * (new.log() + rho)
            momentum = 0.9 * momentum + 0.1 * float(slope_tau)
            moved = min(max(t - lr * momentum, low), high) if kind == "individual" else t
            written[name, side] = (new, moved, momentum)
    memory |= written
    return value.detach() / len(names), slope / len(names)


def late(
    rows: Rows, p: Rows, meta: Rows, memory: Memory, step: int, symmetric: bool,
    taps: tuple[str, str] = ("image.tokens", "text.tokens"),
) -> tuple[Tensor, None]:  # fmt: skip
    q, k = (rows[tap] for tap in taps)
    real = [
        meta["text_mask"] if tap.startswith("text") else torch.ones(r.shape[:2], dtype=torch.bool)
        for tap, r in ((taps[0], q), (taps[1], k))
    ]
    losses = []
    for a, b, of_a, of_b in ((q, k, *real), (k, q, *real[::-1]))[: 1 + symmetric]:
        products = torch.einsum("itd,jud->ijtu", a, b)
        best = products.masked_fill(~of_b[None, :, None], -torch.inf).amax(3)
        s = (best * of_a[:, None]).sum(2) / of_a.sum(1)[:, None]
        losses.append(F.cross_entropy(p["log_scale"].exp() * s, torch.arange(len(a))))
    return torch.stack(losses).mean(), None


def both(
    rows: Rows, p: Rows, meta: Rows, memory: Memory, step: int, weights: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    one, _ = infonce(rows, {"log_scale": p["terms.0.log_scale"]}, meta, memory, step)
    value, slope = sogclr(rows, {}, meta, memory, step, 0.6)
    return (
        weights[0] * one.detach() + weights[1] * value,
        weights[0] * one + weights[1] * slope,
    )
