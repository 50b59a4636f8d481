"""The registry of tower kinds: a new file is a new kind."""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
from support import losses

import gigabatch.trainer.towers
from gigabatch.trainer.checkpoints.format import latest_checkpoint
from gigabatch.trainer.run.folder import RunFolder
from gigabatch.trainer.towers import base
from gigabatch.trainer.towers.base import Slot, TowerKind, kinds_of, tower_kind

MEAN_COLOR = (Path(__file__).parents[3] / "docs/tutorials/mean_color.py").read_text()
"""The example of docs/tutorials/extend.md."""
SLOTS: tuple[Slot, ...] = get_args(Slot)


def test_each_slot_has_its_kinds() -> None:
    kinds = {slot: set(kinds_of(slot)) for slot in SLOTS}
    assert kinds["image"] >= {"conv", "huggingface", "module"}
    assert kinds["text"] >= {"conv", "huggingface", "module"}
    assert kinds["more"] >= {"audio", "module", "sequence", "set", "vector"}


@pytest.mark.parametrize(
    ("slot", "kind"), [(slot, kind) for slot in SLOTS for kind in kinds_of(slot)]
)
def test_kind_documents_itself_and_its_keys(slot: Slot, kind: str) -> None:
    cls = kinds_of(slot)[kind]
    assert cls.__doc__ != TowerKind.__doc__
    undocumented = [
        name
        for name, field in cls.model_fields.items()
        if not field.description and name not in ("head", "reads")  # their subkeys are documented
    ]
    assert not undocumented
    assert kind in str(cls.model_fields["kind"].description)


def test_duplicate_kind_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_KINDS", {slot: kinds_of(slot) for slot in SLOTS})

    class Second(TowerKind):
        kind: Literal["conv"]

    with pytest.raises(TypeError, match="ConvTower is already kind 'conv' of image"):
        tower_kind("image")(Second)


def test_class_without_a_kind_raises() -> None:
    with pytest.raises(TypeError, match="needs a field `kind"):
        tower_kind("image")(TowerKind)


def test_new_file_is_discovered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "new_kind.py").write_text(MEAN_COLOR.replace("mean_color", "new_kind"))
    before = kinds_of("image")
    monkeypatch.setattr(base, "_KINDS", {slot: kinds_of(slot) for slot in SLOTS})
    folders = [*gigabatch.trainer.towers.__path__, str(tmp_path)]
    monkeypatch.setattr(gigabatch.trainer.towers, "__path__", folders)
    assert kinds_of("image").keys() - before.keys() == {"new_kind"}


@pytest.mark.slow
def test_new_file_trains_without_other_changes(
    tmp_path: Path, tiny: Path, gigabatch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Add one file to a copy of the package, and train from the command line."""
    package = tmp_path / "copy" / "gigabatch"
    package.mkdir(parents=True)
    for name in ("configs", "data", "kernels", "launcher", "trainer"):
        source = Path(next(iter(importlib.import_module(f"gigabatch.{name}").__path__)))
        if name == "trainer":
            shutil.copytree(source, package / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (package / name).symlink_to(source.resolve())
    (package / "trainer" / "towers" / "mean_color.py").write_text(MEAN_COLOR)
    paths = [str(package.parent), os.environ["PYTHONPATH"]]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    tower = "towers.image={kind: mean_color, width: 5}"
    done = gigabatch("train", tiny, tower, "train.steps=3", "eval.sets=[]", "run.name=new")
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunFolder(tmp_path / "runs" / "new")
    assert sorted(losses(run.path)) == [1, 2, 3]
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    assert checkpoint.tensors("towers")["encoders.image.linear.weight"].shape == (5, 3)
    misspelled = gigabatch("train", tiny, "towers.image={kind: mean_color, widht: 5}")
    assert misspelled.returncode == 2
    assert "Did you mean towers.image.width?" in misspelled.stderr
