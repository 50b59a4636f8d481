"""`ContrastiveLoss` and `SigmoidLoss` against dense float64 losses, on 1, 2 and 4 gloo ranks.

The dense losses are those of open_clip's `ClipLoss(local_loss=True, gather_with_grad=True)` and
`SigLipLoss`, by their definitions: rank r's value covers its own rows and all keys, divided by its
own batch size.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from module_ranks import DIM, ROWS, TwoTowers, batch
from torch import Tensor

from gigabatch.kernels import ContrastiveLoss, SigmoidLoss, contrastive_loss

SCRIPT = Path(__file__).with_name("module_ranks.py")
WORLD_SIZES = (1, 2, 4)
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


# The tests of a world size share its processes, and the groups share their start, so all run in one
# worker.
GROUP = pytest.mark.xdist_group("module ranks")


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """World size -> rank -> results."""
    folder = tmp_path_factory.mktemp("modules")
    process = subprocess.Popen(
        [sys.executable, SCRIPT, folder, *map(str, WORLD_SIZES)],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        errors = process.communicate(timeout=500)[1]
    finally:
        with suppress(ProcessLookupError):  # also ranks that wait for one that ended
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors
    return {
        size: [torch.load(folder / str(size) / f"{rank}.pt") for rank in range(size)]
        for size in WORLD_SIZES
    }


@pytest.fixture(params=[pytest.param(size, marks=GROUP) for size in WORLD_SIZES])
def ranks(
    request: pytest.FixtureRequest, groups: dict[int, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Results of every rank of a group."""
    return groups[request.param]


def clip_values(images: Tensor, texts: Tensor, scale: Tensor, sizes: list[int]) -> list[Tensor]:
    """Return open_clip's local loss of each rank."""
    logits = scale * images @ texts.T
    labels = torch.arange(len(images))
    rows = (F.cross_entropy(logits, labels, reduction="none")
            + F.cross_entropy(logits.T, labels, reduction="none")) / 2  # fmt: skip
    return [part.mean() for part in rows.split(sizes)]


def siglip_values(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, sizes: list[int]
) -> list[Tensor]:
    """Return open_clip's sigmoid loss of each rank."""
    logits = scale * images @ texts.T + bias
    labels = 2 * torch.eye(len(images), dtype=torch.float64) - 1
    rows = -F.logsigmoid(labels * logits).sum(1)
    return [part.sum() / len(part) for part in rows.split(sizes)]


