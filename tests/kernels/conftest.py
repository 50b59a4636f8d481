from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.language as tl
from torch.overrides import TorchFunctionMode
from triton.runtime import interpreter

from gigabatch.kernels.fused import launch
from gigabatch.kernels.fused.maxsim import FusedMaxSim


def patch_the_language_once() -> None:
    """Triton's interpreter puts its own functions into the language when a kernel starts and again,
    for three fifths of a test's time, at every call of a function of the kernel. Here it does so
    where they are not in already."""
    patch = interpreter._patch_lang

    def unless_done(fn: Any) -> Any:
        langs = [lang for lang in (tl, tl.core) if any(v is lang for v in fn.__globals__.values())]
        if any(tl.core.is_builtin(lang.load) for lang in langs):
            return patch(fn)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = unless_done


if not torch.cuda.is_available():
    patch_the_language_once()


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
