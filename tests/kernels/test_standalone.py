"""`gigabatch.kernels` for others: torch alone, memory linear in the batch."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

LOSS = """
import sys
import torch
import torch.distributed
from importlib.abc import MetaPathFinder

known = {name.partition(".")[0] for name in sys.modules} | set(sys.stdlib_module_names)

class TorchAlone(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in known | {"gigabatch"}:
            raise ImportError(f"{name} is not torch's")

for forbidden in ("webdataset", "pydantic", "pyarrow", "deepspeed", "ray", "transformers"):
    assert forbidden not in known
sys.meta_path.insert(0, TorchAlone())

from gigabatch.kernels import contrastive_loss

q = torch.randn(20, 8, requires_grad=True)
loss = contrastive_loss(q, torch.randn(20, 8), torch.tensor(10.0))
loss.backward()
assert loss.isfinite() and q.grad.isfinite().all()
others = {n for n in sys.modules if n.startswith("gigabatch.")}
assert all(n.startswith("gigabatch.kernels") for n in others), others
try:
    import webdataset
except ImportError:
    print("alone")
"""

PEAK = """
import json
import sys
import torch
from gigabatch.kernels import contrastive_loss

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))

def loss_of(n):
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(n, 64, generator=generator).mul_(0.1).requires_grad_() for _ in "qk"]

torch.set_num_threads(1)
scale = torch.tensor(10.0, requires_grad=True)
warm = loss_of(600)
contrastive_loss(*warm, scale).backward()
q, k = loss_of(int(sys.argv[1]))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before, peak = status("VmRSS"), status("VmHWM")
contrastive_loss(q, k, scale).backward()
gradients = q.grad.nbytes + k.grad.nbytes
print(json.dumps({"reset": peak - before, "extra": status("VmHWM") - before - gradients}))
"""


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_engine_needs_torch_alone() -> None:
    assert run(LOSS) == "alone"


@pytest.mark.slow
def test_memory_beside_inputs_and_gradients_is_at_most_linear() -> None:
    sizes = [4096, 8192, 16384]
    found = [json.loads(run(PEAK, str(n))) for n in sizes]
    assert all(abs(one["reset"]) < 2 << 20 for one in found), f"VmHWM was not reset: {found}"
    extra = [one["extra"] for one in found]
    # The matrix at the largest size is 1 GiB.
    assert max(extra) < 64 << 20
    logs = [math.log(n) for n in sizes], [math.log(max(e, 1 << 20)) for e in extra]
    mean = [sum(values) / 3 for values in logs]
    exponent = sum((x - mean[0]) * (y - mean[1]) for x, y in zip(*logs, strict=True)) / sum(
        (x - mean[0]) ** 2 for x in logs[0]
    )
    assert exponent <= 1.1, extra
