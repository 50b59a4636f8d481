from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from backends import BACKENDS_OF_FLOAT64, KIND, SLOW_TRITON, examples, small_tiles
from backends import BACKENDS_WITH_SLOW_TRITON as BACKENDS
from dense import (
    Case,
    Result,
    assert_as_exact_as_torch,
    dense_loss,
    differentiate,
    differentiate_with,
    make_case,
    positives,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gigabatch.kernels import (
    Eq,
    Local,
    Lse,
    contrastive_loss,
    lse_stats,
    pair_sum,
    sigmoid_loss,
    tiled,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
CASES = st.builds(
    make_case,
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    d=st.integers(1, 17),
    scale=st.floats(-2, 2).map(lambda exponent: 10**exponent),
    ids=st.integers(1, 60),  # from all equal to few positives
    seed=st.integers(0, 10**6),
    symmetric=st.booleans(),
    label_smoothing=st.sampled_from([0.0, 0.1, 0.5]),
    biased=st.booleans(),
)
EXCLUDED = st.builds(
    lambda n, d, **rest: make_case(n, n, d, same_id="exclude", **rest),
    n=st.integers(1, 40),
    d=st.integers(1, 17),
    scale=st.floats(-2, 2).map(lambda exponent: 10**exponent),
    ids=st.sampled_from([None, 1, 3, 12, 60]),
    seed=st.integers(0, 10**6),
    symmetric=st.booleans(),
    label_smoothing=st.sampled_from([0.0, 0.1, 0.5]),
    biased=st.booleans(),
)
SQUARES = st.builds(
    lambda n, d, seed, scale, symmetric: make_case(n, n, d, scale, None, seed, symmetric),
    st.integers(1, 40), st.integers(1, 17), st.integers(0, 10**6),
    st.sampled_from([0.01, 1.0, 14.3, 100.0]), st.booleans(),
)  # fmt: skip


@pytest.fixture(params=["one tile", "partial tiles"])
def tiles(request: pytest.FixtureRequest) -> Iterator[None]:
    """Use tiles larger than the inputs, then tiles so small that there are many, not all full."""
    with small_tiles(7, 5) if request.param == "partial tiles" else contextlib.nullcontext():
        yield


def checked(case: Case, backend: str) -> Result:
    result = differentiate(case, backend)
    assert result.finite()
    assert_as_exact_as_torch(case, result)
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=examples(60))
@given(case=CASES | EXCLUDED)
def test_value_and_gradients_equal_dense_loss(backend: str, dtype: torch.dtype, case: Case) -> None:
    checked(case.to(dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=examples(60))
@given(case=CASES | EXCLUDED)
def test_partial_tiles_equal_dense_loss(dtype: torch.dtype, case: Case) -> None:
    with small_tiles(7, 5):
        checked(case.to(dtype), "tiled")


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=examples(40))
@given(case=SQUARES)
def test_without_ids_loss_equals_clip(backend: str, case: Case) -> None:
    assert case.ids_q is None
    ours = checked(case.to(torch.float32), backend)
    logits = case.scale * case.q @ case.k.T
    target = torch.arange(len(logits))
    clip = torch.nn.functional.cross_entropy(logits, target)
    if case.symmetric:
        clip = (clip + torch.nn.functional.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(ours.value.double(), clip, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_q_without_ids_k_apply_to_both_sides(backend: str) -> None:
    case = make_case(20, 20, 8, ids=7).to(KIND[backend])
    one_sided = Case(case.q, case.k, case.scale, case.ids_q)
    both = Case(case.q, case.k, case.scale, case.ids_q, case.ids_q)
    assert differentiate(one_sided, backend).equal(differentiate(both, backend))
    checked(one_sided, backend)


def test_default_back_end_is_tiled() -> None:
    case = make_case(30, 20, 8).to(torch.float32)
    assert differentiate(case).equal(differentiate(case, "tiled"))


@pytest.mark.parametrize("backend", BACKENDS_OF_FLOAT64)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.usefixtures("tiles")
def test_gradcheck_of_contrastive_loss(backend: str, symmetric: bool) -> None:
    case = make_case(9, 12, 4, scale=3.0, ids=5, symmetric=symmetric)

    def loss(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
        return contrastive_loss(
            q, k, scale, ids_q=case.ids_q, ids_k=case.ids_k, symmetric=symmetric, backend=backend
        )

    inputs = tuple(t.clone().requires_grad_() for t in (case.q, case.k, case.scale))
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS_OF_FLOAT64)
@pytest.mark.usefixtures("tiles")
def test_gradcheck_of_statistics_with_separate_scales(backend: str) -> None:
    case = make_case(9, 12, 4, ids=5)
    assert case.ids_q is not None
    assert case.ids_k is not None
    ids_q, ids_k = case.ids_q, case.ids_k

    def stats(q: Tensor, k: Tensor, *scales: Tensor) -> tuple[Tensor, ...]:
        lses = [Lse("rows", scales[0]), Lse("columns", scales[1]), Lse("rows", scales[2])]
        result = lse_stats(q, Local(k, {"id": ids_k}), lses, Eq(ids_q, "id"), backend)
        return (*result.z, *result.positive)

    scales = [torch.tensor(s, dtype=torch.float64) for s in (0.5, 2.0, 7.0)]
    inputs = tuple(t.clone().requires_grad_() for t in (case.q, case.k, *scales))
    assert torch.autograd.gradcheck(stats, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("tiles")
def test_statistics_equal_their_formulas(backend: str) -> None:
    case = make_case(23, 17, 6, ids=9).to(KIND[backend])
    assert case.ids_q is not None
    assert case.ids_k is not None
    lses = [Lse("columns", torch.tensor(2.0)), Lse("rows", torch.tensor(30.0))]
    keys = Local(case.k, {"id": case.ids_k})
    stats = lse_stats(case.q, keys, lses, Eq(case.ids_q, "id"), backend)
    scores, mask = case.q @ case.k.T, positives(case)
    torch.testing.assert_close(stats.z[0], (2 * scores).logsumexp(0))
    torch.testing.assert_close(stats.z[1], (30 * scores).logsumexp(1))
    torch.testing.assert_close(stats.positive[0], 2 * (scores * mask).sum(0))
    torch.testing.assert_close(stats.positive[1], 30 * (scores * mask).sum(1))
    assert [c.tolist() for c in stats.weight] == [mask.sum(0).tolist(), mask.sum(1).tolist()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_raises_runtime_error(backend: str) -> None:
    case = make_case(6, 6, 4).to(KIND[backend])
    q = case.q.clone().requires_grad_()
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    loss = contrastive_loss(
        q, case.k, case.scale, ids_q=case.ids_q, ids_k=case.ids_k, backend=backend
    )
    (dq,) = torch.autograd.grad(weight * loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("tiles")
def test_rows_without_positive_have_weight_zero(backend: str, dtype: torch.dtype) -> None:
    """They are not part of the sum or mean, but remain negatives of the other side."""
    case = make_case(12, 15, 8, symmetric=False).to(dtype)
    assert case.ids_q is not None
    ids_q = case.ids_q.clone()
    ids_q[[2, 5, 11]] = -1  # no key has this id
    unmatched = Case(case.q, case.k, case.scale, ids_q, case.ids_k, symmetric=False)
    matched = ids_q != -1
    rest = Case(case.q[matched], case.k, case.scale, ids_q[matched], case.ids_k, symmetric=False)
    one, two = checked(unmatched, backend), checked(rest, backend)
    torch.testing.assert_close(one.value, two.value)
    assert (one.dq[~matched] == 0).all()
    torch.testing.assert_close(one.dq[matched], two.dq)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.usefixtures("tiles")
def test_batch_without_positives_gives_zero(
    backend: str, dtype: torch.dtype, symmetric: bool
) -> None:
    case = make_case(12, 15, 8, scale=100.0).to(dtype)
    ids_q, ids_k = torch.arange(12), 100 + torch.arange(15)
    unmatched = Case(case.q, case.k, case.scale, ids_q, ids_k, symmetric)
    result = differentiate(unmatched, backend)
    for tensor in result.tensors():
        assert (tensor == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("m", "n"), [(0, 5), (5, 0), (0, 0)])
def test_empty_sides_give_zero(backend: str, m: int, n: int) -> None:
    result = differentiate(make_case(m, n, 4).to(torch.float32), backend)
    assert result.dq.shape == (m, 4)
    assert result.dk.shape == (n, 4)
    for tensor in result.tensors():
        assert (tensor == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.usefixtures("tiles")
def test_scores_of_128_do_not_overflow(backend: str, dtype: torch.dtype, scale: float) -> None:
    signs = torch.where(torch.rand(24, 8, generator=torch.Generator().manual_seed(1)) < 0.5, -1, 1)
    rows = 4.0 * signs  # of squared length 128: scores run from -128 to 128
    case = Case(rows[:12], rows[8:], torch.tensor(scale), torch.arange(12), torch.arange(8, 24)).to(
        dtype
    )
    assert (case.q @ case.k.T).abs().max() == 128
    checked(case, backend)


@pytest.mark.parametrize("backend", BACKENDS_OF_FLOAT64)
@pytest.mark.parametrize("offset", [128.0, -128.0])
@pytest.mark.usefixtures("tiles")
def test_common_offset_of_logits_changes_nothing(backend: str, offset: float) -> None:
    """exp(12800) overflows, so sums must subtract the true maximum."""
    case = make_case(13, 11, 6, scale=100.0)
    one, offsets = torch.ones(13, 1).double(), torch.full((11, 1), offset).double()
    shifted_case = Case(
        torch.cat([case.q, one], 1), torch.cat([case.k, offsets], 1), case.scale, case.ids_q,
        case.ids_k,
    )  # fmt: skip
    baseline, shifted = differentiate(case, backend), differentiate(shifted_case, backend)
    torch.testing.assert_close(shifted.value, baseline.value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(shifted.dq[:, :6], baseline.dq, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(shifted.dk[:, :6], baseline.dk, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("backend", ["tiled", SLOW_TRITON])
def test_late_gradients_are_exact_in_bfloat16(backend: str) -> None:
    """With probabilities near 1 the positive weight must be subtracted before G is rounded."""
    case = make_case(64, 64, 32, scale=100.0, ids=None, seed=4)
    keys = torch.nn.functional.normalize(case.q + 1.3 * case.k, dim=1)
    late = Case(case.q, keys, case.scale).to(torch.bfloat16)
    result = differentiate(late, backend)
    exact = differentiate(late.to(torch.float64), dense=True)
    baseline = differentiate(late, dense=True)
    error, baseline_error = ((r.dq.double() - exact.dq).norm() for r in (result, baseline))
    assert error < 0.01 * exact.dq.norm()
    assert error < 0.1 * baseline_error


@pytest.mark.parametrize("backend", ["tiled", SLOW_TRITON])
@pytest.mark.parametrize("noise", [1.5, 2.0, 2.5])  # losses of about 1e-12, 1e-5 and 1e-3
def test_late_gradients_are_exact_in_float32(backend: str, noise: float) -> None:
    """If nearly every probability is 0 or 1, rounding errors in them would hide the gradient."""
    case = make_case(256, 256, 64, scale=100.0, ids=None, seed=4)
    noisy = noise * torch.nn.functional.normalize(case.k, dim=1)
    late = Case(case.q, torch.nn.functional.normalize(case.q + noisy, dim=1), case.scale)
    late = late.to(torch.float32)
    exact = differentiate(late.to(torch.float64), dense=True)
    result, baseline = differentiate(late, backend), differentiate(late, dense=True)
    error, baseline_error = ((r.dq.double() - exact.dq).norm() for r in (result, baseline))
    assert error <= 16 * baseline_error, (error, baseline_error, exact.dq.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_calls_give_the_same_bits(backend: str, dtype: torch.dtype) -> None:
    case = make_case(600, 600, 16, ids=50).to(dtype)
    assert differentiate(case, backend).equal(differentiate(case, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_larger_than_a_default_tile_equal_dense_loss(backend: str) -> None:
    case = make_case(tiled.ROWS + 3, tiled.COLUMNS + 5, 3, ids=900)
    checked(case.to(torch.float32), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_rows_permutes_gradients(backend: str) -> None:
    case = make_case(20, 20, 8).to(KIND[backend])
    assert case.ids_q is not None
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    permuted = Case(case.q[order], case.k, case.scale, case.ids_q[order], case.ids_k)
    one, two = differentiate(case, backend), differentiate(permuted, backend)
    torch.testing.assert_close(two.value, one.value)
    torch.testing.assert_close(two.dq, one.dq[order])
    torch.testing.assert_close(two.dk, one.dk)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_layout_changes_nothing(backend: str) -> None:
    case = make_case(20, 24, 8).to(KIND[backend])
    strided = Case(
        case.q.T.contiguous().T, case.k.repeat(1, 2)[:, :8], case.scale, case.ids_q, case.ids_k
    )
    one, two = differentiate(case, backend), differentiate(strided, backend)
    torch.testing.assert_close(two.value, one.value)
    torch.testing.assert_close(two.dq, one.dq)
    torch.testing.assert_close(two.dk, one.dk)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_a_single_input_is_the_same(backend: str) -> None:
    case = make_case(20, 24, 8).to(KIND[backend])
    full = differentiate(case, backend)
    for name, expected in (("q", full.dq), ("k", full.dk), ("scale", full.dscale)):
        inputs = {n: getattr(case, n).clone() for n in ("q", "k", "scale")}
        inputs[name].requires_grad_()
        loss = contrastive_loss(**inputs, ids_q=case.ids_q, ids_k=case.ids_k, backend=backend)
        loss.backward()
        assert torch.equal(inputs[name].grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_tensor_on_both_sides_gets_both_gradients(backend: str) -> None:
    """Text against text: the tensor's gradient is the sum of both."""
    case = make_case(15, 1, 6).to(KIND[backend])
    q = case.q.clone().requires_grad_()
    contrastive_loss(q, q, case.scale, backend=backend).backward()
    other = case.q.clone().requires_grad_()
    dense_loss(Case(other, other, case.scale)).backward()
    torch.testing.assert_close(q.grad, other.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_label_smoothing_matches_torch(backend: str) -> None:
    case = replace(make_case(20, 20, 8, ids=None, symmetric=False), label_smoothing=0.1)
    case = case.to(KIND[backend])
    target = torch.arange(20)
    expected = torch.nn.functional.cross_entropy(
        case.scale * case.q @ case.k.T, target, label_smoothing=0.1
    )
    torch.testing.assert_close(differentiate(case, backend).value, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exclude_equals_dropping_other_copies(backend: str) -> None:
    """If a batch contains a sample twice, each copy has the loss of the batch without the other."""
    case = make_case(6, 6, 4, ids=None, symmetric=False).to(KIND[backend])
    ids = torch.tensor([0, 1, 2, 3, 4, 0])
    q, k = case.q.clone(), case.k.clone()
    q[5], k[5] = q[0], k[0]
    doubled = Case(q, k, case.scale, ids, ids, False, "exclude")
    single = Case(q[:5], k[:5], case.scale, symmetric=False)
    logits = case.scale * q @ k.T
    allowed = torch.tensor([[True] * 5 + [False]] * 5 + [[False] + [True] * 5])
    for row in range(1, 5):
        allowed[row, 5] = True
    rows = [logits[i][allowed[i]].logsumexp(0) - logits[i, i] for i in range(6)]
    torch.testing.assert_close(differentiate(doubled, backend).value, torch.stack(rows).mean())
    with_positives = differentiate(replace(doubled, same_id="positive"), backend)
    assert not torch.isclose(with_positives.value, differentiate(single, backend).value)


def sigmoid_of(backend: str | None) -> Callable[[Case], Tensor]:
    def loss(case: Case) -> Tensor:
        assert case.bias is not None
        return sigmoid_loss(case.q, case.k, case.scale, case.bias, backend=backend)

    return loss


def dense_sigmoid(case: Case) -> Tensor:
    """Compute SigLIP's loss in the form of the paper's code, in at least float32."""
    wide = torch.promote_types(case.q.dtype, torch.float32)
    logits = case.scale * (case.q.to(wide) @ case.k.to(wide).T) + case.bias
    labels = 2 * torch.eye(len(logits), dtype=wide) - 1
    return -torch.nn.functional.logsigmoid(labels * logits).sum() / max(1, len(logits))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=examples(40))
@given(
    n=st.integers(1, 30),
    d=st.integers(1, 17),
    exponent=st.floats(-2, 3),
    bias=st.sampled_from([0.0, -10.0, 50.0]),
    seed=st.integers(0, 10**6),
)
def test_sigmoid_loss_equals_dense_loss(
    backend: str, dtype: torch.dtype, n: int, d: int, exponent: float, bias: float, seed: int
) -> None:
    case = make_case(n, n, d, 10**exponent, None, seed)
    case = replace(case, bias=torch.tensor(bias, dtype=torch.float64)).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "ROWS", 7)
        patch.setattr(tiled, "COLUMNS", 5)
        ours = differentiate_with(sigmoid_of(backend), case)
    assert_as_exact_as_torch(case, ours, dense_sigmoid)


def test_late_sigmoid_positives_keep_their_gradient() -> None:
    """Their terms, e^-40, would vanish if they were subtracted from a rounded sum."""
    q = torch.eye(4, requires_grad=True)
    scale, bias = torch.tensor(80.0), torch.tensor(-40.0)
    sigmoid_loss(q, torch.eye(4), scale, bias).backward()
    assert q.grad is not None
    expected = -80 * torch.sigmoid(torch.tensor(-40.0)) / 4
    torch.testing.assert_close(q.grad.diagonal(), expected.expand(4), rtol=1e-5, atol=0)


@pytest.mark.parametrize("total", [True, False])
def test_pair_sum_without_grad_computes_no_gradient(total: bool) -> None:
    """An evaluation takes one matrix pass instead of three."""
    case = make_case(6, 6, 4)
    with torch.no_grad():
        q = case.q.clone().requires_grad_()
        out = pair_sum(q, Local(case.k), "softplus", case.scale, case.scale, total=total)
    assert not out.requires_grad


def test_groups_with_more_keys_than_rows_equal_separate_losses() -> None:
    """With several captions per image, each group has the loss of a separate batch."""
    torch.manual_seed(0)
    q, k = torch.randn(5, 4, dtype=torch.float64), torch.randn(12, 4, dtype=torch.float64)
    ids_q, ids_k = torch.arange(5), torch.arange(12) % 5
    groups_q, groups_k = ids_q % 2, ids_k % 2
    scale = torch.tensor(3.0, dtype=torch.float64)
    combined = contrastive_loss(
        q, k, scale, ids_q=ids_q, ids_k=ids_k, groups_q=groups_q, groups_k=groups_k, symmetric=False
    )
    separate = [
        contrastive_loss(
            q[groups_q == g], k[groups_k == g], scale, ids_q=ids_q[groups_q == g],
            ids_k=ids_k[groups_k == g], symmetric=False,
        ) * (groups_q == g).sum()
        for g in (0, 1)
    ]  # fmt: skip
    torch.testing.assert_close(combined, sum(separate) / 5)
