"""Robustness of the engine: layouts, threads, half precision, autocast, invalid arguments."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from gigabatch.kernels import (
    AbsDiff,
    Concat,
    Eq,
    GatedCosine,
    Local,
    Lse,
    Ne,
    Products,
    Ragged,
    SecondScore,
    Table,
    contrastive_loss,
    late_interaction_loss,
    loss_terms,
    lse_stats,
    maxsim,
    pair_sum,
    row_top,
    sigmoid_loss,
    take,
)

ONE = torch.ones(())
UNIT = torch.nn.functional.normalize


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return UNIT(torch.randn(shape, generator=g, dtype=torch.float64), dim=-1).to(dtype)


def permuted(x: Tensor) -> Tensor:
    """Return the same values with the first two axes swapped in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_token_major_tensors_give_the_same_gradients(backend: str) -> None:
    q, k = draw(5, 4, 6).requires_grad_(), draw(5, 3, 6, seed=1).requires_grad_()
    others = permuted(q.detach()), permuted(k.detach())
    for loss in (
        lambda a, b: maxsim(a, b).square().sum(),
        lambda a, b: late_interaction_loss(a, b, 5 * ONE, backend=backend),
    ):
        expected = torch.autograd.grad(loss(q, k), (q, k))
        for actual, grad in zip(torch.autograd.grad(loss(*others), others), expected, strict=True):
            torch.testing.assert_close(actual, grad)


def test_column_major_matrices_give_the_same_gradients() -> None:
    q, k = draw(6, 4).requires_grad_(), draw(6, 4, seed=1).requires_grad_()
    others = permuted(q.detach()), permuted(k.detach())
    bias = torch.tensor(-3.0)
    for loss in (
        lambda a, b: contrastive_loss(a, b, 5 * ONE),
        lambda a, b: sigmoid_loss(a, b, 5 * ONE, bias),
        lambda a, b: lse_stats(GatedCosine(a, a), Local(b), [Lse("rows", ONE)]).z[0].sum(),
    ):
        expected = torch.autograd.grad(loss(q, k), (q, k))
        for actual, grad in zip(torch.autograd.grad(loss(*others), others), expected, strict=True):
            torch.testing.assert_close(actual, grad)


THREADS = """
import torch
from gigabatch.kernels import Eq, Local, Lse, Products, lse_stats, take
torch.set_num_threads(2)
g = torch.Generator().manual_seed(0)
n = 4096
q, k = (torch.randn(n, 16, generator=g).requires_grad_() for _ in range(2))
scale, ids = torch.rand(n, generator=g).requires_grad_(), torch.arange(n) % 200
index = torch.randint(0, 50, (20000,), generator=g)

def run():
    lses = [Lse("rows", scale), Lse("columns", scale)]
    s = lse_stats(q, Local(k, {"id": ids}), lses, Eq(ids, "id"))
    total = sum((v * torch.arange(n)).sum() for v in (*s.z, *s.positive))
    total = total + take(Local(k), index).keys.square().sum()
    keys = Products([k, q], [(torch.arange(n) % 7, 0)])
    total = total + lse_stats(q, keys, [Lse("rows", torch.ones(()))]).z[0].sum()
    return [*s.z, *s.positive, *torch.autograd.grad(total, (q, k, scale))]

first = run()
for _ in range(4):
    assert all(map(torch.equal, first, run()))
print("same")
"""


@pytest.mark.slow
def test_two_threads_give_the_same_bits_on_every_run() -> None:
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr


def test_half_precision_gradients_are_scaled_before_rounding() -> None:
    """In fp16 the sum over pairs would overflow; the mean does not."""
    n = 8192
    q = torch.zeros(n, 2, dtype=torch.float16)
    q[:, 0] = 1
    q.requires_grad_()
    sigmoid_loss(q, q.detach(), torch.tensor(10.0), torch.tensor(0.0)).backward()
    assert q.grad is not None
    torch.testing.assert_close(q.grad[:, 0], torch.full((n,), 10.0 * (n - 1) / n).half())


