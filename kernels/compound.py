"""Composite key sources: several sources in a row, keys of separate groups, products of vectors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gigabatch.kernels.rules import Eq
from gigabatch.kernels.sources import (
    KeyBlock,
    KeySource,
    Merge,
    Work,
    accumulator_dtype,
    add_rows,
    check_metadata,
)


class Concat(KeySource):
    """Keys of several sources, one after the other: a batch and a queue, or hard negatives.

    Per-key values and results are concatenated.

    Args:
        *sources: Key sources whose metadata columns have the same names.
    """

    def __init__(self, *sources: KeySource) -> None:
        self.sources, self.tensors = sources, tuple(t for s in sources for t in s.tensors)
        self.total, self.held = sum(s.total for s in sources), sum(s.held for s in sources)
        self.requires_grad = any(source.requires_grad for source in sources)

    def fold(self, work: Work, columns: Sequence[Tensor], merges: Sequence[Merge]) -> list[Tensor]:
        results, offset, first = [], 0, 0
        for source in self.sources:
            part = [column[first : first + source.held] for column in columns]

            def shifted(block: KeyBlock, values: list[Tensor], by: int = offset) -> list[Tensor]:
                return work(replace(block, offset=block.offset + by), values)

            results.append(source.fold(shifted, part, merges))
            offset, first = offset + source.total, first + source.held
        return [torch.cat(parts) for parts in zip(*results, strict=True)]


class Ragged(KeySource):
    """Keys of this process, each visible only to rows of its group, such as the candidate objects
    of one page.

    Groups are combined into blocks of about `rows` rows, with a mask that separates them. The cost
    is M x max(rows, a group's keys), not M x n.

    Args:
        k: [n, ...] keys.
        groups: int64 [n], sorted.
        row_groups: int64 [M], sorted.
        metadata: Columns [n, ...] by name.
        rows: Smallest number of rows of a block, except the last.

    Raises:
        ValueError: if groups are not int64 and sorted, or a column's length is not n.
    """

    def __init__(
        self, k: Tensor, groups: Tensor, row_groups: Tensor,
        metadata: Mapping[str, Tensor] | None = None, rows: int = 512,
    ) -> None:  # fmt: skip
        for name, codes in (("groups", groups), ("row_groups", row_groups)):
            if codes.dtype != torch.int64 or not (codes[1:] >= codes[:-1]).all():
                raise ValueError(f"{name} must be int64 and sorted; got {codes.dtype}")
        self.tensors, self.total, self.held = (k,), len(k), len(k)
        self.requires_grad = k.requires_grad
        columns = check_metadata(k, {**(metadata or {}), "group": groups})
        self.block = KeyBlock(k.detach(), columns, 0, clauses=(Eq(row_groups, "group"),))
        row_codes = row_groups.unique()
        ends = [torch.searchsorted(codes, row_codes, right=True) for codes in (row_groups, groups)]
        self._parts, row, key = list[tuple[slice, slice]](), 0, 0
        for end, key_end in torch.stack(ends, 1).tolist():
            last = end == len(row_groups)
            if end - row >= rows or last:
                self._parts.append((slice(row, end), slice(key, len(k) if last else key_end)))
                row, key = end, key_end
        if not self._parts:  # without rows the keys still need their (empty) results
            self._parts.append((slice(0), slice(0, len(k))))

    def fold(self, work: Work, columns: Sequence[Tensor], merges: Sequence[Merge]) -> list[Tensor]:
        results = [
            work(replace(self.block.slice(keys), rows=rows), [column[keys] for column in columns])
            for rows, keys in self._parts
        ]
        return [torch.cat(parts) for parts in zip(*results, strict=True)]


class Products(KeySource):
    """Elementwise products of other modalities' vectors, for the multilinear score of Symile.

    For a query a, the score is <a, b * c * ...> = sum_d a_d b_d c_d ... A pairing holds an index
    [N] or a shift per factor, and defines N keys: key j is the product of the factors' rows
    index[j], or j + shift. Shifts of 0 give the true tuples, a shuffle per factor Symile's O(N)
    negatives, and `all_pairings` its O(N^2) negatives.

    Keys are computed when needed, in at least float32: products of eight factors underflow in bf16.
    Memory is O(N D), for any number of pairings. Metadata columns: "tuple" is the row that a key
    is the true tuple of, or -1 if its factors belong to different rows; "index" is the key's index
    within its pairing.

    Args:
        factors: Tensors [N, D], all ranks' rows (see `gather_rows`).
        pairings: One entry per N keys, with an int64 [N] or an int per factor.

    Raises:
        ValueError: if the factors' shapes differ.
    """

    def __init__(
        self, factors: Sequence[Tensor], pairings: Sequence[Sequence[Tensor | int]]
    ) -> None:
        if len({factor.shape for factor in factors}) != 1:
            raise ValueError(f"factors must share a shape; got {[f.shape for f in factors]}")
        self.tensors, self.pairings = tuple(factors), pairings
        self.total = self.held = len(factors[0]) * len(pairings)
        self.requires_grad = any(factor.requires_grad for factor in factors)

    def fold(self, work: Work, columns: Sequence[Tensor], merges: Sequence[Merge]) -> list[Tensor]:
        row = torch.arange(len(self.tensors[0]), device=self.tensors[0].device)
        factors = [factor.detach().to(accumulator_dtype(factor.dtype)) for factor in self.tensors]
        grads = [torch.zeros_like(factor) for factor in factors if "grad" in merges]
        results = []
        for i, pairing in enumerate(self.pairings):
            indices = [row.roll(-at) if isinstance(at, int) else at for at in pairing]
            chosen = [factor[index] for factor, index in zip(factors, indices, strict=True)]
            is_tuple = torch.stack([index == indices[0] for index in indices]).all(0)
            part = slice(len(row) * i, len(row) * (i + 1))
            metadata = {"tuple": torch.where(is_tuple, indices[0], -1), "index": row}
            keys = math.prod(chosen[1:], start=chosen[0])
            block_results = work(
                KeyBlock(keys, metadata, part.start), [column[part] for column in columns]
            )
            dk = block_results.pop(0) if grads else keys
            for f, grad in enumerate(grads):
                dfactor = math.prod(chosen[:f] + chosen[f + 1 :], start=dk)
                add_rows(grad, indices[f], dfactor.to(grad.dtype))
            results.append(block_results)
        merged = [torch.cat(parts) for parts in zip(*results, strict=True)]
        return [torch.cat(grads), *merged] if grads else merged


def all_pairings(n: int, factors: int) -> list[Sequence[Tensor | int]]:
    """Return every combination of n rows for each factor, as shifts; the true tuples are first.

    There are n^(factors - 1) of them.
    """
    return [(0, *shifts) for shifts in itertools.product(range(n), repeat=factors - 1)]
