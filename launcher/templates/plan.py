"""Properties of a run that templates need: workers, nodes, folders, start command."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote.locations import is_remote

if TYPE_CHECKING:  # it imports torch, which `gigabatch template --help` does without
    from gigabatch.trainer.config import Config

SECRETS = "gigabatch-secrets"
"""Name under which the cluster stores secrets such as HF_TOKEN; templates contain no secrets."""
VOLUME = "gigabatch-runs"
DATA_VOLUME = "gigabatch-data"


@dataclass(frozen=True)
class Plan:
    """A run and the nodes that it will use.

    Attributes:
        config: Config, resolved except for `cluster.threads`, which depends on the cluster.
        path: Absolute path of the config.
        overrides: Config settings as `key=value`.
        image: Container image.
        gpus_per_node: GPUs per node; 0 trains on CPUs with one worker per node.
    """

    config: Config
    path: Path
    overrides: tuple[str, ...]
    image: str
    gpus_per_node: int

    @property
    def workers(self) -> int:
        """Maximum number of workers; nodes are requested for all of them."""
        return self.config.cluster.max_workers

    @property
    def workers_per_node(self) -> int:
        """Number of workers on a node: one per GPU, or one on CPUs."""
        return min(self.workers, self.gpus_per_node or 1)

    @property
    def nodes(self) -> int:
        """Number of nodes.

        Raises:
            GigabatchError: if the workers do not fill all nodes.
        """
        if self.workers % self.workers_per_node:
            raise GigabatchError(
                f"cluster.workers={self.workers} is not a multiple of {self.workers_per_node}, the "
                "workers of a node. Set --gpus-per-node to a divisor of cluster.workers."
            )
        return self.workers // self.workers_per_node

    @property
    def min_nodes(self) -> int:
        """Minimum number of nodes with which the run trains."""
        return -(-self.config.cluster.min_workers // self.workers_per_node)

    @property
    def name(self) -> str:
        """Name of the run; fixed, so that a restarted job resumes the same run."""
        stem = re.sub(r"[^A-Za-z0-9._-]", "-", self.path.stem).lstrip(".-") or "run"
        return self.config.run.name or stem

    @property
    def label(self) -> str:
        """Name of the run, reduced to the characters that Kubernetes and SkyPilot allow."""
        text = re.sub(r"[^a-z0-9-]+", "-", self.name.lower()).strip("-")
        # Kubernetes limits labels to 63 characters, and RayJob appends suffixes.
        return (text if text[:1].isalpha() else f"run-{text}")[:40].rstrip("-")

    @property
    def run(self) -> Path:
        """Folder of the run."""
        return self.config.run.dir / self.name

    @property
    def data(self) -> str | None:
        """Local folder of the data, which nodes must mount too; None if the data is remote."""
        root = self.config.data.root
        return None if root.startswith("demo:") or is_remote(root) else root


def start_script(plan: Plan, config: str, *settings: str) -> str:
    """Return shell lines that start the run, or resume it if it exists, in place of the shell.

    Args:
        plan: The run.
        config: Path of the config on the node.
        settings: Additional settings as `key=value`.
    """
    python = ["exec", "python", "-m", "gigabatch.launcher"]
    location = [f"run.name={plan.name}", f"run.dir={plan.config.run.dir}"]
    train = [*python, "train", config, *settings, *location]
    resume = [*python, "resume", str(plan.run), *settings]
    return (
        f"if [ -e {shlex.quote(f'{plan.run}/config.yaml')} ]; then\n"
        f"  {shlex.join(resume)}\n"
        "fi\n"
        f"{shlex.join(train)}\n"
    )


def to_yaml(*documents: dict[str, Any]) -> str:
    """Format YAML documents; multi-line texts become blocks."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=1000)


def commented(text: str) -> str:
    """Turn text into comment lines."""
    return "".join(f"# {line}".rstrip() + "\n" for line in text.strip().splitlines())


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