def test_outer_autocast_changes_no_bit() -> None:
    q, k, teacher = draw(8, 4), draw(8, 4, seed=1), draw(8, 5, seed=2)
    q, k, teacher = (t.float() for t in (q, k, teacher))
    tokens = draw(5, 3, 4).float()

    def results() -> list[Tensor]:
        rule = (SecondScore(teacher, "teacher", scale=50.0),)
        x = q.clone().requires_grad_()
        s = lse_stats(x, Local(k, {"teacher": teacher}), [Lse("rows", ONE, None, rule)])
        (dq,) = torch.autograd.grad(s.z[0].sum(), x)
        smooth = contrastive_loss(x, k, 9 * ONE, label_smoothing=0.3)
        score = GatedCosine(q, q.abs())
        pairs = score.pairs(Local(k).block)
        return [*s.z, dq, smooth, pairs, maxsim(tokens, tokens), *row_top(q, Local(k), 3)]

    baseline = results()
    with torch.autocast("cpu", torch.bfloat16):
        cast = results()
    assert all(map(torch.equal, baseline, cast))


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_bias_of_minus_infinity_masks_like_a_rule(backend: str) -> None:
    q, k, ids = draw(4, 3), draw(4, 3, seed=1), torch.tensor([0, 1, 0, 2])
    bias = torch.tensor([0, -torch.inf, 0, 0], dtype=torch.float64)
    keys, equal = Local(k, {"id": ids}), Eq(ids, "id")
    one, two = (
        lse_stats(q, keys, [Lse("rows", ONE.double(), bias)], rule, backend)
        for rule in (equal, (equal, equal))
    )
    for a, b in zip((*one.z, *one.positive), (*two.z, *two.positive), strict=True):
        torch.testing.assert_close(a, b)


def test_row_without_negatives_gives_zero_in_loss_terms() -> None:
    z = torch.tensor([-torch.inf, 0.0], requires_grad=True)
    zero = torch.zeros(2)
    for value in (
        loss_terms.fcco(z, ONE, zero, 5),
        loss_terms.lse_plus(z, z),
        loss_terms.circle(z, zero),
    ):
        assert value[0] == 0
        (grad,) = torch.autograd.grad(value.sum(), z, allow_unused=True)
        assert grad is None or grad.isfinite().all()


def test_cross_entropy_of_row_without_keys_is_minus_infinity() -> None:
    """With the positives masked out of `z`, a row without negatives has z = -inf."""
    q, k = draw(3, 4).requires_grad_(), draw(3, 4, seed=1).requires_grad_()
    ids = torch.tensor([0, 0, 0])
    keys, same = Local(k, {"id": ids, "index": torch.arange(3)}), Eq(torch.arange(3), "index")
    s = lse_stats(q, keys, [Lse("rows", ONE.double(), None, (Ne(ids, "id"),))], same)
    loss = loss_terms.cross_entropy(s.z[0], s.positive[0], s.weight[0])
    assert (loss == -torch.inf).all()
    grads = torch.autograd.grad(loss.sum(), (q, k))
    for grad, other in zip(grads, (k, q), strict=True):
        torch.testing.assert_close(grad, -other)


def test_ragged_groups_stay_separate_at_any_block_size() -> None:
    q, k, groups = draw(4, 3), draw(4, 3, seed=1), torch.tensor([0, 0, 1, 1])
    ids = torch.tensor([5, 6, 5, 6])
    for rows in (1, 100):
        keys = Ragged(k, groups, groups, {"id": ids}, rows=rows)
        s = lse_stats(q, keys, [Lse("rows", ONE.double())], Eq(ids, "id"))
        assert s.weight[0].tolist() == [1, 1, 1, 1]
        torch.testing.assert_close(s.z[0][:2], (q[:2] @ k[:2].T).logsumexp(1))
        assert (row_top(q, keys, 4)[1][:2, 2:] == -1).all()
        one = torch.ones((), dtype=torch.float64)
        out = pair_sum(q, keys, "softplus", one, 0 * one)
        torch.testing.assert_close(out[2:], torch.nn.functional.softplus(q[2:] @ k[2:].T).sum(1))


