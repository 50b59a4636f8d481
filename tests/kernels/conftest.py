from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode


class SeededOnTheCpu(TorchFunctionMode):
    """Random numbers of a CPU generator are drawn there, the same as without a GPU, and moved."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator is None or generator.device.type != "cpu":
            return func(*args, **kwargs)
        return func(*args, **{**kwargs, "device": "cpu"}).to(torch.get_default_device())


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests marked `gpu` make their tensors on the GPU."""
    if request.node.get_closest_marker("gpu") is None or not torch.cuda.is_available():
        yield
        return
    with torch.device("cuda"), SeededOnTheCpu():
        yield
