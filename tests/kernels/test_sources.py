"""Compound sources, and rows taken from sources, against equivalent dense matrices."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from backends import BACKENDS, KIND
from brute import World, lse
from torch import Tensor

from gigabatch.kernels import (
    Concat,
    Eq,
    Local,
    Lse,
    Ne,
    Products,
    Ragged,
    Stats,
    all_pairings,
    gather_rows,
    lse_stats,
    pair_sum,
    row_top,
    take,
)
from gigabatch.kernels.maxsim import TOKENS, MaxSim
from gigabatch.kernels.scores import Dot, GatedCosine, Score
from gigabatch.kernels.sources import KeySource, Merge, Work

ONE = torch.ones((), dtype=torch.float64)


def leaf(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_()


def grads(total: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(total, inputs)


def weighted_total(stats: Stats) -> Tensor:
    """Sum all finite results, each with another weight."""
    values = torch.cat([*stats.z, *stats.positive])
    return (torch.where(values.isfinite(), values, 0) * torch.arange(1, len(values) + 1)).sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_concat_equals_one_source(backend: str) -> None:
    """A batch, a queue without gradient and hard negatives behave like one tensor of keys."""
    w = World(6, 11, 4, 0, KIND[backend])
    q, k, bias = (leaf(w.tensors[name]) for name in ("q", "k", "key_bias"))
    single = Local(k, w.metadata())
    parts = [slice(0, 5), slice(5, 8), slice(8, 11)]
    pieces = [leaf(k[part]) for part in parts]
    pieces[1] = pieces[1].detach()
    metadata = [{n: column[part] for n, column in w.metadata().items()} for part in parts]
    joined = Concat(*(Local(p, m) for p, m in zip(pieces, metadata, strict=True)))
    assert joined.total == joined.held == 11
    rule, scale = (Ne(torch.arange(6), "index"),), w.tensors["key_scale"]

    def stats(source: KeySource) -> Stats:
        lses = [Lse("rows", ONE, bias, rule), Lse("columns", scale)]
        return lse_stats(q, source, lses, Eq(w.row_id, "id"), backend)

    one, other = stats(single), stats(joined)
    results = [(*s.z, *s.positive, *s.weight) for s in (one, other)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    dq, dk, dbias = grads(weighted_total(one), q, k, bias)
    gradients = grads(weighted_total(other), q, pieces[0], pieces[2], bias)
    for a, b in zip((dq, dk[:5], dk[8:], dbias), gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(row_top(q, joined, 3, (), backend)[1], row_top(q, single, 3)[1])
    index = torch.tensor([0, 10, 6, -1, 10])
    torch.testing.assert_close(take(joined, index).keys[:3], k[[0, 10, 6]])
    assert torch.equal(take(joined, index).metadata["id"][:3], w.key_id[[0, 10, 6]])
    assert (take(joined, index).keys[3] == 0).all()
    (dk,) = grads(take(joined, index).keys.sum(), pieces[2])
    assert dk.sum(1).tolist() == [0, 0, 8]


class RecordingSource(Local):
    """Records the merges that each pass requests."""

    def __init__(self, k: Tensor, metadata: Mapping[str, Tensor]) -> None:
        super().__init__(k, metadata)
        self.requested: list[Sequence[Merge]] = []

    def fold(self, work: Work, columns: Sequence[Tensor], merges: Sequence[Merge]) -> list[Tensor]:
        self.requested.append(merges)
        return super().fold(work, columns, merges)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["dot", "gated", "maxsim"])
def test_constant_keys_request_no_gradient(backend: str, form: str) -> None:
    w = World(6, 11, 4, 0, KIND[backend])
    vectors, gate = w.tensors["q"], w.tensors["gate"]
    scores: dict[str, Callable[[Tensor], Score]] = {
        "dot": Dot,
        "gated": lambda q: GatedCosine(q, gate),
        "maxsim": lambda q: MaxSim(q.unflatten(1, (2, 2))),
    }

    def run(k: Tensor) -> tuple[RecordingSource, tuple[Tensor, ...]]:
        q, scale = leaf(vectors), leaf(ONE)
        tokens = k.unflatten(1, (2, 2)) if form == "maxsim" else k
        real = torch.ones(len(k), 2, dtype=torch.bool)
        keys = RecordingSource(tokens, {**w.metadata(), TOKENS: real})
        lses = [Lse("rows", scale), Lse("columns", scale)]
        stats = lse_stats(scores[form](q), keys, lses, Eq(w.row_id, "id"), backend)
        leaves = [q, scale, *([k] if k.requires_grad else [])]
        return keys, grads(weighted_total(stats), *leaves)

    constant, (dq, dscale) = run(w.tensors["k"])
    trainable, (trainable_dq, trainable_dscale, dk) = run(leaf(w.tensors["k"]))
    assert ["grad" in merges for merges in constant.requested] == [False, False]
    assert ["grad" in merges for merges in trainable.requested] == [False, True]
    assert torch.equal(dq, trainable_dq)
    assert torch.equal(dscale, trainable_dscale)
    assert dk.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize(
    ("row_groups", "key_groups"),
    [
        ([0, 0, 1, 1, 1, 4], [0, 0, 0, 1, 4, 4]),
        ([0, 2, 2, 5], [-1, 0, 1, 2, 2, 3, 9, 9]),  # keys of groups without rows
        ([0, 3, 3, 7], [0, 0, 7]),  # rows of groups without keys
        ([5, 5], []),
        ([], [1, 2]),
    ],
)
def test_ragged_equals_a_block_diagonal_mask(
    backend: str, rows: int, row_groups: list[int], key_groups: list[int]
) -> None:
    m, n = len(row_groups), len(key_groups)
    w = World(max(m, 1), max(n, 1), 4, 1, KIND[backend])
    q, k = leaf(w.tensors["q"][:m]), leaf(w.tensors["k"][:n])
    codes = torch.tensor(row_groups, dtype=torch.int64), torch.tensor(key_groups, dtype=torch.int64)
    same = Eq(codes[0], "group")
    column = {"id": w.key_id[:n]}

    def stats(source: KeySource) -> Stats:
        lses = [Lse("rows", 2 * ONE, None, (same,)), Lse("columns", ONE, None, (same,))]
        return lse_stats(q, source, lses, (Eq(w.row_id[:m], "id"), same), backend)

    dense = stats(Local(k, {**column, "group": codes[1]}))
    ragged = stats(Ragged(k, codes[1], codes[0], column, rows=rows))
    for a, b in zip((*dense.z, *dense.positive), (*ragged.z, *ragged.positive), strict=True):
        torch.testing.assert_close(a, b)
    both = (grads(weighted_total(stats), q, k) for stats in (dense, ragged))
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b)


def test_unsorted_ragged_groups_raise_value_error() -> None:
    k, sorted_, mixed = torch.zeros(3, 2), torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1])
    with pytest.raises(ValueError, match="row_groups must be int64 and sorted"):
        Ragged(k, sorted_, mixed)
    with pytest.raises(ValueError, match=r"groups must be int64 and sorted; got torch\.int32"):
        Ragged(k, sorted_.int(), sorted_)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("modalities", [3, 4])
def test_products_score_all_pairings(backend: str, modalities: int) -> None:
    """Symile's O(N^2) form scores anchors with every combination of the other modalities' rows."""
    n, factors = 4, modalities - 1
    g = torch.Generator().manual_seed(0)
    a, *others = (
        torch.randn(n, 3, generator=g, dtype=torch.float64).to(KIND[backend]).requires_grad_()
        for _ in range(modalities)
    )
    keys = Products(others, all_pairings(n, factors))
    assert keys.total == n**factors
    result = lse_stats(a, keys, [Lse("rows", ONE)], Eq(torch.arange(n), "tuple"), backend)
    combinations = list(itertools.product(range(n), repeat=factors))
    scores = torch.stack([
        torch.stack([
            (a[i] * torch.stack([o[j] for o, j in zip(others, at, strict=True)]).prod(0)).sum()
            for at in combinations
        ])
        for i in range(n)
    ])  # fmt: skip
    true_scores = torch.stack([scores[i, combinations.index((i,) * factors)] for i in range(n)])
    torch.testing.assert_close(result.z[0], scores.logsumexp(1))
    torch.testing.assert_close(result.positive[0], true_scores)
    assert (result.weight[0] == 1).all()
    gradients = grads((result.z[0] - result.positive[0]).sum(), a, *others)
    expected = grads((scores.logsumexp(1) - true_scores).sum(), a, *others)
    for actual, exact in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, exact)


def test_products_of_float32_factors_work_in_the_reference_back_end() -> None:
    """Gradients there are float64 and must be added to those of the factors."""
    a, b, c = (torch.randn(4, 3, generator=torch.Generator().manual_seed(i)).requires_grad_()
               for i in range(3))  # fmt: skip
    keys = Products([b, c], [(0, 0), (0, 1)])
    results = []
    for backend in ("reference", "tiled"):
        (z,) = lse_stats(a, keys, [Lse("rows", ONE.float())], backend=backend).z
        results.append((z, *grads(z.sum(), a, b, c)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_shuffled_products_mark_true_tuples() -> None:
    b, c = torch.randn(4, 3), torch.randn(4, 3)
    keys = Products([b, c], [(torch.tensor([2, 1, 0, 3]), torch.tensor([2, 0, 1, 3]))])
    tuples: list[Tensor] = []
    keys.fold(lambda block, _: tuples.append(block.metadata["tuple"]) or [], [], [])
    assert [t.tolist() for t in tuples] == [[2, -1, -1, 3]]


def test_key_bias_is_split_over_concatenated_sources() -> None:
    w = World(5, 6, 3, 2)
    q, bias = leaf(w.tensors["q"]), leaf(w.tensors["key_bias"])
    keys = Concat(Local(w.tensors["k"][:2]), Local(w.tensors["k"][2:]))
    out = pair_sum(q, keys, "softplus", ONE, 0 * ONE, bias)
    scores = q @ w.tensors["k"].T + bias
    expected = torch.nn.functional.softplus(scores).sum(1)
    torch.testing.assert_close(out, expected)
    weight = torch.arange(5)
    for a, b in zip(
        grads((out * weight).sum(), q, bias), grads((expected * weight).sum(), q, bias), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_gather_rows_without_group_returns_its_input() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    assert gather_rows(rows, None) is rows


def test_fully_masked_rows_and_columns_give_minus_infinity() -> None:
    w = World(3, 4, 2, 0)
    never = Eq(torch.full((3,), 77), "id")
    for axis in ("rows", "columns"):
        stats = lse_stats(w.tensors["q"], Local(w.tensors["k"], w.metadata()),
                          [Lse(axis, ONE, None, (never,))])  # fmt: skip
        expected = lse(torch.full((3, 4), -torch.inf), int(axis == "rows"))
        assert torch.equal(stats.z[0], expected.double())
