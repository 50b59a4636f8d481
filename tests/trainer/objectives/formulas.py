"""Each objective written from its formula in float64, with whole matrices and plain autograd.

Shares nothing with the product. A formula gets the batch's rows by tap, the objective's parameters,
the metadata, what was kept so far (`memory`, which it changes), and the step, from 1; it returns
the value, and where the gradient is not the value's own, a scalar that has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gigabatch.data.rng import key, permute, uniforms

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
    within: str | None = None, phi: float | None = None,
) -> tuple[Tensor, None]:  # fmt: skip
    logits = p["log_scale"].exp() * rows[taps[0]] @ rows[taps[1]].T
    of_text = torch.arange(len(rows[taps[1]])) // (len(rows[taps[1]]) // len(rows[taps[0]]))
    same = meta[label][:, None] == meta[label][of_text][None]
    allowed = torch.ones_like(same)
    if within:
        allowed = meta[within][:, None] == meta[within][of_text][None]
        same = same & allowed
    if phi is not None:
        t = meta["teacher: npy"].double()
        alike = F.cosine_similarity(t[:, None], t[of_text][None], dim=2)
        allowed = allowed & ((alike <= phi) | same)
        assert not allowed.all()
    halves = []
    for x, right, keep in ((logits, same, allowed), (logits.T, same.T, allowed.T)):
        target = right.double() / right.sum(1, keepdim=True)
        target = (1 - smoothing) * target + smoothing / target.shape[1]
        logp = x.masked_fill(~keep, -torch.inf).log_softmax(1)
        halves.append(-(target * torch.where(target > 0, logp, 0)).sum(1).mean())
    return (halves[0] + halves[1]) / 2, None


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


def nested(
    rows: Rows, p: Rows, meta: Rows, memory: Memory, step: int, inner: str,
    widths: tuple[int, ...], **how: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    total = torch.zeros((), dtype=torch.float64)
    for d in widths:
        short = {tap: unit(r[..., :d]) if d < r.shape[-1] else r for tap, r in rows.items()}
        total = total + globals()[inner](short, p, meta, memory, step, **how)[0]
    return total / len(widths), None


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


def sogclr_views(
    rows: Rows, p: Rows, meta: Rows, memory: Memory, step: int, gamma: float, rho: float = 6.5,
    tau: float = 0.07, lr: float = 0.0, label: str = "sample", low: float = 0.01,
    high: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of one modality: anchors of both views, negatives of both views, one u and tau a sample."""
    keep = meta.get("image_present", torch.ones_like(meta["sample"], dtype=torch.bool))
    names, ids = meta["sample"][keep].tolist(), meta[label][keep]
    views = [rows["image"][keep], rows["image@1"][keep]]
    own = (views[0] * views[1]).sum(1)
    value = slope = torch.zeros((), dtype=torch.float64)
    written: Memory = {}
    for i, name in enumerate(names):
        u, t, momentum = memory.get(name, (None, tau, 0.0))
        others = ids != ids[i]
        h = torch.stack([view @ anchor[i] for anchor in views for view in views])[:, others]
        h = h - own[i]
        g = torch.exp(h / t).mean()
        new = g.detach() if u is None else (1 - gamma) * u + gamma * g.detach()
        share = torch.exp(h.detach() / t) / (h.numel() * new)
        slope_tau = float(new.log() + rho - (share * h.detach()).sum() / t)
        slope, value = slope + t * g / new, value + t * (new.log() + rho)
        momentum = 0.9 * momentum + 0.1 * slope_tau
        moved = min(max(t - lr * momentum, low), high) if lr else t
        written[name] = (new, moved, momentum)
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


def cross(logits: Tensor, same: Tensor) -> Tensor:
    """[n]: minus the mean log-probability of each row's right answers."""
    return -(logits.log_softmax(1)[:, : same.shape[1]] * same).sum(1) / same.sum(1)


