"""Losses of other packages, if they are installed, each as one symmetric cross-entropy."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import torch
from torch import Tensor

from gigabatch.kernels.bench.implementations import Implementation, Inputs, Loss

OneWay = Callable[[Tensor, Tensor, Tensor], Tensor]  # (scaled rows, columns, labels) -> loss


def find_peers(device: torch.device, size: int) -> list[Implementation]:
    """List all known packages. If one cannot run here, `missing` holds the reason.

    Args:
        device: Device of the inputs.
        size: Bytes per element of the inputs.
    """
    peers = []
    for name, (module, package, load) in PEERS.items():
        missing = ""
        loss: Loss = _unavailable
        if find_spec(module) is None:
            missing = f"not installed: pip install {package}"
        elif device.type != "cuda" and module != "open_clip":
            missing = "needs a GPU"
        else:
            try:
                loss = load()
            except Exception as error:  # importing another package may raise anything
                missing = f"cannot be imported: {first_line(error)}"
        pair_bytes = 4 * size if module == "open_clip" else 0
        peers.append(Implementation(name, loss, pair_bytes=pair_bytes, missing=missing))
    return peers


def first_line(error: BaseException) -> str:
    """Return the type and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def _open_clip() -> Loss:
    """Load only the file of the loss: the package would also import its models and torchvision."""
    package = find_spec("open_clip")
    assert package is not None
    assert package.submodule_search_locations
    path = Path(package.submodule_search_locations[0], "loss.py")
    spec = spec_from_file_location("open_clip_loss", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    loss = module.ClipLoss()

    def symmetric(b: Inputs) -> Tensor:
        value: Tensor = loss(b.q, b.k, b.scale)
        return value

    return symmetric


def _inf_cl() -> Loss:
    """Load the loss and scale its rows first: the package's own scale needs a process group."""
    loss = importlib.import_module("inf_cl").cal_inf_loss
    return _both_ways(lambda q, k, labels: loss(q, k, labels, head_dim=min(256, q.shape[1])))


def _liger() -> Loss:
    module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss()
    return _both_ways(lambda q, k, labels: loss(k, q, labels))


def _cut_cross_entropy() -> Loss:
    """Load the loss without its gradient filter, which drops most of a nearly uniform softmax."""
    loss = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return _both_ways(lambda q, k, labels: loss(q, k, labels, filter_eps=None, impl="cce"))


def _both_ways(one: OneWay) -> Loss:
    def loss(b: Inputs) -> Tensor:
        labels = torch.arange(len(b.q), device=b.q.device)
        return (one(b.scale * b.q, b.k, labels) + one(b.scale * b.k, b.q, labels)) / 2

    return loss


def _unavailable(b: Inputs) -> Tensor:
    raise AssertionError("an implementation that cannot run here was run")


PEERS: dict[str, tuple[str, str, Callable[[], Loss]]] = {  # module, package, loader
    "open_clip": ("open_clip", "open_clip_torch", _open_clip),
    "inf_cl": ("inf_cl", "inf_cl", _inf_cl),
    "liger": ("liger_kernel", "liger_kernel", _liger),
    "cut_cross_entropy": ("cut_cross_entropy", "cut_cross_entropy", _cut_cross_entropy),
}
