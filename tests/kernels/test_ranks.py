"""The engine over real gloo processes equals the engine on the full batch in one process.

Convention under test: the mean of the ranks' values is the loss, and gradients averaged over ranks
are its gradients. So a rank's gradient of its slice, divided by the world size, is the loss's.
One group of processes per world size runs all jobs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import brute
import pytest
import torch
from dense import Result, assert_as_exact_as_torch, positives
from loss_ranks import GATHER_MODES, Results, cases, sigmoid_case, tokens
from test_losses import dense_sigmoid
from torch import Tensor

SCRIPT = Path(__file__).with_name("loss_ranks.py")
SMALL = (1, 2, 3)
# Tests share the processes of a group, and the small groups share their start, so each set of tests
# runs in one worker.
WORLD_SIZES = [
    *(pytest.param(size, marks=pytest.mark.xdist_group("ranks")) for size in SMALL),
    pytest.param(4, marks=[pytest.mark.xdist_group("ranks 4"), pytest.mark.slow]),
]


def run_groups(world_sizes: Sequence[int], folder: Path) -> dict[int, list[dict[str, Results]]]:
    """Run all jobs; return world size -> rank -> gather_mode -> case -> results."""
    process = subprocess.Popen(
        [sys.executable, SCRIPT, folder, *map(str, world_sizes)],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        errors = process.communicate(timeout=570)[1]
    finally:
        with suppress(ProcessLookupError):  # also ranks that wait for one that ended
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors
    return {
        size: [torch.load(folder / str(size) / f"{rank}.pt") for rank in range(size)]
        for size in world_sizes
    }


@pytest.fixture(scope="module")
def small_groups(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[int, list[dict[str, Results]]]:
    return run_groups(SMALL, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module", params=WORLD_SIZES)
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Results]]:
    if request.param in SMALL:
        return request.getfixturevalue("small_groups")[request.param]
    return run_groups([request.param], tmp_path_factory.mktemp("ranks"))[request.param]


def merge(parts: list[dict[str, Tensor]]) -> Result:
    """Merge the ranks' results into those of the full batch."""
    dbias = [part["dbias"] for part in parts if "dbias" in part]
    joined = torch.cat(dbias) / len(parts) if dbias and dbias[0].ndim else torch.zeros(0)
    return Result(
        torch.stack([part["value"] for part in parts]).mean(),
        torch.cat([part["dq"] for part in parts]) / len(parts),
        torch.cat([part["dk"] for part in parts]) / len(parts),
        torch.stack([part["dscale"] for part in parts]).mean(),
        torch.stack(dbias).mean() if dbias and not dbias[0].ndim else joined,
    )


@pytest.mark.parametrize("gather_mode", GATHER_MODES)
def test_contrastive_loss_over_ranks_equals_one_process(
    ranks: list[dict[str, Results]], gather_mode: str
) -> None:
    for name, case in cases(len(ranks)).items():
        parts = [rank[gather_mode][name] for rank in ranks]
        for rank, part in enumerate(parts):
            assert len(part["dq"]) == case.queries[rank]
            assert len(part["dk"]) == case.keys[rank]
        # Without ids, rows are matched by their index in the full batch.
        full = case.full
        if full.ids_q is None:
            ids = torch.arange(len(full.q))
            full = replace(full, ids_q=ids, ids_k=ids)
        result = merge(parts)
        assert result.finite(), name
        if positives(full).any():
            assert result.value > 0, name
        else:
            assert not any(tensor.any() for tensor in result.tensors()), name
        assert_as_exact_as_torch(full, result)


@pytest.mark.parametrize("gather_mode", GATHER_MODES)
def test_sigmoid_loss_over_ranks_equals_one_process(
    ranks: list[dict[str, Results]], gather_mode: str
) -> None:
    names = [name for name in ranks[0][gather_mode] if name.startswith("sigmoid: ")]
    assert len(names) >= 8
    for name in names:
        full = sigmoid_case(cases(len(ranks))[name.removeprefix("sigmoid: ")].full)
        result = merge([rank[gather_mode][name] for rank in ranks])
        assert_as_exact_as_torch(full, result, dense_sigmoid)


