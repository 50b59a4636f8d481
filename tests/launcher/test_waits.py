"""Commands say that they work: a first line within 5 s, the first step at once, progress."""

from __future__ import annotations

import logging
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import outcome

from gigabatch.launcher import progress
from gigabatch.launcher.waiting import verb
from gigabatch.trainer.evaluation import progress as evaluation_progress
from gigabatch.trainer.evaluation.progress import log_progress, showing, tracked

SILENT = """
import sys, time
from gigabatch.launcher.waiting import sign_of_life
with sign_of_life(sys.argv[1:], first=0.2):
    time.sleep({before}); print("out", flush=True); time.sleep(0.4)
"""


@pytest.mark.parametrize(
    ("arguments", "before", "rank", "expected"),
    [
        (["train", "my.yaml"], 0.5, "0", "gigabatch train: working, no output yet (0 s)\n"),
        (["data", "index", "x", "-f"], 0.5, "0", "gigabatch data index: working, no output yet"),
        (["eval", "--on", "val"], 0.0, "0", ""),
        (["train", "my.yaml"], 0.5, "3", ""),
    ],
)
def test_silent_command_says_that_it_works(
    arguments: list[str], before: float, rank: str, expected: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SILENT.format(before=before), *arguments],
        capture_output=True, text=True, timeout=60, env={**os.environ, "RANK": rank},
    )  # fmt: skip
    assert done.stdout == "out\n"
    assert done.stderr.startswith(expected)
    assert bool(done.stderr) == bool(expected)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("train quickstart", "train"),
        ("data pack in out", "data pack"),
        ("jobs logs 7", "jobs logs"),
        ("bench data", "bench data"),
        ("--version", ""),
    ],
)
def test_verb_is_the_name_of_the_command(line: str, name: str) -> None:
    assert verb(line.split()) == name


COMMANDS = [
    ["train", "CONFIG"], ["resume", "no-such-run"], ["eval", "no-such-run", "--on", "x"],
    ["doctor", "CONFIG"], ["data", "index", "SET"], ["data", "check", "SET"],
    ["data", "stats", "SET"], ["bench", "data", "SET"], ["config", "CONFIG"], ["objectives"],
    ["reproduce", "--help"], ["submit", "CONFIG"], ["template", "slurm"], ["jobs", "status", "x"],
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_writes_within_5_seconds(
    command: list[str], tiny: Path, shards: Path, tmp_path: Path
) -> None:
    names = {"CONFIG": str(tiny), "SET": str(shards / "train")}
    arguments = [names.get(word, word) for word in command]
    # A machine with other work may start the interpreter late: the best of three counts.
    assert any(seconds_to_first_line(arguments, tmp_path) < 5 for _ in range(3))


def seconds_to_first_line(arguments: list[str], folder: Path) -> float:
    process = subprocess.Popen(
        [sys.executable, "-m", "gigabatch.launcher", *arguments], cwd=folder,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    began = time.monotonic()
    try:
        assert process.stdout.readline()
        return time.monotonic() - began
    finally:
        process.kill()
        process.communicate()


def test_first_step_is_logged_at_once_and_changes_no_metrics(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["monitor.every_steps=3", "train.steps=4", "eval.sets=[]", "run.name=a"]
    code, out, _ = outcome(monkeypatch, capsys, "train", tiny, *settings)
    assert code == 0
    steps = [line.split()[1] for line in out.splitlines() if line.startswith("step ")]
    assert steps == ["1/4", "3/4", "4/4"]
    assert "first step" in out
    lines = (tmp_path / "runs" / "a" / "metrics.jsonl").read_text().splitlines()
    assert [line.split(",")[0] for line in lines if "train/loss" in line] == [
        '{"step": 3', '{"step": 4'
    ]  # fmt: skip


def test_tasks_show_their_progress_as_lines_on_a_pipe(
    tiny: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = ["train.steps=1", "eval.sets=[]", "run.name=a"]
    assert outcome(monkeypatch, capsys, "train", tiny, *settings)[0] == 0
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.0)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    for task, words in {
        ("retrieval",): ["embedding val in micro-batches: 1 of 8", "ranking queries: 0 of 1"],
        ("probe", "label=concept", "train=train"): [
            "embedding train in micro-batches: 24 of 25", "fitting the probe: 5 of 6"
        ],
        ("knn", "label=concept", "train=train"): ["finding neighbors: 0 of 1"],
        ("batch-bias", "batch=16", "samples=32", "rounds=4"): ["measuring rounds of batches: 3 of"],
    }.items():  # fmt: skip
        command = ["eval", tmp_path / "runs" / "a", "--on", shards / "val", "--task", *task]
        code, out, err = outcome(monkeypatch, capsys, *command, "--json")
        assert code == 0, err
        assert out.startswith("{")
        for line in words:
            assert line in err


def test_bars_are_drawn_on_a_terminal() -> None:
    code = (
        "from gigabatch.launcher.progress import progress_bars\n"
        "import time\n"
        "with progress_bars() as show:\n"
        "    for name in ('embedding', 'ranking'):\n"
        "        for i in range(4): show(name, i, 4); time.sleep(0.1)\n"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # the terminal was closed
        pass
    assert process.wait(30) == 0
    os.close(ours)
    assert b"embedding" in shown
    assert b"ranking" in shown
    assert b"3/4" in shown


def test_evaluation_in_training_logs_its_progress(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(evaluation_progress, "SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level(logging.INFO, "gigabatch"), showing(log_progress("evaluating step 7")):
        assert list(tracked("ranking queries", "abc", 3)) == ["a", "b", "c"]
    assert "evaluating step 7: ranking queries: 2 of 3" in caplog.messages
    assert list(tracked("outside", "ab", 2)) == ["a", "b"]
