"""`gigabatch.kernels` as a library: it needs only torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LOSS = """
import sys
import torch
import torch.distributed
from importlib.abc import MetaPathFinder

known = {name.partition(".")[0] for name in sys.modules} | set(sys.stdlib_module_names)

class OnlyTorch(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in known | {"gigabatch"}:
            raise ImportError(f"{name} is not needed by torch")

for forbidden in ("webdataset", "pydantic", "pyarrow", "deepspeed", "ray", "transformers"):
    assert forbidden not in known
sys.meta_path.insert(0, OnlyTorch())

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
    print("only torch")
"""


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_engine_imports_only_torch() -> None:
    assert run(LOSS) == "only torch"


COLLECT = """
import sys
from importlib.abc import MetaPathFinder

class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("gigabatch.trainer", "gigabatch.data", "gigabatch.launcher")) or (
            name.partition(".")[0] in ("ray", "deepspeed", "webdataset", "pydantic", "typer")
        ):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
import pytest

folder = sys.argv[1]
sys.exit(pytest.main([
    "--collect-only", "-q", folder, "--confcutdir", folder, "-o", "addopts=",
    "-o", f"pythonpath={folder}", "-p", "no:cacheprovider",
]))
"""


@pytest.mark.slow
def test_engine_tests_collect_without_the_rest_of_gigabatch() -> None:
    """A machine with a GPU, torch and pytest can run them."""
    output = run(COLLECT, str(Path(__file__).parent))
    assert "test_gpu.py::" in output
