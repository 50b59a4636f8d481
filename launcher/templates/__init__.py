"""Job and cluster descriptions for Kubernetes, Slurm, Ray and SkyPilot, from a run's config."""

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
_RAY_TEMPLATES = ("kuberay", "ray-cluster")


def render(
    kind: str, path: Path, overrides: Sequence[str], image: str | None, gpus_per_node: int
) -> str:
    """Fill in a template for a run.

    Args:
        kind: Name of the template.
        path: Config of the run.
        overrides: Config settings as `key=value`.
        image: Container image; required except for Slurm.
        gpus_per_node: GPUs per node; 0 trains on CPUs with one worker per node.

    Returns:
        Text of the job or cluster description.

    Raises:
        GigabatchError: if the template is unknown, or the config is invalid or does not fit it.
    """
    if kind not in TEMPLATES:
        raise GigabatchError(f"unknown template {kind!r}; choose {', '.join(TEMPLATES)}.")
    config = resolve_for_cluster(parse_config(read_config(path), str(path), overrides))
    if image is None and kind != "slurm":
        raise GigabatchError(f"{kind} runs in containers; specify one with --image IMAGE.")
    if kind in _RAY_TEMPLATES and config.cluster.launcher != "ray":
        raise GigabatchError(
            f"{kind} starts a Ray cluster, but cluster.launcher is {config.cluster.launcher}. Set "
            "cluster.launcher=ray."
        )
    plan = Plan(config, path.absolute(), tuple(overrides), image or "", gpus_per_node)
    return TEMPLATES[kind](plan)
