"""Gloo ranks that train with `ContrastiveLoss` and `SigmoidLoss` under DistributedDataParallel.

    python module_ranks.py OUT WORLD_SIZE...

Groups run one after another. Results are saved as OUT/WORLD_SIZE/RANK.pt. All tensors are float64.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gigabatch.kernels import ContrastiveLoss, SigmoidLoss

ROWS, WIDTH, DIM = 12, 7, 5  # of the global batch, divisible by every world size tested
Loss = Callable[..., "Tensor | dict[str, Tensor]"]


class TwoTowers(nn.Module):
    """Two linear encoders, a learned logit scale and a learned logit bias."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.image, self.text = (
            nn.Parameter(torch.randn(DIM, WIDTH, generator=g, dtype=torch.float64)) for _ in "it"
        )
        self.log_scale = nn.Parameter(torch.tensor([1.5], dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        image, text = (F.normalize(x @ w.T, dim=1)
                       for x, w in ((images, self.image), (texts, self.text)))  # fmt: skip
        return image, text, self.log_scale.exp(), self.bias


def batch() -> tuple[Tensor, Tensor]:
    """Return images and texts of the global batch, [ROWS, WIDTH]."""
    g = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(ROWS, WIDTH, generator=g, dtype=torch.float64) for _ in "it")
    return images, texts


def losses(rank: int, world_size: int) -> dict[str, Loss]:
    """Return the losses to test, by name; some with open_clip's constructor arguments."""
    group = {"rank": rank, "world_size": world_size}
    named_losses: dict[str, Loss] = {
        "contrastive": ContrastiveLoss(),
        "contrastive, local": ContrastiveLoss(local_loss=True, gather_with_grad=True, **group),
        "contrastive, ring": ContrastiveLoss(cache_labels=True, gather_mode="ring", **group),
        "sigmoid, global": SigmoidLoss(local_loss=False),
    }
    for dist_impl in (None, "bidir", "gather"):
        named_losses[f"sigmoid, {dist_impl}"] = SigmoidLoss(dist_impl=dist_impl, **group)
    return named_losses


def train_step(loss: Loss, slice_: slice) -> dict[str, Tensor]:
    """Run one step under DDP; return the value, the global loss and the averaged gradients."""
    model = TwoTowers()
    wrapped = DistributedDataParallel(model)
    images, texts = batch()
    image, text, scale, bias = wrapped(images[slice_], texts[slice_])
    image.retain_grad()
    value = loss(image, text, scale, bias, output_dict=True)["contrastive_loss"]
    value.backward()
    assert image.grad is not None
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    recorded = loss.global_loss  # type: ignore[attr-defined]
    return {"value": value.detach(), "global": recorded, "dimage": image.grad, **gradients}


def uneven_step(loss: ContrastiveLoss | SigmoidLoss, rank: int) -> dict[str, Tensor]:
    """Run one step whose ranks hold rank + 1 rows; return its values and feature gradients."""
    images, texts = batch()
    rows = slice(rank * (rank + 1) // 2, (rank + 1) * (rank + 2) // 2)
    image, text = (F.normalize(x[rows, :DIM], dim=1).requires_grad_() for x in (images, texts))
    value = loss(image, text, 5.0, -2.0)
    assert isinstance(value, Tensor)
    value.backward()
    assert image.grad is not None
    assert text.grad is not None
    assert loss.global_loss is not None
    return {"value": value.detach(), "global": loss.global_loss, "di": image.grad, "dt": text.grad}


def refusals(rank: int, world_size: int) -> dict[str, str]:
    """Return the messages of constructor arguments that contradict the process group."""
    x = torch.ones(2, 3)
    cases = {
        "world_size": ContrastiveLoss(world_size=world_size + 1),
        "rank": SigmoidLoss(rank=rank + 1),
        "gather_with_grad": ContrastiveLoss(gather_with_grad=False),
    }
    messages = {}
    for name, loss in cases.items():
        try:
            loss(x, x, 1.0)
            messages[name] = ""
        except ValueError as error:
            messages[name] = str(error)
    return messages


def subgroup_value(rank: int, world_size: int) -> Tensor:
    """Return the loss over a group of only the first two ranks; NaN on the others."""
    group = dist.new_group(list(range(min(2, world_size))))
    if rank > 1:
        return torch.tensor(torch.nan, dtype=torch.float64)
    image, text = (F.normalize(x[2 * rank : 2 * rank + 2], dim=1) for x in batch())
    value = ContrastiveLoss(group=group)(image, text, 5.0)
    assert isinstance(value, Tensor)
    return value


def main(rank: int, out: Path, world_size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/store", rank=rank, world_size=world_size
    )
    size = ROWS // world_size
    rows = slice(rank * size, (rank + 1) * size)
    results: dict[str, object] = {
        name: train_step(loss, rows) for name, loss in losses(rank, world_size).items()
    }
    for name, loss in (("contrastive", ContrastiveLoss()), ("sigmoid", SigmoidLoss())):
        results[f"uneven {name}"] = uneven_step(loss, rank)
    results["refusals"] = refusals(rank, world_size)
    results["subgroup"] = subgroup_value(rank, world_size)
    torch.save(results, out / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may outlive the interpreter's shutdown


def run_group(out: Path, world_size: int) -> None:
    """Fork the ranks, so that they need not import anything again."""
    out.mkdir()
    fork = mp.get_context("fork").Process
    ranks = [fork(target=main, args=(rank, out, world_size)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        if process.exitcode:
            sys.exit(f"a rank of {world_size} ended with exit code {process.exitcode}")


if __name__ == "__main__":
    import torch._dynamo  # DDP imports it, which takes as long as importing torch

    for size in map(int, sys.argv[2:]):
        run_group(Path(sys.argv[1], str(size)), size)
