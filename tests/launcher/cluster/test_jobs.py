"""Jobs on a real Ray cluster with token authentication, over HTTP."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import support_towers
from clusters import TOKEN, Cluster, ask, free_ports, node_environment, ray_node, serves, wait_until
from support import Command, losses

from gigabatch.launcher.cluster.wheel import wheel_version

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray-cluster"), pytest.mark.timeout(480)]
STAGES = """
def darken(samples):
    for sample in samples:
        yield sample | {"image": sample["image"] // 2}
"""


STEPS = 150
"""Enough steps that the job still trains when a busy machine lists and stops it."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Unix sockets in this folder need a short path.
    home = Path(tempfile.mkdtemp(prefix="gbray-"))
    environment = node_environment(home)
    gcs, dashboard, client, agent = free_ports(4)
    cluster = Cluster(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", environment)
    head = [
        "--head", f"--port={gcs}", f"--dashboard-port={dashboard}", "--node-ip-address=127.0.0.1",
        f"--ray-client-server-port={client}", f"--temp-dir={home}/ray",
        f"--dashboard-agent-listen-port={agent}",
    ]  # fmt: skip
    with ray_node(head, environment, home / "head.log"):
        wait_until(lambda: serves(cluster), "the dashboard serves", home / "head.log")
        yield cluster
    shutil.rmtree(home)


def test_stopped_and_resumed_job_matches_local_run(
    cluster: Cluster, tiny: Path, tmp_path: Path, start: Any
) -> None:
    towers, stages = Path(support_towers.__file__), tmp_path / "my_stages"
    stages.mkdir()
    (stages / "__init__.py").touch()
    (stages / "dark.py").write_text(STAGES)
    (stages / ".gitignore").write_text("*\n")
    config = tmp_path / "it's mine.yaml"
    shutil.copy(tiny, config)
    fast = tmp_path / "fast"
    settings = [
        f"towers.image={{kind: module, module: 'support_towers:Slow', args: {{fast: {fast}}}}}",
        "data.stages=[my_stages.dark:darken]", f"train.steps={STEPS}",
    ]  # fmt: skip
    address = ["--address", cluster.address]

    def run(*arguments: str | Path) -> Command:
        return start(*arguments, env=cluster.client())

    submitted = run(
        "submit", config, *settings, "cluster.launcher=ray", *address, "--with", towers,
        "--with", stages,
    )  # fmt: skip
    runs = tmp_path / "runs"
    folder = wait_until(lambda: next(runs.glob("it-s-mine-*"), None), "a run", by=submitted)
    metrics = folder / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and losses(folder), "a step", by=submitted)
    submitted.signal(signal.SIGINT)
    interrupted = submitted.wait(240)
    assert interrupted.returncode == 130
    assert "continues" in interrupted.stdout
    job = re.search(r"submitted (\S+)", interrupted.stdout)
    assert job is not None, interrupted.stdout
    assert f"gigabatch jobs stop {job[1]} --address {cluster.address}" in interrupted.stdout

    follower = run("jobs", "logs", job[1], "--follow", *address)
    listed = run("jobs", "list", *address).wait(240)
    assert re.search(rf"{job[1]}\s+RUNNING", listed.stdout), listed.stdout
    stopped = run("jobs", "stop", job[1], *address).wait(300)
    assert f"{job[1]} is STOPPED" in stopped.stdout, stopped.stderr
    followed = follower.wait(240)
    assert followed.returncode == 75, followed.stdout + followed.stderr
    assert followed.stdout.count(f"step 1/{STEPS} ") == 1  # the log appears once
    assert "saved checkpoint" in followed.stdout
    assert f"{job[1]} was stopped" in followed.stdout
    before = len(losses(folder))
    assert 0 < before < STEPS
    fast.touch()

    modules = ["--with", towers, "--with", stages]
    inline = ["submit", "--resume", folder, "cluster.launcher=inline"]
    resume_command = run(*inline, *address, *modules)
    os.environ["PYTHONPATH"] += f"{os.pathsep}{tmp_path}"  # restored by the `start` fixture
    local = start("train", config, *settings, "run.name=local").wait(240)
    resumed = resume_command.wait(240)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"finished: {STEPS} steps" in resumed.stdout
    status = run("jobs", "status", job[1], *address).wait(240).stdout
    assert "STOPPED" in status
    commands = [interrupted, followed, listed, stopped, resumed]
    assert not any(TOKEN in done.stdout + done.stderr for done in commands)
    assert TOKEN not in json.dumps(ask(cluster, "/api/jobs/"))
    # The nodes ran the code of the wheel, not the installed package.
    packages = json.loads((folder / "environment.json").read_text())["packages"]
    assert packages["gigabatch"] == wheel_version()

    assert local.returncode == 0, local.stderr
    assert losses(folder) == losses(tmp_path / "runs" / "local")


def test_failed_job_returns_its_exit_code_and_reason(
    cluster: Cluster, tiny: Path, tmp_path: Path, start: Any
) -> None:
    missing = f"data.root={tmp_path / 'no-such-folder'}"
    done = start("submit", tiny, missing, "--address", cluster.address, env=cluster.client()).wait()
    assert done.returncode == 2, done.stdout + done.stderr
    assert "no-such-folder" in done.stdout
    assert "failed" in done.stderr


@pytest.mark.parametrize(
    ("token", "message"),
    [(None, "requires a token (401)"), ("wrong" * 9, "rejects this token (403)")],
)
def test_missing_or_wrong_token_fails_quickly(
    cluster: Cluster, start: Any, token: str | None, message: str
) -> None:
    start_time = time.monotonic()
    arguments = ["jobs", "list", "--address", cluster.address]
    done = start(*arguments, env=cluster.client(token)).wait(240)
    assert done.returncode == 2
    assert message in done.stderr
    assert "RAY_AUTH_TOKEN_PATH" in done.stderr
    assert "Traceback" not in done.stderr
    assert "wrongwrong" not in done.stdout + done.stderr
    assert time.monotonic() - start_time < 20
    assert done.stdout == ""


def test_unknown_job_id_is_reported(cluster: Cluster, start: Any) -> None:
    for verb in ("status", "logs", "stop"):
        arguments = ["jobs", verb, "raysubmit_none", "--address", cluster.address]
        done = start(*arguments, env=cluster.client()).wait(240)
        assert done.returncode == 2
        assert "raysubmit_none" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_run_folder_missing_on_a_node_is_reported(
    cluster: Cluster, tiny: Path, tmp_path: Path, start: Any
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    agents = free_ports(2)
    # Start a second node that mounts another file system over the folder.
    hidden = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none "{runs}" && exec "$@"', "sh"]
    node = [
        f"--address={cluster.gcs}", f"--dashboard-agent-listen-port={agents[0]}",
        f"--runtime-env-agent-port={agents[1]}",
    ]  # fmt: skip
    log = tmp_path / "node.log"

    def joined() -> bool:
        """Return whether the node and its agents run; a job needs both."""
        sockets = psutil.net_connections("tcp")
        listening = {s.laddr.port for s in sockets if s.status == psutil.CONN_LISTEN}
        nodes = ask(cluster, "/nodes?view=summary")["data"]["summary"]
        return listening.issuperset(agents) and len(nodes) == 2

    with ray_node(node, cluster.environment, log, *hidden):
        wait_until(joined, "a second node", log)
        arguments = ["submit", tiny, "cluster.launcher=ray", "--address", cluster.address]
        done = start(*arguments, env=cluster.client()).wait(300)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "run.dir" in done.stdout
    assert "cannot see the driver's file" in done.stdout
    assert not list(runs.glob("*/.probe-*"))
