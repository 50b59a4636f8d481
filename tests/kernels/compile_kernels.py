"""Compile every Triton kernel for a GPU that need not be present, and describe the result.

    python compile_kernels.py 90 [PROBLEM]...

The engine's code runs on small CPU tensors; a launch only compiles for the architecture, so results
mean nothing. It prints one JSON line per kernel. Run it in a new process without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class AbsentGpu:
    """Driver of a GPU of some architecture that is not present."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def main(arch: int, *names: str) -> None:
    driver.set_active(AbsentGpu(arch))
    compiled: list[Any] = []
    run = JITFunction.run

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel not in compiled:
            compiled.append(kernel)
        return kernel

    JITFunction.run = only_compile
    for name, use in problems().items():
        if names and name not in names:
            continue
        compiled.clear()
        use()
        for kernel in compiled:
            print(json.dumps({"problem": name, **describe(kernel)}), flush=True)


def problems() -> dict[str, Any]:
    import gigabatch.kernels as K
    from gigabatch.kernels import fused
    from gigabatch.kernels.bench.problems import AXES

    for name in ("checks", "collect", "maxsim", "stats"):
        sys.modules[f"gigabatch.kernels.{name}"].load_backend = lambda *_: fused  # type: ignore[attr-defined]
    one, n = torch.ones((), requires_grad=True), 256

    def rows(dtype: torch.dtype, n: int = n, d: int = 512) -> torch.Tensor:
        return torch.ones(n, d, dtype=dtype, requires_grad=True)

    def losses_of(dtype: torch.dtype, **options: Any) -> None:
        K.contrastive_loss(rows(dtype), rows(dtype), one, **options).backward()
        K.sigmoid_loss(rows(dtype), rows(dtype), one, one).backward()

    def rules(*names: str) -> None:
        ids, label, role = torch.arange(n), torch.rand(n), torch.arange(n) % 3
        teacher = torch.rand(n, 16)
        keys = {"id": ids, "label": label, "role": role, "teacher": teacher}
        clauses = {
            "either": K.Either(K.Ne(ids, "id"), K.Eq(ids, "id")),
            "distance": K.AbsDiff(label, "label"),
            "table": K.Table(role, "role", torch.zeros(3, 3), K.Eq(ids, "id")),
            "at least": K.AtLeast(label),
            "teacher's threshold": K.SecondScore(teacher, "teacher", 0.5),
            "teacher": K.SecondScore(teacher, "teacher"),
        }
        for clause in (clauses[name] for name in names):
            q = rows(torch.bfloat16)
            lses = [K.Lse(axis, torch.ones(n), label, (clause,)) for axis in AXES]
            stats = K.lse_stats(q, K.Local(rows(torch.bfloat16), keys), lses, clause)
            (sum(stats.z) + sum(stats.positive)).sum().backward()  # type: ignore[union-attr]

    def gated() -> None:
        score = K.GatedCosine(rows(torch.bfloat16), torch.rand(n, 512, requires_grad=True))
        stats = K.lse_stats(score, K.Local(rows(torch.bfloat16)), [K.Lse("rows", one)])
        stats.z[0].sum().backward()
        K.row_top(score, K.Local(rows(torch.bfloat16)), 2)

    def others() -> None:
        for m, width in ((1, 100), (300, 1)):
            K.contrastive_loss(rows(torch.bfloat16, m, width), rows(torch.bfloat16, m, width),
                               one, ids_q=torch.arange(m)).backward()  # fmt: skip
        K.row_top(rows(torch.bfloat16), K.Local(rows(torch.bfloat16)), 4)

    def tokens(tq: int, tk: int, d: int, dtype: torch.dtype = torch.bfloat16) -> None:
        q, k = (torch.ones(4, t, d, dtype=dtype, requires_grad=True) for t in (tq, tk))
        K.maxsim(q, k).sum().backward()

    return {
        "bf16": lambda: losses_of(torch.bfloat16),
        "cached": lambda: K.contrastive_loss(
            rows(torch.bfloat16), rows(torch.bfloat16), one, cache_bytes=2**30
        ).backward(),
        "fp16": lambda: losses_of(torch.float16),
        "fp32": lambda: losses_of(torch.float32),
        "rules": lambda: rules("either", "distance", "table", "at least"),
        "second scores": lambda: rules("teacher's threshold", "teacher"),
        "gated": gated,
        "odd sizes": others,
        "maxsim": lambda: tokens(196, 77, 256),
        "small maxsim": lambda: tokens(5, 7, 32),
        "fp32 maxsim": lambda: tokens(64, 32, 128, torch.float32),
    }


def describe(kernel: Any) -> dict[str, Any]:
    """Return registers, shared memory, and numbers of tensor-core and spill instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage, code = (
            subprocess.run([TOOLS / tool, *flags, file.name], capture_output=True, text=True).stdout
            for tool, flags in (("cuobjdump", ["--dump-resource-usage"]), ("nvdisasm", []))
        )
    resources = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?\s*([A-Z0-9_]+)", code)
    return {
        "kernel": kernel.metadata.name, "warps": kernel.metadata.num_warps,
        "shared": kernel.metadata.shared, "registers": int(resources["REG"]),
        "instructions": len(names), "spills": names.count("STL") + names.count("LDL"),
        "products": names.count("HGMMA") + names.count("HMMA"),
    }  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