def test_tiny_gates_keep_their_direction() -> None:
    q, k, gate = draw(4, 3), draw(4, 3, seed=1), draw(4, 3, seed=2).abs()
    expected = lse_stats(GatedCosine(q, gate), Local(k), [Lse("rows", ONE.double())]).z[0]
    tiny = GatedCosine(q.float(), 1e-25 * gate.float())
    actual = lse_stats(tiny, Local(k.float()), [Lse("rows", ONE)]).z[0]
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)


def test_mixed_dtypes_are_promoted() -> None:
    """A bf16 batch with a float32 queue; float32 queries with a float64 scale."""
    q, k, queue = draw(4, 3), draw(4, 3, seed=1).bfloat16(), draw(5, 3, seed=2).float()
    leaves = q.float().requires_grad_(), k.requires_grad_()
    keys = Concat(Local(leaves[1]), Local(queue))
    scale = torch.tensor(3.0, dtype=torch.float64)
    z = lse_stats(leaves[0], keys, [Lse("rows", scale)]).z[0]
    all_keys = torch.cat([k.double(), queue.double()])
    torch.testing.assert_close(z.double(), (3 * q @ all_keys.T).logsumexp(1), rtol=1e-6, atol=1e-6)
    dq, dk = torch.autograd.grad(z.sum(), leaves)
    assert (dq.dtype, dk.dtype) == (torch.float32, torch.bfloat16)
    assert take(keys, torch.tensor([0, 8])).keys.dtype == torch.float32
    ids = torch.arange(4)
    equal = (Eq(ids, "id"),)
    out = pair_sum(leaves[0], Local(q.float(), {"id": ids}), "relu", scale, 0 * scale, rule=equal)
    torch.testing.assert_close(out.double(), torch.full((4,), 3.0).double(), rtol=1e-6, atol=1e-6)


def rule_case(name: str, value: Any) -> None:
    keys = Local(draw(4, 3), {"id": torch.arange(4), "label": torch.rand(4)})
    lse_stats(draw(4, 3), keys, [Lse("rows", ONE.double(), None, (value,))])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rule_case("id", Eq(torch.arange(3), "id")), "Eq.rows must have 4 entries"),
        (lambda: rule_case("id", Eq(torch.arange(9), "id")), "Eq.rows must have 4 entries"),
        (
            lambda: rule_case("label", AbsDiff(torch.rand(4), "label", torch.rand(5))),
            "AbsDiff.factor must have 4 entries",
        ),
        (
            lambda: rule_case(
                "id",
                Table(
                    torch.zeros(4).long(), "id", torch.zeros(1, 4), only=Eq(torch.arange(2), "id")
                ),
            ),
            "Eq.rows must have 4 entries",
        ),
        (
            lambda: rule_case(
                "id", Table(torch.zeros(4).long(), "id", torch.zeros(1, 4, requires_grad=True))
            ),
            "Table.table requires a gradient, but rules are constants",
        ),
        (lambda: Local(draw(4, 3), {"id": torch.arange(3)}), "metadata 'id' must have 4 entries"),
        (lambda: take(Local(draw(4, 3)), torch.tensor([7])), r"index must lie in \[-1, 4\)"),
        (lambda: take(Local(draw(4, 3)), torch.tensor([-5])), r"index must lie in \[-1, 4\)"),
        (lambda: take(Local(draw(4, 3)), torch.tensor([[1]])), r"index must be int64 \[M\]"),
        (lambda: Products([draw(4, 3), draw(5, 3)], [(0, 0)]), "factors must share a shape"),
    ],
)
def test_invalid_rules_and_indices_raise_value_error(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
