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
def three() -> Iterator[Hosts]:
    home = Path(tempfile.mkdtemp(prefix="gbh-"))
    try:
        with hosts(home, 3) as made, ray_on(made, 3):
            yield made
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


def test_losing_hosts_changes_neither_samples_nor_losses(
    three: Hosts, tiny: Path, tmp_path: Path, start: Any
) -> None:
    cluster = Cluster(three.dashboard, f"{three.address(0)}:6379", three.environment)
    wait_until(lambda: serves(cluster), "the dashboard serves", three.home / "node0.log", None, 240)
    wait_until(lambda: len(nodes(cluster)) == 3, "nodes", three.home / "node2.log", None, 240)
    hurry = tmp_path / "hurry"
    settings = [
        "train.steps=60", "eval.sets=[]", "monitor.record_samples=true", "checkpoint.every_steps=0",
        f"towers.image={{kind: module, module: 'support_towers:Slow', args: {{hurry: {hurry}}}}}",
    ]  # fmt: skip
    run, reference = tmp_path / "runs" / "cut", tmp_path / "runs" / "reference"
    submitted = start(
        "submit", tiny, *settings, "run.name=cut", "cluster.launcher=ray", "cluster.workers=[1,3]",
        "cluster.placement=spread", "cluster.start_timeout_s=20", "--address", three.dashboard,
        "--with", support_towers.__file__,
        env=cluster.client(),
    )  # fmt: skip

    def until(what: str, condition: Callable[[], Any]) -> None:
        wait_until(condition, what, None, submitted, 240)

    all_three = [three.name(number) for number in range(3)]
    until("three workers", lambda: hosts_of(run) == [set(all_three)])
    until("a step", lambda: max(steps(run), default=0) > 3)
    # Only the notice can cause a checkpoint before the last step.
    three.announce_loss(nodes(cluster)[all_three[2]], 20)
    until("a checkpoint", lambda: len(RunFolder(run).steps_saved()) == 1)
    (saved,) = RunFolder(run).steps_saved()
    until("two workers", lambda: hosts_of(run)[1:] == [set(all_three[:2])])
    until("another step", lambda: attempt_of(run) == 2)
    three.cut_off(1)
    until("one worker", lambda: hosts_of(run)[2:] == [{all_three[0]}])
    hurry.touch()
    undisturbed = start("train", tiny, *settings, "run.name=reference")
    done = submitted.wait(240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"node {all_three[2]} will be removed" in done.stdout
    assert done.stdout.count(f"resuming after step {saved}\n") == 2
    assert "attempt 3: 1 worker " in done.stdout
    assert undisturbed.wait().returncode == 0
    assert samples(run) == samples(reference)
    assert losses(run) == pytest.approx(losses(reference), rel=1e-5)
