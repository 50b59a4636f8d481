"""Restarts of failed workers: counts of failed attempts, waits, limits."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support import losses

from gigabatch.launcher.restarts import failed_attempts, wait_for_turn
from gigabatch.trainer.config.load import parse_config
from gigabatch.trainer.run.create import create_run
from gigabatch.trainer.run.folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return create_run(parse_config(f"run: {{dir: {tmp_path}}}", "c"), "run")


def save(run: RunFolder, step: int) -> None:
    (run.checkpoints / f"step-{step:08d}").mkdir(parents=True)


def test_failed_attempts_are_counted_since_the_newest_checkpoint(run: RunFolder) -> None:
    assert failed_attempts(run, 0) == 0
    run.take_attempt()
    run.take_attempt()
    assert failed_attempts(run, 0) == 2
    assert failed_attempts(run, 1) == 1  # a later start ignores earlier attempts
    save(run, 3)
    assert failed_attempts(run, 0) == 0
    run.take_attempt()
    assert failed_attempts(run, 0) == 1


def test_attempt_killed_while_starting_counts_as_failed(run: RunFolder) -> None:
    run.take_attempt()
    (run.path / "attempts" / "000002.json").write_text("")
    (run.path / "attempts" / "000003.json").write_text('{"ti')
    assert failed_attempts(run, 0) == 3


def test_wait_grows_with_failed_attempts_and_ends_on_a_stop_request(run: RunFolder) -> None:
    def seconds_waited() -> float:
        start = time.monotonic()
        wait_for_turn(run, 0)
        return time.monotonic() - start

    assert seconds_waited() < 0.5
    run.take_attempt()
    assert 1 <= seconds_waited() < 1.8
    for _ in range(5):
        run.take_attempt()
    run.request_stop()
    assert seconds_waited() < 0.5


# A cluster with capacity for one of two workers; after two log messages, a stop is requested.
NO_CAPACITY = """
import logging, os, sys
from pathlib import Path
from gigabatch.launcher.cluster import workers as ray_workers
from gigabatch.trainer.run.folder import RunFolder

run, messages = RunFolder(Path(sys.argv[1])), []
cluster = run.config().cluster
os.environ |= ray_workers.start_settings(cluster)
import ray

class StopAfterTwo(logging.Handler):
    def emit(self, record):
        messages.append(record.getMessage())
        if len(messages) == 2:
            run.request_stop()

logging.getLogger("gigabatch").addHandler(StopAfterTwo())
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
         object_store_memory=10**8)
ray_workers._fit(run, cluster)
ray.shutdown()
print(messages, run.crash(), run.stopped())
"""


@pytest.mark.slow
def test_waiting_for_cluster_resources_uses_no_restart(tmp_path: Path) -> None:
    overrides = ["cluster.workers=2", "cluster.max_restarts=0", "cluster.start_timeout_s=1"]
    run = create_run(parse_config(f"run: {{dir: {tmp_path}}}", "c", overrides), "run")
    command = [sys.executable, "-c", NO_CAPACITY, str(run.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    message = "the cluster has no capacity for 2 workers; waiting"
    expected = f"{[message, message]} None True"
    assert done.stdout.splitlines()[-1:] == [expected], done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("every", "code", "attempts"), [(1, 0, 3), (0, 2, 2)])
def test_max_restarts_counts_only_attempts_without_a_new_checkpoint(
    every: int, code: int, attempts: int, tiny: Path, tmp_path: Path, gigabatch: Any
) -> None:
    """Workers fail after two steps, so five steps succeed only with a checkpoint per step."""
    done = gigabatch(
        "train", tiny, "run.name=a", "eval.sets=[]", "train.steps=5",
        f"checkpoint.every_steps={every}", "cluster.launcher=torchrun", "cluster.workers=1",
        "cluster.max_restarts=1", "checkpoint.asynchronous=false",
        "towers.image={kind: module, module: 'support_towers:FailingLater', args: {batches: 19}}",
        timeout=280,
    )  # fmt: skip
    run = tmp_path / "runs" / "a"
    first_steps = [json.loads(p.read_text())["saved"] for p in sorted(run.glob("attempts/*.json"))]
    assert done.returncode == code, done.stdout + done.stderr
    assert len(first_steps) == attempts
    if code:
        assert "out of batches" in done.stderr
        log = (run / "workers.log").read_text()
        assert "1 attempt without a new checkpoint; retrying in 1 s" in log
    else:
        assert first_steps == [0, 2, 4]
        assert sorted(losses(run)) == list(range(1, 6))
