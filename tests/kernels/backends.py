"""The engine's back ends as parameters. Triton runs under its interpreter, or on a GPU if there is
one: the same tests either way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gigabatch.kernels import tiled
from gigabatch.kernels.fused import launch

GPU = torch.cuda.is_available()
TRITON: Any = pytest.param("triton", marks=[pytest.mark.gpu] if GPU else [])
SLOW_TRITON: Any = pytest.param("triton", marks=[pytest.mark.gpu if GPU else pytest.mark.slow])
BACKENDS = ["reference", "tiled", TRITON]
BACKENDS_WITH_SLOW_TRITON = ["reference", "tiled", SLOW_TRITON]
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


@contextlib.contextmanager
def small_tiles(rows: int = 5, columns: int = 4) -> Iterator[None]:
    """Tiles, blocks and panels so small that there are several, not all full."""
    block = launch.Config(16, 16, 16, 1, 1) if GPU else launch.Config(4, 4, 4, 1, 1, group=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "ROWS", rows)
        patch.setattr(tiled, "COLUMNS", columns)
        patch.setattr(launch, "CONFIGS", {True: [block], False: [block]})
        patch.setattr(launch, "PANEL", (8, 8))
        yield
