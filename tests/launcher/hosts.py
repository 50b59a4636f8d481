"""Several hosts on one machine, as network namespaces on one bridge; needs root.

Each host has its own address, name, processes, /dev/shm and Ray folder. Files are shared.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from clusters import node_environment, ray_node

INIT = r"""
hostname "$1"; shift
mount --bind "$1" "$2"; shift 2
mount -t tmpfs -o size=300m none /dev/shm
mount --bind "$1" /etc/hosts; shift
exec "$@"
"""
QUICK_HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
"""Detect a lost node within seconds, not a minute. Shorter limits also drop busy nodes."""


@dataclass
class Hosts:
    home: Path
    """Home of the nodes' user; short, because paths of Unix sockets must be short."""
    stem: str
    net: str
    """First three numbers of all addresses."""
    environment: dict[str, str] = field(default_factory=dict)
    nodes: dict[int, psutil.Process] = field(default_factory=dict)

    def name(self, number: int) -> str:
        return f"{self.stem}h{number}"

    def address(self, number: int) -> str:
        return f"{self.net}.{10 + number}"

    @property
    def dashboard(self) -> str:
        return f"http://{self.address(0)}:8265"

    def command(self, number: int) -> list[str]:
        """Return the prefix that runs a command on a host."""
        ray_folder = self.home / f"ray{number}"
        ray_folder.mkdir()
        return [
            "ip", "netns", "exec", self.name(number), "unshare", "--mount", "--pid", "--uts",
            "--fork", "--kill-child", "--mount-proc", "sh", "-c", INIT, "sh", self.name(number),
            str(ray_folder), str(self.home / "ray"), str(self.home / "hosts"),
        ]  # fmt: skip

    def announce_loss(self, node_id: str, seconds: int) -> None:
        """Send Ray a preemption notice for a node, as a cloud would."""
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "drain-node",
            f"--address={self.address(0)}:6379", f"--node-id={node_id}",
            "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=a test",
            f"--deadline-remaining-seconds={seconds}",
        ]  # fmt: skip
        subprocess.run(command, env=self.environment, check=True, capture_output=True)

    def disconnect(self, number: int) -> None:
        """Disconnect a host's network; its processes keep running."""
        _ip("link", "set", self.name(number), "down")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def hosts(home: Path, count: int) -> Iterator[Hosts]:
    """Create `count` hosts without processes; skip the test if that is not possible."""
    if os.geteuid() != 0:
        pytest.skip("needs root to make hosts of network namespaces")
    random_net = random.SystemRandom()
    stem = f"gb{random_net.randrange(10**5)}"
    group = Hosts(home, stem, f"10.{random_net.randrange(100, 250)}.{random_net.randrange(250)}")
    (home / "ray").mkdir()
    lines = ["127.0.0.1 localhost", *(f"{group.address(n)} {group.name(n)}" for n in range(count))]
    (home / "hosts").write_text("\n".join(lines) + "\n")
    group.environment = node_environment(home) | QUICK_HEALTH
    with ExitStack() as stack:
        _add(stack, ("link", "add", stem, "type", "bridge"), ("link", "del", stem))
        _ip("addr", "add", f"{group.net}.1/24", "dev", stem)
        _ip("link", "set", stem, "up")
        for number in range(count):
            _connect(group, number, stack)
        yield group


def _add(stack: ExitStack, add: tuple[str, ...], remove: tuple[str, ...]) -> None:
    try:
        _ip(*add)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs root that may make network namespaces, and iproute2: {error}")
    stack.callback(subprocess.run, ["ip", *remove], capture_output=True)


def _connect(group: Hosts, number: int, stack: ExitStack) -> None:
    name = group.name(number)
    _add(stack, ("netns", "add", name), ("netns", "del", name))
    # The link is removed by name, because a namespace may outlive its last process for a while.
    cable = ("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
    _add(stack, cable, ("link", "del", name))
    _ip("link", "set", name, "master", group.stem)
    _ip("link", "set", name, "up")
    for device in ("lo", "eth0"):
        _ip("-n", name, "link", "set", device, "up")
    _ip("-n", name, "addr", "add", f"{group.address(number)}/24", "dev", "eth0")


@contextmanager
def ray_on(group: Hosts, count: int) -> Iterator[Hosts]:
    """Run Ray on the first `count` hosts, with one CPU each; host 0 is the head."""
    with ExitStack() as stack:
        for number in range(count):
            start_ray(group, number, stack)
        yield group


def start_ray(group: Hosts, number: int, stack: ExitStack) -> None:
    head = ["--head", "--port=6379", "--dashboard-host=0.0.0.0", f"--temp-dir={group.home}/ray"]
    options = head if number == 0 else [f"--address={group.address(0)}:6379"]
    node = ray_node(
        [f"--node-ip-address={group.address(number)}", *options],
        group.environment,
        group.home / f"node{number}.log",
        *group.command(number),
        cpus=1,
    )
    group.nodes[number] = stack.enter_context(node)
