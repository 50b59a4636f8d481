"""Runs under Slurm: host lists, variables of a step, tasks of `srun`."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from support import losses, wait_for_step

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.slurm import expand_hosts, join_slurm_step

STEP = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "gpu[007-008]",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", ["node1"]),
        ("login,node[01-03,7]", ["login", "node01", "node02", "node03", "node7"]),
        ("a[9-11]-ib,b.c-d", ["a9-ib", "a10-ib", "a11-ib", "b.c-d"]),
        ("r[1-2]n[3,4]", ["r1n3", "r1n4", "r2n3", "r2n4"]),
    ],
)
def test_host_list_is_expanded_in_order(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize("text", ["", "node[1-", "node[a]", "a,,b", "node[1-2]]", "n[-3]"])
def test_malformed_host_list_raises(text: str) -> None:
    with pytest.raises(GigabatchError, match="SLURM_JOB_NODELIST"):
        expand_hosts(text)


def test_task_of_a_step_gets_distributed_variables() -> None:
    environment = dict(STEP)
    assert join_slurm_step(environment)
    added = {name: environment[name] for name in environment.keys() - STEP.keys()}
    assert added == {
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "gpu007",
        "MASTER_PORT": str(10_000 + (4711 * 16 + 2) % 20_000),
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"RANK": "0"},  # torchrun under srun
        {"SLURM_NTASKS": "1"},
        {"SLURM_STEP_NUM_TASKS": "1"},  # srun -n1 in a job of four tasks
        {"SLURM_STEP_ID": None},  # a batch script
    ],
)
def test_environment_of_a_process_that_starts_workers_is_unchanged(
    changes: dict[str, str | None],
) -> None:
    environment = {name: v for name, v in (STEP | changes).items() if v is not None}
    before = dict(environment)
    assert not join_slurm_step(environment)
    assert environment == before


@pytest.mark.slow
def test_signal_to_one_srun_task_stops_all_tasks(
    tiny: Path, tmp_path: Path, start: Any, gigabatch: Any
) -> None:
    run = tmp_path / "runs" / "a"
    job = str(os.getpid() * 10)  # determines a port that no other test uses
    tasks = [
        start(
            "train", tiny, "run.name=a", "eval.sets=[]", "train.steps=3000",
            "checkpoint.every_steps=0",
            env=os.environ
            | STEP
            | {
                "SLURM_JOB_ID": job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
                "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "localhost",
            },
        )
        for rank in (0, 1)
    ]  # fmt: skip
    wait_for_step(run, 3, tasks[0])
    tasks[1].signal(signal.SIGUSR1)
    done = [task.wait(240) for task in tasks]
    assert [task.returncode for task in done] == [75, 75], [task.stderr for task in done]
    assert "2 workers" in (run / "train.log").read_text()
    stopped = max(losses(run))
    assert (run / "checkpoints" / "LATEST").read_text() == f"step-{stopped:08d}\n"
    more = [f"train.steps={stopped + 2}", "--allow", "train.steps"]
    assert gigabatch("resume", run, *more, "cluster.launcher=inline",
                     "cluster.workers=1").returncode == 0  # fmt: skip
    assert sorted(losses(run)) == list(range(1, stopped + 3))
