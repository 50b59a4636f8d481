"""The Python blocks of docs/engine.md run, in order, and their losses are finite."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).parents[2] / "docs" / "engine.md"


def test_engine_page_code_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    for block in blocks:
        torch.manual_seed(0)
        exec(compile(block, str(PAGE), "exec"), names)
        assert names["loss"].isfinite()
