"""Docs: commands, keys, links and examples are valid, and words follow the style table."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from gigabatch import kernels
from gigabatch.launcher.cli.app import app
from gigabatch.trainer.config import Config
from gigabatch.trainer.config.load import known_keys, parse_config
from gigabatch.trainer.objectives import OBJECTIVES, build_objective
from gigabatch.trainer.objectives.documentation import (
    committed_rows,
    objectives_table,
    with_generated_table,
)

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]
    if path.name
    not in ("engineering-log.md", "CHANGELOG.md")  # they name removed commands and keys
)
OBJECTIVE_BLOCKS = re.findall(r"```yaml\n(.*?)```", (DOCS / "objectives.md").read_text(), re.DOTALL)
STYLE = (ROOT / "CONTRIBUTING.md").read_text()
AMBIGUOUS = {"plain", "ours", "deal", "cut", "spread", "bar", "starts"}
"""Words of the style table that are allowed in another sense."""
page_of = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def _code(page: Path) -> str:
    """Return the code spans and blocks of a page, one per line."""
    text = page.read_text()
    fence = re.compile(r"```.*?\n(.*?)```", re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", fence.sub("", text))
    return "\n".join([*fence.findall(text), *spans])


@page_of
def test_commands_exist(page: Path) -> None:
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for verb, subcommand in re.findall(
        r"\bgigabatch ([a-z]+)(?: ([a-z]+)\b(?![=./-]))?", _code(page)
    ):
        assert verb in verbs, f"gigabatch {verb}"
        if subcommand and hasattr(verbs[verb], "commands"):
            assert subcommand in verbs[verb].commands, f"gigabatch {verb} {subcommand}"


@page_of
def test_config_keys_exist(page: Path) -> None:
    keys = {tuple(key.split(".")) for key in known_keys(Config)}
    prefixes = {key[:n] for key in keys for n in range(1, len(key) + 1)}
    sections = "|".join(Config.model_fields)
    text = _code(page)
    for match in re.findall(rf"(?<![\w/.-])((?:{sections})(?:\.[a-z_]+)+)\b(?![(/*])", text):
        path = tuple(match.split("."))
        if path[-1] in ("md", "log", "py", "jsonl", "yaml", "digest", "csv"):  # a file
            continue
        assert any(_matches(path, prefix) for prefix in prefixes), match


def _matches(path: tuple[str, ...], prefix: tuple[str, ...]) -> bool:
    """Return whether a dotted path is a key; NAME in known keys is a name that the user chooses."""
    return len(path) == len(prefix) and all(
        part == known or known == "NAME" for part, known in zip(path, prefix, strict=True)
    )


@page_of
def test_linked_files_exist(page: Path) -> None:
    for link in re.findall(r"\]\((?!http)([^)#\s]+)[^)]*\)", page.read_text()):
        target = (page.parent / link).resolve()
        assert target.exists(), link


@page_of
def test_page_follows_the_style_table(page: Path) -> None:
    table = re.findall(r"(?m)^\|[^|]+\|([^|]+)\|$", STYLE.partition("| Write | Not |")[2])
    words = {word.strip() for cell in table[1:] for word in cell.split(",")} - AMBIGUOUS
    assert len(words) > 10
    text = page.read_text()
    if page.name == "CONTRIBUTING.md":
        text = re.sub(r"(?m)^\|.*$", "", text)
    matches = re.findall(
        rf"\b(?:{'|'.join(map(re.escape, sorted(words)))})s?\b", text, re.IGNORECASE
    )
    numbers = re.findall(r"\b(?:paper|number) \d+", text, re.IGNORECASE)  # name the paper instead
    assert matches + numbers == []


@pytest.mark.parametrize("block", OBJECTIVE_BLOCKS)
def test_objective_examples_are_valid(block: str) -> None:
    config = parse_config(block, "docs/objectives.md")
    assert build_objective(config.objective, width=8).needs.taps


def test_committed_objectives_table_has_no_stale_rows() -> None:
    # A new objective needs no row: the site's build generates the table again.
    rows = committed_rows((DOCS / "objectives.md").read_text())
    assert len(rows) >= 14
    stale = set(rows) - set(objectives_table().splitlines())
    assert not stale, "replace the table by the output of gigabatch objectives --markdown"


def test_site_has_a_row_for_every_objective() -> None:
    page = (DOCS / "objectives.md").read_text()
    (row,) = [row for row in committed_rows(page) if row.startswith("| `swav` |")]
    outdated = page.replace(row, row.replace("swav", "renamed")) + "\nText below the table.\n"
    generated = with_generated_table(outdated)
    assert committed_rows(generated) == objectives_table().splitlines()[2:]
    assert len(committed_rows(generated)) == len(OBJECTIVES)
    assert generated.endswith("|\n\nText below the table.\n")
    assert generated.partition("<!-- Table of")[0] == page.partition("<!-- Table of")[0]
    with pytest.raises(ValueError, match="no table after a comment"):
        with_generated_table("# Choosing an objective\n")


def test_every_objective_of_the_committed_table_has_an_example() -> None:
    rows = committed_rows((DOCS / "objectives.md").read_text())
    documented = {row.split("`")[1] for row in rows}
    objectives = [yaml.safe_load(block)["objective"] for block in OBJECTIVE_BLOCKS]
    names = {
        term["name"]
        for objective in objectives
        for term in [objective, *objective.get("terms", [])]
    }
    assert documented - {"byol"} <= names  # byol and barlow are used in sums


def test_kernels_reference_lists_every_public_name() -> None:
    page = (DOCS / "reference" / "kernels.md").read_text()
    assert set(re.findall(r"::: gigabatch\.kernels\.(\w+)", page)) == set(kernels.__all__)


def test_objective_tutorial_includes_its_files() -> None:
    # `ruff format` would rewrite these lines in a block that starts with ```python.
    text = (DOCS / "tutorials" / "own-objective.md").read_text()
    included = re.findall(r'(?m)^--8<-- "(.+)"$', text)
    assert included == ["docs/tutorials/dcl.py", "docs/tutorials/test_dcl.py"]
    assert all((ROOT / path).exists() for path in included)


@pytest.mark.slow
def test_site_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the extra `docs`")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    for page, content in {
        "recipes": "quickstart",
        "reference/config": "train.max_bad_steps",
    }.items():
        text = (tmp_path / page / "index.html").read_text()
        assert content in text
        assert "The site shows" not in text  # it is for readers of the file
