"""Whatever user code raises is a failure: exit code 1 or 2, with the class and where it was."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import outcome

from gigabatch.data.errors import GigabatchError
from gigabatch.data.failures import UnexpectedExit, as_failure
from gigabatch.launcher.worker import work
from gigabatch.trainer.config.load import parse_config, resolve
from gigabatch.trainer.run.folder import RunFolder

CODE = """
import os
from typing import Literal
from torch import nn
from support_towers import Pixels
from gigabatch.trainer.evaluation.result import TaskResult
from gigabatch.trainer.evaluation.task import SetTask
from gigabatch.trainer.objectives.infonce import InfoNCE

def fail(place):
    if place == {place!r}:
        class Local(Exception):  # cannot be pickled
            pass
        {statement}

fail("import")

class Tower(Pixels):
    calls = 0
    def __init__(self, width=4):
        super().__init__(width)
        fail("constructor")
    def forward(self, images):
        Tower.calls += 1
        if Tower.calls > 12:  # later than any check before step 1
            fail("forward")
        return super().forward(images)

def stage(samples):
    for number, sample in enumerate(samples):
        if number == 40:
            fail("stage")
        yield sample

class LossSettings(InfoNCE.Settings):
    name: Literal["failing"]

class Loss(InfoNCE):
    Settings = LossSettings
    calls = 0
    def forward(self, *args):
        Loss.calls += 1
        if Loss.calls > 1:
            fail("objective")
        return super().forward(*args)

class Task(SetTask):
    name = "mine"
    summary = "my own"
    def measure(self, context):
        fail("task")
        return TaskResult(context.set_name, set_metrics={{"one": 1.0}})
"""
TOWER = "towers.image={kind: module, module: 'MODULE:Tower'}"
STAGE = "data.stages=['MODULE:stage']"
OBJECTIVE = "objective={name: module, module: 'MODULE:Loss'}"
TORCHRUN = ["cluster.launcher=torchrun", "cluster.workers=2", "cluster.max_restarts=0"]
CASES = [
    # place, statement, override, words of the message
    ("import", "raise SystemExit(0)", STAGE, "SystemExit(0)"),
    ("import", "raise SystemExit(0)", TOWER, "SystemExit(0)"),
    ("constructor", "raise EOFError('no weights')", TOWER, "EOFError: no weights"),
    ("constructor", "import sys; sys.exit('no licence')", TOWER, "SystemExit('no licence')"),
    ("forward", "raise SystemExit(0)", TOWER, "SystemExit(0)"),
    ("forward", "raise KeyboardInterrupt", TOWER, "KeyboardInterrupt"),
    ("forward", "raise GeneratorExit", TOWER, "GeneratorExit"),
    ("forward", "raise StopIteration", TOWER, "StopIteration"),
    ("objective", "raise EOFError", OBJECTIVE, "EOFError"),
    ("stage", "raise SystemExit(3)", STAGE, "SystemExit(3)"),
    ("stage", "raise KeyboardInterrupt", STAGE, "KeyboardInterrupt"),
    ("stage", "raise Local('mine alone')", STAGE, "mine alone"),
    ("stage", "raise StopIteration", STAGE, "StopIteration"),
    ("stage", "os._exit(0)", STAGE, "exited without a message"),
]


def write_module(folder: Path, place: str, statement: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a user's module that executes `statement` at `place`; return its name."""
    name = f"user_{abs(hash((place, statement, str(folder)))):x}"
    (folder / f"{name}.py").write_text(CODE.format(place=place, statement=statement))
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    return name