def dense_step(name: str, world_size: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return each rank's value, and the gradients of one process with the complete batch."""
    model = TwoTowers()
    image, text, scale, bias = model(*batch())
    image.retain_grad()
    sizes = [ROWS // world_size] * world_size
    if name.startswith("contrastive"):
        values = clip_values(image, text, scale, sizes)
    else:
        values = siglip_values(image, text, scale, bias, sizes)
    torch.stack(values).mean().backward()
    zeros = {"bias": torch.zeros((), dtype=torch.float64)}
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert image.grad is not None
    return [v.detach() for v in values], {**zeros, **grads, "dimage": image.grad}


NAMES = ["contrastive", "contrastive, local", "contrastive, ring", "sigmoid, global",
         "sigmoid, None", "sigmoid, bidir", "sigmoid, gather"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_ddp_gradients_equal_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    """Including those of the logit scale and bias."""
    _, expected = dense_step(name, len(ranks))
    for rank in ranks:
        for parameter in ("image", "text", "log_scale", "bias"):
            torch.testing.assert_close(rank[name][parameter], expected[parameter], **CLOSE)
    dimage = torch.cat([rank[name]["dimage"] for rank in ranks]) / len(ranks)
    torch.testing.assert_close(dimage, expected["dimage"], **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_value_is_the_share_or_the_global_loss(ranks: list[dict[str, Any]], name: str) -> None:
    """A share equals open_clip's value on that rank."""
    shares, _ = dense_step(name, len(ranks))
    mean = torch.stack(shares).mean()
    is_global = name in ("contrastive", "contrastive, ring", "sigmoid, global")
    for rank, share in zip(ranks, shares, strict=True):
        torch.testing.assert_close(rank[name]["value"], mean if is_global else share, **CLOSE)
        torch.testing.assert_close(rank[name]["global"], mean, **CLOSE)
        assert torch.equal(rank[name]["global"], ranks[0][name]["global"])


@pytest.mark.parametrize("name", ["contrastive", "sigmoid"])
def test_uneven_ranks_give_the_global_loss_and_its_gradient(
    ranks: list[dict[str, Any]], name: str
) -> None:
    n = len(ranks) * (len(ranks) + 1) // 2
    image, text = (F.normalize(x[:n, :DIM], dim=1).requires_grad_() for x in batch())
    scale, bias = (torch.tensor(v, dtype=torch.float64) for v in (5.0, -2.0))
    if name == "contrastive":
        (loss,) = clip_values(image, text, scale, [n])
    else:
        (loss,) = siglip_values(image, text, scale, bias, [n])
    loss.backward()
    values = torch.stack([rank[f"uneven {name}"]["value"] for rank in ranks])
    torch.testing.assert_close(values.mean(), loss.detach(), **CLOSE)
    for rank in ranks:
        torch.testing.assert_close(rank[f"uneven {name}"]["global"], loss.detach(), **CLOSE)
    for key, leaf in (("di", image), ("dt", text)):
        gradient = torch.cat([rank[f"uneven {name}"][key] for rank in ranks]) / len(ranks)
        torch.testing.assert_close(gradient, leaf.grad, **CLOSE)


def test_arguments_that_contradict_the_group_raise(ranks: list[dict[str, Any]]) -> None:
    for index, rank in enumerate(ranks):
        messages = rank["refusals"]
        assert f"the process group has size {len(ranks)}" in messages["world_size"]
        assert f"this process has rank {index}" in messages["rank"]
        assert ("wrong gradient" in messages["gather_with_grad"]) == (len(ranks) > 1)


def test_group_argument_limits_the_negatives(ranks: list[dict[str, Any]]) -> None:
    n = 2 * min(2, len(ranks))
    image, text = (F.normalize(x[:n], dim=1) for x in batch())
    (expected,) = clip_values(image, text, torch.tensor(5.0, dtype=torch.float64), [n])
    for rank in ranks[:2]:
        torch.testing.assert_close(rank["subgroup"], expected, **CLOSE)


def features(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    image, text = (F.normalize(x[:, :DIM], dim=1).to(dtype) for x in batch())
    return image, text


@pytest.mark.parametrize("loss", [ContrastiveLoss(), SigmoidLoss()], ids=["softmax", "sigmoid"])
def test_scale_and_bias_accept_numbers_and_tensors(loss: ContrastiveLoss | SigmoidLoss) -> None:
    image, text = features()
    expected = loss(image, text, torch.tensor(5.0), torch.tensor(-2.0))
    for make in (float, int, lambda v: torch.tensor([float(v)])):
        assert torch.equal(loss(image, text, make(5), make(-2)), expected)


def test_output_dict_holds_only_the_contrastive_loss() -> None:
    """Training loops add up all values of the dictionary."""
    image, text = features()
    loss = ContrastiveLoss()
    output = loss(image, text, 5.0, output_dict=True)
    assert isinstance(output, dict)
    assert list(output) == ["contrastive_loss"]
    assert torch.equal(output["contrastive_loss"], loss(image, text, 5.0))


def test_without_bias_sigmoid_loss_uses_zero() -> None:
    image, text = features()
    assert torch.equal(SigmoidLoss()(image, text, 5.0), SigmoidLoss()(image, text, 5.0, 0.0))


def test_options_reach_the_engine() -> None:
    image, text = features()
    scale = torch.tensor(5.0)
    loss = ContrastiveLoss(backend="reference", cache_bytes=2**20)
    expected = contrastive_loss(image, text, scale, backend="reference")
    assert torch.equal(loss(image, text, scale), expected)
    with pytest.raises(ValueError, match="backend is 'fast'"):
        SigmoidLoss(backend="fast")(image, text, 5.0)


@pytest.fixture(params=["no group", "group"])
def maybe_group(request: pytest.FixtureRequest) -> Iterator[None]:
    """A default process group of one rank, or none unless an earlier test left one."""
    creates = request.param == "group" and not dist.is_initialized()
    if creates:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if creates:  # DeepSpeed keeps a reference to a group that it uses
        dist.destroy_process_group()


@pytest.mark.usefixtures("maybe_group")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_features_are_float32(dtype: torch.dtype) -> None:
    """open_clip rounds them to the features' dtype."""
    image, text = features(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        value = ContrastiveLoss()(image, text, 100.0)
    assert isinstance(value, Tensor)
    assert value.dtype == torch.float32
    (exact,) = clip_values(image.double(), text.double(), torch.tensor(100.0), [ROWS])
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-6)


IMAGE, TEXT = torch.zeros(4, 3), torch.zeros(4, 3)
FLOAT8 = torch.float8_e4m3fn


@pytest.mark.parametrize("loss", [ContrastiveLoss(), SigmoidLoss()], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"image_features": torch.zeros(4)}, ValueError, r"same shape \[n, D\]; got \(4,\) and"),
        ({"text_features": torch.zeros(5, 3)}, ValueError, r"got \(4, 3\) and \(5, 3\)"),
        ({"text_features": torch.zeros(4, 2)}, ValueError, r"got \(4, 3\) and \(4, 2\)"),
        ({"text_features": TEXT.double()}, TypeError, r"dtype \(bfloat16, .*; got .*float32 and"),
        (
            {"image_features": IMAGE.long(), "text_features": TEXT.long()},
            TypeError, "share a floating dtype .*; got torch.int64",
        ),
        (
            {"image_features": IMAGE.to(FLOAT8), "text_features": TEXT.to(FLOAT8)},
            TypeError, "share a floating dtype .*; got torch.float8",
        ),
        ({"image_features": [[0.0] * 3] * 4}, TypeError, r"image_features must be a tensor \[n, D"),
        ({"text_features": TEXT.numpy()}, TypeError, "must be a tensor .* got ndarray"),
        ({"logit_scale": None}, TypeError, "logit_scale must be a number, .* got NoneType"),
        ({"logit_bias": "a"}, TypeError, "logit_bias must be a number, .* got str"),
        ({"text_features": TEXT.to("meta")}, ValueError, "share a device; got cpu and meta"),
        ({"logit_scale": torch.ones(4)}, ValueError, r"logit_scale must be .* got shape \(4,\)"),
        ({"logit_scale": torch.ones(1, 1)}, ValueError, r"0-dim or \[1\]; got shape \(1, 1\)"),
        ({"logit_scale": torch.tensor(5)}, TypeError, "logit_scale must be floating; got .*int64"),
        ({"logit_scale": torch.ones((), device="meta")}, ValueError, "must be on cpu; it is on"),
        ({"logit_bias": torch.ones(2)}, ValueError, r"logit_bias must be .* got shape \(2,\)"),
    ],
)  # fmt: skip
def test_invalid_tensors_raise_one_sentence(
    loss: ContrastiveLoss | SigmoidLoss, changed: dict[str, Any], error: type[Exception],
    message: str,
) -> None:  # fmt: skip
    arguments = {"image_features": IMAGE, "text_features": TEXT, "logit_scale": 1.0} | changed
    with pytest.raises(error, match=message) as raised:
        loss(**arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ContrastiveLoss(use_horovod=True), "use_horovod=True is not supported"),
        (lambda: SigmoidLoss(use_horovod=True), "use_horovod=True is not supported"),
        (lambda: SigmoidLoss(dist_impl="tree"), "choose one of gather, bidir, shift, reduce"),
        (lambda: ContrastiveLoss(world_size=4)(IMAGE, TEXT, 1.0), "init_process_group first"),
        (
            lambda: ContrastiveLoss(group=dist.GroupMember.NON_GROUP_MEMBER)(IMAGE, TEXT, 1.0),
            "not a member of group",
        ),
    ],
)
def test_invalid_constructor_arguments_raise_value_error(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_open_clip_positional_arguments_are_accepted() -> None:
    image, text = features()
    clip, siglip = ContrastiveLoss(True, True, False, 0, 1), SigmoidLoss(False, 0, 1, "bidir", 0)
    for loss in (clip, siglip):
        assert loss(image, text, 5.0, -2.0).isfinite()
    assert ContrastiveLoss(gather_with_grad=False)(image, text, 5.0).isfinite()
