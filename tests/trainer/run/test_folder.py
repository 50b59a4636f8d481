"""Run folders: creation, opening, locks, records."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.config import Config
from gigabatch.trainer.config.load import parse_config
from gigabatch.trainer.run.create import check_name_is_free, create_run, open_run
from gigabatch.trainer.run.folder import RunFolder


def config(tmp_path: Path, *overrides: str) -> Config:
    return parse_config("", "c", [f"run.dir={tmp_path}", *overrides])


def test_unnamed_runs_get_numbered_names(tmp_path: Path) -> None:
    names = [create_run(config(tmp_path), "my config!").path.name for _ in range(3)]
    assert names == ["my-config--001", "my-config--002", "my-config--003"]


def test_new_run_keeps_its_config_and_environment(tmp_path: Path) -> None:
    run = create_run(config(tmp_path), "x")
    assert run.config() == config(tmp_path, "run.name=x-001")
    assert '"torch"' in (run.path / "environment.json").read_text()


def test_existing_folder_raises_and_is_unchanged(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("years of work")
    with pytest.raises(GigabatchError, match="not a run"):
        create_run(config(tmp_path, "run.name=a"), "x")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["thesis.tex"]


def test_name_of_an_unfinished_run_raises_with_resume_command(tmp_path: Path) -> None:
    create_run(config(tmp_path, "run.name=a"), "x")
    with pytest.raises(GigabatchError, match="gigabatch resume"):
        create_run(config(tmp_path, "run.name=a"), "x")


def take_attempt(path: str) -> int:
    return RunFolder(Path(path)).take_attempt()


def test_attempt_numbers_are_unique(tmp_path: Path) -> None:
    run = create_run(config(tmp_path, "run.name=a"), "x")
    with multiprocessing.get_context("fork").Pool(3) as pool:
        numbers = pool.map(take_attempt, [str(run.path)] * 12)
    assert sorted(numbers) == list(range(1, 13))
    assert run.owned_by(12)
    assert not run.owned_by(11)


def test_only_the_first_failure_is_recorded_until_cleared(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.record_failure("first")
    run.record_failure("second")
    assert run.failure() == "first"
    run.request_stop()
    run.clear_requests()
    assert run.failure() is None
    assert not run.stop_requested()


def test_empty_failure_file_counts_as_a_failure(tmp_path: Path) -> None:
    run = create_run(parse_config(f"run: {{dir: {tmp_path}}}", "c"), "run")
    assert run.failure() is None
    (run.path / "failure.txt").touch()
    assert "is its disk full?" in (run.failure() or "")
    assert run.is_over()


def test_open_run_accepts_a_path_or_a_name(tmp_path: Path) -> None:
    run = create_run(config(tmp_path, "run.name=a"), "x")
    assert open_run(str(run.path)).path == run.path
    assert open_run("a", tmp_path).path == run.path
    with pytest.raises(GigabatchError, match="b: not a run folder"):
        open_run("b", tmp_path)


def try_lock(path: str) -> str:
    try:
        with RunFolder(Path(path)).lock():
            return "locked"
    except GigabatchError as error:
        return str(error)


def test_run_is_locked_by_one_process_at_a_time(tmp_path: Path) -> None:
    run = create_run(config(tmp_path, "run.name=a"), "x")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        with run.lock():
            message = pool.apply(try_lock, [str(run.path)])
            assert f"being trained (by process {os.getpid()} on" in message
            assert message.endswith(f"no longer exists, delete {run.path / 'lock'}.")
        assert pool.apply(try_lock, [str(run.path)]) == "locked"


def test_empty_folder_left_by_a_kill_is_used(tmp_path: Path) -> None:
    config = parse_config(f"run: {{dir: {tmp_path}, name: mine}}", "c")
    (tmp_path / "mine").mkdir()
    check_name_is_free(config)
    assert create_run(config, "run").path == tmp_path / "mine"
    with pytest.raises(GigabatchError, match="contains an unfinished run"):
        check_name_is_free(config)
