"""A run keeps the version of the steps from file to pixels that it began with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
import yaml
from PIL import ExifTags, Image
from support import TINY, losses

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.start import resumed_config
from gigabatch.trainer.config.load import parse_config
from gigabatch.trainer.run.create import create_run
from gigabatch.trainer.run.folder import RunFolder

NEW_KEYS = ("resize", "interpolation", "crop", "fill", "draft", "max_decoded_mib", "version")


def write_turned(folder: Path) -> None:
    """Write 48 JPEGs of odd sizes, with every EXIF orientation."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    with wds.TarWriter(str(folder / "a.tar"), mtime=0) as writer:
        for number in range(48):
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = 1 + number % 8
            width, height = random.integers(17, 40, 2)
            pixels = random.integers(0, 256, (height, width, 3), np.uint8)
            path = folder / "image.jpg"
            Image.fromarray(pixels).save(path, exif=exif)
            concept = number % 16
            sample = {"jpg": path.read_bytes(), "txt": f"thing {concept}"}
            writer.write({"__key__": f"t{number}", **sample, "json": {"concept": concept}})
    path.unlink()


def make_old(run: Path) -> None:
    """Remove the keys that runs lacked before `data.image.version` existed."""
    tree = yaml.safe_load((run / "config.yaml").read_text())
    for key in NEW_KEYS:
        del tree["data"]["image"][key]
    (run / "config.yaml").write_text(yaml.safe_dump(tree))


@pytest.mark.slow
def test_old_run_resumes_with_its_pixels_bit_for_bit(tmp_path: Path, gigabatch: Any) -> None:
    write_turned(tmp_path / "data" / "train")
    config = tmp_path / "c.yaml"
    config.write_text(TINY.format(root=tmp_path / "data") + f"run: {{dir: {tmp_path}}}\n")
    settings = ["train.steps=6", "data.image.version=1", "run.name=full", "eval.sets=[train]"]
    done = gigabatch("train", config, *settings)
    assert done.returncode == 0, done.stderr
    full = losses(tmp_path / "full")
    assert sorted(full) == list(range(1, 7))

    old, changed = tmp_path / "old", tmp_path / "changed"
    shutil.copytree(tmp_path / "full", old)
    make_old(old)
    shutil.rmtree(old / "checkpoints" / "step-00000006")
    shutil.copytree(old, changed)
    done = gigabatch("resume", old)
    assert done.returncode == 0, done.stderr
    assert losses(old) == full
    assert RunFolder(old).evaluation(6) == RunFolder(tmp_path / "full").evaluation(6)
    assert yaml.safe_load((old / "config.yaml").read_text())["data"]["image"]["version"] == 1

    # The control: with the pixels of version 2, the losses are others.
    setting = "data.image.version=2"
    done = gigabatch("resume", changed, setting, "--allow", "data.image.version")
    assert done.returncode == 0, done.stderr
    other = losses(changed)
    assert [step for step in full if other[step] != full[step]] == [4, 5, 6]


@pytest.mark.parametrize("text", ["data: {image: {size: 8}}", "data: null", "data: {image: null}"])
def test_old_config_of_a_run_means_version_1(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    run = RunFolder(tmp_path)
    assert run.config().data.image.version == 1
    assert resumed_config(run, [], []).data.image.version == 1
    with pytest.raises(GigabatchError, match=r"data\.image\.version: 1 -> 2"):
        resumed_config(run, ["data.image.version=2"], [])


def test_new_run_has_version_2_in_its_config(tmp_path: Path) -> None:
    config = parse_config(f"run: {{dir: {tmp_path}}}\ndata: {{image: {{size: 32}}}}", "mine")
    assert config.data.image.version == 2
    run = create_run(config, "run")
    assert "version: 2" in (run.path / "config.yaml").read_text()
    assert resumed_config(run, [], []).data.image.version == 2
