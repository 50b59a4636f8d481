"""Losses over the engine's primitives, each a few lines and a formula."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from gigabatch.kernels.rules import Eq
from gigabatch.kernels.sources import Gather, KeySource, Local
from gigabatch.kernels.stats import Lse, lse_stats


def contrastive_loss(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    *,
    ids_q: Tensor | None = None,
    ids_k: Tensor | None = None,
    symmetric: bool = True,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """InfoNCE over the global batch: CLIP's loss, with any number of positives a row.

        L_rows = mean_i [ log sum_j exp(scale s_ij) - 1/|P_i| sum_{j in P_i} scale s_ij ]

    over the rows that have a positive (SupCon's "outside" average, Khosla et al. 2020, eq. 2);
    symmetric: (L_rows + L_columns) / 2 (Radford et al. 2021). s_ij = <q_i, k_j>: normalise first.

    q, k: [n, D], this rank's slices; any floating dtype, the same on every rank; n may differ
    between ranks and be 0. scale: 0-dimensional, positive. ids_q, ids_k: int64 [n]; pairs with
    equal ids are positives. Without ids, row i's positive is key i; with ids_q alone, ids_k is
    the same. group: a process group, or None for this process alone. backend: see `lse_stats`.

    Returns a 0-dimensional tensor, at least float32. The *mean over ranks* of the returned values
    is the loss of the global batch, and gradients averaged over ranks are its gradients. Rows
    without a positive have weight 0. Raises ValueError or TypeError for arguments that do not fit.
    """
    _check(q, k, scale, ids_q, ids_k)
    if ids_q is None:
        ids_q = _row_numbers(len(q), q.device, group)
    ids_k = ids_q if ids_k is None else ids_k
    keys: KeySource
    if group is None:
        keys, world_size = Local(k, {"id": ids_k}), 1
    else:
        keys, world_size = Gather(k, {"id": ids_k}, group), dist.get_world_size(group)
    axes = [Lse("rows", scale), Lse("columns", scale)] if symmetric else [Lse("rows", scale)]
    stats = lse_stats(q, keys, axes, Eq(ids_q, "id"), backend)
    sums, counted = [], []
    for z, positive, count in zip(stats.z, stats.positive, stats.count, strict=True):
        has_positive = count > 0
        per_row = z - scale * positive / count.clamp(min=1)
        sums.append(torch.where(has_positive, per_row, 0).sum())
        counted.append(has_positive.sum())
    totals = torch.stack(counted)
    if group is not None:
        dist.all_reduce(totals, group=group)
    return world_size * (torch.stack(sums) / totals.clamp(min=1)).mean()


def _row_numbers(n: int, device: torch.device, group: dist.ProcessGroup | None) -> Tensor:
    """Numbers of this rank's rows in the global batch, ranks in order."""
    first = 0
    if group is not None:
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(group.size())]
        dist.all_gather(sizes, torch.tensor([n], device=device), group=group)
        first = int(sum(sizes[: dist.get_rank(group)]))
    return torch.arange(first, first + n, device=device)


def _check(q: Tensor, k: Tensor, scale: Tensor, ids_q: Tensor | None, ids_k: Tensor | None) -> None:
    if q.ndim != 2 or k.ndim != 2 or q.shape[1] != k.shape[1]:
        raise ValueError(f"q and k must be [n, D]; got {tuple(q.shape)} and {tuple(k.shape)}")
    if not q.is_floating_point() or q.dtype != k.dtype:
        raise TypeError(f"q and k must share a floating dtype; got {q.dtype} and {k.dtype}")
    if q.device != k.device or scale.device != q.device:
        raise ValueError(f"q, k and scale must share a device; got {q.device}, {k.device}, "
                         f"{scale.device}")  # fmt: skip
    if scale.ndim != 0:
        raise ValueError(f"scale must be 0-dimensional; got {tuple(scale.shape)}")
    if ids_q is None and (ids_k is not None or len(q) != len(k)):
        raise ValueError("give ids_q (and ids_k), or as many keys as queries and neither")
    for name, ids, rows in (("ids_q", ids_q, q), ("ids_k", ids_q if ids_k is None else ids_k, k)):
        if ids is None:
            continue
        if ids.dtype != torch.int64:
            raise TypeError(f"{name} must be int64; got {ids.dtype}")
        if ids.shape != (len(rows),) or ids.device != q.device:
            raise ValueError(
                f"{name} must be [{len(rows)}] on {q.device}; got {tuple(ids.shape)} "
                f"on {ids.device}"
            )
