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

# One group: the set is drawn once, and not by each of the workers that would share the tests.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("glyphs")]
SETS = ("train", "val-face", "val-concept")
MAKE = "from gigabatch.data.glyphs import glyphs_root; print(glyphs_root())"


def samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """key -> extension -> bytes."""
    found: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob("*.tar")):
        for name, data in contents(shard).items():
            key, _, extension = name.partition(".")
            found.setdefault(key, {})[extension] = data
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that two processes filled at the same time."""
    cache = tmp_path_factory.mktemp("cache")
    environment = os.environ | {"GIGABATCH_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen([sys.executable, "-c", MAKE], env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=200)[0].decode().strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said == [str(cache / "glyphs-v1")] * 2
    return cache


@pytest.fixture(scope="module")
def sets(home: Path) -> dict[str, dict[str, dict[str, bytes]]]:
    return {name: samples(home / "glyphs-v1" / name) for name in SETS}


def codepoints(rows: dict[str, dict[str, bytes]]) -> set[int]:
    return {json.loads(row["json"])["codepoint"] for row in rows.values()}


def faces(rows: dict[str, dict[str, bytes]]) -> set[str]:
    return {json.loads(row["json"])["face"] for row in rows.values()}


def test_nothing_else_is_left_in_the_cache(home: Path) -> None:
    assert [p.name for p in home.iterdir()] == ["glyphs-v1"]
    assert sorted(p.name for p in (home / "glyphs-v1").iterdir()) == sorted(SETS)


def test_a_second_call_writes_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIGABATCH_CACHE", str(home))
    before = {p: p.stat().st_mtime_ns for p in home.rglob("*")}
    assert glyphs_root() == home / "glyphs-v1"
    assert {p: p.stat().st_mtime_ns for p in home.rglob("*")} == before


def test_every_sample_is_whole(sets: dict[str, dict[str, dict[str, bytes]]]) -> None:
    for rows in sets.values():
        for row in rows.values():
            assert set(row) == {"png", "txt", "json"}
            assert row["txt"].decode().split(" ")[0] == json.loads(row["json"])["script"]


def test_images_are_small_and_inked(sets: dict[str, dict[str, dict[str, bytes]]]) -> None:
    for row in list(sets["train"].values())[::500]:
        image = Image.open(io.BytesIO(row["png"]))
        assert (image.size, image.mode) == ((32, 32), "L")
        assert image.getextrema()[0] < 128  # type: ignore[operator]


def test_val_face_shows_known_characters_in_an_unseen_face(
    sets: dict[str, dict[str, dict[str, bytes]]],
) -> None:
    assert 2400 < len(sets["val-face"]) < 2560
    assert faces(sets["val-face"]) == {"STIXGeneral"}
    assert len(faces(sets["train"])) == 12
    assert "STIXGeneral" not in faces(sets["train"])
    assert codepoints(sets["val-face"]) <= codepoints(sets["train"])


def test_val_concept_shows_characters_that_train_never_does(
    sets: dict[str, dict[str, dict[str, bytes]]],
) -> None:
    held, known = codepoints(sets["val-concept"]), codepoints(sets["train"])
    assert not held & known
    assert 0.045 < len(held) / (len(held) + len(known)) < 0.055
    assert len(faces(sets["val-concept"])) == 13
