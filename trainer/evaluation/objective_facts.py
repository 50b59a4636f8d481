"""Temporary: facts about objectives that their settings classes will report themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from gigabatch.trainer.config import Single
from gigabatch.trainer.objectives import Objective


def retrieval_score(settings: Single) -> Literal["pair", "product"]:
    """`product` if all taps are compared at once by the multilinear product."""
    return "product" if settings.name == "symile" else "pair"


def temperature(objective: Objective, tables: Mapping[str, Tensor]) -> float | None:
    """The current temperature, a mean if samples have their own; None if there is not one."""
    if callable(scale := getattr(objective, "scale", None)):
        return float(1 / scale())
    if callable(temperatures := getattr(objective, "temperatures", None)):
        means = [value.mean() for value in temperatures(tables["state"])]
        return float(torch.stack(means).mean())
    return None
