"""The engine's back ends as parameters. Triton runs under its interpreter, or on a GPU if there is
one: the same tests either way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from gigabatch.kernels import tiled
from gigabatch.kernels.fused import launch
from gigabatch.kernels.fused import maxsim as fused_maxsim

GPU = torch.cuda.is_available()
TRITON: Any = pytest.param("triton", marks=[pytest.mark.gpu] if GPU else [])
SLOW_TRITON: Any = pytest.param("triton", marks=[pytest.mark.gpu if GPU else pytest.mark.slow])
BACKENDS = ["reference", "tiled", TRITON]
BACKENDS_OF_FLOAT64 = ["reference", "tiled"]
BACKENDS_WITH_SLOW_TRITON = ["reference", "tiled", SLOW_TRITON]
# A test's own dtype: the exact ones can be held to float64, for which Triton has no kernels.
KIND = {"reference": torch.float64, "tiled": torch.float64, "triton": torch.float32}
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


def sizes(most: int) -> st.SearchStrategy[int]:
    """Up to several blocks of `small_tiles`."""
    return st.integers(1, 50 if GPU else most)


def examples(count: int) -> int:
    """How many of a random test; on a GPU nearly each one compiles kernels, for seconds."""
    return max(6, count // 8) if GPU else count


@contextlib.contextmanager
def small_tiles(rows: int = 5, columns: int = 4) -> Iterator[None]:
    """Tiles, blocks and panels so small that there are several, not all full."""
    block = launch.Config(16, 16, 16, 1, 1) if GPU else launch.Config(4, 4, 4, 1, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "ROWS", rows)
        patch.setattr(tiled, "COLUMNS", columns)
        patch.setattr(launch, "CONFIGS", {True: [block], False: [block]})
        patch.setattr(launch, "PANEL", (40, 40) if GPU else (8, 8))
        patch.setattr(fused_maxsim, "TILE", 3)
        yield
