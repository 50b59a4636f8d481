"""Rendering of a template for a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.templates.plan import Plan
from gigabatch.launcher.templates.registry import all_templates


def render(
    kind: str, path: Path, overrides: Sequence[str], image: str | None, gpus_per_node: int
) -> str:
    """Fill in a template for a run.

    Args:
        kind: Name of the template.
        path: Config of the run.
        overrides: Config settings as `key=value`.
        image: Container image; required if the template needs one.
        gpus_per_node: GPUs of a node; 0 trains on CPUs with one worker per node.

    Returns:
        Text of the job or cluster description.

    Raises:
        GigabatchError: if the template is unknown, the config is invalid, or the two do not fit.
    """
    from gigabatch.launcher.cluster.submit import resolve_for_cluster
    from gigabatch.trainer.config.load import parse_config, read_config

    templates = all_templates()
    if kind not in templates:
        raise GigabatchError(f"unknown template {kind!r}; choose {', '.join(templates)}.")
    template = templates[kind]
    config = resolve_for_cluster(parse_config(read_config(path), str(path), overrides))
    if image is None and template.needs_image:
        raise GigabatchError(f"{kind} runs in containers; specify one with --image IMAGE.")
    if template.starts_ray and config.cluster.launcher != "ray":
        raise GigabatchError(
            f"{kind} starts a Ray cluster, but cluster.launcher is {config.cluster.launcher}. Set "
            "cluster.launcher=ray."
        )
    plan = Plan(config, path.absolute(), tuple(overrides), image or "", gpus_per_node)
    return template.render(plan)
