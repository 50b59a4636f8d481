"""Rows of scores, a block of queries at a time: what rankings, neighbours and classes are read
from. A row of N scores is held for as many queries as fit a fixed budget, never all N x N.

Products are summed in float64 and rounded once, to float32: equal vectors score alike in any block
and on any number of ranks, so that ties are ties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Scorer = Callable[[slice], Tensor]
"""Some of the queries -> their scores with all N keys, float32 [b, N]."""
BUDGET = 1 << 22
"""Scores held at a time, unless a single row is longer."""
_LOW = (1 << 32) - 1


def blocks(queries: int, columns: int) -> Iterator[slice]:
    """The queries in parts whose rows of `columns` scores fit the budget."""
    step = max(1, BUDGET // max(columns, 1))
    for first in range(0, queries, step):
        yield slice(first, min(first + step, queries))


def dot_rows(queries: Tensor, keys: Tensor) -> Scorer:
    """Dot products of `queries` [Q, D] with `keys` [N, D]."""
    step = max(1, (1 << 22) // max(keys.shape[1], 1))  # keys turned to float64 at a time

    def rows(part: slice) -> Tensor:
        wanted = queries[part].double()
        out = torch.empty(len(wanted), len(keys), device=keys.device)
        for first in range(0, len(keys), step):
            chunk = slice(first, first + step)
            out[:, chunk] = wanted @ keys[chunk].double().T
        return out

    return rows


def maxsim_rows(
    queries: Tensor, query_mask: Tensor, keys: Tensor, key_mask: Tensor, reduce: str = "mean"
) -> Scorer:
    """Late interaction (ColBERT, FILIP): for each real token of a query its best product with a
    real token of the key, averaged over the query's tokens, or with `reduce` "sum" added up.

    `queries` [Q, T, D], `keys` [N, S, D]; masks bool [Q, T] and [N, S], true on real tokens. A
    query or a key without one scores -inf.
    """

    def rows(part: slice) -> Tensor:
        wanted, real = queries[part].double(), query_mask[part]
        out = torch.empty(len(wanted), len(keys), device=keys.device)
        held = max(1, wanted.shape[0] * wanted.shape[1] * keys.shape[1])
        for first in range(0, len(keys), max(1, BUDGET // held)):
            chunk = slice(first, first + max(1, BUDGET // held))
            tokens = torch.einsum("qtd,nsd->qnts", wanted, keys[chunk].double())
            tokens.masked_fill_(~key_mask[chunk][None, :, None, :], -torch.inf)
            best = tokens.amax(3).masked_fill(~real.unsqueeze(1), 0.0)
            count = real.sum(1, keepdim=True)
            total = best.sum(2) if reduce == "sum" else best.sum(2) / count.clamp(min=1)
            out[:, chunk] = torch.where(count > 0, total, -torch.inf)
        return out

    return rows


@torch.no_grad()
def top_rows(
    score: Scorer, queries: int, keys: int, k: int, own: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k best keys of each query: scores float32 [Q, k], descending, and numbers int64 [Q, k];
    of equal scores the lower number comes first. -inf and -1 where there are fewer.

    `own`: int64 [Q], the key that is the query itself and left out; -1 for none. A score that is
    NaN counts as -inf. Fewer than 2^32 keys.
    """
    values, numbers = [], []
    k_held = min(k, keys)
    for part in blocks(queries, keys):
        scores = score(part).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf) + 0.0
        if own is not None:
            _scatter(scores, own[part], -torch.inf)
        # Score and number in one integer, all distinct: the best k are then a matter of fact.
        bits = scores.view(torch.int32).to(torch.int64)
        ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32
        ordered += _LOW - torch.arange(keys, device=scores.device)
        found = _LOW - (ordered.topk(k_held, dim=1).values & _LOW)
        best = scores.gather(1, found)
        values.append(best)
        numbers.append(torch.where(best == -torch.inf, -1, found))
    if not values:
        device = own.device if own is not None else None
        return (
            torch.empty(0, k, device=device),
            torch.empty(0, k, dtype=torch.int64, device=device),
        )
    short = (0, k - k_held)
    return (
        torch.nn.functional.pad(torch.cat(values), short, value=-torch.inf),
        torch.nn.functional.pad(torch.cat(numbers), short, value=-1),
    )


def _scatter(scores: Tensor, own: Tensor, value: float) -> None:
    rows = (own >= 0).nonzero().squeeze(1)
    scores[rows, own[rows]] = value
