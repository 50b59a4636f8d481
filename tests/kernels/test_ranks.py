"""The engine over real gloo processes equals the engine on the whole batch in one.

Convention under test: the mean over ranks of the values is the loss; gradients averaged over ranks
are its gradients. So what a rank's own slice receives, divided by the world size, is the gradient.
One group of processes a world size runs everything.
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
from loss_ranks import SCHEDULES, Results, cases, sigmoid_case, tokens
from test_losses import dense_sigmoid
from torch import Tensor

SCRIPT = Path(__file__).with_name("loss_ranks.py")
SMALL = (1, 2, 3)
# Tests share the processes of a group, and the small groups their start: each in one worker.
WORLD_SIZES = [
    *(pytest.param(size, marks=pytest.mark.xdist_group("ranks")) for size in SMALL),
    pytest.param(4, marks=[pytest.mark.xdist_group("ranks 4"), pytest.mark.slow]),
]


def run_groups(world_sizes: Sequence[int], folder: Path) -> dict[int, list[dict[str, Results]]]:
    """All jobs on so many processes; world size -> rank -> gather_mode -> case -> results."""
    process = subprocess.Popen(
        [sys.executable, SCRIPT, folder, *map(str, world_sizes)],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        said = process.communicate(timeout=570)[1]
    finally:
        with suppress(ProcessLookupError):  # the ranks too, where one waits for another in vain
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said
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


def together(found: list[dict[str, Tensor]]) -> Result:
    """What the ranks' results say of the whole batch."""
    dbias = [part["dbias"] for part in found if "dbias" in part]
    joined = torch.cat(dbias) / len(found) if dbias and dbias[0].ndim else torch.zeros(0)
    return Result(
        torch.stack([part["value"] for part in found]).mean(),
        torch.cat([part["dq"] for part in found]) / len(found),
        torch.cat([part["dk"] for part in found]) / len(found),
        torch.stack([part["dscale"] for part in found]).mean(),
        torch.stack(dbias).mean() if dbias and not dbias[0].ndim else joined,
    )


@pytest.mark.parametrize("gather_mode", SCHEDULES)
def test_ranks_together_equal_one_process(
    ranks: list[dict[str, Results]], gather_mode: str
) -> None:
    for name, case in cases(len(ranks)).items():
        found = [rank[gather_mode][name] for rank in ranks]
        for rank, part in enumerate(found):
            assert len(part["dq"]) == case.queries[rank]
            assert len(part["dk"]) == case.keys[rank]
        # Ids over slices without them are the rows' numbers in the whole batch.
        whole = case.whole
        if whole.ids_q is None:
            ids = torch.arange(len(whole.q))
            whole = replace(whole, ids_q=ids, ids_k=ids)
        result = together(found)
        assert result.finite(), name
        if positives(whole).any():
            assert result.value > 0, name
        else:
            assert not any(tensor.any() for tensor in result.tensors()), name
        assert_as_exact_as_torch(whole, result)


@pytest.mark.parametrize("gather_mode", SCHEDULES)
def test_the_sigmoid_loss_of_ranks_equals_that_of_one_process(
    ranks: list[dict[str, Results]], gather_mode: str
) -> None:
    names = [name for name in ranks[0][gather_mode] if name.startswith("sigmoid: ")]
    assert len(names) >= 8
    for name in names:
        whole = sigmoid_case(cases(len(ranks))[name.removeprefix("sigmoid: ")].whole)
        result = together([rank[gather_mode][name] for rank in ranks])
        assert_as_exact_as_torch(whole, result, dense_sigmoid)


@pytest.mark.parametrize("gather_mode", SCHEDULES)
def test_late_interaction_of_ranks_equals_that_of_one_process(
    ranks: list[dict[str, Results]], gather_mode: str
) -> None:
    whole, _ = tokens(len(ranks))
    q, k = (whole[name].double().requires_grad_() for name in ("q", "k"))
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    target, masks = torch.arange(len(q)), (whole["mask_q"], whole["mask_k"])
    cross_entropy = torch.nn.functional.cross_entropy
    there = cross_entropy(scale * brute.late(q, masks[0], k, masks[1]), target)
    back = cross_entropy(scale * brute.late(k, masks[1], q, masks[0]), target)
    loss = (there + back) / 2
    wanted = (loss, *torch.autograd.grad(loss, (q, k, scale)))
    result = together([rank[gather_mode]["late"] for rank in ranks])
    for got, want in zip(result.tensors(), wanted, strict=False):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gather_mode", SCHEDULES)
