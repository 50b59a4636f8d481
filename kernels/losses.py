"""Contrastive losses over the global batch, each a formula over reductions of the engine.

`q` and `k` are this rank's slices. The *mean over ranks* of the returned values is the loss of the
global batch, and gradients averaged over ranks are its gradients. Values are at least float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from gigabatch.kernels.checks import (
    check_columns,
    check_finite,
    check_inputs,
    normalized_teachers,
)
from gigabatch.kernels.collect import sum_over_ranks
from gigabatch.kernels.loss_terms import cross_entropy, soft_positives
from gigabatch.kernels.maxsim import MaxSim, token_keys
from gigabatch.kernels.rules import Either, Eq, Ne, Rule, SecondScore, combine_ids
from gigabatch.kernels.scores import Dot
from gigabatch.kernels.sources import (
    Gather,
    KeyBlock,
    KeySource,
    Local,
    Ring,
    all_sum,
    global_row_indices,
)
from gigabatch.kernels.stats import Lse, lse_stats, lse_stats_of_rules, pair_sum

GatherMode = Literal["gather", "ring"]


def contrastive_loss(
    q: Tensor, k: Tensor, scale: Tensor, *,
    ids_q: Tensor | None = None, ids_k: Tensor | None = None,
    same_id: Literal["positive", "exclude"] = "positive", groups_q: Tensor | None = None,
    groups_k: Tensor | None = None, teacher_q: Tensor | None = None,
    teacher_k: Tensor | None = None, threshold: float = 1.0,
    bias: Tensor | None = None, symmetric: bool = True,
    label_smoothing: float = 0.0, group: dist.ProcessGroup | None = None,
    gather_mode: GatherMode = "gather", backend: str | None = None, cache_bytes: int = 0,
    validate: bool = False, counts: dict[str, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Compute InfoNCE over the global batch: CLIP's loss, with any number of positives per row.

        L_rows = mean_i [ log sum_j exp(l_ij) - sum_j P_ij l_ij ],   l_ij = scale <q_i, k_j> + b_j

    over the rows i that have a positive. If symmetric, (L_rows + L_columns) / 2 (Radford et al.
    2021); b cancels in L_columns. With e = label_smoothing, P_ij = (1 - e) [j in P_i] / |P_i|
    + e / |candidates of i|: several positives are averaged outside the logarithm (SupCon, Khosla
    et al. 2020, eq. 2). The score is a plain dot product: normalize q and k first.

    Args:
        q: [n, D], any floating dtype, the same on every rank; n may differ between ranks and be 0.
        k: [n, D], same dtype.
        scale: 0-dim logit scale.
        ids_q: int64 [n]; if None, row i's positive is key i.
        ids_k: int64 [n]; if None, `ids_q`.
        same_id: "positive": all pairs of equal ids are positives. "exclude": row i's positive is
            key i, and other pairs of equal ids are left out.
        groups_q: int64 [n]; only pairs of one group (language, domain) are compared. Not with
            label smoothing.
        groups_k: int64 [n]; if None, `groups_q`.
        teacher_q: float [n, E], vectors of another model; pairs whose cosine in it exceeds
            `threshold` are left out, except positives. Not with label smoothing.
        teacher_k: float [n, E]; if None, `teacher_q`.
        threshold: Cosine of the teacher's vectors above which a pair is left out.
        bias: float [n], one per key, for example log popularity.
        symmetric: Average over both directions; otherwise, only rows are compared with keys.
        label_smoothing: Share of the target, in [0, 1), that is spread over all candidates of a
            row.
        group: Process group, or None for this process only.
        gather_mode: "gather" holds all keys, O(N D); "ring" passes them on, O(n D).
        backend: As in `lse_stats`.
        cache_bytes: As in `lse_stats`.
        validate: Raise for NaN, infinity or a row without a positive; otherwise such a row has
            weight 0.
        counts: Dict that receives int64 "rows_without_positive" and "columns_without_positive".

    Returns:
        0-dim: world size times this rank's share of the loss.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, a device or an option is wrong; with `validate`, on every rank.
    """
    exclude = same_id == "exclude"
    check_inputs(q, k, gather_mode, backend, paired=ids_q is None or exclude, scale=scale)
    check_columns(q, k, bias, ids=(ids_q, ids_k), groups=(groups_q, groups_k))
    if label_smoothing and (groups_q is not None or teacher_q is not None):
        raise ValueError("label_smoothing spreads over all candidates of the batch; leave out "
                         "groups and teacher vectors, or set it to 0")  # fmt: skip
    teachers = normalized_teachers(q, k, teacher_q, teacher_k)
    if same_id not in ("positive", "exclude") or not 0 <= label_smoothing < 1:
        raise ValueError(f"same_id must be positive or exclude, label_smoothing in [0, 1); got "
                         f"{same_id!r} and {label_smoothing}")  # fmt: skip
    if validate:
        check_finite(group, q=q, k=k, scale=scale, bias=bias)
    indices = global_row_indices(len(q), q.device, group)
    ids = (indices if ids_q is None else ids_q, ids_k)
    pairing = _pair(indices, ids, (groups_q, groups_k), exclude, teachers, threshold)
    keys = key_source(k, pairing.metadata, group, gather_mode)
    lses = [Lse("rows", scale, bias, pairing.rule), Lse("columns", scale, None, pairing.rule)]
    lses = lses[: 1 + symmetric]
    positives = [pairing.positive]
    if exclude and label_smoothing:
        positives.append(pairing.same_id)
    stats, *same_id_stats = lse_stats_of_rules(q, keys, lses, positives, backend, cache_bytes)
    targets = [p / w.clamp(min=1) for p, w in zip(stats.positive, stats.weight, strict=True)]
    if label_smoothing:
        candidates = _all_logits(q, k, scale, bias, group)[: 1 + symmetric]
        for others in same_id_stats:
            # Leave out the keys with the row's id, except its own key.
            own_is_equal = pairing.same_id.rows == pairing.metadata["id"]
            candidates = [
                (total - others.positive[i] + own_is_equal * targets[i],
                 count - others.weight[i] + own_is_equal)
                for i, (total, count) in enumerate(candidates)
            ]  # fmt: skip
        targets = [
            target.lerp(total / count.clamp(min=1), label_smoothing)
            for target, (total, count) in zip(targets, candidates, strict=True)
        ]
    has_positive = [weight > 0 for weight in stats.weight]
    losses = [
        torch.where(has, z - target, 0)
        for has, z, target in zip(has_positive, stats.z, targets, strict=True)
    ]
    return _mean_over_ranks(losses, has_positive, group, validate, counts)


