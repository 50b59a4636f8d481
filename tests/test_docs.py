"""What the guides show can be used as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from gigabatch.trainer.config.load import parse_config
from gigabatch.trainer.objectives import OBJECTIVES, build_objective

DOCS = Path(__file__).parent.parent / "docs"
BLOCKS = re.findall(r"```yaml\n(.*?)```", (DOCS / "objectives.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_an_objective_shown_is_one(block: str) -> None:
    config = parse_config(block, "docs/objectives.md")
    assert build_objective(config.objective, width=8).needs.taps


def test_every_objective_is_shown() -> None:
    shown = [yaml.safe_load(block)["objective"] for block in BLOCKS]
    names = {term["name"] for each in shown for term in [each, *each.get("terms", [])]}
    assert set(OBJECTIVES) - {"byol"} <= names  # in a sum, as barlow


def test_every_linked_file_exists() -> None:
    for page in DOCS.glob("*.md"):
        for path in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / path).exists(), (page.name, path)