def queue(
    rows: Rows, p: Rows, meta: Rows, memory: Memory, step: int, size: int,
    label: str = "sample", within: str | None = None,
) -> tuple[Tensor, None]:  # fmt: skip
    keep = here(meta)
    ids = meta[label][keep]
    groups = meta[within][keep] if within else torch.zeros_like(ids)
    held = memory.setdefault("queue", [])
    ways = []
    for mine, theirs, side in (("image", "text", 1), ("text", "image", 0)):
        old = torch.stack([e[side] for e in held]) if held else torch.zeros(0, 6).double()
        old_ids, old_groups = (torch.tensor([e[i] for e in held]).long() for i in (2, 3))
        same = (ids[:, None] == ids[None]) & (groups[:, None] == groups[None])
        allowed = torch.cat([torch.ones_like(same), ids[:, None] != old_ids[None]], 1) & (
            groups[:, None] == torch.cat([groups, old_groups])[None]
        )
        for batch in (rows[theirs], rows[f"teacher.{theirs}"]):
            scores = p["log_scale"].exp() * rows[mine][keep] @ torch.cat([batch[keep], old]).T
            logp = scores.masked_fill(~allowed, -torch.inf).log_softmax(1)
            own = torch.where(same, logp[:, : len(ids)], 0)
            ways.append((-own.sum(1) / same.sum(1)).mean())
    slow = zip(rows["teacher.image"][keep], rows["teacher.text"][keep], ids, groups, strict=True)
    held += [(i, t, int(a), int(b)) for i, t, a, b in slow]
    memory["queue"] = held[-size:]
    return torch.stack(ways).mean(), None


def two_gaussians(values: list[float]) -> tuple[Any, Any, Any]:
    """Plain expectation maximisation from the mean -+ a standard deviation."""
    x = torch.tensor(values, dtype=torch.float64)
    spread = x.std(correction=0)
    means, variances = (
        torch.stack([x.mean() - spread, x.mean() + spread]),
        spread**2 * torch.ones(2),
    )
    shares = torch.full((2,), 0.5, dtype=torch.float64)
    for _ in range(5000):
        density = (
            shares * torch.exp(-((x[:, None] - means) ** 2) / (2 * variances)) / variances**0.5
        )
        p = density / density.sum(1, keepdim=True)
        shares = p.mean(0)
        means = (p * x[:, None]).sum(0) / p.sum(0)
        variances = ((p * (x[:, None] - means) ** 2).sum(0) / p.sum(0)).clamp(min=1e-3 * spread**2)
    order = means.argsort()
    return means[order], variances[order], shares[order]


def noisy(
    rows: Rows, p: Rows, meta: Rows, memory: Memory, step: int, hinge: bool = False
) -> tuple[Tensor, None]:
    keep = here(meta)
    names = meta["sample"][keep].tolist()
    clean = torch.ones(len(names), dtype=torch.float64)
    if step > 1:
        means, variances, shares = two_gaussians(list(memory.values()))
        for i, name in enumerate(names):
            if name in memory:
                x = min(max(memory[name], float(means[0])), float(means[1]))
                each = shares * torch.exp(-((x - means) ** 2) / (2 * variances)) / variances**0.5
                clean[i] = each[0] / each.sum()
    scores = rows["image"][keep] @ rows["text"][keep].T
    ids = meta["sample"][keep]
    same = ids[:, None] == ids[None]
    if hinge:
        margin = 0.2 * (10**clean - 1) / 9
        ways = []
        for s in (scores, scores.T):
            over = torch.relu(margin[:, None] + s - s.diagonal()[:, None]).masked_fill(same, 0)
            ways.append(over.amax(1) if step > 1 else over.sum(1) / (~same).sum(1))
        losses = (ways[0] + ways[1]) / 2
        value = losses.mean()
    else:
        logits = p["log_scale"].exp() * scores
        losses = (cross(logits, same) + cross(logits.T, same)) / 2
        value = (clean * losses).sum() / clean.sum()
    for name, loss in zip(names, losses.tolist(), strict=True):
        memory[name] = float(torch.tensor(loss, dtype=torch.float32))
    return value, None


