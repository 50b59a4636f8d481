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


def patch_triton_language_once() -> None:
    """Make Triton's interpreter patch the language only once per kernel.

    By default it patches again at every function call in a kernel, which takes three fifths of a
    test's time.
    """
    patch = interpreter._patch_lang

    def patch_once(fn: Any) -> Any:
        langs = [lang for lang in (tl, tl.core) if any(v is lang for v in fn.__globals__.values())]
        if any(tl.core.is_builtin(lang.load) for lang in langs):
            return patch(fn)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_once


if not torch.cuda.is_available():
    patch_triton_language_once()


class CpuRandomNumbers(TorchFunctionMode):
    """Draw numbers of a CPU generator on the CPU, as without a GPU, then move them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator is None or generator.device.type != "cpu":
            return func(*args, **kwargs)
        return func(*args, **{**kwargs, "device": "cpu"}).to(torch.get_default_device())


@pytest.fixture(autouse=True)
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test of Triton that starts none of its kernels."""
    callspec = getattr(request.node, "callspec", None)
    params = {} if callspec is None else callspec.params
    if params.get("backend") != "triton" or params.get("dtype") == torch.float64:
        yield
        return
    started = []
    start, arguments = launch._Launch._start, FusedMaxSim._arguments

    def note(method: Any) -> Any:
        return lambda *values: (started.append(1), method(*values))[1]

    monkeypatch.setattr(launch._Launch, "_start", note(start))
    monkeypatch.setattr(FusedMaxSim, "_arguments", note(arguments))
    yield
    # Empty inputs start no kernel.
    empty = 0 in (params.get("m"), params.get("n")) or [] in params.values()
    assert started or empty, "no Triton kernel was started"


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Create tensors on the GPU in tests marked `gpu`."""
    if request.node.get_closest_marker("gpu") is None or not torch.cuda.is_available():
        yield
        return
    with torch.device("cuda"), CpuRandomNumbers():
        yield
