"""Registry of the templates of `gigabatch template`; a new module of this folder is a new one."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from gigabatch.launcher import templates
from gigabatch.launcher.templates.plan import Plan

Render = Callable[[Plan], str]
_TEMPLATES: dict[str, Template] = {}


@dataclass(frozen=True)
class Template:
    """A job or cluster description for one system.

    Attributes:
        render: Returns the text for a plan.
        starts_ray: The text starts a Ray cluster, so the run needs `cluster.launcher=ray`.
        needs_image: The text needs a container image.
    """

    render: Render
    starts_ray: bool
    needs_image: bool


def template(
    name: str, *, starts_ray: bool = False, needs_image: bool = True
) -> Callable[[Render], Render]:
    """Return a decorator that registers a function as the template `name`.

    Args:
        name: KIND of `gigabatch template KIND`.
        starts_ray: See `Template`.
        needs_image: See `Template`.

    Raises:
        ValueError: when the function is decorated, if another module registered the name.
    """

    def register(render: Render) -> Render:
        other = _TEMPLATES.setdefault(name, Template(render, starts_ray, needs_image))
        if other.render is not render:
            raise ValueError(
                f"{render.__module__}: the template name {name!r} is taken by "
                f"{other.render.__module__}; choose another name."
            )
        return render

    return register


def all_templates() -> dict[str, Template]:
    """Import every module of this folder; return the templates by name, sorted."""
    for module in pkgutil.iter_modules(templates.__path__):
        importlib.import_module(f"{templates.__name__}.{module.name}")
    return dict(sorted(_TEMPLATES.items()))
