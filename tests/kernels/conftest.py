from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from gigabatch.kernels.fused import launch
from gigabatch.kernels.fused.maxsim import FusedMaxSim


class SeededOnTheCpu(TorchFunctionMode):
    """Random numbers of a CPU generator are drawn there, the same as without a GPU, and moved."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator is None or generator.device.type != "cpu":
            return func(*args, **kwargs)
        return func(*args, **{**kwargs, "device": "cpu"}).to(torch.get_default_device())


@pytest.fixture(autouse=True)
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test of Triton that starts no kernel of it tests something else."""
    given = getattr(request.node, "callspec", None)
    given = {} if given is None else given.params
    if given.get("backend") != "triton" or given.get("dtype") == torch.float64:
        yield
        return
    started = []
    start, made = launch._Part._start, FusedMaxSim._arguments

    def note(method: Any) -> Any:
        return lambda *arguments: (started.append(1), method(*arguments))[1]

    monkeypatch.setattr(launch._Part, "_start", note(start))
    monkeypatch.setattr(FusedMaxSim, "_arguments", note(made))
    yield
    # Of nothing there is nothing to start.
    empty = 0 in (given.get("m"), given.get("n")) or [] in given.values()
    assert started or empty, "no Triton kernel was started"


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests marked `gpu` make their tensors on the GPU."""
    if request.node.get_closest_marker("gpu") is None or not torch.cuda.is_available():
        yield
        return
    with torch.device("cuda"), SeededOnTheCpu():
        yield
