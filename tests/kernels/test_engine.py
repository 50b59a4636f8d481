"""`lse_stats`, `pair_sum` and `row_top` against brute force, over combinations of all features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import brute
import pytest
import torch
from backends import (
    BACKENDS_OF_FLOAT64,
    BACKENDS_WITH_SLOW_TRITON,
    SLOW_TRITON,
    TRITON,
    examples,
    sizes,
    small_tiles,
)
from brute import World
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gigabatch.kernels import (
    AbsDiff,
    AtLeast,
    Either,
    Eq,
    GatedCosine,
    Local,
    Lse,
    Ne,
    SecondScore,
    Table,
    lse_stats,
    pair_sum,
    row_top,
)
from gigabatch.kernels.scores import Dot

MASKS, WEIGHTS = sorted(brute.MASKS), sorted(brute.WEIGHTS)
RULES = st.tuples(
    st.lists(st.sampled_from(MASKS), max_size=2, unique=True),
    st.lists(st.sampled_from(WEIGHTS), max_size=2, unique=True),
).map(lambda both: both[0] + both[1])
POSITIVES = st.sampled_from(
    [[], ["eq"], ["eq", "not self"], ["eq", "distance"], ["soft"], ["own table", "eq"]]
)
SIZES = {"m": sizes(12), "n": sizes(12), "d": st.integers(1, 9)}

# On a CPU its products take three times as long as those of any other dtype.
SLOW_BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.slow)


def clause(w: World, name: str) -> Any:
    rows, keys = torch.arange(w.m), w.tensors
    equal = Eq(w.row_id, "id")
    return {
        "eq": equal,
        "ne": Ne(w.row_id, "id"),
        "not self": Ne(rows, "index"),
        "either": Either(Ne(w.row_id, "id"), Eq(rows, "index")),
        "teacher": SecondScore(keys["row_teacher"], "teacher", at_most=0.5),
        "at least": AtLeast(keys["threshold"]),
        "table": Table(w.row_role, "role", keys["table"]),
        "own table": Table(w.row_role, "role", keys["table"], only=equal),
        "distance": AbsDiff(keys["row_label"], "label"),
        "mixed distance": AbsDiff(keys["row_label"], "label", keys["factor"]),
        "soft": SecondScore(keys["row_teacher"], "teacher", scale=2.0),
    }[name]


def rule_of(w: World, names: Sequence[str]) -> tuple[Any, ...]:
    return tuple(clause(w, name) for name in names)


class Problem:
    """A random use of the engine, computed by the engine and by brute force."""

    def __init__(
        self, world: World, score: str, axes: Sequence[str], rule: Sequence[str],
        positives: Sequence[str], vectors: bool, biased: bool, scale: float,
    ) -> None:  # fmt: skip
        self.world, self.score, self.axes = world, score, axes
        self.rule, self.positives, self.biased = rule, positives, biased
        wide = torch.promote_types(world.dtype, torch.float32)
        t = world.tensors
        self.inputs = {"q": t["q"], "k": t["k"]}
        if score == "gated":
            self.inputs["gate"] = t["gate"]
        for axis in axes:
            along, across = ("row", "key") if axis == "rows" else ("key", "row")
            self.inputs[f"{axis} scale"] = (
                scale * t[f"{along}_scale"] if vectors else torch.tensor(scale, dtype=wide)
            )
            if biased:
                self.inputs[f"{axis} bias"] = t[f"{across}_bias"]

    def to(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: value.detach().to(dtype) for name, value in self.inputs.items()}

    def engine(self, x: dict[str, Tensor], backend: str, cache_bytes: int = 0) -> list[Tensor]:
        w = self.world
        score = Dot(x["q"]) if self.score == "dot" else GatedCosine(x["q"], x["gate"])
        rule = rule_of(w, self.rule)
        lses = [Lse(axis, x[f"{axis} scale"], x.get(f"{axis} bias"), rule) for axis in self.axes]
        stats = lse_stats(
            score, Local(x["k"], w.metadata()), lses,
            rule_of(w, self.positives) if self.positives else None, backend, cache_bytes,
        )  # fmt: skip
        return [*stats.z, *stats.positive, *stats.weight]

    def brute(self, x: dict[str, Tensor], rule_scores: Tensor | None = None) -> list[Tensor]:
        w = self.world
        scores = (
            brute.dot(x["q"], x["k"]) if self.score == "dot"
            else brute.gated(x["q"], x["gate"], x["k"])
        )  # fmt: skip
        judged = scores if rule_scores is None else rule_scores
        mask, weights = brute.combine_rule(w, self.rule, judged)
        z, positive, weight = [], [], []
        for axis in self.axes:
            a, scale = int(axis == "rows"), x[f"{axis} scale"]
            logits = (scale.unsqueeze(a) if scale.ndim else scale) * scores
            if self.biased:
                logits = logits + x[f"{axis} bias"].unsqueeze(1 - a)
            z.append(brute.lse((logits + weights).masked_fill(~mask, -torch.inf), a))
            if self.positives:
                keep, lw = brute.combine_rule(w, self.positives, judged)
                share = torch.where(keep, lw.exp(), 0)
                positive.append((share * logits).sum(a))
                weight.append(share.sum(a).detach())
        return [*z, *positive, *weight]


def differentiate(results: list[Tensor], inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return results, then gradients of a fixed linear function of the finite ones."""
    g = torch.Generator().manual_seed(0)
    total = torch.zeros((), dtype=results[0].dtype)
    for r in results:
        if r.requires_grad:
            weight = torch.randn(r.shape, generator=g, dtype=torch.float64).to(r.dtype)
            total = total + torch.where(r.detach().isfinite(), r * weight, 0).sum()
    grads = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
    zeros = [torch.zeros_like(x) for x in inputs.values()]
    return [*results, *(z if g is None else g for z, g in zip(zeros, grads, strict=True))]


