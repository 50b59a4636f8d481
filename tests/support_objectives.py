"""Objectives as users would write them, all of them faulty."""

from __future__ import annotations

from typing import Any

from gigabatch.trainer.objectives import Context, Loss
from gigabatch.trainer.objectives.infonce import InfoNCE


class Unreduced(InfoNCE):
    """Return one value per sample."""

    class Settings(InfoNCE.Settings):  # type: ignore[name-defined, misc]
        pass

    def forward(self, outputs: Any, meta: Any, ctx: Context) -> Loss:
        return Loss(super().forward(outputs, meta, ctx).value.expand(2))


class Detached(InfoNCE):
    """Return a loss without a gradient."""

    class Settings(InfoNCE.Settings):  # type: ignore[name-defined, misc]
        pass

    def forward(self, outputs: Any, meta: Any, ctx: Context) -> Loss:
        return Loss(super().forward(outputs, meta, ctx).value.detach())


class Failing(InfoNCE):
    """Read an output that does not exist."""

    class Settings(InfoNCE.Settings):  # type: ignore[name-defined, misc]
        pass

    def forward(self, outputs: Any, meta: Any, ctx: Context) -> Loss:
        return Loss(outputs["queue"].mean())
