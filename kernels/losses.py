"""Losses over the engine's primitives, each a few lines and a formula.

`q` and `k` are this rank's slices. The *mean over ranks* of the returned value is the loss of the
global batch, and gradients averaged over ranks are its gradients. Values are at least float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from gigabatch.kernels.collect import sum_rows
from gigabatch.kernels.loss_terms import cross_entropy, soft_positives
from gigabatch.kernels.maxsim import MaxSim, token_keys
from gigabatch.kernels.rules import Either, Eq, Ne, Rule, SecondScore, joined
from gigabatch.kernels.scores import Dot
from gigabatch.kernels.sources import (
    Gather,
    KeySource,
    Local,
    Panel,
    Ring,
    all_sum,
    global_row_indices,
    wide,
)
from gigabatch.kernels.stats import Lse, engine_of, lse_stats, lse_sums, pair_sum

Schedule = Literal["gather", "ring"]


def contrastive_loss(
    q: Tensor, k: Tensor, scale: Tensor, *,
    ids_q: Tensor | None = None, ids_k: Tensor | None = None,
    same_id: Literal["positive", "exclude"] = "positive", groups_q: Tensor | None = None,
    groups_k: Tensor | None = None, teacher_q: Tensor | None = None,
    teacher_k: Tensor | None = None, threshold: float = 1.0,
    bias: Tensor | None = None, symmetric: bool = True,
    label_smoothing: float = 0.0, group: dist.ProcessGroup | None = None,
    gather_mode: Schedule = "gather", backend: str | None = None, cache_bytes: int = 0,
    validate: bool = False, counts: dict[str, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """InfoNCE over the global batch: CLIP's loss, with any number of positives a row.

        L_rows = mean_i [ log sum_j exp(l_ij) - sum_j P_ij l_ij ],   l_ij = scale <q_i, k_j> + b_j

    over the rows i that have a positive; symmetric: (L_rows + L_columns) / 2 (Radford et al.
    2021), where b cancels in L_columns. P_ij = (1 - e) [j in P_i] / |P_i| + e / |candidates of i|,
    e = label_smoothing: several positives are averaged outside the logarithm (SupCon, Khosla et
    al. 2020, eq. 2). The score is a plain dot product: normalise first.

    q, k: [n, D], any floating dtype, the same on every rank; n may differ between ranks, and be 0.
    scale: 0-dimensional. bias: float [n], one a key (log popularity, say). ids_q, ids_k: int64
    [n]; without them row i's positive is key i; with ids_q alone, ids_k is the same. same_id:
    "positive": all pairs of equal ids are positives; "exclude": row i's positive is key i, and
    other pairs of equal ids are left out altogether. groups_q, groups_k: int64 [n], alike; only
    pairs of one group (language, domain) are compared; not with label_smoothing. teacher_q,
    teacher_k: float [n, E], another model's vectors, alike; pairs whose cosine there is above
    `threshold` are left out, positives apart; not with label_smoothing either. group: a process
    group, or None for this process alone. gather_mode: "gather" holds all keys, O(N D); "ring"
    passes them round, O(n D). backend, cache_bytes: see `lse_stats`. validate: raise, on every
    rank, for NaN or infinity and for a row without a positive, which otherwise has weight 0.
    counts: a dict that receives how many there were, "rows_without_positive" and
    "columns_without_positive", int64.

    Raises ValueError or TypeError for arguments that do not fit, before any work.
    """
    exclude = same_id == "exclude"
    _check(q, k, gather_mode, backend, paired=ids_q is None or exclude, scale=scale)
    _check_columns(q, k, bias, ids=(ids_q, ids_k), groups=(groups_q, groups_k))
    if label_smoothing and (groups_q is not None or teacher_q is not None):
        raise ValueError("label_smoothing spreads over all candidates, which groups divide and a "
                         "teacher leaves out")  # fmt: skip
    teachers = _teachers(q, k, teacher_q, teacher_k)
    if same_id not in ("positive", "exclude") or not 0 <= label_smoothing < 1:
        raise ValueError(f"same_id must be positive or exclude, label_smoothing in [0, 1); got "
                         f"{same_id!r} and {label_smoothing}")  # fmt: skip
    if validate:
        _check_finite(group, q=q, k=k, scale=scale, bias=bias)
    numbers = global_row_indices(len(q), q.device, group)
    ids_q = numbers if ids_q is None else ids_q
    ids_k = ids_q if ids_k is None else ids_k
    numbers_q = numbers_k = numbers
    if groups_q is not None:
        groups_k = groups_q if groups_k is None else groups_k
        # Equal only within a group: then the positives stay lone equalities, which are cheap.
        ids_q, ids_k = joined(ids_q, groups_q), joined(ids_k, groups_k)
        if exclude:  # then q and k have as many rows
            numbers_q, numbers_k = joined(numbers, groups_q), joined(numbers, groups_k)
    metadata = {"id": ids_k}
    same = own = Eq(ids_q, "id")
    if exclude:
        metadata["number"], own = numbers_k, Eq(numbers_q, "number")
    rule: Rule = (Either(Ne(ids_q, "id"), own),) if exclude else ()
    if groups_q is not None and groups_k is not None:
        metadata["group"] = groups_k
        rule = (*rule, Eq(groups_q, "group"))
    if teachers is not None:
        metadata["teacher"] = teachers[1]
        rule = (*rule, Either(SecondScore(teachers[0], "teacher", at_most=threshold), own))
    keys = key_source(k, metadata, group, gather_mode)
    lses = [Lse("rows", scale, bias, rule), Lse("columns", scale, None, rule)][: 1 + symmetric]
    positives = [own, same] if exclude and label_smoothing else [own]
    stats, *more = lse_sums(q, keys, lses, positives, backend, cache_bytes)
    targets = [p / w.clamp(min=1) for p, w in zip(stats.positive, stats.weight, strict=True)]
    if label_smoothing:
        candidates = _all_logits(q, k, scale, bias, group)[: 1 + symmetric]
        for others in more:  # minus those of the same id, the row's own key apart
            twice = ids_q == metadata["id"]
            candidates = [
                (total - others.positive[i] + twice * targets[i], count - others.weight[i] + twice)
                for i, (total, count) in enumerate(candidates)
            ]
        targets = [
            target.lerp(total / count.clamp(min=1), label_smoothing)
            for target, (total, count) in zip(targets, candidates, strict=True)
        ]
    kept = [weight > 0 for weight in stats.weight]
    each = zip(kept, stats.z, targets, strict=True)
    losses = [torch.where(keep, z - target, 0) for keep, z, target in each]
    return _mean_over_ranks(losses, kept, group, validate, counts)


def sigmoid_loss(
    q: Tensor, k: Tensor, scale: Tensor, bias: Tensor, *, ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None, gather_mode: Schedule = "gather",
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """SigLIP's loss (Zhai et al. 2023): every pair of the global batch is its own question,

        1/N sum_ij log(1 + exp(-y_ij l_ij)),   l_ij = scale <q_i, k_j> + bias,

    y = 1 for row i with key i, else -1. q, k: [n, D], this rank's slices. scale, bias:
    0-dimensional. ids: int64 [n]; other pairs of equal ids are left out. group, gather_mode,
    backend, result: as in `contrastive_loss`; either all ranks want gradients or none. Three matrix
    passes: the gradient is made in the forward pass.
    """
    _check(q, k, gather_mode, backend, scale=scale, bias=bias)
    _check_columns(q, k, None, ids=(ids, ids))
    numbers = global_row_indices(len(q), q.device, group)
    ids = numbers if ids is None else ids
    keys = key_source(k, {"id": ids}, group, gather_mode)
    # The positives are left out of the sum, not taken off it: late in training their terms are
    # smaller than the rounding of what they would be taken off.
    rest = (Ne(ids, "id"),)
    negatives = pair_sum(q, keys, "softplus", scale, bias, rule=rest, total=True, backend=backend)
    own = F.softplus(-scale * Dot(q).pairs(Panel(k, {}, 0)) - bias, threshold=40)
    return _mean_over_ranks([torch.cat([own, negatives[None]])], [numbers >= 0], group)


def late_interaction_loss(
    q: Tensor, k: Tensor, scale: Tensor, *, mask_q: Tensor | None = None,
    mask_k: Tensor | None = None, symmetric: bool = True, group: dist.ProcessGroup | None = None,
    gather_mode: Schedule = "gather", backend: str | None = None, cache_bytes: int = 0,
) -> Tensor:  # fmt: skip
    """InfoNCE over token-wise MaxSim scores (FILIP, number 25; one way: ColBERT).

    q [n, Tq, D], k [n, Tk, D]: token vectors, normalised; masks bool [n, T], true for real tokens.
    Row i's positive is key i; T must be the same on every rank. symmetric: the way back uses the
    other score, the mean over the key's tokens. Other arguments, result: as `contrastive_loss`.
    Raises ValueError on every rank if an item of any rank has no token.
    """
    _check(q, k, gather_mode, backend, 3, scale=scale)
    for side, mask in ((q, mask_q), (k, mask_k)):
        lost = 0 if mask is None or mask.dtype != torch.bool else int((~mask.any(-1)).sum())
        if int(all_sum(torch.tensor(lost, device=side.device), group)):
            raise ValueError("an item has no token: every row of mask_q and mask_k needs one")
    numbers = global_row_indices(len(q), q.device, group)
    sides = [((q, mask_q), (k, mask_k)), ((k, mask_k), (q, mask_q))][: 1 + symmetric]
    losses, kept = [], []
    for (rows, row_mask), (columns, mask) in sides:
        metadata = token_keys(columns, mask, number=numbers)
        keys = key_source(columns, metadata, group, gather_mode)
        score, own = MaxSim(rows, row_mask), Eq(numbers, "number")
        stats = lse_stats(score, keys, [Lse("rows", scale)], own, backend, cache_bytes)
        losses.append(cross_entropy(stats.z[0], stats.positive[0], stats.weight[0]))
        kept.append(stats.weight[0] > 0)
    return _mean_over_ranks(losses, kept, group)


def key_source(
    k: Tensor, metadata: Mapping[str, Tensor], group: dist.ProcessGroup | None,
    gather_mode: Schedule = "gather",
) -> KeySource:  # fmt: skip
    """The keys of all ranks, by the gather mode; this process's alone without a group."""
    if group is None:
        return Local(k, metadata)
    return (Ring if gather_mode == "ring" else Gather)(k, metadata, group)