def leaves(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}


def assert_close(
    results: list[Tensor], baseline: list[Tensor], expected: list[Tensor], largest: float
) -> None:
    """Assert that errors against float64 are at most twice those of plain torch, the baseline.

    Plain torch may be exact by chance, so a few rounding errors of the logit `largest` (an exp's
    relative error) are allowed.
    """
    for i, (x, other, exact) in enumerate(zip(results, baseline, expected, strict=True)):
        exact = exact.to(x.dtype).double().where(exact.abs() > torch.finfo(x.dtype).max, exact)
        finite = exact.isfinite()
        assert torch.equal(x.isfinite(), finite), i
        assert torch.equal(x[~finite].double(), exact[~finite].double()), i
        kind = torch.promote_types(x.dtype, torch.float32)
        size = exact[finite].detach().abs().max().item() if finite.any() else 0.0
        floor = 8 * torch.finfo(kind).eps * largest * (1 + size) + torch.finfo(x.dtype).eps * size
        error, allowed = (
            (t[finite].double() - exact[finite]).abs().max().item() if finite.any() else 0.0
            for t in (x, other)
        )
        assert error <= 2 * allowed + floor, (i, error, allowed, floor)


@pytest.mark.parametrize("backend", BACKENDS_WITH_SLOW_TRITON)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, SLOW_BF16, torch.float16])
@settings(max_examples=examples(40), deadline=None)
@given(
    **SIZES, seed=st.integers(0, 10**6), score=st.sampled_from(["dot", "dot", "gated"]),
    axes=st.sampled_from([["rows"], ["columns"], ["rows", "columns"], ["columns", "rows", "rows"]]),
    rule=RULES, positives=POSITIVES, vectors=st.booleans(), biased=st.booleans(),
    exponent=st.floats(-3, 3), sign=st.sampled_from([1, 1, -1]),
)  # fmt: skip
def test_statistics_equal_brute_force(
    backend: str, dtype: torch.dtype, m: int, n: int, d: int, seed: int, score: str,
    axes: list[str], rule: list[str], positives: list[str], vectors: bool, biased: bool,
    exponent: float, sign: int,
) -> None:  # fmt: skip
    world = World(m, n, d, seed, dtype)
    scale = sign * 10.0**exponent
    problem = Problem(world, score, axes, rule, positives, vectors, biased, scale)
    ours = leaves(problem.inputs)
    with small_tiles():
        got = differentiate(problem.engine(ours, backend), ours)
    plain, exact = leaves(problem.inputs), leaves(problem.to(torch.float64))
    # A mask by score must compare the same scores, or results differ at the threshold.
    judged = brute.dot(world.tensors["q"], world.tensors["k"]) if score == "dot" else brute.gated(
        world.tensors["q"], world.tensors["gate"], world.tensors["k"])  # fmt: skip
    if "at least" in rule:
        assume((judged - world.tensors["threshold"][:, None]).abs().min() > 1e-4)
    other = differentiate(problem.brute(plain, judged), plain)
    truth = differentiate(problem.brute(exact, judged.double()), exact)
    biggest = max(float(v.abs().max()) for n_, v in problem.inputs.items() if "scale" in n_)
    # Small gates amplify rounding errors.
    assert_close(got, other, truth, (4 + biggest) * (64 if score == "gated" else 1))