def symile(
    rows: Rows, p: Rows, meta: Rows, memory: Memory, step: int, taps: tuple[str, ...], keys: str
) -> tuple[Tensor, None]:
    keep = here(meta)
    vectors = [rows[tap][keep] for tap in taps]
    n, scale = len(vectors[0]), p["log_scale"].exp()
    losses = []
    for anchor, mine in enumerate(vectors):
        others = vectors[:anchor] + vectors[anchor + 1 :]
        if keys == "paired":
            logits = scale * mine @ math.prod(others[1:], start=others[0]).T
            losses.append(F.cross_entropy(logits, torch.arange(n)))
        elif keys == "all":
            b, c = others
            logits = scale * torch.einsum("id,jd,ld->ijl", mine, b, c).flatten(1)
            losses.append(F.cross_entropy(logits, torch.arange(n) * (n + 1)))
        else:
            stream = key(5, "symile", step, anchor)  # the permutations are the product's own
            shuffles = [permute(np.arange(n), n, key(stream, i)) for i in range(len(others))]
            own = scale * (mine * math.prod(others[1:], start=others[0])).sum(1)
            each = []
            for i in range(n):
                logits = [own[i]]
                for j in range(n):
                    chosen = [int(s[j]) for s in shuffles]
                    if j != i and set(chosen) != {i}:
                        made = math.prod(o[at] for o, at in zip(others, chosen, strict=True))
                        logits.append(scale * (mine[i] * made).sum())
                each.append(torch.stack(logits).logsumexp(0) - own[i])
            losses.append(torch.stack(each).mean())
    return torch.stack(losses).mean(), None


def hard(
    rows: Rows, p: Rows, meta: Rows, memory: Memory, step: int, own: float, other: float,
    beta: float, pair: str = "sample", changed: str | None = None,
) -> tuple[Tensor, None]:  # fmt: skip
    image, text = rows["image"], rows["text"]
    per, n = len(text) // len(image), len(image)
    of_text = torch.arange(len(text)) // per
    nth = torch.arange(len(text)) % per
    made_q = meta[changed] != 0 if changed else torch.zeros(n, dtype=torch.bool)
    made_k = made_q[of_text] | (nth > 0)
    same_pair = meta[pair][:, None] == meta[pair][of_text][None]
    weight = torch.where(
        made_q[:, None] != made_k[None], torch.where(same_pair, own, other), 1.0
    ).double()
    right = (meta["sample"][:, None] == meta["sample"][of_text][None]) & (nth == 0)[None]
    logits = p["log_scale"].exp() * image @ text.T
    mass = weight * torch.exp(logits)
    halves = []
    for m, x, yes, made in ((mass, logits, right, made_q), (mass.T, logits.T, right.T, made_k)):
        count = yes.sum(1)
        each = m.sum(1).log() - (x * yes).sum(1) / count.clamp(min=1)
        rated = torch.where(made, beta, 1.0).double() * (count > 0)
        halves.append((torch.where(count > 0, each, 0) * rated).sum() / rated.sum())
    return (halves[0] + halves[1]) / 2, None


