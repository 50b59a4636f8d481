"""The README: quick start, recipes, layout. (`.ci/run` runs the quick start.)"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_quick_start_is_two_commands() -> None:
    block = re.search(r"## Quick start.*?```\n(.*?)```", TEXT, re.DOTALL)
    assert block is not None
    assert block[1].splitlines() == [
        "pip install -e . && gigabatch train configs/quickstart.yaml",
        'pip install -e ".[test]" && pytest',
    ]


def test_every_recipe_is_listed() -> None:
    recipes = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    listed = set(re.findall(r"\]\(configs/([\w-]+)\.yaml\)", TEXT))
    assert listed == recipes - {"quickstart", "emoji"}  # the quick start and its larger version


def test_layout_lists_the_top_level_packages() -> None:
    block = TEXT.split("## Repository layout", 1)[1]
    listed = set(re.findall(r"(?m)^(\w+)/ ", block))
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages | {"docs", "examples", "tests"} == listed
