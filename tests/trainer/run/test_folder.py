from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.config import Config
from gigabatch.trainer.config.load import parse_config
from gigabatch.trainer.run.create import create_run, open_run, refuse_taken_name
from gigabatch.trainer.run.folder import RunFolder


def config(tmp_path: Path, *overrides: str) -> Config:
    return parse_config("", "c", [f"run.dir={tmp_path}", *overrides])


def test_an_unnamed_run_takes_a_new_name_each_time(tmp_path: Path) -> None:
    names = [create_run(config(tmp_path), "my config!").path.name for _ in range(3)]
    assert names == ["my-config--001", "my-config--002", "my-config--003"]


def test_the_resolved_config_and_the_environment_are_kept(tmp_path: Path) -> None:
    run = create_run(config(tmp_path), "x")
    assert run.config() == config(tmp_path, "run.name=x-001")
    assert '"torch"' in (run.path / "environment.json").read_text()


def test_an_existing_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("years of work")
    with pytest.raises(GigabatchError, match="not a run"):
        create_run(config(tmp_path, "run.name=a"), "x")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["thesis.tex"]


def test_an_unfinished_run_says_resume(tmp_path: Path) -> None:
    create_run(config(tmp_path, "run.name=a"), "x")
    with pytest.raises(GigabatchError, match="gigabatch resume"):
        create_run(config(tmp_path, "run.name=a"), "x")


def take(path: str) -> int:
    return RunFolder(Path(path)).take_attempt()


def test_attempt_numbers_are_never_shared(tmp_path: Path) -> None:
    run = create_run(config(tmp_path, "run.name=a"), "x")
    with multiprocessing.get_context("fork").Pool(3) as pool:
        taken = pool.map(take, [str(run.path)] * 12)
    assert sorted(taken) == list(range(1, 13))
    assert run.owned_by(12)
    assert not run.owned_by(11)


def test_only_the_first_failure_is_kept_until_cleared(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.record_failure("first")
    run.record_failure("second")
    assert run.failure() == "first"
    run.request_stop()
    run.clear_requests()
    assert run.failure() is None
    assert not run.stop_requested()


def test_a_failure_that_a_full_disk_kept_no_word_of_is_one_all_the_same(tmp_path: Path) -> None:
    run = create_run(parse_config(f"run: {{dir: {tmp_path}}}", "c"), "run")
    assert run.failure() is None
    (run.path / "failure.txt").touch()
    assert "is its disk full?" in (run.failure() or "")
    assert run.is_over()


def test_a_run_is_found_by_path_or_by_name(tmp_path: Path) -> None:
    run = create_run(config(tmp_path, "run.name=a"), "x")
    assert open_run(str(run.path)).path == run.path
    assert open_run("a", tmp_path).path == run.path
    with pytest.raises(GigabatchError, match="b: not a run folder"):
        open_run("b", tmp_path)


def hold(path: str) -> str:
    try:
        with RunFolder(Path(path)).held():
            return "held"
    except GigabatchError as error:
        return str(error)


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path: Path) -> None:
    run = create_run(config(tmp_path, "run.name=a"), "x")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        with run.held():
            told = pool.apply(hold, [str(run.path)])
            assert f"being trained now (by process {os.getpid()} on" in told
            assert told.endswith(f"if its machine is gone, remove {run.path / 'lock'}.")
        assert pool.apply(hold, [str(run.path)]) == "held"


def test_a_named_folder_that_a_kill_left_empty_is_taken(tmp_path: Path) -> None:
    config = parse_config(f"run: {{dir: {tmp_path}, name: mine}}", "c")
    (tmp_path / "mine").mkdir()
    refuse_taken_name(config)
    assert create_run(config, "run").path == tmp_path / "mine"
    with pytest.raises(GigabatchError, match="holds an unfinished run"):
        refuse_taken_name(config)