@pytest.mark.parametrize("backend", ["tiled", SLOW_TRITON])
@settings(max_examples=examples(12), deadline=None)
@given(
    **SIZES, seed=st.integers(0, 10**6), rule=RULES, positives=POSITIVES,
    score=st.sampled_from(["dot", "dot", "gated"]), vectors=st.booleans(), room=st.integers(0, 800),
)  # fmt: skip
def test_score_cache_changes_no_bit(
    backend: str, m: int, n: int, d: int, seed: int, rule: list[str], positives: list[str],
    score: str, vectors: bool, room: int,
) -> None:  # fmt: skip
    """The cache has room for no row, some rows or all."""
    world = World(m, n, d, seed, torch.float32)
    problem = Problem(world, score, ["columns", "rows"], rule, positives, vectors, True, 3.0)
    results = []
    for cache_bytes in (0, room):
        inputs = leaves(problem.inputs)
        with small_tiles():
            results.append(differentiate(problem.engine(inputs, backend, cache_bytes), inputs))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


BACKENDS = ["tiled", TRITON]


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_that_share_memory_get_separate_gradients(backend: str) -> None:
    """Two scales that share memory but not their graph get separate gradients."""
    w = World(6, 7, 4, 0, torch.float32)
    one = torch.tensor(3.0, requires_grad=True)
    other = one.detach().requires_grad_()
    separate = torch.tensor(3.0, requires_grad=True)
    grads = []
    for scale in (other, separate):
        keys = Local(w.tensors["k"])
        both = [Lse("rows", one), Lse("columns", scale)]
        total = torch.cat(lse_stats(w.tensors["q"], keys, both, backend=backend).z).square().sum()
        grads.append(torch.autograd.grad(total, (one, scale)))
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pairs_of_weight_zero_may_be_infinite(backend: str) -> None:
    """A positive of weight 0 may have a logit of -inf, from its key's bias."""
    w = World(3, 4, 5, 0, torch.float32)
    bias = torch.tensor([0.0, -torch.inf, 0.0, 0.0])
    keys = Local(w.tensors["k"], {"code": torch.tensor([0, 1, 0, 0])})
    rule = Table(torch.zeros(3, dtype=torch.int64), "code", torch.tensor([[0.0, -torch.inf]]))
    lse = Lse("rows", torch.tensor(2.0), bias)
    stats = lse_stats(w.tensors["q"], keys, [lse], rule, backend)
    scores = 2 * w.tensors["q"] @ w.tensors["k"].T
    torch.testing.assert_close(stats.positive[0], scores[:, [0, 2, 3]].sum(1))
    assert stats.weight[0].tolist() == [3, 3, 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_top_ignores_log_weights_and_their_limits(backend: str) -> None:
    w = World(6, 9, 4, 0, torch.float32)
    few = Either(Eq(w.row_id, "id"), Ne(w.row_role, "role"))
    weight = Table(w.row_role, "role", w.tensors["table"], only=few)
    keys, rule = Local(w.tensors["k"], w.metadata()), (weight, Ne(w.row_id, "id"))
    actual = row_top(w.tensors["q"], keys, 2, rule, backend)
    expected = row_top(w.tensors["q"], keys, 2, rule[1:], "reference")
    torch.testing.assert_close(actual[0], expected[0].float())
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.float64])
def test_abs_diff_accepts_labels_of_any_dtype(backend: str, dtype: torch.dtype) -> None:
    w = World(3, 4, 5, 0, torch.float32)
    rows, columns = torch.tensor([0, 1, 5]).to(dtype), torch.tensor([3, 1, 2, 2]).to(dtype)
    lse = Lse("rows", torch.tensor(2.0), None, (AbsDiff(rows, "label"),))
    keys = Local(w.tensors["k"], {"label": columns})
    (z,) = lse_stats(w.tensors["q"], keys, [lse], backend=backend).z
    log_weights = (rows[:, None] - columns).abs().float().log1p()
    expected = (2 * w.tensors["q"] @ w.tensors["k"].T + log_weights).logsumexp(1)
    rtol = 1e-2 if dtype.itemsize == 2 else 1e-5
    torch.testing.assert_close(z.float(), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("backend", BACKENDS_WITH_SLOW_TRITON)
@pytest.mark.parametrize("phi", ["softplus", "relu", "step"])
@pytest.mark.parametrize("total", [False, True])
@settings(max_examples=examples(25), deadline=None)
@given(
    **SIZES, seed=st.integers(0, 10**6), rule=RULES, vectors=st.booleans(), biased=st.booleans(),
    exponent=st.floats(-3, 2),
)  # fmt: skip
def test_pair_sums_equal_brute_force(
    backend: str, phi: str, total: bool, m: int, n: int, d: int, seed: int, rule: list[str],
    vectors: bool, biased: bool, exponent: float,
) -> None:  # fmt: skip
    # Triton has no kernels for float64.
    dtype = torch.float32 if backend == "triton" else torch.float64
    w, scale = World(m, n, d, seed, dtype), 10.0**exponent
    t = w.tensors
    inputs = {
        "q": t["q"], "k": t["k"],
        "scale": scale * t["row_scale"] if vectors else torch.tensor(scale, dtype=dtype),
        "shift": t["shift"],
    }  # fmt: skip
    if biased:
        inputs["bias"] = t["key_bias"]

    def engine(x: dict[str, Tensor]) -> list[Tensor]:
        out = pair_sum(
            x["q"], Local(x["k"], w.metadata()), phi, x["scale"], x["shift"], x.get("bias"),
            rule_of(w, rule), total=total, backend=backend,
        )  # fmt: skip
        return [out]

    bound = 1e-9 if dtype == torch.float64 else 2e-5

    def logits_of(x: dict[str, Tensor]) -> Tensor:
        scores = brute.dot(x["q"], x["k"])
        logits = scores * (x["scale"][:, None] if vectors else x["scale"]) + x["shift"][:, None]
        return logits + x["bias"] if biased else logits

    def distance_to_step(x: dict[str, Tensor]) -> Tensor:
        return logits_of(x).detach().abs()

    def dense(x: dict[str, Tensor]) -> list[Tensor]:
        scores, logits = brute.dot(x["q"], x["k"]), logits_of(x)
        value = {
            "softplus": torch.logaddexp(logits, torch.zeros_like(logits)),
            "relu": logits.clamp(min=0),
            "step": (logits >= 0).to(dtype),
        }[phi]
        mask, weights = brute.combine_rule(w, rule, scores)
        out = torch.where(mask, value * weights.exp(), 0).sum(1)
        return [out.sum() if total else out]

    with small_tiles():
        ours, truth = leaves(inputs), leaves(inputs)
        got, want = engine(ours), dense(truth)
        if phi == "step":
            assert not got[0].requires_grad
            # Compare only where no logit is so close to the step that rounding decides.
            certain = (distance_to_step(truth) > bound * (1 + scale)).all(1)
            certain = certain.all() if total else certain
            torch.testing.assert_close(got[0][certain], want[0][certain])
            return
        got, want = differentiate(got, ours), differentiate(want, truth)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(
            one.double(), other.double(), rtol=bound, atol=bound * (1 + scale) ** 2
        )


@pytest.mark.parametrize("backend", BACKENDS_WITH_SLOW_TRITON)
@settings(max_examples=examples(40), deadline=None)
@given(
    **SIZES, seed=st.integers(0, 10**6), rule=RULES, k=st.integers(1, 20), gated=st.booleans()
)  # fmt: skip
def test_row_top_equals_sorting(
    backend: str, m: int, n: int, d: int, seed: int, rule: list[str], k: int, gated: bool
) -> None:
    w = World(m, n, d, seed, torch.float32 if backend == "triton" else torch.float64)
    t = w.tensors
    if gated:
        score, scores = GatedCosine(t["q"], t["gate"]), brute.gated(t["q"], t["gate"], t["k"])
    else:
        score, scores = Dot(t["q"]), brute.dot(t["q"], t["k"])
    if "at least" in rule:  # a mask by score must compare the same scores
        assume((scores - t["threshold"][:, None]).abs().min() > 1e-4)
    mask, _ = brute.combine_rule(w, [name for name in rule if name in brute.MASKS], scores)
    with small_tiles():
        keys = Local(t["k"], w.metadata())
        values, index = row_top(score, keys, k, rule_of(w, rule), backend)
    allowed = scores.masked_fill(~mask, -torch.inf)
    want = torch.full((m, max(k, n)), -torch.inf, dtype=scores.dtype)
    want[:, :n] = allowed
    torch.testing.assert_close(values, want.sort(1, descending=True).values[:, :k])
    exists = index >= 0
    assert torch.equal(exists, values > -torch.inf)
    assert (index[~exists] == -1).all()
    at = index.clamp(min=0).clamp(max=n - 1)
    torch.testing.assert_close(values[exists], allowed.gather(1, at)[exists])


@pytest.mark.parametrize("backend", BACKENDS_OF_FLOAT64)
def test_invalid_arguments_raise_value_error(backend: str) -> None:
    w = World(4, 5, 3, 0)
    q, keys, one = w.tensors["q"], Local(w.tensors["k"], w.metadata()), torch.ones(())
    for lse, message in [
        (Lse("diagonal", one), "choose rows or columns"),  # type: ignore[arg-type]
        (Lse("rows", torch.ones(5)), r"scale of rows must be \(\) or \(4,\); got \(5,"),
        (Lse("columns", torch.ones(4)), r"scale of columns .* got \(4,\)"),
        (Lse("rows", one, torch.ones(4)), r"bias of rows must be \(5,\)"),
        (Lse("columns", one, torch.ones(5)), r"bias of columns must be \(4,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            lse_stats(q, keys, [lse], backend=backend)
    with pytest.raises(ValueError, match="choose one of softplus, relu, step"):
        pair_sum(q, keys, "sine", one, one, backend=backend)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shift of rows .* got \(5,\)"):
        pair_sum(q, keys, "relu", one, torch.ones(5), backend=backend)
    with pytest.raises(ValueError, match="k is 0; it must be at least 1"):
        row_top(q, keys, 0)
    with pytest.raises(ValueError, match="backend is 'fast'"):
        lse_stats(q, keys, [Lse("rows", one)], backend="fast")
