"""Complete runs as users start them: launchers, resume, evaluation, terminal, TensorBoard."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from support import Command, losses, write_samples

from gigabatch.trainer.monitoring.metrics import read_metrics

pytestmark = pytest.mark.slow


def test_inline_run_trains_evaluates_and_shows_in_tensorboard(
    tiny: Path, tmp_path: Path, gigabatch: Any, start: Any, shards: Path
) -> None:
    done = gigabatch("train", tiny, "run.name=a")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "a"
    lines = done.stdout.splitlines()
    assert f"run {run}" in lines[0:1] + lines[1:2]
    assert sum(line.startswith("step ") for line in lines) == 12
    assert "\r" not in done.stdout
    assert any(line.startswith("val: recall@10 ") for line in lines)

    evaluated = json.loads((run / "eval" / "step-00000012.json").read_text())
    lines = read_metrics(run / "metrics.jsonl")
    (logged,) = [line for line in lines if "eval/val/candidates" in line]
    assert {key: logged[key] for key in evaluated} == evaluated
    assert evaluated["eval/val/candidates"] == 60

    repeated = gigabatch("eval", run, "--on", shards / "val", "--json")
    assert repeated.returncode == 0, repeated.stderr
    printed = json.loads(repeated.stdout)
    assert printed.keys() == evaluated.keys()
    assert printed == pytest.approx(evaluated, abs=0.02)
    pairs = gigabatch("eval", run, "--on", shards / "val", "--json", "--positives", "none")
    assert json.loads(pairs.stdout)["eval/val/i2t_recall@10"] <= printed["eval/val/i2t_recall@10"]

    duplicate = gigabatch("train", tiny, "run.name=a")
    assert duplicate.returncode == 2
    assert "contains a finished run" in duplicate.stderr
    resumed = gigabatch("resume", run)
    assert resumed.returncode == 2
    assert "the run is finished" in resumed.stderr
    assert_tensorboard_serves_the_curves(run, start)


def assert_tensorboard_serves_the_curves(run: Path, start: Any) -> None:
    command: Command = start("board", run, "--port", "0")
    url = None
    while url is None:
        line = command.process.stderr.readline()
        assert line, "TensorBoard ended"
        match = re.search(r"at (http://\S+)", line)
        url = match[1] if match else None
    deadline = time.monotonic() + 30
    tags: dict[str, Any] = {}
    while not tags and time.monotonic() < deadline:
        with urllib.request.urlopen(f"{url}data/plugin/scalars/tags") as response:
            tags = json.load(response)
    assert "train/loss" in next(iter(tags.values()))
    command.signal(signal.SIGINT)
    command.wait(20)


def test_resume_with_changed_training_or_shards_needs_allow(
    tiny: Path, tmp_path: Path, gigabatch: Any
) -> None:
    root = tmp_path / "data"
    write_samples(root / "train", 40, 20, seed=1)
    settings = [f"data.root={root}", "eval.sets=[]", "run.name=a", "train.steps=9"]
    assert gigabatch("train", tiny, *settings).returncode == 0
    run = tmp_path / "runs" / "a"
    before = (run / "config.yaml").read_text()
    rejected = gigabatch("resume", run, "run.seed=5", "batch.global_size=64", "towers.width=8")
    assert rejected.returncode == 2
    assert "run.seed: 0 -> 5" in rejected.stderr
    assert "batch.global_size: 32 -> 64" in rejected.stderr
    assert "towers.width: 16 -> 8" in rejected.stderr
    for key in ("run.seed", "batch.global_size", "towers.width"):
        assert f"--allow {key}" in rejected.stderr
    assert (run / "config.yaml").read_text() == before
    write_samples(root / "train", 60, 20, seed=1)
    longer = ["train.steps=12", "--allow", "train.steps"]
    rejected = gigabatch("resume", run, *longer)
    assert rejected.returncode == 2
    assert "not those that the run was trained on" in rejected.stderr
    allowed = gigabatch("resume", run, *longer, "--allow", "data")
    assert allowed.returncode == 0, allowed.stderr
    assert sorted(losses(run)) == list(range(1, 13))


def test_hugging_face_towers_train_resume_and_evaluate(
    tiny: Path, tmp_path: Path, gigabatch: Any, shards: Path
) -> None:
    bert = (
        "towers.text={kind: huggingface, config: {model_type: bert, hidden_size: 16, "
        "num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 16, vocab_size: 400}}"
    )
    clip = (
        "towers.image={kind: huggingface, config: {model_type: clip_vision_model, hidden_size: 16, "
        "num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 16, image_size: 16, "
        "patch_size: 8}}"
    )
    settings = [bert, clip, "run.name=a", "train.steps=4", "eval.sets=[]"]
    assert gigabatch("train", tiny, *settings).returncode == 0
    run = tmp_path / "runs" / "a"
    longer = gigabatch(
        "resume", run, "train.steps=6", "--allow", "train.steps", "train.zero_stage=3"
    )
    assert longer.returncode == 0, longer.stderr
    evaluated = gigabatch("eval", run, "--on", shards / "val", "--json")
    assert evaluated.returncode == 0, evaluated.stderr


def test_eval_accepts_a_relative_folder_without_the_training_data(
    tiny: Path, tmp_path: Path, start: Any
) -> None:
    root = tmp_path / "data"
    write_samples(root / "train", 40, 40, seed=1)
    write_samples(tmp_path / "elsewhere" / "small", 9, 9, seed=2)
    settings = [f"data.root={root}", "eval.sets=[]", "run.name=a", "train.steps=2"]
    assert start("train", tiny, *settings).wait().returncode == 0
    root.rename(tmp_path / "gone")
    for on, folder in (
        (tmp_path / "elsewhere" / "small", tmp_path),
        (".", tmp_path / "elsewhere/small"),
    ):
        done = start("eval", tmp_path / "runs" / "a", "--on", on, "--json", cwd=folder).wait()
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["eval/small/candidates"] == 9


def test_all_launchers_give_the_same_losses(tiny: Path, tmp_path: Path, gigabatch: Any) -> None:
    curves = {}
    for launcher, workers in (("inline", 1), ("torchrun", 2), ("ray", 2)):
        name = f"{launcher}{workers}"
        done = gigabatch(
            "train", tiny, f"cluster.launcher={launcher}", f"cluster.workers={workers}",
            f"run.name={name}", "eval.sets=[]",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        curves[name] = losses(tmp_path / "runs" / name)
    assert curves["torchrun2"] == curves["ray2"]
    assert curves["torchrun2"] == pytest.approx(curves["inline1"], rel=1e-5)


def test_training_runs_under_a_users_torchrun(tiny: Path, tmp_path: Path, gigabatch: Any) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "gigabatch.launcher", "train", str(tiny), "run.name=a",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 workers on" in done.stdout
    config = (tmp_path / "runs" / "a" / "config.yaml").read_text()
    assert "launcher: torchrun" in config
    assert "workers: 2" in config
    assert len(losses(tmp_path / "runs" / "a")) == 12


def test_terminal_rewrites_one_progress_line(tiny: Path, tmp_path: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        command = [sys.executable, "-m", "gigabatch.launcher", "train", str(tiny), "run.name=a"]
        os.execv(sys.executable, command)
    output = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the process closed its end of the terminal
            break
        if not part:
            break
        output += part
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0, output.decode()
    text = output.decode()
    assert text.count("\r\x1b[K") >= 10
    assert "ETA" in text
    assert len(re.findall(r"\nstep ", text)) <= 4
