"""The README's commands and paths are real. (`.ci/run` runs its quick start as printed.)"""

from __future__ import annotations

import re
from pathlib import Path

import typer

from gigabatch.launcher.cli.app import app

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_the_quick_start_is_two_commands() -> None:
    block = re.search(r"## Quick start.*?```\n(.*?)```", TEXT, re.DOTALL)
    assert block is not None
    assert block[1].splitlines() == [
        'pip install -e ".[test]" && gigabatch train configs/quickstart.yaml',
        "pytest",
    ]


def test_every_verb_named_exists() -> None:
    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert set(re.findall(r"gigabatch (\w+)(?= [A-Z`]| configs| memory)", TEXT)) <= known


def test_every_linked_file_exists() -> None:
    for path in re.findall(r"\]\((?!http)([^)#]+)", TEXT):
        assert (ROOT / path).exists(), path


def test_every_key_named_exists() -> None:
    from gigabatch.trainer.config import Config
    from gigabatch.trainer.config.load import known_keys

    known = set(known_keys(Config))
    named = set(
        re.findall(r"\b((?:run|data|batch|train|cluster|objective|eval)\.\w+(?:\.\w+)?)=", TEXT)
    )
    sections = {key.rpartition(".")[0] for key in known}  # such as data.train=PATH
    assert named
    assert named <= known | sections
