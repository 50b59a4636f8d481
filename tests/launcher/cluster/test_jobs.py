"""Runs as jobs of a real Ray cluster with token authentication, over HTTP."""

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


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # A short name: Unix sockets lie in it.
    home = Path(tempfile.mkdtemp(prefix="gbray-"))
    environment = node_environment(home)
    gcs, dashboard, client, agent = free_ports(4)
    made = Cluster(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", environment)
    head = [
        "--head", f"--port={gcs}", f"--dashboard-port={dashboard}", "--node-ip-address=127.0.0.1",
        f"--ray-client-server-port={client}", f"--temp-dir={home}/ray",
        f"--dashboard-agent-listen-port={agent}",
    ]  # fmt: skip
    with ray_node(head, environment, home / "head.log"):
        wait_until(lambda: serves(made), "the dashboard serves", home / "head.log")
        yield made
    shutil.rmtree(home)


def test_a_job_is_followed_stopped_resumed_and_ends_as_a_local_run(
    cluster: Cluster, tiny: Path, tmp_path: Path, start: Any
) -> None:
    towers, stages = Path(support_towers.__file__), tmp_path / "my_stages"
    stages.mkdir()
    (stages / "__init__.py").touch()
    (stages / "dark.py").write_text(STAGES)
    (stages / ".gitignore").write_text("*\n")
    config = tmp_path / "it's mine.yaml"
    shutil.copy(tiny, config)
    hurry = tmp_path / "hurry"
    settings = [
        f"towers.image={{kind: module, module: 'support_towers:Slow', args: {{hurry: {hurry}}}}}",
        "data.stages=[my_stages.dark:darken]", "train.steps=45",
    ]  # fmt: skip
    to = ["--address", cluster.address]

    def run(*arguments: str | Path) -> Command:
        return start(*arguments, env=cluster.client())

    submitted = run(
        "submit", config, *settings, "cluster.launcher=ray", *to, "--with", towers, "--with", stages
    )  # fmt: skip
    runs = tmp_path / "runs"
    where = wait_until(lambda: next(runs.glob("it-s-mine-*"), None), "a run", by=submitted)
    metrics = where / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and losses(where), "a step", by=submitted)
    submitted.signal(signal.SIGINT)
    left = submitted.wait(240)
    assert left.returncode == 130
    assert "goes on" in left.stdout
    job = re.search(r"submitted (\S+)", left.stdout)
    assert job is not None, left.stdout
    assert f"gigabatch jobs stop {job[1]} --address {cluster.address}" in left.stdout

    follower = run("jobs", "logs", job[1], "--follow", *to)
    listed = run("jobs", "list", *to).wait(240)
    assert re.search(rf"{job[1]}\s+RUNNING", listed.stdout), listed.stdout
    stopped = run("jobs", "stop", job[1], *to).wait(300)
    assert f"{job[1]} is STOPPED" in stopped.stdout, stopped.stderr
    followed = follower.wait(240)
    assert followed.returncode == 75, followed.stdout + followed.stderr
    assert followed.stdout.count("step 1/45 ") == 1  # the whole log, once
    assert "saved checkpoint" in followed.stdout
    assert f"{job[1]} was stopped" in followed.stdout
    before = len(losses(where))
    assert 0 < before < 45
    hurry.touch()

    sent = ["--with", towers, "--with", stages]
    inline = ["submit", "--resume", where, "cluster.launcher=inline"]
    resumes = run(*inline, *to, *sent)
    os.environ["PYTHONPATH"] += f"{os.pathsep}{tmp_path}"  # the fixture puts it back
    local = start("train", config, *settings, "run.name=local").wait(240)
    resumed = resumes.wait(240)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "finished: 45 steps" in resumed.stdout
    told = run("jobs", "status", job[1], *to).wait(240).stdout
    assert "STOPPED" in told
    everything = [left, followed, listed, stopped, resumed]
    assert not any(TOKEN in done.stdout + done.stderr for done in everything)
    assert TOKEN not in json.dumps(ask(cluster, "/api/jobs/"))
    # The nodes ran this code from the wheel, not what is installed there.
    packages = json.loads((where / "environment.json").read_text())["packages"]
    assert packages["gigabatch"] == wheel_version()

    assert local.returncode == 0, local.stderr
    assert losses(where) == losses(tmp_path / "runs" / "local")


def test_a_job_that_fails_ends_with_its_exit_code_and_its_reason(
    cluster: Cluster, tiny: Path, tmp_path: Path, start: Any
) -> None:
    missing = f"data.root={tmp_path / 'nowhere'}"
    done = start("submit", tiny, missing, "--address", cluster.address, env=cluster.client()).wait()
    assert done.returncode == 2, done.stdout + done.stderr
    assert "nowhere" in done.stdout
    assert "failed" in done.stderr


@pytest.mark.parametrize(
    ("token", "told"), [(None, "wants a token (401)"), ("wrong" * 9, "refuses this token (403)")]
)
def test_a_missing_or_wrong_token_is_refused_at_once(
    cluster: Cluster, start: Any, token: str | None, told: str
) -> None:
    begun = time.monotonic()
    arguments = ["jobs", "list", "--address", cluster.address]
    done = start(*arguments, env=cluster.client(token)).wait(240)
    assert done.returncode == 2
    assert told in done.stderr
    assert "RAY_AUTH_TOKEN_PATH" in done.stderr
    assert "Traceback" not in done.stderr
    assert "wrongwrong" not in done.stdout + done.stderr
    assert time.monotonic() - begun < 20
    assert done.stdout == ""


def test_an_unknown_job_is_said_to_be_one(cluster: Cluster, start: Any) -> None:
    for verb in ("status", "logs", "stop"):
        arguments = ["jobs", verb, "raysubmit_none", "--address", cluster.address]
        done = start(*arguments, env=cluster.client()).wait(240)
        assert done.returncode == 2
        assert "raysubmit_none" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_run_folder_that_a_node_does_not_share_is_refused_by_name(
    cluster: Cluster, tiny: Path, tmp_path: Path, start: Any
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    agents = free_ports(2)
    # A second node of the cluster with a file system of its own over the folder.
    hidden = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none "{runs}" && exec "$@"', "sh"]
    node = [
        f"--address={cluster.gcs}", f"--dashboard-agent-listen-port={agents[0]}",
        f"--runtime-env-agent-port={agents[1]}",
    ]  # fmt: skip
    log = tmp_path / "node.log"

    def joined() -> bool:
        """Its agents too, which the node starts beside itself: without them no job starts there."""
        sockets = psutil.net_connections("tcp")
        listening = {each.laddr.port for each in sockets if each.status == psutil.CONN_LISTEN}
        known = ask(cluster, "/nodes?view=summary")["data"]["summary"]
        return listening.issuperset(agents) and len(known) == 2

    with ray_node(node, cluster.environment, log, *hidden):
        wait_until(joined, "a second node", log)
        arguments = ["submit", tiny, "cluster.launcher=ray", "--address", cluster.address]
        done = start(*arguments, env=cluster.client()).wait(300)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "run.dir" in done.stdout
    assert "does not see what the driver wrote there" in done.stdout
    assert not list(runs.glob("*/.probe-*"))
