"""Every config key has an effect: another value changes the result of a probe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from config_probes import PROBES
from config_table import KEYS, KINDS
from support import TINY

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.config import Config
from gigabatch.trainer.config.load import known_keys, parse_config, resolve
from gigabatch.trainer.towers.base import kinds_of

COMMAND = "command"
SLOW = ("train.max_rewinds",)  # several runs
SECTIONS = {
    "towers.image.": "image",
    "towers.text.": "text",
    "towers.more.NAME.": "more",
    "towers.more.NAME.tower.": "text",
}
"""Section of the config -> slot of the kinds that it accepts."""


def test_table_lists_every_key() -> None:
    # tests/trainer/objectives/test_keys.py tests the keys of objectives.
    keys = {key for key in known_keys(Config) if not key.startswith("objective.")}
    keys -= tower_keys(built_in=False) - tower_keys(built_in=True)
    assert {key for key in KEYS if not key.startswith("objective.")} == keys


def tower_keys(built_in: bool) -> set[str]:
    """Return the keys of the tower kinds that the table lists, or of all others."""
    return {
        key
        for section, slot in SECTIONS.items()
        for kind, cls in kinds_of(slot).items()
        if (kind in KINDS[slot]) == built_in
        for key in known_keys(cls, section)
    }


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(key, marks=[pytest.mark.slow] if key in SLOW else [])
        for key, (_, probe, _) in KEYS.items()
        if probe != COMMAND
    ],
)
def test_key_changes_probe_result_or_error(key: str, shards: Path, tmp_path: Path) -> None:
    assert_effect(key, shards, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key, (_, probe, _) in KEYS.items() if probe == COMMAND])
def test_launcher_key_changes_the_run(
    key: str, shards: Path, tmp_path: Path, gigabatch: Any
) -> None:
    def command(overrides: list[str], folder: Path) -> Any:
        path = folder / "c.yaml"
        path.parent.mkdir()
        path.write_text(TINY.format(root=shards))
        settings = ["eval.sets=[]", "train.steps=2", f"run.dir={folder}", "run.name=r"]
        done = gigabatch("train", path, *settings, *overrides)
        log = (folder / "r" / "train.log").read_text().splitlines()
        return {
            "code": done.returncode,
            "workers": [line.split(" on ")[0][22:] for line in log if "attempt 1:" in line],
            "attempts": len(list((folder / "r" / "attempts").iterdir())),
            "printed": (folder / "r" / "workers.log").exists(),
        }

    value, _, common = KEYS[key]
    before = command(common, tmp_path / "before")
    assert command([*common, f"{key}={value}"], tmp_path / "after") != before


def assert_effect(key: str, shards: Path, tmp_path: Path) -> None:
    value, probe, common = KEYS[key]
    before = observe(probe, common, shards, tmp_path / "before")
    name = key.replace("NAME", "sensor")
    override = value if value.startswith("data.") else f"{name}={value}"
    after = observe(probe, [*common, override], shards, tmp_path / "after")
    assert after != before


def observe(probe: str, overrides: list[str], shards: Path, folder: Path) -> Any:
    """Return the result of a probe, or the error message of an invalid config."""
    folder.mkdir()
    base = ["eval.sets=[]", "train.steps=3", f"run.dir={folder}", "data.workers=0"]
    try:
        text = TINY.format(root=shards)
        return PROBES[probe](resolve(parse_config(text, "tiny", [*base, *overrides])), folder)
    except GigabatchError as error:
        return str(error).replace(str(folder), "")
