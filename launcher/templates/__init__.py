"""Job and cluster descriptions for other systems, made from a run's config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.cluster.submit import resolve_for_cluster
from gigabatch.launcher.templates.kuberay import kuberay
from gigabatch.launcher.templates.plan import Plan
from gigabatch.launcher.templates.raycluster import ray_cluster
from gigabatch.launcher.templates.skypilot import skypilot
from gigabatch.launcher.templates.slurm import slurm
from gigabatch.trainer.config.load import parse_config, read_config

TEMPLATES: dict[str, Callable[[Plan], str]] = {
    "kuberay": kuberay,
    "slurm": slurm,
    "ray-cluster": ray_cluster,
    "skypilot": skypilot,
}
_NEED_RAY = ("kuberay", "ray-cluster")


def render(
    kind: str, path: Path, overrides: Sequence[str], image: str | None, gpus_per_node: int
) -> str:
    """The text of a template for the run that a config describes. Raises GigabatchError."""
    if kind not in TEMPLATES:
        raise GigabatchError(f"there is no template {kind!r}; choose {', '.join(TEMPLATES)}.")
    config = resolve_for_cluster(parse_config(read_config(path), str(path), overrides))
    if image is None and kind != "slurm":
        raise GigabatchError(f"{kind} runs in containers: name one by --image IMAGE.")
    if kind in _NEED_RAY and config.cluster.launcher != "ray":
        raise GigabatchError(
            f"{kind} starts a Ray cluster, and cluster.launcher is {config.cluster.launcher}. Set "
            "cluster.launcher=ray."
        )
    plan = Plan(config, path.absolute(), tuple(overrides), image or "", gpus_per_node)
    return TEMPLATES[kind](plan)
