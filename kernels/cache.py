"""Score cache: the backward pass reuses forward scores, saving up to one matrix pass in four."""

from __future__ import annotations

import torch
from torch import Tensor

from gigabatch.kernels.scores import Score
from gigabatch.kernels.sources import KeyBlock


class ScoreCache:
    """Unrounded scores of the first rows of each key block, within a byte budget.

    Results with and without the cache are bit-identical.
    """

    def __init__(self, budget: int) -> None:
        self.bytes_left = budget
        self.scores: dict[tuple[int, int], Tensor] = {}

    def first_rows(
        self, score: Score, block: KeyBlock, dtype: torch.dtype, step: int, backward: bool
    ) -> Tensor | None:
        """Return cached scores [R, n] of a block's first R rows, to write or to read.

        Args:
            score: Similarity function.
            block: n keys.
            dtype: Dtype of the scores.
            step: R is a multiple of `step`, or the number of all rows.
            backward: Read, and remove from the cache, what the forward pass wrote.

        Returns:
            None if there is no room, or if the score's `pull` needs more than its scores.
        """
        first, stop, _ = block.rows.indices(len(score.operands[0]))
        position, row_bytes = (block.offset, first), dtype.itemsize * len(block.keys)
        if backward:
            return self.scores.pop(position, None)
        count = min(stop - first, self.bytes_left // max(row_bytes, 1))
        count -= count % step if first + count < stop else 0
        if score.needs_scratch or count <= 0:
            return None
        self.scores[position] = block.keys.new_empty(count, len(block.keys), dtype=dtype)
        self.bytes_left -= count * row_bytes
        return self.scores[position]


def cached_tile(cached: Tensor | None, first: int, rows: slice, columns: slice) -> Tensor | None:
    """Return a tile of `cached`, the scores of the rows from `first` on, or None if a part of the
    tile is not cached."""
    start, stop = rows.start - first, rows.stop - first
    return None if cached is None or stop > len(cached) else cached[start:stop, columns]
