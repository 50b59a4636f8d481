"""Other packages' losses, where they are installed: each as one symmetric cross-entropy."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import torch
from torch import Tensor

from gigabatch.kernels.bench.contenders import Contender, Inputs, Loss

OneWay = Callable[[Tensor, Tensor, Tensor], Tensor]  # of scaled rows, columns, and labels


def find_peers(device: torch.device, size: int) -> list[Contender]:
    """All that are known, those that cannot run on this machine with the reason. `size`: bytes of
    a value of the inputs."""
    found = []
    for name, (module, package, load) in PEERS.items():
        missing = ""
        loss: Loss = _never
        if find_spec(module) is None:
            missing = f"not installed: pip install {package}"
        elif device.type != "cuda" and module != "open_clip":
            missing = "needs a GPU"
        else:
            try:
                loss = load()
            except Exception as error:  # whatever another package's import may raise
                missing = f"cannot be imported: {first_line(error)}"
        held = 4 * size if module == "open_clip" else 0
        found.append(Contender(name, loss, pair_bytes=held, missing=missing))
    return found


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def _open_clip() -> Loss:
    """Its loss alone, from the file: the package would import its models, and torchvision."""
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
    return lambda b: loss(b.q, b.k, b.scale)


def _inf_cl() -> Loss:
    """Scaled here: its own scale wants a process group."""
    loss = importlib.import_module("inf_cl").cal_inf_loss
    return _both_ways(lambda q, k, own: loss(q, k, own, head_dim=min(256, q.shape[1])))


def _liger() -> Loss:
    module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss()
    return _both_ways(lambda q, k, own: loss(k, q, own))


def _cut_cross_entropy() -> Loss:
    """Without its gradient filter, which drops most of the mass where logits are near uniform."""
    loss = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return _both_ways(lambda q, k, own: loss(q, k, own, filter_eps=None, impl="cce"))


def _both_ways(one: OneWay) -> Loss:
    def loss(b: Inputs) -> Tensor:
        own = torch.arange(len(b.q), device=b.q.device)
        return (one(b.scale * b.q, b.k, own) + one(b.scale * b.k, b.q, own)) / 2

    return loss


def _never(b: Inputs) -> Tensor:
    raise AssertionError("a contender that is missing was run")


PEERS: dict[str, tuple[str, str, Callable[[], Loss]]] = {  # module, package, loader
    "open_clip": ("open_clip", "open_clip_torch", _open_clip),
    "inf_cl": ("inf_cl", "inf_cl", _inf_cl),
    "liger": ("liger_kernel", "liger_kernel", _liger),
    "cut_cross_entropy": ("cut_cross_entropy", "cut_cross_entropy", _cut_cross_entropy),
}
