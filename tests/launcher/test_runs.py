"""Whole runs as users start them: every launcher, signals, faults, evaluation, the board."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import Command, losses, wait_for_step, write_samples

from gigabatch.trainer.monitor import read_metrics

pytestmark = pytest.mark.slow


def test_a_run_in_this_process_from_start_to_evaluation(
    tiny: Path, tmp_path: Path, gigabatch: Any, shards: Path
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
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert {key: last[key] for key in evaluated} == evaluated
    assert evaluated["eval/val/candidates"] == 60

    again = gigabatch("eval", run, "--on", shards / "val", "--json")
    assert again.returncode == 0, again.stderr
    printed = json.loads(again.stdout)
    assert printed.keys() == evaluated.keys()
    assert printed == pytest.approx(evaluated, abs=0.02)
    pairs = gigabatch("eval", run, "--on", shards / "val", "--json", "--positives", "none")
    assert json.loads(pairs.stdout)["eval/val/i2t_recall@10"] <= printed["eval/val/i2t_recall@10"]

    taken = gigabatch("train", tiny, "run.name=a")
    assert taken.returncode == 2
    assert "holds a finished run" in taken.stderr
    resumed = gigabatch("resume", run)
    assert resumed.returncode == 2
    assert "the run is finished" in resumed.stderr


def test_resume_refuses_another_run_with_a_diff(tiny: Path, tmp_path: Path, gigabatch: Any) -> None:
    assert gigabatch("train", tiny, "run.name=a", "eval.sets=[]").returncode == 0
    run = tmp_path / "runs" / "a"
    before = (run / "config.yaml").read_text()
    refused = gigabatch("resume", run, "run.seed=5", "batch.global_size=64")
    assert refused.returncode == 2
    assert "run.seed: 0 -> 5" in refused.stderr
    assert "batch.global_size: 32 -> 64" in refused.stderr
    assert "--allow run.seed --allow batch.global_size" in refused.stderr
    assert (run / "config.yaml").read_text() == before
    longer = gigabatch("resume", run, "train.steps=14", "--allow", "train.steps")
    assert longer.returncode == 0, longer.stderr
    assert sorted(losses(run)) == list(range(1, 15))


def test_evaluations_that_a_stop_or_a_kill_cut_off_are_made_up(
    tiny: Path, tmp_path: Path, gigabatch: Any, shards: Path
) -> None:
    settings = ["run.name=a", "eval.every_steps=3", f"eval.sets=[{shards / 'val'}]"]
    assert gigabatch("train", tiny, *settings).returncode == 0
    run = tmp_path / "runs" / "a"
    names = [f"step-{step:08d}.json" for step in (3, 6, 9, 12)]
    assert sorted(p.name for p in (run / "eval").iterdir()) == names
    # As if killed after step 9 was saved, before it was evaluated; step 12 is damaged besides.
    (run / "eval" / names[2]).unlink()
    (run / "checkpoints" / "step-00000012" / "state.json").write_text("{")
    done = gigabatch("resume", run)
    assert done.returncode == 0, done.stderr
    assert "going on after step 9" in done.stdout
    assert sorted(p.name for p in (run / "eval").iterdir()) == names
    lines = read_metrics(run / "metrics.jsonl")
    assert {line["step"] for line in lines if "train/loss" not in line} == {3, 6, 9, 12}


def test_hugging_face_towers_are_saved_resumed_and_evaluated(
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
    longer = gigabatch("resume", run, "train.steps=6", "--allow", "train.steps", "train.zero=3")
    assert longer.returncode == 0, longer.stderr
    evaluated = gigabatch("eval", run, "--on", shards / "val", "--json")
    assert evaluated.returncode == 0, evaluated.stderr


def test_a_stop_in_an_evaluation_leaves_off_and_a_resume_measures_again(
    tiny: Path, tmp_path: Path, start: Any, gigabatch: Any
) -> None:
    write_samples(tmp_path / "many" / "wide", 6000, 6000, seed=3)
    settings = [f"eval.sets=[{tmp_path / 'many' / 'wide'}]", "eval.every_steps=4", "run.name=a"]
    run = tmp_path / "runs" / "a"
    command = start("train", tiny, *settings, "checkpoint.every_steps=0", "batch.micro_size=2")
    wait_for_step(run, 4, command)  # the evaluation of 3,000 micro-batches comes next
    command.signal(signal.SIGTERM)
    done = command.wait(60)
    assert done.returncode == 75, done.stdout + done.stderr
    assert "wide: recall" not in done.stdout
    assert (run / "checkpoints" / "LATEST").read_text() == "step-00000004\n"
    assert not (run / "eval" / "step-00000004.json").exists()
    assert gigabatch("resume", run, timeout=200).returncode == 0
    assert (run / "eval" / "step-00000004.json").exists()


def test_steps_that_are_not_finite_push_no_checkpoint_out(
    tiny: Path, tmp_path: Path, gigabatch: Any
) -> None:
    settings = ["optimizer.lr=1.0e+30", "schedule.warmup_steps=0", "train.clip=0", "run.name=a"]
    done = gigabatch("train", tiny, *settings, "checkpoint.every_steps=1", "train.max_bad_steps=4")
    assert done.returncode == 2
    assert "4 steps in a row" in done.stderr
    saved = [p.name for p in (tmp_path / "runs" / "a" / "checkpoints").glob("step-*")]
    assert saved == ["step-00000001"]
    assert "the last checkpoint: step 1" in done.stderr


def test_ctrl_c_at_any_moment_of_the_start_is_heard(tiny: Path, start: Any) -> None:
    for moment in (0.8, 1.1, 1.4, 1.7, 2.0):
        command = start("train", tiny, "train.steps=5000", "eval.sets=[]")
        time.sleep(moment)  # any moment will do: imports, indexing, setting up, training
        command.signal(signal.SIGINT)
        done = command.wait(60)
        assert done.returncode in (130, -signal.SIGINT), (moment, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr or moment < 1


def test_a_run_that_is_being_trained_is_left_alone(
    tiny: Path, tmp_path: Path, start: Any, gigabatch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "a"
    command = start("train", tiny, "train.steps=5000", "eval.sets=[]", "run.name=a")
    wait_for_step(run, 3, command)
    before = (run / "config.yaml").read_text()
    plain = gigabatch("resume", run, "monitor.every_steps=7")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    as_rank = gigabatch("resume", run, "monitor.every_steps=7")
    for refused in (plain, as_rank):
        assert refused.returncode == 2
        assert "being trained now" in refused.stderr
    assert (run / "config.yaml").read_text() == before
    assert command.process.poll() is None


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_eval_takes_a_folder_as_the_user_sees_it_with_the_training_data_gone(
    tiny: Path, tmp_path: Path, start: Any
) -> None:
    root = tmp_path / "own"
    write_samples(root / "train", 40, 40, seed=1)
    write_samples(tmp_path / "elsewhere" / "small", 9, 9, seed=2)
    settings = [f"data.root={root}", "eval.sets=[]", "run.name=a", "train.steps=2"]
    assert start("train", tiny, *settings).wait().returncode == 0
    root.rename(tmp_path / "gone")
    for on, here in (
        (tmp_path / "elsewhere" / "small", tmp_path),
        (".", tmp_path / "elsewhere/small"),
    ):
        done = start("eval", tmp_path / "runs" / "a", "--on", on, "--json", cwd=here).wait()
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["eval/small/candidates"] == 9


def test_a_reader_that_goes_away_does_not_end_the_run(tiny: Path, tmp_path: Path) -> None:
    command = f"{sys.executable} -m gigabatch.launcher train {tiny} run.name=a eval.sets=[] | true"
    subprocess.run(["bash", "-c", command], timeout=60, check=True, capture_output=True)
    assert len(losses(tmp_path / "runs" / "a")) == 12


def test_resume_refuses_other_shards(
    tiny: Path, tmp_path: Path, start: Any, gigabatch: Any
) -> None:
    root = tmp_path / "own"
    write_samples(root / "train", 40, 20, seed=1)
    settings = [f"data.root={root}", "eval.sets=[]", "run.name=a", "train.steps=9"]
    assert gigabatch("train", tiny, *settings).returncode == 0
    write_samples(root / "train", 60, 20, seed=1)
    longer = ["train.steps=12", "--allow", "train.steps"]
    refused = gigabatch("resume", tmp_path / "runs" / "a", *longer)
    assert refused.returncode == 2
    assert "not those that the run was trained on" in refused.stderr
    allowed = gigabatch("resume", tmp_path / "runs" / "a", *longer, "--allow", "data")
    assert allowed.returncode == 0, allowed.stderr


@pytest.mark.parametrize(
    ("launcher", "workers", "number", "code"),
    [
        ("inline", 1, signal.SIGINT, 130),
        ("torchrun", 2, signal.SIGTERM, 75),
        ("ray", 2, signal.SIGINT, 130),
        ("ray", 2, signal.SIGTERM, 75),
    ],
)
def test_a_signal_ends_cleanly_with_a_checkpoint_and_the_run_goes_on(
    launcher: str, workers: int, number: signal.Signals, code: int, tiny: Path, tmp_path: Path,
    start: Any, gigabatch: Any,
) -> None:  # fmt: skip
    settings = [
        f"cluster.launcher={launcher}", f"cluster.workers={workers}", "train.steps=300",
        "eval.sets=[]", "checkpoint.every_steps=0", "run.name=a",
    ]  # fmt: skip
    run = tmp_path / "runs" / "a"
    command = start("train", tiny, *settings)
    wait_for_step(run, 5, command)
    below = psutil.Process(command.process.pid).children(recursive=True)
    command.signal(number)
    done = command.wait(60)
    assert done.returncode == code, done.stdout + done.stderr
    assert "stopping after this step" in done.stderr
    assert f"gigabatch resume {run}" in done.stdout
    _, alive = psutil.wait_procs(below, timeout=15)
    assert not alive
    stopped = max(losses(run))
    assert (run / "checkpoints" / "LATEST").read_text() == f"step-{stopped:08d}\n"
    here = [
        "cluster.launcher=inline",
        "cluster.workers=1",
    ]  # any launcher goes on, this one soonest
    more = [f"train.steps={stopped + 2}", "--allow", "train.steps"]
    resumed = gigabatch("resume", run, *here, *more)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert sorted(losses(run)) == list(range(1, stopped + 3))


def test_launchers_give_the_same_run(tiny: Path, tmp_path: Path, gigabatch: Any) -> None:
    curves = {}
    for launcher, workers in (("inline", 1), ("torchrun", 1), ("torchrun", 2), ("ray", 2)):
        name = f"{launcher}{workers}"
        done = gigabatch(
            "train", tiny, f"cluster.launcher={launcher}", f"cluster.workers={workers}",
            f"run.name={name}", "eval.sets=[]",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        curves[name] = losses(tmp_path / "runs" / name)
    assert curves["inline1"] == curves["torchrun1"]
    assert curves["torchrun2"] == curves["ray2"]
    assert curves["torchrun2"] == pytest.approx(curves["inline1"], rel=1e-5)


def test_torchrun_started_by_the_user(tiny: Path, tmp_path: Path, gigabatch: Any) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "gigabatch.launcher", "train", str(tiny), "run.name=a",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 workers on" in done.stdout
    kept = (tmp_path / "runs" / "a" / "config.yaml").read_text()
    assert "launcher: torchrun" in kept
    assert "workers: 2" in kept
    assert len(losses(tmp_path / "runs" / "a")) == 12


def ray_workers() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        if "RayTrainWorker" in title:
            found.append(process)
    return found


def test_a_rank_killed_under_ray_is_started_again(
    tiny: Path, tmp_path: Path, start: Any, gigabatch: Any
) -> None:
    settings = ["cluster.workers=2", "train.steps=40", "eval.sets=[]", "checkpoint.every_steps=4"]
    whole = gigabatch("train", tiny, *settings, "cluster.launcher=torchrun", "run.name=whole")
    assert whole.returncode == 0, whole.stderr
    run = tmp_path / "runs" / "a"
    command = start("train", tiny, *settings, "cluster.launcher=ray", "run.name=a")
    wait_for_step(run, 6, command)
    mine = {p.pid for p in psutil.Process(command.process.pid).children(recursive=True)}
    victims = [p for p in ray_workers() if p.pid in mine]
    assert victims
    os.kill(victims[-1].pid, signal.SIGKILL)
    done = command.wait()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "attempt 2: 2 workers" in done.stdout
    text = (run / "metrics.jsonl").read_text()
    assert '"attempt": 2' in text
    assert losses(run) == losses(tmp_path / "runs" / "whole")


@pytest.mark.parametrize("launcher", ["inline", "torchrun", "ray"])
def test_an_image_that_cannot_be_read_is_named_and_not_retried(
    launcher: str, tiny: Path, tmp_path: Path, gigabatch: Any
) -> None:
    root = tmp_path / "own"
    write_samples(root / "train", 32, 32, seed=1)
    shard = root / "train" / "train-000.tar"
    data = bytearray(shard.read_bytes())
    at = data.index(b"\x89PNG")
    data[at : at + 64] = bytes(64)
    shard.write_bytes(bytes(data))
    done = gigabatch(
        "train", tiny, f"data.root={root}", "eval.sets=[]", f"cluster.launcher={launcher}",
        "cluster.workers=1", "run.name=a",
    )  # fmt: skip
    assert done.returncode == 2
    assert f"gigabatch: {shard}: sample 's00000'" in done.stderr
    assert "the image cannot be decoded" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(list((tmp_path / "runs" / "a" / "attempts").iterdir())) == 1


def test_a_fault_in_a_tower_shows_its_traceback(tiny: Path, tmp_path: Path, gigabatch: Any) -> None:
    for launcher in ("torchrun", "ray"):
        done = gigabatch(
            "train", tiny, f"cluster.launcher={launcher}", "cluster.max_restarts=0", "eval.sets=[]",
            f"run.name={launcher}",
            "towers.image={kind: module, module: 'support_towers:Crashing'}",
        )  # fmt: skip
        assert done.returncode == 2
        assert "this tower cannot see" in done.stderr
        assert "support_towers.py" in done.stderr


def test_a_full_disk_stops_the_run_and_loses_nothing(
    tiny: Path, tmp_path: Path, gigabatch: Any
) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=460k", "none", str(disk)], check=True)
    try:
        settings = [f"run.dir={disk}", "run.name=a", "eval.sets=[]", "checkpoint.keep=9"]
        done = gigabatch("train", tiny, *settings)
        assert done.returncode == 2, done.stdout
        assert "No space left" in done.stderr
        assert not list((disk / "a" / "checkpoints").glob(".*"))
        kept = sorted(p.name for p in (disk / "a" / "checkpoints").glob("step-*"))
        assert kept, "the disk was too small for the test"
        subprocess.run(["mount", "-o", "remount,size=50M", str(disk)], check=True)
        resumed = gigabatch("resume", disk / "a")
        assert resumed.returncode == 0, resumed.stderr
        assert sorted(losses(disk / "a")) == list(range(1, 13))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_terminal_shows_one_live_line(tiny: Path, tmp_path: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        command = [sys.executable, "-m", "gigabatch.launcher", "train", str(tiny), "run.name=a"]
        os.execv(sys.executable, command)
    shown = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # how a terminal says that the other end has closed
            break
        if not part:
            break
        shown += part
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0, shown.decode()
    text = shown.decode()
    assert text.count("\r\x1b[K") >= 10
    assert "ETA" in text
    assert len(re.findall(r"\nstep ", text)) <= 4


def test_the_board_serves_the_curves(
    tiny: Path, tmp_path: Path, gigabatch: Any, start: Any
) -> None:
    assert gigabatch("train", tiny, "run.name=a", "eval.sets=[]").returncode == 0
    command: Command = start("board", tmp_path / "runs" / "a", "--port", "0")
    url = None
    while url is None:
        line = command.process.stderr.readline()
        assert line, "TensorBoard ended"
        found = re.search(r"at (http://\S+)", line)
        url = found[1] if found else None
    deadline = time.monotonic() + 30
    tags: dict[str, Any] = {}
    while not tags and time.monotonic() < deadline:
        with urllib.request.urlopen(f"{url}data/plugin/scalars/tags") as answer:
            tags = json.load(answer)
    assert "train/loss" in next(iter(tags.values()))
    command.signal(signal.SIGINT)
    command.wait(20)
