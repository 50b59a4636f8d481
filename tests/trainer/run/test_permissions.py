"""Files have the permissions that the umask says, whichever library writes them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import write_samples

from gigabatch.data.describe.contact import contact_sheet
from gigabatch.data.files import atomic_create, atomic_replace
from gigabatch.data.packing.pack import pack
from gigabatch.data.shards.filtered_view import create_view
from gigabatch.data.shards.indexing import open_index
from gigabatch.data.shards.scan import IndexSettings
from gigabatch.data.text.captions import CaptionSettings
from gigabatch.trainer.checkpoints.format import write_checkpoint
from gigabatch.trainer.config import CheckpointSettings
from gigabatch.trainer.run.folder import RunFolder

UMASKS = (0o022, 0o027, 0o077)


@pytest.fixture(params=UMASKS, ids=[f"{umask:03o}" for umask in UMASKS])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def assert_modes(folder: Path, umask: int) -> None:
    """Require the mode of new files and folders of everything in `folder`."""
    paths = [path for path in folder.rglob("*") if not path.is_symlink()]
    assert any(path.is_file() for path in paths)
    wrong = {
        str(path.relative_to(folder)): oct(stat.S_IMODE(path.stat().st_mode))
        for path in paths
        if stat.S_IMODE(path.stat().st_mode) != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert not wrong


def test_data_and_checkpoints_follow_the_umask(umask: int, tmp_path: Path) -> None:
    source = tmp_path / "set"
    write_samples(source, 20, 10, seed=1)
    index = open_index(source, settings=IndexSettings(columns=("concept",)))
    create_view(index, "concept > 3", tmp_path / "view")
    pack(source, tmp_path / "packed")
    contact_sheet(index, CaptionSettings(), tmp_path / "sheet.png")
    run = RunFolder(tmp_path / "run")
    (run.path / "attempts").mkdir(parents=True)
    (run.path / "attempts" / "000001.json").touch()
    tensors = {"w": torch.ones(3)}
    files = {"towers": tensors, "moments": tensors, "objective": tensors}
    write_checkpoint(run, 1, 5, files, {"step": 5}, CheckpointSettings())
    assert len(list(run.checkpoints.rglob("*.safetensors"))) == 3
    assert_modes(tmp_path, umask)


@pytest.mark.parametrize("write", [atomic_replace, atomic_create])
def test_library_that_replaces_the_file_keeps_its_mode(
    write: Any, umask: int, tmp_path: Path
) -> None:
    with write(tmp_path / "a.safetensors") as temporary:
        save_file({"w": torch.ones(3)}, temporary)
    with write(tmp_path / "b.txt") as temporary:
        temporary.unlink()
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o600))
    assert_modes(tmp_path, umask)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_run_folder_follows_the_umask(tiny: Path, tmp_path: Path, start: Any) -> None:
    options = ["run.name=a", "train.steps=2", "cluster.launcher=torchrun", "cluster.workers=2"]
    done = start("train", tiny, *options, umask=0o027).wait()
    assert done.returncode == 0, done.stderr
    assert_modes(tmp_path / "runs" / "a", 0o027)