def test_sources_of_ranks_hold_the_same_keys_as_one_process(
    ranks: list[dict[str, Results]], gather_mode: str
) -> None:
    """Against plain torch in float64 on the whole batch, the sum over ranks differentiated."""
    case = cases(len(ranks))["uneven, ids"]
    whole = case.whole
    assert whole.ids_q is not None
    assert whole.ids_k is not None
    g = torch.Generator().manual_seed(9)
    queue = torch.randn(5, 7, generator=g).double()
    row_scale, key_scale, bias = (
        torch.rand(n, generator=g).double().requires_grad_()
        for n in (len(whole.q), len(whole.k), len(whole.k))
    )
    q, k = (t.double().requires_grad_() for t in (whole.q, whole.k))
    scores = q @ torch.cat([k, queue]).T
    ids = torch.cat([whole.ids_k, torch.arange(5)])
    mask, n = whole.ids_q[:, None] == ids[None, :], len(k)
    logits = row_scale[:, None] * scores + torch.cat([bias, torch.zeros(5).double()])
    top = scores.topk(3, 1)
    columns = key_scale * scores[:, :n]
    weight = torch.arange(1, len(q) + 1).unsqueeze(1)
    wanted = {
        "z": logits.logsumexp(1), "z inverse": (-row_scale[:, None] * scores).logsumexp(1),
        "positive": torch.where(mask, logits, 0).sum(1), "column z": columns.logsumexp(0),
        "column positive": torch.where(mask[:, :n], columns, 0).sum(0), "chosen": top.values[:, 1],
    }  # fmt: skip
    shares = len(ranks) * (len(ranks) + 1) / 2  # each rank weighs what it gathered by its number
    total = sum(value.sum() for value in wanted.values()) + shares * (q.square() * weight).sum()
    inputs = {"q": q, "k": k, "row_scale": row_scale, "key_scale": key_scale, "bias": bias}
    grads = torch.autograd.grad(total, list(inputs.values()))
    wanted["top"] = top.values
    wanted |= {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}
    for name, want in wanted.items():
        got = torch.cat([rank[gather_mode]["sources"][name] for rank in ranks])
        torch.testing.assert_close(got.double(), want.detach(), rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("gather_mode", SCHEDULES)
def test_constant_keys_change_no_other_gradient(
    ranks: list[dict[str, Results]], gather_mode: str
) -> None:
    """Nor keep ranks apart: one may hold constants where others' keys learn."""
    for number, rank in enumerate(ranks):
        found = {name.split(": ")[1]: given for name, given in rank[gather_mode].items()
                 if name.startswith("constants")}  # fmt: skip
        some = len(ranks) > 1
        learns = {of: bool(result.pop("learns")) for of, result in found.items()}
        assert learns == {"none": True, "first": some, "all": False}
        whole = found.pop("none")
        assert whole["dk"].any()
        for of, result in found.items():
            assert ("dk" in result) == (of == "first" and number > 0)
            for name, value in result.items():
                assert torch.equal(value, whole[name]), (of, name)


@pytest.mark.parametrize("gather_mode", SCHEDULES)
def test_a_fault_of_one_rank_is_heard_by_all(
    ranks: list[dict[str, Results]], gather_mode: str
) -> None:
    for rank in ranks:
        refused = rank[gather_mode]["refusals"]
        assert all(refused.values()), refused


@pytest.mark.parametrize("gather_mode", SCHEDULES)
def test_a_second_run_agrees_to_the_last_bit(
    ranks: list[dict[str, Results]], gather_mode: str
) -> None:
    for rank in ranks:
        first, second = rank[gather_mode], rank[f"{gather_mode} again"]
        for name, results in first.items():
            for key, value in results.items():
                assert torch.equal(value, second[name][key]), (name, key)
