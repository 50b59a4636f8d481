"""Every key of the config has an effect: changed, it changes something that a probe observes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from config_probes import PROBES
from config_table import KEYS
from support import TINY

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.config import Config
from gigabatch.trainer.config.load import known_keys, parse_config, resolve

COMMAND = "command"
SLOW = ("train.max_rewinds",)  # several runs


def test_the_table_names_every_key() -> None:
    # tests/trainer/objectives/test_keys.py has those of the objectives.
    keys = {key for key in known_keys(Config) if not key.startswith("objective.")}
    assert {key for key in KEYS if not key.startswith("objective.")} == keys


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(key, marks=[pytest.mark.slow] if key in SLOW else [])
        for key, (_, probe, _) in KEYS.items()
        if probe != COMMAND
    ],
)
def test_key_has_an_effect_or_is_refused(key: str, shards: Path, tmp_path: Path) -> None:
    assert_effect(key, shards, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key, (_, probe, _) in KEYS.items() if probe == COMMAND])
def test_key_of_the_launcher_has_an_effect(
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

    override, _, both = KEYS[key]
    before = command(both, tmp_path / "before")
    assert command([*both, f"{key}={override}"], tmp_path / "after") != before


def assert_effect(key: str, shards: Path, tmp_path: Path) -> None:
    override, probe, both = KEYS[key]
    before = observe(probe, both, shards, tmp_path / "before")
    name = key.replace("NAME", "sensor")
    assignment = override if override.startswith("data.") else f"{name}={override}"
    after = observe(probe, [*both, assignment], shards, tmp_path / "after")
    assert after != before


def observe(probe: str, overrides: list[str], shards: Path, folder: Path) -> Any:
    """What a probe sees of a config, or the words with which it is refused."""
    folder.mkdir()
    base = ["eval.sets=[]", "train.steps=3", f"run.dir={folder}", "data.workers=0"]
    try:
        text = TINY.format(root=shards)
        return PROBES[probe](resolve(parse_config(text, "tiny", [*base, *overrides])), folder)
    except GigabatchError as error:
        return str(error).replace(str(folder), "")
