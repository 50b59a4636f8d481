"""Rules say which pairs count, from O(N) metadata; nothing of size M x N is ever stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gigabatch.kernels.sources import Panel


@dataclass(frozen=True)
class Eq:
    """Pairs whose row code equals the key's code.

    `rows`: int64 [M]. `keys`: the name of an int64 metadata column of the key source.
    """

    rows: Tensor
    keys: str

    def bind(self, panel: Panel) -> BoundEq:
        codes, order = torch.sort(panel.metadata[self.keys], stable=True)
        return BoundEq(self.rows, codes, order)


@dataclass(frozen=True)
class BoundEq:
    """`Eq` on one panel, its codes sorted once: a tile then costs its own pairs, not its area."""

    rows: Tensor
    codes: Tensor
    order: Tensor

    def counts(self) -> Tensor:
        """int64 [M]: keys of the panel that equal each row."""
        return self._edges(self.rows)[1] - self._edges(self.rows)[0]

    def pairs(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """(row, key) numbers of the equal pairs of rows `first` to `last` - 1; rows from 0.

        At most (last - first) * panel entries, so no more than a tile of that height.
        """
        low, high = self._edges(self.rows[first:last])
        count = high - low
        row = torch.repeat_interleave(count)
        start = torch.cumsum(count, 0) - count
        nth = torch.arange(row.numel(), device=row.device) - start[row]
        return row, self.order[low[row] + nth]

    def _edges(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return torch.searchsorted(self.codes, rows), torch.searchsorted(
            self.codes, rows, right=True
        )
