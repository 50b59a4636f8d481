from __future__ import annotations

import brute
import pytest
import torch
from backends import BACKENDS_OF_FLOAT64, TRITON, small_tiles
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gigabatch.kernels import (
    Eq,
    Local,
    Lse,
    MaxSim,
    late_interaction_loss,
    lse_stats,
    maxsim,
    tiled,
    token_keys,
)

SIZES = {
    "m": st.integers(1, 6), "n": st.integers(1, 6), "tq": st.integers(1, 5),
    "tk": st.integers(1, 5), "d": st.integers(1, 6), "seed": st.integers(0, 10**6),
}  # fmt: skip


def tokens(
    n: int, t: int, d: int, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Make unit vectors and a mask with a token in every row; padding is NaN."""
    g = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(n, t, d, generator=g, dtype=torch.float64), dim=2)
    real = torch.rand(n, t, generator=g) < 0.6
    real[torch.arange(n), torch.randint(0, t, (n,), generator=g)] = True
    return x.masked_fill(~real.unsqueeze(2), torch.nan).to(dtype).requires_grad_(), real


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@settings(max_examples=60, deadline=None)
@given(**SIZES)
def test_scores_and_gradients_ignore_padding(
    dtype: torch.dtype, m: int, n: int, tq: int, tk: int, d: int, seed: int
) -> None:
    (q, real_q), (k, real_k) = tokens(m, tq, d, seed, dtype), tokens(n, tk, d, seed + 1, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "ROWS", 2 * tq)
        patch.setattr(tiled, "COLUMNS", 2 * tk)
        got = maxsim(q, k, real_q, real_k)
        weight = torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).to(got.dtype)
        dq, dk = torch.autograd.grad((got * weight).sum(), (q, k))
    wide = torch.promote_types(dtype, torch.float32)
    truth = [x.detach().double().requires_grad_() for x in (q, k)]
    want = brute.late(truth[0], real_q, truth[1], real_k)
    eps = torch.finfo(wide).eps
    torch.testing.assert_close(got.double(), want, rtol=0, atol=8 * eps)
    assert got.dtype == wide
    for grad, real in ((dq, real_q), (dk, real_k)):
        assert (grad[~real] == 0).all()
    gaps = [
        (values := (q[i].double()[real_q[i]] @ k[j].double()[real_k[j]].T).sort(1).values)[:, -1]
        - values[:, -2]
        for i in range(m) for j in range(n) if int(real_k[j].sum()) > 1
    ]  # fmt: skip
    if all(bool((gap > 1e-4).all()) for gap in gaps):  # else rounding decides the maximum
        wants = torch.autograd.grad((want * weight.double()).sum(), truth)
        stored = torch.finfo(dtype).eps
        for grad, exact in zip((dq, dk), wants, strict=True):
            exact = exact.nan_to_num()
            torch.testing.assert_close(
                grad.double(),
                exact,
                rtol=2 * stored,
                atol=16 * eps * (1 + float(exact.abs().max())),
            )


@pytest.mark.parametrize("backend", BACKENDS_OF_FLOAT64)
@pytest.mark.parametrize("symmetric", [True, False])
def test_loss_uses_a_separate_score_per_direction(backend: str, symmetric: bool) -> None:
    (q, real_q), (k, real_k) = tokens(5, 4, 6, 0), tokens(5, 3, 6, 1)
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    loss = late_interaction_loss(
        q, k, scale, mask_q=real_q, mask_k=real_k, symmetric=symmetric, backend=backend
    )
    target = torch.arange(5)
    expected = torch.nn.functional.cross_entropy(scale * brute.late(q, real_q, k, real_k), target)
    if symmetric:
        back = scale * brute.late(k, real_k, q, real_q)
        expected = (expected + torch.nn.functional.cross_entropy(back, target)) / 2
    torch.testing.assert_close(loss, expected)
    for actual, other in zip(
        torch.autograd.grad(loss, (q, k, scale)), torch.autograd.grad(expected, (q, k, scale)),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(actual, other.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 4, 6), (3, 70, 20)])  # also more tokens than a block holds
@pytest.mark.parametrize("backend", [TRITON])
def test_triton_kernels_equal_tiled(
    backend: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    n, tq, d = shape
    (q, real_q), (k, real_k) = tokens(n, tq, d, 0, dtype), tokens(4, 19, d, 1, dtype)
    results = []
    for name in ("tiled", backend):
        out = maxsim(q, k, real_q, real_k, backend=name)
        weight = torch.arange(out.numel()).view(out.shape) / out.numel()
        results.append([out, *torch.autograd.grad((out * weight).sum(), (q, k))])
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        stored = torch.finfo(one.dtype).eps
        torch.testing.assert_close(one, other, rtol=4 * stored, atol=1e-5)


@pytest.mark.parametrize("backend", ["tiled", TRITON])
@pytest.mark.parametrize(
    "room",
    [0, pytest.param(20, marks=pytest.mark.slow), pytest.param(10**6, marks=pytest.mark.slow)],
)
def test_score_cache_changes_no_bit(backend: str, room: int) -> None:
    results = []
    for cache_bytes in (0, room):
        (q, real_q), (k, real_k) = (
            tokens(5, 4, 6, 0, torch.float32), tokens(5, 3, 6, 1, torch.float32)
        )  # fmt: skip
        scale = torch.tensor(7.0, requires_grad=True)
        with small_tiles(8, 9):
            loss = late_interaction_loss(
                q, k, scale, mask_q=real_q, mask_k=real_k, backend=backend, cache_bytes=cache_bytes
            )
            results.append([loss, *torch.autograd.grad(loss, (q, k, scale))])
    directions = (q.double(), real_q, k.double(), real_k), (k.double(), real_k, q.double(), real_q)
    both = [
        torch.nn.functional.cross_entropy(7 * brute.late(*direction), torch.arange(5))
        for direction in directions
    ]
    torch.testing.assert_close(results[0][0].double(), sum(both) / 2, rtol=1e-5, atol=1e-5)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_mixed_token_dtypes_use_the_wider_one() -> None:
    (q, _), (k, _) = tokens(3, 4, 6, 0, torch.bfloat16), tokens(3, 3, 6, 1, torch.float32)
    q, k = q.detach().nan_to_num(), k.detach().nan_to_num()
    torch.testing.assert_close(maxsim(q, k, backend="triton"), maxsim(q, k))


@pytest.mark.parametrize("backend", BACKENDS_OF_FLOAT64)
def test_statistics_over_token_scores_equal_their_formulas(backend: str) -> None:
    """MaxSim works with rules and along both axes, as any score does."""
    (q, real_q), (k, real_k) = tokens(5, 4, 6, 0), tokens(7, 3, 6, 1)
    ids = torch.tensor([0, 1, 0, 2, 2]), torch.tensor([0, 0, 1, 2, 2, 1, 5])
    one = torch.ones((), dtype=torch.float64)
    stats = lse_stats(
        MaxSim(q, real_q), Local(k, token_keys(k, real_k, id=ids[1])),
        [Lse("rows", 3 * one), Lse("columns", one)], Eq(ids[0], "id"), backend,
    )  # fmt: skip
    scores = brute.late(q, real_q, k, real_k)
    torch.testing.assert_close(stats.z[0], (3 * scores).logsumexp(1))
    torch.testing.assert_close(stats.z[1], scores.logsumexp(0))
    mask = ids[0][:, None] == ids[1][None, :]
    torch.testing.assert_close(stats.positive[1], (scores * mask).sum(0))


def test_gradient_of_equal_maxima_goes_to_the_first() -> None:
    q = torch.ones(1, 1, 2, requires_grad=True)
    k = torch.ones(1, 3, 2, requires_grad=True)
    maxsim(q, k).sum().backward()
    assert k.grad is not None
    assert k.grad[0].sum(1).tolist() == [2, 0, 0]


def test_pairs_equal_the_diagonal() -> None:
    (q, real_q), (k, real_k) = tokens(5, 4, 6, 0), tokens(5, 3, 6, 1)
    scores = MaxSim(q, real_q).pairs(Local(k, token_keys(k, real_k)).block)
    torch.testing.assert_close(scores, brute.late(q, real_q, k, real_k).diagonal())


def test_invalid_tokens_and_masks_raise() -> None:
    q, k, none = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool)
    for arguments, error, message in [
        ((q[0], k), ValueError, r"q must be \[n, tokens, D\]; got \(3, 4\)"),
        ((q, k[..., :2]), ValueError, "share a width; got 4 and 2"),
        ((q, k, none), ValueError, "mask_q: row 0 has no token"),
        ((q, k, None, none), ValueError, "mask_k: row 0 has no token"),
        ((q, k, none.float()), TypeError, r"mask_q must be bool; got torch\.float32"),
        ((q, k, None, none[:, :2]), ValueError, r"mask_k must be \[2, 3\] on cpu; got \[2, 2\]"),
    ]:
        with pytest.raises(error, match=message):
            maxsim(*arguments)
    with pytest.raises(ValueError, match=r"q and k must be \[n, tokens, D\]"):
        late_interaction_loss(q[0], k[0], torch.tensor(1.0))
    with pytest.raises(ValueError, match="row i belongs to key i"):
        late_interaction_loss(q, k[:1], torch.tensor(1.0))
