"""Rows of scores, a block of queries at a time: what rankings, neighbours and classes are read
from. A row of N scores is held for as many queries as fit a fixed budget, never all N x N.

Products are summed in float64 and rounded once, to float32: equal vectors score alike in any block
and on any number of ranks, so that ties are ties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gigabatch.kernels import MaxSim, gather_rows, maxsim, token_keys
from gigabatch.kernels.sources import KeyBlock

Scorer = Callable[[slice], Tensor]
"""Some of the queries -> their scores with all N keys, float32 [b, N]."""
BUDGET = 1 << 22
"""Scores held at a time, unless a single row is longer."""
_LOW = (1 << 32) - 1


@dataclass(frozen=True)
class Rows:
    """What is compared: vectors [n, D], or tokens [n, T, D], of which `real` (bool [n, T]) are."""

    values: Tensor
    real: Tensor | None = None

    def take(self, rows: Sequence[int] | slice) -> Rows:
        """Some of them."""
        return Rows(self.values[rows], None if self.real is None else self.real[rows])

    def gathered(self, group: dist.ProcessGroup | None) -> Rows:
        """Those of all ranks, in rank order."""
        real = None if self.real is None else gather_rows(self.real, group)
        return Rows(gather_rows(self.values, group), real)


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


def maxsim_rows(queries: Tensor, query_mask: Tensor, keys: Tensor, key_mask: Tensor) -> Scorer:
    """Late interaction (ColBERT, FILIP): for each real token of a query its best product with a
    real token of the key, averaged over the query's tokens.

    `queries` [Q, T, D], `keys` [N, S, D]; masks bool [Q, T] and [N, S], true on real tokens. A
    query or a key without one scores -inf. No token products are held beyond a tile of them.
    """
    asks, answers = query_mask.any(1), key_mask.any(1)
    query_mask, key_mask = (m | ~m.any(1, keepdim=True) for m in (query_mask, key_mask))
    step = max(1, (1 << 22) // max(queries.shape[1] * queries.shape[2], 1))  # turned to float64

    def rows(part: slice) -> Tensor:
        found = [
            maxsim(queries[few].double(), keys, query_mask[few], key_mask).float()
            for few in (
                slice(first, min(first + step, part.stop))
                for first in range(part.start, part.stop, step)
            )
        ]
        return torch.cat(found).masked_fill_(~(asks[part].unsqueeze(1) & answers), -torch.inf)

    return rows


def score_rows(queries: Rows, keys: Rows) -> Scorer:
    """Scores of all queries with all keys: dot products, or of tokens late interaction."""
    if queries.real is None or keys.real is None:
        return dot_rows(queries.values, keys.values)
    return maxsim_rows(queries.values, queries.real, keys.values, keys.real)


def score_pairs(queries: Rows, keys: Rows) -> Tensor:
    """float32 [n]: the score of each query with the key of its own row."""
    q, k = queries.values, keys.values
    if queries.real is None or keys.real is None:
        return (q.double() * k.double()).sum(1).float()
    out = torch.empty(len(q), device=q.device)
    for part in blocks(len(q), q.shape[1] * k.shape[1]):
        metadata = token_keys(k[part], keys.real[part])
        score = MaxSim(q[part].double(), queries.real[part])
        out[part] = score.pairs(KeyBlock(k[part], metadata, 0)).float()
    return out


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
