from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support import losses

from gigabatch.launcher.restarts import attempts_in_vain, wait_for_turn
from gigabatch.trainer.config.load import parse_config
from gigabatch.trainer.run.create import create_run
from gigabatch.trainer.run.folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return create_run(parse_config(f"run: {{dir: {tmp_path}}}", "c"), "run")


def save(run: RunFolder, step: int) -> None:
    (run.checkpoints / f"step-{step:08d}").mkdir(parents=True)


def test_attempts_count_as_vain_until_there_is_a_newer_checkpoint(run: RunFolder) -> None:
    assert attempts_in_vain(run, 0) == 0
    run.take_attempt()
    run.take_attempt()
    assert attempts_in_vain(run, 0) == 2
    assert attempts_in_vain(run, 1) == 1  # of a start of its own, after the first
    save(run, 3)
    assert attempts_in_vain(run, 0) == 0
    run.take_attempt()
    assert attempts_in_vain(run, 0) == 1


def test_an_attempt_that_was_killed_as_it_began_is_one_in_vain(run: RunFolder) -> None:
    run.take_attempt()
    (run.path / "attempts" / "000002.json").write_text("")
    (run.path / "attempts" / "000003.json").write_text('{"ti')
    assert attempts_in_vain(run, 0) == 3


def test_each_start_in_vain_waits_longer_but_not_where_a_stop_is_asked_for(run: RunFolder) -> None:
    def waited() -> float:
        began = time.monotonic()
        wait_for_turn(run, 0)
        return time.monotonic() - began

    assert waited() < 0.5
    run.take_attempt()
    assert 1 <= waited() < 1.8
    for _ in range(5):
        run.take_attempt()
    run.request_stop()
    assert waited() < 0.5


# A cluster with room for one worker of two; the stop comes as it has been found so twice.
NO_ROOM = """
import logging, os, sys
from pathlib import Path
from gigabatch.launcher.cluster import workers as ray_workers
from gigabatch.trainer.run.folder import RunFolder

run, seen = RunFolder(Path(sys.argv[1])), []
cluster = run.config().cluster
os.environ |= ray_workers.start_settings(cluster)
import ray

class Heard(logging.Handler):
    def emit(self, record):
        seen.append(record.getMessage())
        if len(seen) == 2:
            run.request_stop()

logging.getLogger("gigabatch").addHandler(Heard())
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
         object_store_memory=10**8)
ray_workers._fit(run, cluster)
ray.shutdown()
print(seen, run.crash(), run.stopped())
"""


@pytest.mark.slow
def test_workers_without_room_wait_for_it_and_no_restart_is_used_up(tmp_path: Path) -> None:
    overrides = ["cluster.workers=2", "cluster.max_restarts=0", "cluster.start_timeout_s=1"]
    run = create_run(parse_config(f"run: {{dir: {tmp_path}}}", "c", overrides), "run")
    command = [sys.executable, "-c", NO_ROOM, str(run.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    said = "the cluster has no capacity for 2 workers; waiting"
    assert done.stdout.splitlines()[-1:] == [f"{[said, said]} None True"], done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("every", "code", "attempts"), [(1, 0, 3), (0, 2, 2)])
def test_restarts_are_counted_from_the_last_checkpoint_on(
    every: int, code: int, attempts: int, tiny: Path, tmp_path: Path, gigabatch: Any
) -> None:
    """Its workers fall over after two steps each time: enough for a run of five steps with a
    checkpoint at each, and too little without any."""
    done = gigabatch(
        "train", tiny, "run.name=a", "eval.sets=[]", "train.steps=5",
        f"checkpoint.every_steps={every}", "cluster.launcher=torchrun", "cluster.workers=1",
        "cluster.max_restarts=1", "checkpoint.asynchronous=false",
        "towers.image={kind: module, module: 'support_towers:Tiring', args: {batches: 19}}",
        timeout=280,
    )  # fmt: skip
    run = tmp_path / "runs" / "a"
    begun = [json.loads(p.read_text())["saved"] for p in sorted(run.glob("attempts/*.json"))]
    assert done.returncode == code, done.stdout + done.stderr
    assert len(begun) == attempts
    if code:
        assert "tired" in done.stderr
        assert (
            "the last 1 starts left no new checkpoint: waiting 1 s"
            in (run / "workers.log").read_text()
        )
    else:
        assert begun == [0, 2, 4]
        assert sorted(losses(run)) == list(range(1, 6))
