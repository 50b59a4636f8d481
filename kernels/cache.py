"""Scores that the backward pass need not make again: three matrix passes for four."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gigabatch.kernels.scores import Score
from gigabatch.kernels.sources import Panel


@dataclass(frozen=True)
class Kept:
    """Scores [R, n] of a panel's rows from `first` on; `loaded`: made already."""

    scores: Tensor
    first: int
    loaded: bool

    def at(self, rows: slice, columns: slice) -> Tensor | None:
        """Those of a block, if there is room for all of it."""
        start, stop = rows.start - self.first, rows.stop - self.first
        return self.scores[start:stop, columns] if stop <= len(self.scores) else None


class ScoreCache:
    """Keeps scores from the forward pass for the backward, unrounded, so that results are the same
    to the last bit with it and without: the first rows of each panel, as far as `budget` bytes go.
    """

    def __init__(self, budget: int) -> None:
        self.left = budget
        self.kept: dict[tuple[int, int], Tensor] = {}

    def rows(
        self, score: Score, panel: Panel, kind: torch.dtype, step: int, again: bool
    ) -> Kept | None:
        """Room for some of a panel's scores, whole steps of rows; `again`: in the backward pass.
        None if there is none. A score whose `pull` needs more than its scores keeps none."""
        first, stop, _ = panel.rows.indices(len(score.operands[0]))
        at, size = (panel.offset, first), kind.itemsize * len(panel.keys)
        if again:
            found = self.kept.pop(at, None)
        else:
            count = min(stop - first, self.left // max(size, 1))
            count -= count % step if first + count < stop else 0
            if score.needs_scratch or count <= 0:
                return None
            found = panel.keys.new_empty(count, len(panel.keys), dtype=kind)
            self.kept[at], self.left = found, self.left - count * size
        return None if found is None else Kept(found, first, again)