@pytest.mark.parametrize(("place", "statement", "override", "words"), CASES)
def test_exception_of_user_code_fails_the_run(
    place: str,
    statement: str,
    override: str,
    words: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = write_module(tmp_path, place, statement, monkeypatch)
    settings = [override.replace("MODULE", module), "train.steps=3", "eval.sets=[]", "run.name=a"]
    try:
        code, _, err = outcome(monkeypatch, capsys, "train", tiny, *settings)
        message = err
    except Exception as error:  # a traceback with exit code 1, when run as a command
        code, message = 1, "".join([f"{type(error).__name__}: {error}", *notes(error)])
    assert code in (1, 2)
    assert words in message, message
    if place in ("forward", "objective", "stage"):
        assert "gigabatch resume" in message
        assert "continues from the last checkpoint" in message
        assert not RunFolder(tmp_path / "runs" / "a").is_finished()


def notes(error: Exception) -> list[str]:
    return list(getattr(error, "__notes__", []))


@pytest.mark.parametrize("statement", ["raise EOFError", "raise SystemExit(0)"])
def test_exception_of_user_task_fails_the_evaluation(
    statement: str,
    tiny: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = write_module(tmp_path, "task", statement, monkeypatch)
    settings = ["train.steps=1", "eval.sets=[]", "run.name=a"]
    assert outcome(monkeypatch, capsys, "train", tiny, *settings)[0] == 0
    arguments = [tmp_path / "runs" / "a", "--on", shards / "val", "--task", f"{name}:Task"]
    with pytest.raises(UnexpectedExit, match=r"(EOFError|SystemExit\(0\)) was raised at .*user_"):
        outcome(monkeypatch, capsys, "eval", *arguments)


ENDS = [
    # place, statement, settings, `ulimit -n`, exit code, words
    ("forward", "raise SystemExit(0)", [TOWER], 0, 1, "SystemExit(0) was raised at"),
    ("forward", "raise SystemExit(0)", [TOWER, *TORCHRUN], 0, 2, "SystemExit(0) was raised at"),
    ("stage", "os.kill(os.getpid(), 9)", [STAGE], 0, 2, "usually because the machine ran out"),
    ("stage", "os.kill(os.getpid(), 9)", [STAGE, *TORCHRUN], 0, 2, "usually because the machine"),
    ("never", "", ["data.prefetch=40", "batch.micro_size=2"], 90, 2, "Set `ulimit -n 4096`"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("place", "statement", "settings", "files", "expected", "words"), ENDS)
def test_command_ends_soon_with_the_reason_and_how_to_resume(
    place: str,
    statement: str,
    settings: list[str],
    files: int,
    expected: int,
    words: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = write_module(tmp_path, place, statement or "pass", monkeypatch)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ['PYTHONPATH']}")
    command = [
        sys.executable, "-m", "gigabatch.launcher", "train", str(tiny), "train.steps=6",
        "eval.sets=[]", *(setting.replace("MODULE", module) for setting in settings),
    ]  # fmt: skip
    limit = f"ulimit -n {files}; " if files else ""
    done = subprocess.run(
        ["bash", "-c", f'{limit}exec "$@"', "bash", *command],
        cwd=tmp_path, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == expected, done.stdout + done.stderr
    assert words in done.stderr
    if not files:
        last = done.stderr.rstrip().splitlines()[-1]
        assert "gigabatch resume" in last
        assert "continues from the last checkpoint" in last


def test_worker_records_an_exit_of_user_code_as_a_crash(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`work` is what Ray and torchrun call; they would take SystemExit(0) for success."""
    module = write_module(tmp_path, "constructor", "raise SystemExit(0)", monkeypatch)
    settings = ["train.steps=1", "eval.sets=[]", "run.name=a"]
    assert outcome(monkeypatch, capsys, "train", tiny, *settings)[0] == 0
    run = RunFolder(tmp_path / "runs" / "a")
    path = run.path / "config.yaml"
    overrides = [TOWER.replace("MODULE", module), "train.steps=2"]
    run.write_config(resolve(parse_config(path.read_text(), str(path), overrides)))
    with pytest.raises(UnexpectedExit):
        work(run, run.attempts())
    assert "SystemExit(0) was raised at" in str(run.crash())


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "ran out of mem"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possib"),
            "/dev/shm has no room",
        ),
        (RuntimeError("DataLoader worker (pid(s) 7, 9) exited unexpectedly"), "7, 9 exited"),
        (OSError(24, "Too many open files"), "ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n 4096"),
        (
            RuntimeError("unable to allocate shared memory(shm) for file </torch_7>: No space"),
            "lower data.workers",
        ),
    ],
)
def test_known_loader_failures_become_one_message(error: Exception, words: str) -> None:
    failure = as_failure(error)
    assert isinstance(failure, GigabatchError)
    assert words in str(failure)


def test_ordinary_errors_stay_as_they_are() -> None:
    for error in (ValueError("x"), GigabatchError("x"), OSError(2, "no such file")):
        assert as_failure(error) is error
