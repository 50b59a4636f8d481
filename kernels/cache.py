"""Scores that the backward pass need not make again: three matrix passes for four."""

from __future__ import annotations

import torch
from torch import Tensor

from gigabatch.kernels.scores import Score
from gigabatch.kernels.sources import Panel


class ScoreCache:
    """Keeps scores from the forward pass for the backward, unrounded, so that results are the same
    to the last bit with it and without: the first rows of each panel, as far as `budget` bytes go.
    """

    def __init__(self, budget: int) -> None:
        self.left = budget
        self.kept: dict[tuple[int, int], Tensor] = {}

    def rows(
        self, score: Score, panel: Panel, kind: torch.dtype, step: int, again: bool
    ) -> Tensor | None:
        """[R, n]: the scores of the panel's first rows, to be written or, `again`, in the backward
        pass, to be read. R is a multiple of `step`, or all. None if there is no room, or the
        score's `pull` needs more than its scores."""
        first, stop, _ = panel.rows.indices(len(score.operands[0]))
        at, size = (panel.offset, first), kind.itemsize * len(panel.keys)
        if again:
            return self.kept.pop(at, None)
        count = min(stop - first, self.left // max(size, 1))
        count -= count % step if first + count < stop else 0
        if score.needs_scratch or count <= 0:
            return None
        self.kept[at] = panel.keys.new_empty(count, len(panel.keys), dtype=kind)
        self.left -= count * size
        return self.kept[at]


def block_of(kept: Tensor | None, first: int, rows: slice, columns: slice) -> Tensor | None:
    """A block of what is kept of the rows from `first` on, if all of it is."""
    start, stop = rows.start - first, rows.stop - first
    return None if kept is None or stop > len(kept) else kept[start:stop, columns]
