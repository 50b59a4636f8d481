"""Back ends as test parameters. The same tests run Triton on a GPU or under its interpreter."""

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
# The dtype of exact tests: float64, except for Triton, which has no kernels for it.
KIND = {"reference": torch.float64, "tiled": torch.float64, "triton": torch.float32}
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


def sizes(largest: int) -> st.SearchStrategy[int]:
    """Draw sizes of up to several blocks of `small_tiles`."""
    return st.integers(1, 50 if GPU else largest)


def examples(count: int) -> int:
    """Return the number of examples of a random test; on a GPU most examples compile kernels."""
    return max(6, count // 8) if GPU else count


@contextlib.contextmanager
def small_tiles(rows: int = 5, columns: int = 4) -> Iterator[None]:
    """Make tiles, blocks and launches so small that there are several, not all full."""
    block = launch.BlockConfig(16, 16, 16, 1, 1) if GPU else launch.BlockConfig(4, 4, 4, 1, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "ROWS", rows)
        patch.setattr(tiled, "COLUMNS", columns)
        patch.setattr(launch, "CONFIGS", {True: [block], False: [block]})
        patch.setattr(launch, "LAUNCH_SHAPE", (40, 40) if GPU else (8, 8))
        patch.setattr(fused_maxsim, "TILE", 3)
        yield
