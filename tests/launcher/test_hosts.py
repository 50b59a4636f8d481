"""A run on three hosts: one announces its loss, another loses its network during a step."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import support_towers
from clusters import Cluster, ask, serves, wait_until
from hosts import Hosts, hosts, ray_on
from support import losses

from gigabatch.trainer.monitoring.metrics import read_metrics
from gigabatch.trainer.run.folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray-cluster"), pytest.mark.timeout(900)]


@pytest.fixture
def group() -> Iterator[Hosts]:
    home = Path(tempfile.mkdtemp(prefix="gbh-"))
    try:
        with hosts(home, 3) as group, ray_on(group, 3):
            yield group
    finally:
        shutil.rmtree(home, ignore_errors=True)


def steps(run: Path) -> dict[int, float]:
    return losses(run) if (run / "metrics.jsonl").exists() else {}


def attempt_of(run: Path) -> int:
    """Return the number of the attempt that wrote the newest metrics."""
    return max(line["attempt"] for line in read_metrics(run / "metrics.jsonl"))


def samples(run: Path) -> dict[int, list[int]]:
    """Return step -> sample numbers, of the newest attempt that trained the step."""
    lines = map(json.loads, (run / "samples.jsonl").read_text().splitlines())
    return {line["step"]: line["samples"] for line in lines}


def hosts_of(run: Path) -> list[set[str]]:
    """Return the host names of each attempt."""
    attempts = [json.loads(path.read_text()) for path in sorted(run.glob("attempts/*.json"))]
    return [{worker["host"] for worker in attempt["workers"]} for attempt in attempts]


def nodes(cluster: Cluster) -> dict[str, str]:
    """Return host name -> Ray node ID. A new node has no name until its agent reports."""
    try:
        summary = ask(cluster, "/nodes?view=summary")["data"]["summary"]
    except OSError:  # the dashboard of a busy machine may drop a request; the caller asks again
        return {}
    return {node["hostname"]: node["raylet"]["nodeId"] for node in summary if "hostname" in node}


def test_losing_hosts_does_not_change_samples_or_losses(
    group: Hosts, tiny: Path, tmp_path: Path, start: Any
) -> None:
    cluster = Cluster(group.dashboard, f"{group.address(0)}:6379", group.environment)
    wait_until(lambda: serves(cluster), "the dashboard serves", group.home / "node0.log", None, 240)
    wait_until(lambda: len(nodes(cluster)) == 3, "nodes", group.home / "node2.log", None, 240)
    fast = tmp_path / "fast"
    settings = [
        "train.steps=60", "eval.sets=[]", "monitor.record_samples=true", "checkpoint.every_steps=0",
        f"towers.image={{kind: module, module: 'support_towers:Slow', args: {{fast: {fast}}}}}",
    ]  # fmt: skip
    run, reference = tmp_path / "runs" / "a", tmp_path / "runs" / "reference"
    submitted = start(
        "submit", tiny, *settings, "run.name=a", "cluster.launcher=ray", "cluster.workers=[1,3]",
        "cluster.placement=spread", "cluster.start_timeout_s=20", "--address", group.dashboard,
        "--with", support_towers.__file__,
        env=cluster.client(),
    )  # fmt: skip

    def until(description: str, condition: Callable[[], Any]) -> None:
        wait_until(condition, description, None, submitted, 240)

    names = [group.name(number) for number in range(3)]
    until("three workers", lambda: hosts_of(run) == [set(names)])
    until("a step", lambda: max(steps(run), default=0) > 3)
    # Before the last step, only the notice causes a checkpoint.
    group.announce_loss(nodes(cluster)[names[2]], 20)
    until("a checkpoint", lambda: len(RunFolder(run).steps_saved()) == 1)
    (saved,) = RunFolder(run).steps_saved()
    until("two workers", lambda: hosts_of(run)[1:] == [set(names[:2])])
    until("another step", lambda: attempt_of(run) == 2)
    group.disconnect(1)
    until("one worker", lambda: hosts_of(run)[2:] == [{names[0]}])
    fast.touch()
    reference_run = start("train", tiny, *settings, "run.name=reference")
    done = submitted.wait(240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"node {names[2]} will be removed" in done.stdout
    assert done.stdout.count(f"resuming after step {saved}\n") == 2
    assert "attempt 3: 1 worker " in done.stdout
    assert reference_run.wait().returncode == 0
    assert samples(run) == samples(reference)
    assert losses(run) == pytest.approx(losses(reference), rel=1e-5)