def sigmoid_loss(
    q: Tensor, k: Tensor, scale: Tensor, bias: Tensor, *, ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None, gather_mode: GatherMode = "gather",
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Compute SigLIP's loss (Zhai et al. 2023): a binary decision for every pair of the batch,

        1/N sum_ij log(1 + exp(-y_ij l_ij)),   l_ij = scale <q_i, k_j> + bias,

    y = 1 for row i with key i, else -1. It takes three matrix passes: the gradient is computed in
    the forward pass, so either all ranks require gradients or none does.

    Args:
        q: [n, D], this rank's queries.
        k: [n, D], same dtype.
        scale: 0-dim logit scale.
        bias: 0-dim logit bias.
        ids: int64 [n]; pairs of equal ids other than row i with key i are left out.
        group: Process group, or None for this process only.
        gather_mode: As in `contrastive_loss`.
        backend: As in `lse_stats`.

    Returns:
        0-dim: world size times this rank's share of the loss.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, a device or an option is wrong.
    """
    check_inputs(q, k, gather_mode, backend, scale=scale, bias=bias)
    check_columns(q, k, None, ids=(ids, ids))
    indices = global_row_indices(len(q), q.device, group)
    ids = indices if ids is None else ids
    keys = key_source(k, {"id": ids}, group, gather_mode)
    # The positives are left out of the sum instead of subtracted from it: late in training their
    # terms are smaller than the rounding of the sum.
    rule = (Ne(ids, "id"),)
    negatives = pair_sum(q, keys, "softplus", scale, bias, rule=rule, total=True, backend=backend)
    positives = F.softplus(-scale * Dot(q).pairs(KeyBlock(k, {}, 0)) - bias, threshold=40)
    return _mean_over_ranks([torch.cat([positives, negatives[None]])], [indices >= 0], group)


def late_interaction_loss(
    q: Tensor, k: Tensor, scale: Tensor, *, mask_q: Tensor | None = None,
    mask_k: Tensor | None = None, symmetric: bool = True, group: dist.ProcessGroup | None = None,
    gather_mode: GatherMode = "gather", backend: str | None = None, cache_bytes: int = 0,
) -> Tensor:  # fmt: skip
    """Compute InfoNCE over token-wise MaxSim scores (FILIP; with one direction only, ColBERT).

    Row i's positive is key i. The second direction uses a different score, the mean over the key's
    tokens.

    Args:
        q: [n, Tq, D] normalized token vectors; Tq is the same on every rank.
        k: [n, Tk, D] normalized token vectors; Tk is the same on every rank.
        scale: 0-dim logit scale.
        mask_q: bool [n, Tq], true for real tokens; None if all are real.
        mask_k: bool [n, Tk], likewise.
        symmetric: Average over both directions.
        group: Process group, or None for this process only.
        gather_mode: As in `contrastive_loss`.
        backend: As in `lse_stats`.
        cache_bytes: As in `lse_stats`.

    Returns:
        0-dim: world size times this rank's share of the loss.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, a device or an option is wrong; on every rank, if an item of any
            rank has no token.
    """
    check_inputs(q, k, gather_mode, backend, 3, scale=scale)
    for side, mask in ((q, mask_q), (k, mask_k)):
        empty = 0 if mask is None or mask.dtype != torch.bool else int((~mask.any(-1)).sum())
        if int(all_sum(torch.tensor(empty, device=side.device), group)):
            raise ValueError("an item has no token; every row of mask_q and mask_k needs one")
    indices = global_row_indices(len(q), q.device, group)
    sides = [((q, mask_q), (k, mask_k)), ((k, mask_k), (q, mask_q))][: 1 + symmetric]
    losses, has_positive = [], []
    for (rows, row_mask), (columns, column_mask) in sides:
        metadata = token_keys(columns, column_mask, index=indices)
        keys = key_source(columns, metadata, group, gather_mode)
        score, positive = MaxSim(rows, row_mask), Eq(indices, "index")
        stats = lse_stats(score, keys, [Lse("rows", scale)], positive, backend, cache_bytes)
        losses.append(cross_entropy(stats.z[0], stats.positive[0], stats.weight[0]))
        has_positive.append(stats.weight[0] > 0)
    return _mean_over_ranks(losses, has_positive, group)


def key_source(
    k: Tensor, metadata: Mapping[str, Tensor], group: dist.ProcessGroup | None,
    gather_mode: GatherMode = "gather",
) -> KeySource:  # fmt: skip
    """Return the source of all ranks' keys; without a group, of this process's keys.

    Args:
        k: [n, ...] this rank's keys.
        metadata: Columns [n, ...] by name.
        group: Process group, or None.
        gather_mode: "gather" (`Gather`) or "ring" (`Ring`).
    """
    if group is None:
        return Local(k, metadata)
    return (Ring if gather_mode == "ring" else Gather)(k, metadata, group)


@dataclass(frozen=True)
class _Pairing:
    """Key metadata, and rules that select positives, pairs of equal ids, and pairs that count."""

    metadata: dict[str, Tensor]
    positive: Eq
    same_id: Eq
    rule: Rule


def _pair(
    indices: Tensor, ids: tuple[Tensor, Tensor | None],
    groups: tuple[Tensor | None, Tensor | None], exclude: bool,
    teachers: tuple[Tensor, Tensor] | None, threshold: float,
) -> _Pairing:  # fmt: skip
    """Build the rules of `contrastive_loss`. `ids` and `groups` are those of queries and of keys;
    None for the keys means those of the queries."""
    ids_q, ids_k = ids[0], ids[0] if ids[1] is None else ids[1]
    groups_q, groups_k = groups[0], groups[0] if groups[1] is None else groups[1]
    indices_q = indices_k = indices
    if groups_q is not None and groups_k is not None:
        # If ids are equal only within a group, positives remain one equality, which is cheap.
        ids_q, ids_k = combine_ids(ids_q, groups_q), combine_ids(ids_k, groups_k)
        if exclude:  # then q and k have the same number of rows
            indices_q, indices_k = combine_ids(indices, groups_q), combine_ids(indices, groups_k)
    metadata = {"id": ids_k}
    same_id = positive = Eq(ids_q, "id")
    if exclude:
        metadata["index"], positive = indices_k, Eq(indices_q, "index")
    rule: Rule = (Either(Ne(ids_q, "id"), positive),) if exclude else ()
    if groups_q is not None and groups_k is not None:
        metadata["group"] = groups_k
        rule = (*rule, Eq(groups_q, "group"))
    if teachers is not None:
        metadata["teacher"] = teachers[1]
        below = SecondScore(teachers[0], "teacher", at_most=threshold)
        rule = (*rule, Either(below, positive))
    return _Pairing(metadata, positive, same_id, rule)


def _all_logits(
    q: Tensor, k: Tensor, scale: Tensor, bias: Tensor | None, group: dist.ProcessGroup | None
) -> list[tuple[Tensor, Tensor]]:
    """Return the sum of all logits and their number, for rows and for columns, in O(N D)."""
    results = []
    for rows, columns in ((q, k), (k, q)):
        ones = (torch.ones_like(rows[:, :1]), torch.ones_like(columns[:, :1]))
        count = all_sum(torch.tensor(len(columns), device=q.device), group)
        total = scale * soft_positives(rows, columns, *ones, group)
        results.append((total, count.expand(len(rows))))
    if bias is not None:
        results[0] = (results[0][0] + sum_over_ranks(bias.sum(), group), results[0][1])
    return results


def _mean_over_ranks(
    losses: list[Tensor], has_positive: list[Tensor], group: dist.ProcessGroup | None,
    validate: bool = False, counts: dict[str, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Return world size x (this rank's sum / all ranks' rows with a positive), averaged over the
    directions."""
    masks = [*has_positive, *(~has for has in has_positive)]
    rows = all_sum(torch.stack([mask.sum() for mask in masks]), group)
    with_positive, without = rows.chunk(2)
    if counts is not None:
        names = ("rows_without_positive", "columns_without_positive")
        counts.update(zip(names, without, strict=False))
    if validate and without.any():
        raise ValueError(f"rows (and columns) without a positive: {without.tolist()}; give each an "
                         "id that a key has, or leave it out")  # fmt: skip
    sums = torch.stack([loss.sum() for loss in losses])
    world_size = 1 if group is None else group.size()
    return world_size * (sums / with_positive.clamp(min=1)).mean()
