"""The record of an attempt's code and packages, and the warning if they changed."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from support import losses

import gigabatch
from gigabatch.trainer.config import Config
from gigabatch.trainer.run.create import create_run
from gigabatch.trainer.run.folder import RunFolder
from gigabatch.trainer.run.provenance import changes, code_digest, environment, provenance

OLD = {
    "code": "1f3870be274f", "python": "3.11.7",
    "packages": {"gigabatch": "0.1.0", "torch": "2.13.0", "deepspeed": "0.19.8", "ray": None},
}  # fmt: skip


def with_packages(**packages: str | None) -> dict[str, Any]:
    return {**OLD, "packages": {**OLD["packages"], **packages}}


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        (OLD, []),
        ({**OLD, "code": "9a0364b9e99b"},
         ["gigabatch 0.1.0 (code 1f3870be274f) -> 0.1.0 (code 9a0364b9e99b)"]),
        (with_packages(torch="2.14.0", deepspeed="0.20.0"),
         ["torch 2.13.0 -> 2.14.0", "deepspeed 0.19.8 -> 0.20.0"]),
        (with_packages(ray="2.60.0"), ["ray (none) -> 2.60.0"]),
        ({**OLD, "python": "3.12.1"}, ["Python 3.11.7 -> 3.12.1"]),
        (with_packages(gigabatch="0.1.0+code.77"), []),  # the same code, from a job's wheel
        (with_packages(pillow="12.0"), []),  # OLD has no version of pillow
    ],
)  # fmt: skip
def test_changes_are_named_with_both_versions(new: dict[str, Any], expected: list[str]) -> None:
    assert changes(OLD, new) == expected


def test_record_without_code_gives_no_changes() -> None:
    assert changes({"time": 1.0}, provenance()) == []


def test_environment_records_code_digest_and_package_versions() -> None:
    recorded = environment()
    assert recorded["code"] == code_digest()
    assert recorded["packages"]["torch"]
    assert recorded["packages"]["deepspeed"]


def test_code_digest_changes_only_with_python_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    code, recipe = tmp_path / "data" / "code.py", tmp_path / "data" / "recipe.yaml"
    code.write_text("A = 1\n")
    monkeypatch.setattr(gigabatch, "__path__", [str(tmp_path)])
    first = code_digest()
    recipe.write_text("run: {}\n")
    code.touch()
    assert code_digest() == first
    code.write_text("A = 2\n")
    second = code_digest()
    assert second != first
    code.rename(code.with_name("other.py"))
    assert code_digest() not in (first, second)


def test_attempt_warns_if_code_differs_from_last_readable_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = create_run(Config.model_validate({"run": {"dir": tmp_path}, "data": {"train": "x"}}), "x")
    caplog.set_level(logging.WARNING)
    assert [run.take_attempt(), run.take_attempt()] == [1, 2]
    assert not caplog.records
    second, third = (run.path / "attempts" / f"{n:06d}.json" for n in (2, 3))
    record = json.loads(second.read_text())
    assert record["code"] == code_digest()
    record["packages"]["torch"] = "1.0"
    second.write_text(json.dumps(record))
    third.write_text("")  # as after a kill during the write
    assert run.take_attempt() == 4
    (line,) = caplog.messages
    assert line.startswith("attempt 4 runs different code from attempt 2: torch 1.0 -> ")


@pytest.mark.slow
def test_resume_with_changed_code_warns_and_continues(
    tiny: Path, tmp_path: Path, start: Any, gigabatch: Any
) -> None:
    run = RunFolder(tmp_path / "runs" / "a")
    done = gigabatch("train", tiny, "run.name=a", "train.steps=3", "eval.sets=[]")
    assert done.returncode == 0, done.stderr
    module = tmp_path / "more" / "gigabatch" / "data" / "extra.py"  # changes the code digest
    module.parent.mkdir(parents=True)
    module.write_text("")
    path = os.pathsep.join([str(tmp_path / "more"), os.environ["PYTHONPATH"]])
    more = ("train.steps=6", "--allow", "train.steps")
    done = start("resume", run.path, *more, env={**os.environ, "PYTHONPATH": path}).wait()
    assert done.returncode == 0, done.stderr
    assert sorted(losses(run.path)) == [1, 2, 3, 4, 5, 6]
    old, new = (
        json.loads((run.path / "attempts" / f"{number:06d}.json").read_text())["code"]
        for number in (1, 2)
    )
    assert old != new
    assert json.loads((run.path / "environment.json").read_text())["code"] == old
    for text in (done.stdout, run.log.read_text()):
        assert "attempt 2 runs different code from attempt 1: gigabatch " in text
        assert f"(code {old}) -> " in text
        assert f"(code {new})" in text