def distance(
    rows: Rows, p: Rows, meta: Rows, memory: Memory, step: int, factor: float,
    taps: tuple[str, ...] = ("image", "image@1"), negatives: bool = False, positives: int = 0,
    window: float = 5.0,
) -> tuple[Tensor, None]:  # fmt: skip
    keep = meta.get("image_present", torch.ones_like(meta["sample"], dtype=torch.bool))
    z = torch.cat([rows[tap][keep] for tap in taps])
    y = torch.cat([meta["age"][keep]] * len(taps)).double()
    n, scale = len(z), p["log_scale"].exp()
    # The uniform numbers are the product's own.
    lams = np.sort(uniforms(key(5, "mixed negatives", step), n, 9), 1)[:, 1]
    drawn = uniforms(key(5, "mixed positives", step), n, max(1, 2 * positives))
    by_label = sorted(range(n), key=lambda j: (float(y[j]), j))
    losses = []
    for i in range(n):
        others = [j for j in range(n) if j != i]
        keys, labels = [z[j] for j in others], [y[j] for j in others]
        right = [j for j, label in enumerate(labels) if label == y[i]]
        if negatives:
            lam = float(lams[i])
            for j in others:
                if y[j] != y[i]:
                    keys.append((lam * z[i] + (1 - lam) * z[j]).detach())
                    labels.append(lam * y[i] + (1 - lam) * y[j])
        below = [j for j in by_label if y[i] - window <= y[j] < y[i]]
        above = [j for j in by_label if y[i] < y[j] <= y[i] + window]
        for m in range(positives if below and above else 0):
            j = below[int(drawn[i, 2 * m] * np.float32(len(below)))]
            k = above[int(drawn[i, 2 * m + 1] * np.float32(len(above)))]
            lam = float((y[k] - y[i]) / (y[k] - y[j]))
            right.append(len(keys))
            keys.append((lam * z[j] + (1 - lam) * z[k]).detach())
            labels.append(y[i])
        if right:
            logits = scale * torch.stack(keys) @ z[i]
            weights = 1 + factor * (torch.stack(labels) - y[i]).abs()
            losses.append((logits + weights.log()).logsumexp(0) - logits[right].mean())
    return torch.stack(losses).mean(), None


def barlow(
    rows: Rows, p: Rows, meta: Rows, memory: Memory, step: int, weight: float
) -> tuple[Tensor, None]:
    keep = meta["image_present"]
    a, b = (
        (r - r.mean(0)) / r.std(0, correction=0)
        for r in (rows["image"][keep], rows["image@1"][keep])
    )
    c = a.T @ b / len(a)
    on = torch.eye(len(c), dtype=torch.bool)
    return ((c - 1) ** 2)[on].sum() + weight * (c**2)[~on].sum(), None


def byol(rows: Rows, p: Rows, meta: Rows, memory: Memory, step: int) -> tuple[Tensor, None]:
    def predict(x: Tensor) -> Tensor:
        h = x @ p["predictor.0.weight"].T + p["predictor.0.bias"]
        h = (h - h.mean(1, keepdim=True)) / (h.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        h = torch.relu(h * p["predictor.1.weight"] + p["predictor.1.bias"])
        return h @ p["predictor.3.weight"].T + p["predictor.3.bias"]

    seen = rows["teacher.image"]
    losses = [
        (2 - 2 * (predict(x) * seen).sum(1) / (predict(x).norm(dim=1) * seen.norm(dim=1))).mean()
        for x in (rows["image"], rows["image@1"])
    ]
    return (losses[0] + losses[1]) / 2, None


def swav(
    rows: Rows, p: Rows, meta: Rows, memory: Memory, step: int, tau: float, epsilon: float,
    rounds: int, taps: tuple[str, ...] = ("image", "image@1"),
) -> tuple[Tensor, None]:  # fmt: skip
    keep = torch.ones_like(meta["sample"], dtype=torch.bool)
    for tap in taps:
        keep = keep & meta.get(f"{tap.partition('@')[0]}_present", keep)
    c = rows[taps[2]][keep] if len(taps) == 3 else p["prototypes"]
    c = c / c.norm(dim=1, keepdim=True)
    scores = [rows[tap][keep] @ c.T for tap in taps[:2]]
    n, k = scores[0].shape
    assigned = []
    for s in scores:
        q = torch.exp(s.detach().T / epsilon)  # [K, N], as the paper's code has it
        q = q / q.sum()
        for _ in range(rounds):
            q = q / q.sum(1, keepdim=True) / k
            q = q / q.sum(0, keepdim=True) / n
        assigned.append((q * n).T)
    losses = [
        F.cross_entropy(s / tau, q) for s, q in zip(scores, assigned[::-1], strict=True)
    ]  # fmt: skip
    return (losses[0] + losses[1]) / 2, None