def _teachers(
    q: Tensor, k: Tensor, of_q: Tensor | None, of_k: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """A teacher's vectors of both sides, of unit length, without gradient; 0 stays 0."""
    if of_q is None:
        if of_k is not None:
            raise ValueError("give teacher_q with teacher_k")
        return None
    of_k = of_q if of_k is None else of_k
    for name, vectors, rows in (("teacher_q", of_q, q), ("teacher_k", of_k, k)):
        if vectors.ndim != 2 or len(vectors) != len(rows) or vectors.shape[1] != of_q.shape[1]:
            raise ValueError(f"{name} must be [{len(rows)}, E]; got {tuple(vectors.shape)}")
        if not vectors.is_floating_point() or vectors.device != rows.device:
            got = f"{vectors.dtype} on {vectors.device}"
            raise TypeError(f"{name} must be floating, on {rows.device}; got {got}")
    one, other = (F.normalize(v.detach().to(wide(v.dtype)), dim=1) for v in (of_q, of_k))
    return one, other


def _all_logits(
    q: Tensor, k: Tensor, scale: Tensor, bias: Tensor | None, group: dist.ProcessGroup | None
) -> list[tuple[Tensor, Tensor]]:
    """For rows and columns: the sum of all their logits, and how many. O(N D), no tile."""
    found = []
    for mine, others in ((q, k), (k, q)):
        one_q, one_k = (torch.ones_like(side[:, :1]) for side in (mine, others))
        count = all_sum(torch.tensor(len(others), device=q.device), group)
        total = scale * soft_positives(mine, others, one_q, one_k, group)
        found.append((total, count.expand(len(mine))))
    if bias is not None:
        found[0] = (found[0][0] + sum_rows(bias.sum(), group), found[0][1])
    return found


def _mean_over_ranks(
    losses: list[Tensor], kept: list[Tensor], group: dist.ProcessGroup | None,
    validate: bool = False, counts: dict[str, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """World size x (this rank's sum / number of rows kept on all), averaged over the axes."""
    numbers = torch.stack([keep.sum() for keep in kept] + [(~keep).sum() for keep in kept])
    with_positive, without = all_sum(numbers, group).chunk(2)
    if counts is not None:
        names = ("rows_without_positive", "columns_without_positive")
        counts.update(zip(names, without, strict=False))
    if validate and without.any():
        raise ValueError(f"rows (and columns) without a positive: {without.tolist()}; give each an "
                         "id that a key has, or leave it out")  # fmt: skip
    sums = torch.stack([loss.sum() for loss in losses])
    world_size = 1 if group is None else group.size()
    return world_size * (sums / with_positive.clamp(min=1)).mean()


def _check(
    q: Tensor, k: Tensor, gather_mode: str, backend: str | None, ndim: int = 2, paired: bool = True,
    **scalars: Tensor,
) -> None:  # fmt: skip
    """Refuse, before any work and any communication, what does not fit."""
    if q.ndim != ndim or k.ndim != ndim or q.shape[-1] != k.shape[-1]:
        what = "[n, D]" if ndim == 2 else "[n, tokens, D]"
        raise ValueError(f"q and k must be {what}; got {tuple(q.shape)} and {tuple(k.shape)}")
    if not q.is_floating_point() or q.dtype != k.dtype:
        raise TypeError(f"q and k must share a floating dtype; got {q.dtype} and {k.dtype}")
    devices = [str(tensor.device) for tensor in (q, k, *scalars.values())]
    if len(set(devices)) > 1:
        raise ValueError(f"q, k, {', '.join(scalars)} must share a device; got {devices}")
    for name, value in scalars.items():
        if value.ndim != 0 or not value.is_floating_point():
            shape = tuple(value.shape)
            raise ValueError(f"{name} must be 0-dimensional, floating; got {shape}, {value.dtype}")
    if paired and len(q) != len(k):
        raise ValueError(f"row i belongs to key i without ids; got {len(q)} and {len(k)}")
    if gather_mode not in ("gather", "ring"):
        raise ValueError(f"gather_mode is {gather_mode!r}; choose gather or ring")
    engine_of(backend, q)


def _check_columns(
    q: Tensor, k: Tensor, bias: Tensor | None, **pairs: tuple[Tensor | None, Tensor | None]
) -> None:
    columns = [("bias", bias, k)]
    for name, (of_q, of_k) in pairs.items():
        if of_q is None and of_k is not None:
            raise ValueError(f"give {name}_q with {name}_k")
        columns += [(f"{name}_q", of_q, q), (f"{name}_k", of_q if of_k is None else of_k, k)]
    for name, column, rows in columns:
        if column is None:
            continue
        if column.dtype != torch.int64 if name != "bias" else not column.is_floating_point():
            what = "int64" if name != "bias" else "floating"
            raise TypeError(f"{name} must be {what}; got {column.dtype}")
        if column.shape != (len(rows),) or column.device != q.device:
            got = f"{tuple(column.shape)} on {column.device}"
            raise ValueError(f"{name} must be [{len(rows)}] on {q.device}; got {got}")


def _check_finite(group: dist.ProcessGroup | None, **tensors: Tensor | None) -> None:
    """ValueError on every rank if a tensor of any rank holds NaN or infinity."""
    for name, tensor in tensors.items():
        bad = 0 if tensor is None else int(all_sum((~tensor.isfinite()).sum(), group))
        if bad:
            raise ValueError(f"{name} holds {bad} values that are NaN or infinite")
