"""Compilation of the Triton kernels for GPUs that are not present."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "compile_kernels.py"
# Compiling is slow, so the A100 compiles only the kernels that need most shared memory; both GPUs
# use the same code.
PROBLEMS = {
    80: ["bf16", "cached", "fp16", "gated", "odd sizes", "maxsim"],
    90: ["bf16", "cached", "fp32", "rules", "second scores", "gated", "maxsim", "small maxsim",
         "fp32 maxsim"],
}  # fmt: skip
SHARED = {80: 166_912, 90: 232_448}  # bytes per block on an A100 and an H100


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED)
def test_every_kernel_compiles_to_tensor_core_code(arch: int) -> None:
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT, str(arch), *PROBLEMS[arch]],
        capture_output=True, text=True, timeout=570, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in compiled} == {
        "sweep", "best", "_score", "_query_grad", "_key_grad",
    }  # fmt: skip
    for kernel in compiled:
        assert kernel["shared"] <= SHARED[arch], kernel
        assert kernel["spills"] <= kernel["instructions"] / 4, kernel
    # Only kernels that load cached scores contain no product.
    no_products = [kernel["problem"] for kernel in compiled if kernel["products"] == 0]
    assert no_products == [name for name in PROBLEMS[arch] if name == "cached"]
    # The backward pass of the most important loss fits in registers.
    backward = [kernel for kernel in compiled if kernel["problem"] == "bf16"][1]
    assert backward["spills"] <= 16, backward
