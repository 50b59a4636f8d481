"""Objectives: losses over the embeddings of the global batch, one per file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter

from gigabatch.data.errors import GigabatchError
from gigabatch.kernels.stats import load_backend
from gigabatch.trainer.objectives import registry
from gigabatch.trainer.objectives.base import Card, Context, Loss, Needs, Objective
from gigabatch.trainer.objectives.registry import OBJECTIVES
from gigabatch.trainer.objectives.settings import ObjectiveSettings

registry.discover()

if TYPE_CHECKING:
    AnyObjective = ObjectiveSettings
else:
    from gigabatch.trainer.objectives.module import ModuleSettings
    from gigabatch.trainer.objectives.union import union_of

    AnyObjective = union_of([*(kind.Settings for kind in OBJECTIVES.values()), ModuleSettings])

# Built once: the schema of the union takes a tenth of a second.
_ADAPTER: TypeAdapter[ObjectiveSettings] = TypeAdapter(AnyObjective)

__all__ = [
    "OBJECTIVES",
    "AnyObjective",
    "Card",
    "Context",
    "Loss",
    "Needs",
    "Objective",
    "ObjectiveSettings",
    "build_objective",
    "default_settings",
    "parse_settings",
]


def default_settings() -> ObjectiveSettings:
    """Return the settings of the default objective."""
    return OBJECTIVES[registry.DEFAULT].Settings(name=registry.DEFAULT)


def parse_settings(settings: Mapping[str, Any]) -> ObjectiveSettings:
    """Validate the settings of an objective from a config.

    Raises:
        pydantic.ValidationError: If a key is unknown or a value is invalid.
    """
    return _ADAPTER.validate_python(dict(settings))


def build_objective(
    settings: ObjectiveSettings,
    device: torch.device | str = "cpu",
    group: str | None = None,
    width: int = 0,
) -> Objective[Any]:
    """Create an objective on a device.

    Args:
        settings: The objective's settings.
        device: Device of its parameters and buffers.
        group: Name of the column in `data.group`; only samples of one group are compared.
        width: Embedding dimension of the shared space.

    Raises:
        GigabatchError: If the device cannot run the objective's back end.
    """
    for single in settings.singles():
        try:
            load_backend(getattr(single, "backend", None), torch.empty(0, device=device))
        except ValueError as error:
            raise GigabatchError(f"objective.backend: {error}") from None
    return registry.build(settings, group=group, width=width).to(device)