@pytest.mark.parametrize("gather_mode", GATHER_MODES)
def test_late_interaction_over_ranks_equals_one_process(
    ranks: list[dict[str, Results]], gather_mode: str
) -> None:
    full, _ = tokens(len(ranks))
    q, k = (full[name].double().requires_grad_() for name in ("q", "k"))
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    target, masks = torch.arange(len(q)), (full["mask_q"], full["mask_k"])
    cross_entropy = torch.nn.functional.cross_entropy
    forward_loss = cross_entropy(scale * brute.late(q, masks[0], k, masks[1]), target)
    back = cross_entropy(scale * brute.late(k, masks[1], q, masks[0]), target)
    loss = (forward_loss + back) / 2
    expected = (loss, *torch.autograd.grad(loss, (q, k, scale)))
    result = merge([rank[gather_mode]["late"] for rank in ranks])
    for actual, expected_value in zip(result.tensors(), expected, strict=False):
        torch.testing.assert_close(actual.double(), expected_value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gather_mode", GATHER_MODES)
def test_sources_over_ranks_equal_plain_torch(
    ranks: list[dict[str, Results]], gather_mode: str
) -> None:
    """Compare with plain torch in float64 on the full batch; differentiate the sum over ranks."""
    case = cases(len(ranks))["uneven, ids"]
    full = case.full
    assert full.ids_q is not None
    assert full.ids_k is not None
    g = torch.Generator().manual_seed(9)
    queue = torch.randn(5, 7, generator=g).double()
    row_scale, key_scale, bias = (
        torch.rand(n, generator=g).double().requires_grad_()
        for n in (len(full.q), len(full.k), len(full.k))
    )
    q, k = (t.double().requires_grad_() for t in (full.q, full.k))
    scores = q @ torch.cat([k, queue]).T
    ids = torch.cat([full.ids_k, torch.arange(5)])
    mask, n = full.ids_q[:, None] == ids[None, :], len(k)
    logits = row_scale[:, None] * scores + torch.cat([bias, torch.zeros(5).double()])
    top = scores.topk(3, 1)
    columns = key_scale * scores[:, :n]
    weight = torch.arange(1, len(q) + 1).unsqueeze(1)
    expected = {
        "z": logits.logsumexp(1), "z inverse": (-row_scale[:, None] * scores).logsumexp(1),
        "positive": torch.where(mask, logits, 0).sum(1), "column z": columns.logsumexp(0),
        "column positive": torch.where(mask[:, :n], columns, 0).sum(0), "chosen": top.values[:, 1],
    }  # fmt: skip
    shares = len(ranks) * (len(ranks) + 1) / 2  # each rank weighs its gathered rows by rank + 1
    total = sum(value.sum() for value in expected.values()) + shares * (q.square() * weight).sum()
    inputs = {"q": q, "k": k, "row_scale": row_scale, "key_scale": key_scale, "bias": bias}
    grads = torch.autograd.grad(total, list(inputs.values()))
    expected["top"] = top.values
    expected |= {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}
    for name, value in expected.items():
        actual = torch.cat([rank[gather_mode]["sources"][name] for rank in ranks])
        torch.testing.assert_close(actual.double(), value.detach(), rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("gather_mode", GATHER_MODES)
def test_constant_keys_on_some_ranks_change_no_other_gradient(
    ranks: list[dict[str, Results]], gather_mode: str
) -> None:
    """One rank may hold constants while other ranks' keys require a gradient."""
    for index, rank in enumerate(ranks):
        results = {name.split(": ")[1]: result for name, result in rank[gather_mode].items()
                   if name.startswith("constants")}  # fmt: skip
        several = len(ranks) > 1
        requires_grad = {case: bool(r.pop("requires_grad")) for case, r in results.items()}
        assert requires_grad == {"none": True, "first": several, "all": False}
        without_constants = results.pop("none")
        assert without_constants["dk"].any()
        for case, result in results.items():
            assert ("dk" in result) == (case == "first" and index > 0)
            for name, value in result.items():
                assert torch.equal(value, without_constants[name]), (case, name)


@pytest.mark.parametrize("gather_mode", GATHER_MODES)
def test_error_on_one_rank_raises_on_all(ranks: list[dict[str, Results]], gather_mode: str) -> None:
    for rank in ranks:
        raised = rank[gather_mode]["refusals"]
        assert all(raised.values()), raised


@pytest.mark.parametrize("gather_mode", GATHER_MODES)
def test_second_run_gives_the_same_bits(ranks: list[dict[str, Results]], gather_mode: str) -> None:
    for rank in ranks:
        first, second = rank[gather_mode], rank[f"{gather_mode} again"]
        for name, results in first.items():
            for key, value in results.items():
                assert torch.equal(value, second[name][key]), (name, key)
