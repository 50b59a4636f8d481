"""A run fetched from its copies: the newest that is sound, loudly; the folder whole or not."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from support_copies import copy, make_run, save

from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote.access import Retry
from gigabatch.trainer.checkpoints.download import (
    copied_config,
    fetch_newer,
    fetch_run,
    open_copy,
    say_newer,
)
from gigabatch.trainer.checkpoints.format import latest_checkpoint
from gigabatch.trainer.checkpoints.remote import RemoteRun
from gigabatch.trainer.run.folder import RunFolder


@pytest.fixture
def far(tmp_path: Path) -> Path:
    return tmp_path / "far" / "a"


@pytest.fixture
def place(far: Path) -> RemoteRun:
    """Copies of the steps 3, 6 and 9 of a run."""
    run = make_run(far.parent.parent / "a")
    run.metrics.write_text('{"step": 9}\n')
    run.write_evaluation(3, {"eval/val/mean_recall@10": 0.5})
    place = RemoteRun(f"file://{far}", Retry(attempts=1))
    place.claim(run)
    for step in (3, 6, 9):
        copy(place, run, step)
    return place


@pytest.fixture
def fresh(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "elsewhere" / "runs" / "a")


def newest(run: RunFolder) -> int:
    found = latest_checkpoint(run)
    assert found is not None
    assert found.tensors("towers")["w"].tolist() == [float(found.step)] * 100
    return found.step


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_fetched_run_has_all_it_needs(place: RemoteRun, fresh: RunFolder, tmp_path: Path) -> None:
    fetch_run(place, fresh)
    assert newest(fresh) == 9
    assert fresh.steps_saved() == [9]
    for name in ("config.yaml", "environment.json", "tokenizer.json", "data.digest"):
        assert (fresh.path / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert fresh.evaluation(3) == {"eval/val/mean_recall@10": 0.5}
    assert fresh.metrics.read_text() == '{"step": 9}\n'
    assert [path.name for path in fresh.path.parent.iterdir()] == ["a"]
    assert copied_config(place) == "config.yaml of 1"


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (
            lambda f: flip(f / "towers.safetensors"),
            "towers.safetensors does not match its checksum",
        ),
        (lambda f: (f / "moments.safetensors").unlink(), "moments.safetensors is missing"),
        (lambda f: (f / "state.json").write_text(""), "state.json is 0 bytes, not"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is damaged"),
        (lambda f: escape(f / "manifest.json"), "'../../config.yaml', outside its folder"),
    ],
)
def test_a_damaged_copy_is_passed_over_loudly(
    harm: object, words: str, place: RemoteRun, far: Path, fresh: RunFolder,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    assert callable(harm)
    harm(far / "checkpoints" / "step-00000009")
    fetch_run(place, fresh)
    assert newest(fresh) == 6
    (told,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "copy passed over: " in told.getMessage()
    assert f"{place.url}/checkpoints/step-00000009/" in told.getMessage()
    assert words in told.getMessage()
    assert not list(fresh.checkpoints.glob(".*"))


def escape(manifest: Path) -> None:
    read = json.loads(manifest.read_text())
    read["files"]["../../config.yaml"] = read["files"]["state.json"]
    manifest.write_text(json.dumps(read))


def test_without_a_manifest_it_is_no_checkpoint(
    place: RemoteRun, far: Path, fresh: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    (far / "checkpoints" / "step-00000009" / "manifest.json").unlink()
    fetch_run(place, fresh)
    assert newest(fresh) == 6
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_no_sound_copy_is_an_error_never_a_fresh_start(
    place: RemoteRun, far: Path, fresh: RunFolder
) -> None:
    for folder in (far / "checkpoints").iterdir():
        flip(folder / "towers.safetensors")
    with pytest.raises(
        GigabatchError, match=r"no sound checkpoint .* \(complete copies: 3, 6, 9\)"
    ):
        fetch_run(place, fresh)
    assert not fresh.path.exists()


def test_a_fetch_that_was_killed_is_begun_again(place: RemoteRun, fresh: RunFolder) -> None:
    half = fresh.path.with_name(".a.fetch") / "checkpoints" / ".step-00000009.fetch.tmp"
    half.mkdir(parents=True)
    (half / "towers.safetensors").write_text("half")
    fetch_run(place, fresh)
    assert newest(fresh) == 9
    assert not list(fresh.checkpoints.glob(".*"))


def test_what_is_missing_or_in_the_way_is_named(
    place: RemoteRun, far: Path, fresh: RunFolder
) -> None:
    fresh.path.mkdir(parents=True)
    with pytest.raises(GigabatchError, match="exists and is no run"):
        fetch_run(place, fresh)
    fresh.path.rmdir()
    (far / "tokenizer.json").unlink()
    with pytest.raises(GigabatchError, match=r"tokenizer.json is missing there"):
        fetch_run(place, fresh)
    with pytest.raises(GigabatchError, match="no run was copied there"):
        copied_config(open_copy(f"file://{far}x/"))


def test_a_run_that_lost_its_newest_gets_the_copy_that_is_newer(
    place: RemoteRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder(tmp_path / "a")
    flip(run.checkpoints / "step-00000009" / "towers.safetensors")
    say_newer(place, run, 6)
    assert "holds a newer checkpoint, of step 9; this goes on from step 6" in caplog.text
    assert f"gigabatch resume {place.url}" in caplog.text
    fetch_newer(place, run)
    assert newest(run) == 9
    save(run, 12)
    fetch_newer(place, run)
    assert newest(run) == 12
    caplog.clear()
    say_newer(place, run, 12)
    assert caplog.text == ""
    shutil.rmtree(run.checkpoints)
    fetch_newer(place, run)
    assert run.steps_saved() == [9]


def test_copies_of_another_run_are_not_mixed_in(place: RemoteRun, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", started=2)
    with pytest.raises(GigabatchError, match="holds another run"):
        fetch_newer(place, other)
    assert other.steps_saved() == []


def test_attempts_go_on_above_those_that_copied(place: RemoteRun, fresh: RunFolder) -> None:
    fetch_run(place, fresh)
    fresh.reserve_attempts(7, place.url)
    assert fresh.owned_by(7)
    assert not fresh.owned_by(6)
    assert len(list((fresh.path / "attempts").iterdir())) == 7
