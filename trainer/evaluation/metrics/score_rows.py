"""Score rows: scores of each query with all keys, for one block of queries at a time.

Rankings, neighbors and classes are computed from these rows. A block has as many rows as fit
`BUDGET`, so memory is O(N) in the number of keys.

Products are summed in float64 and rounded once, to float32. Equal vectors then have equal scores
in any block and on any number of ranks, so ties are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gigabatch.kernels import MaxSim, gather_rows, maxsim, token_keys
from gigabatch.kernels.sources import KeyBlock
from gigabatch.trainer.evaluation.progress import tracked

Scorer = Callable[[slice], Tensor]
"""Function from a slice of b queries to their scores with all N keys, float32 [b, N]."""
BUDGET = 1 << 22
"""Maximum number of scores in a block, unless a single row is longer."""
_FLOAT64_VALUES = 1 << 22  # number of values converted to float64 at a time
_MAX_INDEX = (1 << 32) - 1


@dataclass(frozen=True)
class Rows:
    """Items to compare.

    Attributes:
        values: Vectors [n, D], or tokens [n, T, D].
        mask: bool [n, T], true at real tokens; None for vectors.
    """

    values: Tensor
    mask: Tensor | None = None

    def take(self, rows: Sequence[int] | slice) -> Rows:
        """Return some of the rows."""
        return Rows(self.values[rows], None if self.mask is None else self.mask[rows])

    def gathered(self, group: dist.ProcessGroup | None) -> Rows:
        """Return the rows of all ranks, in rank order."""
        mask = None if self.mask is None else gather_rows(self.mask, group)
        return Rows(gather_rows(self.values, group), mask)


def blocks(num_queries: int, num_keys: int) -> Iterator[slice]:
    """Yield slices of queries whose score rows fit `BUDGET`."""
    step = max(1, BUDGET // max(num_keys, 1))
    for first in range(0, num_queries, step):
        yield slice(first, min(first + step, num_queries))


def tracked_blocks(description: str, num_queries: int, num_keys: int) -> Iterator[slice]:
    """Yield `blocks`, and report the progress of a loop over them."""
    parts = list(blocks(num_queries, num_keys))
    return tracked(description, parts, len(parts))


def dot_rows(queries: Tensor, keys: Tensor) -> Scorer:
    """Return the scorer of dot products of `queries` [Q, D] with `keys` [N, D]."""
    step = max(1, _FLOAT64_VALUES // max(keys.shape[1], 1))

    def rows(part: slice) -> Tensor:
        block = queries[part].double()
        out = torch.empty(len(block), len(keys), device=keys.device)
        for first in range(0, len(keys), step):
            chunk = slice(first, first + step)
            out[:, chunk] = block @ keys[chunk].double().T
        return out

    return rows


def maxsim_rows(queries: Tensor, query_mask: Tensor, keys: Tensor, key_mask: Tensor) -> Scorer:
    """Return the scorer of late interaction (ColBERT, FILIP).

    The score is the mean, over the query's real tokens, of the largest product with a real token of
    the key. A query or key without real tokens scores -inf. Token products are computed tile by
    tile.

    Args:
        queries: [Q, T, D].
        query_mask: bool [Q, T], true at real tokens.
        keys: [N, S, D].
        key_mask: bool [N, S], true at real tokens.
    """
    query_is_real, key_is_real = query_mask.any(1), key_mask.any(1)
    query_mask, key_mask = (m | ~m.any(1, keepdim=True) for m in (query_mask, key_mask))
    step = max(1, _FLOAT64_VALUES // max(queries.shape[1] * queries.shape[2], 1))

    def rows(part: slice) -> Tensor:
        chunks = [
            slice(first, min(first + step, part.stop))
            for first in range(part.start, part.stop, step)
        ]
        scores = [
            maxsim(queries[chunk].double(), keys, query_mask[chunk], key_mask).float()
            for chunk in chunks
        ]
        real = query_is_real[part].unsqueeze(1) & key_is_real
        return torch.cat(scores).masked_fill_(~real, -torch.inf)

    return rows


def score_rows(queries: Rows, keys: Rows) -> Scorer:
    """Return the scorer of dot products, or of late interaction if both sides have tokens."""
    if queries.mask is None or keys.mask is None:
        return dot_rows(queries.values, keys.values)
    return maxsim_rows(queries.values, queries.mask, keys.values, keys.mask)


def score_pairs(queries: Rows, keys: Rows) -> Tensor:
    """Score each query with the key in the same row; returns float32 [n]."""
    q, k = queries.values, keys.values
    if queries.mask is None or keys.mask is None:
        return (q.double() * k.double()).sum(1).float()
    out = torch.empty(len(q), device=q.device)
    for part in blocks(len(q), q.shape[1] * k.shape[1]):
        metadata = token_keys(k[part], keys.mask[part])
        score = MaxSim(q[part].double(), queries.mask[part])
        out[part] = score.pairs(KeyBlock(k[part], metadata, 0)).float()
    return out


@torch.no_grad()
def top_keys(
    score: Scorer, num_queries: int, num_keys: int, k: int, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Find the k best keys of each query; if scores are equal, the lower index comes first.

    Args:
        score: Scorer of Q queries and N keys; NaN counts as -inf.
        num_queries: Q.
        num_keys: N, below 2^32.
        k: Number of keys per query.
        excluded: Key to leave out for each query, such as the query itself, int64 [Q]; -1 for none.

    Returns:
        Scores float32 [Q, k], descending, and key indices int64 [Q, k]; -inf and -1 where there
        are fewer keys.
    """
    values, indices = [], []
    kept = min(k, num_keys)
    for part in tracked_blocks("finding neighbors", num_queries, num_keys):
        # Adding 0.0 turns -0.0 into 0.0; the two are equal, but their bits, used below, are not.
        scores = score(part).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf) + 0.0
        if excluded is not None:
            _fill_at(scores, excluded[part], -torch.inf)
        # topk orders equal values arbitrarily, so score and index are packed into one integer.
        bits = scores.view(torch.int32).to(torch.int64)
        ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32
        ordered += _MAX_INDEX - torch.arange(num_keys, device=scores.device)
        best_indices = _MAX_INDEX - (ordered.topk(kept, dim=1).values & _MAX_INDEX)
        best = scores.gather(1, best_indices)
        values.append(best)
        indices.append(torch.where(best == -torch.inf, -1, best_indices))
    if not values:
        device = excluded.device if excluded is not None else None
        return (
            torch.empty(0, k, device=device),
            torch.empty(0, k, dtype=torch.int64, device=device),
        )
    padding = (0, k - kept)
    return (
        torch.nn.functional.pad(torch.cat(values), padding, value=-torch.inf),
        torch.nn.functional.pad(torch.cat(indices), padding, value=-1),
    )


def _fill_at(scores: Tensor, columns: Tensor, value: float) -> None:
    """Write `value` into one column of each row, in place; a column of -1 is skipped."""
    rows = (columns >= 0).nonzero().squeeze(1)
    scores[rows, columns[rows]] = value
