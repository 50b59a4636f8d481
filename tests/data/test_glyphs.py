from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tarfiles import contents

from gigabatch.data.glyphs import glyphs_root

# One group: the set is rendered once, not once in each pytest worker.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("glyphs")]
SPLITS = ("train", "val-face", "val-concept")
MAKE = "from gigabatch.data.glyphs import glyphs_root; print(glyphs_root())"


def samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """Return key -> extension -> bytes."""
    samples_by_key: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob("*.tar")):
        for name, data in contents(shard).items():
            key, _, extension = name.partition(".")
            samples_by_key.setdefault(key, {})[extension] = data
    return samples_by_key


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache folder that two processes filled at the same time."""
    cache = tmp_path_factory.mktemp("cache")
    environment = os.environ | {"GIGABATCH_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen([sys.executable, "-c", MAKE], env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=200)[0].decode().strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs == [str(cache / "glyphs-v1")] * 2
    return cache


@pytest.fixture(scope="module")
def splits(home: Path) -> dict[str, dict[str, dict[str, bytes]]]:
    return {name: samples(home / "glyphs-v1" / name) for name in SPLITS}


def codepoints(rows: dict[str, dict[str, bytes]]) -> set[int]:
    return {json.loads(row["json"])["codepoint"] for row in rows.values()}


def faces(rows: dict[str, dict[str, bytes]]) -> set[str]:
    return {json.loads(row["json"])["face"] for row in rows.values()}


def test_cache_holds_only_the_demo_set(home: Path) -> None:
    assert [p.name for p in home.iterdir()] == ["glyphs-v1"]
    assert sorted(p.name for p in (home / "glyphs-v1").iterdir()) == sorted(SPLITS)


def test_second_call_writes_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIGABATCH_CACHE", str(home))
    before = {p: p.stat().st_mtime_ns for p in home.rglob("*")}
    assert glyphs_root() == home / "glyphs-v1"
    assert {p: p.stat().st_mtime_ns for p in home.rglob("*")} == before


def test_every_sample_has_all_members(splits: dict[str, dict[str, dict[str, bytes]]]) -> None:
    for rows in splits.values():
        for row in rows.values():
            assert set(row) == {"png", "txt", "json"}
            assert row["txt"].decode().split(" ")[0] == json.loads(row["json"])["script"]


def test_images_are_32_pixels_and_not_blank(splits: dict[str, dict[str, dict[str, bytes]]]) -> None:
    for row in list(splits["train"].values())[::500]:
        image = Image.open(io.BytesIO(row["png"]))
        assert (image.size, image.mode) == ((32, 32), "L")
        assert image.getextrema()[0] < 128  # type: ignore[operator]


def test_val_face_has_train_characters_in_unseen_face(
    splits: dict[str, dict[str, dict[str, bytes]]],
) -> None:
    assert 2400 < len(splits["val-face"]) < 2560
    assert faces(splits["val-face"]) == {"STIXGeneral"}
    assert len(faces(splits["train"])) == 12
    assert "STIXGeneral" not in faces(splits["train"])
    assert codepoints(splits["val-face"]) <= codepoints(splits["train"])


def test_val_concept_has_characters_absent_from_train(
    splits: dict[str, dict[str, dict[str, bytes]]],
) -> None:
    held_out, trained = codepoints(splits["val-concept"]), codepoints(splits["train"])
    assert not held_out & trained
    assert 0.045 < len(held_out) / (len(held_out) + len(trained)) < 0.055
    assert len(faces(splits["val-concept"])) == 13
