"""Tests that need a GPU: large sizes, memory, the choice of blocks.

Smaller tests are in the other modules, whose `triton` cases also run on the GPU.
"""

from __future__ import annotations

import pytest
import torch
from backends import needs_gpu

from gigabatch.kernels import Eq, GatedCosine, Local, Lse, contrastive_loss, lse_stats, maxsim
from gigabatch.kernels.fused import launch, tune

pytestmark = [pytest.mark.gpu, needs_gpu]
GIB = 2**30


def unit(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    g = torch.Generator("cuda").manual_seed(seed)
    rows = torch.empty(shape, dtype=dtype, device="cuda").normal_(generator=g)
    return torch.nn.functional.normalize(rows, dim=-1).requires_grad_()


def step(q: torch.Tensor, k: torch.Tensor, backend: str, **options: int) -> list[torch.Tensor]:
    scale = torch.tensor(50.0, device="cuda", requires_grad=True)
    loss = contrastive_loss(q, k, scale, backend=backend, **options)  # type: ignore[arg-type]
    return [loss.detach(), *torch.autograd.grad(loss, (q, k, scale))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "d"), [(4096, 512), (9001, 768), (3000, 100)])
def test_large_loss_equals_reference_on_every_run(dtype: torch.dtype, n: int, d: int) -> None:
    q, k = unit(n, d, seed=0, dtype=dtype), unit(n, d, seed=1, dtype=dtype)
    exact, first = step(q, k, "reference"), step(q, k, "triton")
    for actual, expected in zip(first, exact, strict=True):
        error = (actual.double() - expected.double()).norm() / expected.double().norm()
        assert error < (1e-5 if dtype == torch.float32 else 4e-3), error
    for repeated in (step(q, k, "triton"), step(q, k, "triton", cache_bytes=4 * 4096 * n)):
        assert all(map(torch.equal, first, repeated))


def test_gated_score_equals_reference() -> None:
    q, k, gate = (unit(2000, 256, seed=s, dtype=torch.float32) for s in range(3))
    ids, results = torch.arange(2000, device="cuda") // 2, []
    for backend in ("reference", "triton"):
        keys = Local(k, {"id": ids})
        lse = Lse("rows", torch.tensor(20.0, device="cuda"))
        stats = lse_stats(GatedCosine(q, gate), keys, [lse], Eq(ids, "id"), backend)
        total = (stats.z[0] - stats.positive[0] / stats.weight[0]).mean()
        results.append([total, *torch.autograd.grad(total, (q, k, gate))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-3, atol=1e-5)


def test_cached_scores_beyond_two_to_the_31_give_the_same_bits() -> None:
    """The cache holds 4,096 rows of 700,000 scores, more than 2^31 numbers."""
    q, k = unit(4096, 64, seed=0), unit(700_000, 64, seed=1)
    one, results = torch.tensor(5.0, device="cuda"), []
    for cache_bytes in (0, 12 * GIB):
        lses = [Lse("rows", one), Lse("columns", one)]
        z = torch.cat(lse_stats(q, Local(k), lses, None, "triton", cache_bytes).z)
        results.append([z, *torch.autograd.grad(z.square().mean(), (q, k))])
    assert all(map(torch.equal, *results))
    expected = (5 * q[-64:].detach().float() @ k.detach().float().T).logsumexp(1)
    torch.testing.assert_close(results[0][0][4096 - 64 : 4096], expected, rtol=1e-5, atol=1e-4)


def test_million_rows_take_less_than_twelve_gib() -> None:
    n = 2**20
    q, k = unit(n, 768, seed=0), unit(n, 768, seed=1)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value, *grads = step(q, k, "triton")
    peak = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in grads)
    assert value.isfinite()
    assert all(g.isfinite().all() for g in grads)
    assert peak < 12 * GIB, peak / GIB


def test_maxsim_of_large_items_equals_reference_on_every_run() -> None:
    q, k = unit(24, 196, 256, seed=0), unit(40, 77, 256, seed=1)
    results = []
    for backend in ("reference", "triton", "triton"):
        out = maxsim(q, k, backend=backend)
        results.append([out, *torch.autograd.grad(out.logsumexp(1).mean(), (q, k))])
    for expected, actual, repeated in zip(*results, strict=True):
        assert torch.equal(actual, repeated)
        error = (actual.double() - expected.double()).norm() / expected.double().norm()
        assert error < 1e-2, error  # of two almost equal products either may be the maximum


def test_tuning_chooses_a_listed_block_and_keeps_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_CHOSEN", {})
    q, k = unit(4096, 512, seed=0), unit(4096, 512, seed=1)
    before = step(q, k, "triton")
    chosen = tune(512, torch.bfloat16, rows=4096)
    assert set(chosen) == {"forward", "backward"}
    assert all(config in launch.CONFIGS[False] for config in chosen.values())
    for one, other in zip(before, step(q, k, "triton"), strict=True):
        error = (one.double() - other.double()).norm() / one.double().norm()
        assert error < 4e-3, error
