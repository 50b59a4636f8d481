"""What every template needs to know of a run: how many workers, where, and how it starts."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote.locations import is_remote
from gigabatch.trainer.config import Config

SECRETS = "gigabatch-secrets"
"""What the cluster's own store calls the secrets (HF_TOKEN and so on); none is written down."""
VOLUME = "gigabatch-runs"
DATA_VOLUME = "gigabatch-data"


@dataclass(frozen=True)
class Plan:
    config: Config
    """Resolved, but for `cluster.threads`, which the machine there pins."""
    path: Path
    """Of the config, absolute."""
    overrides: tuple[str, ...]
    image: str
    gpus_per_node: int
    """0: workers on CPUs, one a node."""

    @property
    def workers(self) -> int:
        """As many as there may be: nodes are asked for all of them."""
        return self.config.cluster.most

    @property
    def workers_per_node(self) -> int:
        return min(self.workers, self.gpus_per_node or 1)

    @property
    def nodes(self) -> int:
        """Raises GigabatchError where the workers do not fill whole nodes."""
        if self.workers % self.workers_per_node:
            raise GigabatchError(
                f"cluster.workers={self.workers} do not fill whole nodes of "
                f"{self.workers_per_node}. Set --gpus-per-node to a divisor of it."
            )
        return self.workers // self.workers_per_node

    @property
    def fewest_nodes(self) -> int:
        """Without which the run would not train."""
        return -(-self.config.cluster.least // self.workers_per_node)

    @property
    def name(self) -> str:
        """The run's; fixed, so that a job that is started again goes on with the same run."""
        stem = re.sub(r"[^A-Za-z0-9._-]", "-", self.path.stem).lstrip(".-") or "run"
        return self.config.run.name or stem

    @property
    def label(self) -> str:
        """The name as Kubernetes and SkyPilot allow it."""
        text = re.sub(r"[^a-z0-9-]+", "-", self.name.lower()).strip("-")
        # A Kubernetes label has 63 characters, of which RayJob takes some for its own suffixes.
        return (text if text[:1].isalpha() else f"run-{text}")[:40].rstrip("-")

    @property
    def run(self) -> Path:
        return self.config.run.dir / self.name

    @property
    def data(self) -> str | None:
        """A local folder of data, which the nodes must see too."""
        root = self.config.data.root
        return None if root.startswith("demo:") or is_remote(root) else root


def start_script(plan: Plan, config: str, *settings: str) -> str:
    """Shell lines that begin the run, or go on with it where it has begun; `config` is the file's
    path there, `settings` more `key=value`. They replace the shell."""
    python = ["exec", "python", "-m", "gigabatch.launcher"]
    place = [f"run.name={plan.name}", f"run.dir={plan.config.run.dir}"]
    train = [*python, "train", config, *settings, *place]
    resume = [*python, "resume", str(plan.run), *settings]
    return (
        f"if [ -e {shlex.quote(f'{plan.run}/config.yaml')} ]; then\n"
        f"  {shlex.join(resume)}\n"
        "fi\n"
        f"{shlex.join(train)}\n"
    )


def to_yaml(*documents: dict[str, Any]) -> str:
    """YAML documents, with texts of several lines as blocks."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=1000)


def commented(text: str) -> str:
    return "".join(f"# {line}".rstrip() + "\n" for line in text.strip().splitlines())


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
