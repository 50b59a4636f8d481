"""Sources made of others: several in a row, keys that only their own group sees, products."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gigabatch.kernels.rules import Eq
from gigabatch.kernels.sources import KeySource, Merge, Panel, Work, add_rows, checked, wide


class Concat(KeySource):
    """Keys of several sources, one after the other: the batch and a queue, or hard negatives.

    Their metadata columns must have the same names. Per-key values and results are concatenated.
    """

    def __init__(self, *sources: KeySource) -> None:
        self.sources, self.tensors = sources, tuple(t for s in sources for t in s.tensors)
        self.total, self.held = sum(s.total for s in sources), sum(s.held for s in sources)
        self.learns = any(source.learns for source in sources)

    def fold(self, work: Work, columns: Sequence[Tensor], merges: Sequence[Merge]) -> list[Tensor]:
        parts, offset, first = [], 0, 0
        for source in self.sources:
            mine = [column[first : first + source.held] for column in columns]

            def shifted(panel: Panel, given: list[Tensor], by: int = offset) -> list[Tensor]:
                return work(replace(panel, offset=panel.offset + by), given)

            parts.append(source.fold(shifted, mine, merges))
            offset, first = offset + source.total, first + source.held
        return [torch.cat(results) for results in zip(*parts, strict=True)]


class Ragged(KeySource):
    """This process's keys, each seen by the rows of its own group only (the objects of one page).

    `k` [n, ...] with `groups` int64 [n], and `row_groups` int64 [M]; both sorted. Groups are taken
    together to panels of about `rows` rows, which carry the mask that keeps them apart. Cost:
    M x max(rows, a group's keys), not M x n.
    """

    def __init__(
        self, k: Tensor, groups: Tensor, row_groups: Tensor,
        metadata: Mapping[str, Tensor] | None = None, rows: int = 512,
    ) -> None:  # fmt: skip
        for name, codes in (("groups", groups), ("row_groups", row_groups)):
            if codes.dtype != torch.int64 or not (codes[1:] >= codes[:-1]).all():
                raise ValueError(f"{name} must be int64 and sorted; got {codes.dtype}")
        self.tensors, self.total, self.held = (k,), len(k), len(k)
        self.learns = k.requires_grad
        columns = checked(k, {**(metadata or {}), "group": groups})
        self.panel = Panel(k.detach(), columns, 0, only=(Eq(row_groups, "group"),))
        present = row_groups.unique()
        ends = [torch.searchsorted(codes, present, right=True) for codes in (row_groups, groups)]
        self._parts, row, key = list[tuple[slice, slice]](), 0, 0
        for end, key_end in torch.stack(ends, 1).tolist():
            last = end == len(row_groups)
            if end - row >= rows or last:
                self._parts.append((slice(row, end), slice(key, len(k) if last else key_end)))
                row, key = end, key_end
        if not self._parts:  # no row at all: the keys still get their (empty) results
            self._parts.append((slice(0), slice(0, len(k))))

    def fold(self, work: Work, columns: Sequence[Tensor], merges: Sequence[Merge]) -> list[Tensor]:
        parts = [
            work(replace(self.panel.cut(keys), rows=rows), [column[keys] for column in columns])
            for rows, keys in self._parts
        ]
        return [torch.cat(results) for results in zip(*parts, strict=True)]


class Products(KeySource):
    """Elementwise products of other modalities' vectors, for a multilinear score: with a query a,
    <a, b * c * ...> = sum_d a_d b_d c_d ... (Symile, number 34).

    `factors`: tensors [N, D], all ranks' rows (see `gather_rows`). `pairings`: each holds for each
    factor an index [N] or a shift, and makes N keys: key j is the product of the factors' rows
    index[j], or j + shift. Zeros make the true tuples, a shuffle a factor Symile's O(N) negatives,
    `all_pairings` its O(N^2) ones. Keys are made when needed, in at least float32 (products of
    eight underflow in bf16): memory O(N D), however many pairings. The metadata column "tuple" is
    the row that a key is the true tuple of, and -1 where its factors belong to different rows;
    "number" counts the keys of a pairing.
    """

    def __init__(
        self, factors: Sequence[Tensor], pairings: Sequence[Sequence[Tensor | int]]
    ) -> None:
        if len({factor.shape for factor in factors}) != 1:
            raise ValueError(f"factors must share a shape; got {[f.shape for f in factors]}")
        self.tensors, self.pairings = tuple(factors), pairings
        self.total = self.held = len(factors[0]) * len(pairings)
        self.learns = any(factor.requires_grad for factor in factors)

    def fold(self, work: Work, columns: Sequence[Tensor], merges: Sequence[Merge]) -> list[Tensor]:
        row = torch.arange(len(self.tensors[0]), device=self.tensors[0].device)
        factors = [factor.detach().to(wide(factor.dtype)) for factor in self.tensors]
        grads = [torch.zeros_like(factor) for factor in factors if "grad" in merges]
        parts = []
        for number, pairing in enumerate(self.pairings):
            index = [row.roll(-at) if isinstance(at, int) else at for at in pairing]
            chosen = [factor[at] for factor, at in zip(factors, index, strict=True)]
            true = torch.stack([at == index[0] for at in index]).all(0)
            mine = slice(len(row) * number, len(row) * (number + 1))
            keys, metadata = math.prod(chosen[1:], start=chosen[0]), torch.where(true, index[0], -1)
            panel = Panel(keys, {"tuple": metadata, "number": row}, mine.start)
            results = work(panel, [column[mine] for column in columns])
            dk = results.pop(0) if grads else keys
            for i, grad in enumerate(grads):
                others = math.prod(chosen[:i] + chosen[i + 1 :], start=dk)
                add_rows(grad, index[i], others)
            parts.append(results)
        whole = [torch.cat(results) for results in zip(*parts, strict=True)]
        return [torch.cat(grads), *whole] if grads else whole


def all_pairings(n: int, factors: int) -> list[Sequence[Tensor | int]]:
    """Every combination of n rows for each of several factors, as shifts; the first is the true
    tuples'. There are n^(factors - 1)."""
    return [(0, *shifts) for shifts in itertools.product(range(n), repeat=factors - 1)]
