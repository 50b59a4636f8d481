"""`gigabatch.kernels` for others: torch alone."""

from __future__ import annotations

import subprocess
import sys

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


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_engine_needs_torch_alone() -> None:
    assert run(LOSS) == "alone"
