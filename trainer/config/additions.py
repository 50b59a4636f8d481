"""Objectives without a loss over scores of all pairs: additions to another, in a sum."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from gigabatch.data.settings import Settings
from gigabatch.trainer.fields import Count, Fraction, Pair, Tap


class BarlowSettings(Settings):
    name: Literal["barlow"]
    """Barlow Twins: the correlations of two taps' coordinates shall be the identity. An addition
    to another objective, in a sum."""
    taps: Pair = ("image", "image@1")
    """What is compared with what."""
    off_diagonal: float = Field(0.005, ge=0)
    """Weight of what is off the diagonal."""


class BYOLSettings(Settings):
    name: Literal["byol"]
    """BYOL: a predictor of one view's vectors in a momentum tower, without negatives. An addition
    to another objective, in a sum."""
    taps: Pair = ("image", "image@1")
    """Both ways; the teacher sees a view of its own of each one's modality."""
    momentum: Fraction = 0.99
    """Of the teacher's weights, a step."""
    hidden: Count = 512
    """Width of the predictor."""


class SwAVSettings(Settings):
    name: Literal["swav"]
    """SwAV: what one view is assigned to, of prototypes that all get as much, is predicted from the
    other view. An addition to another objective, in a sum."""
    taps: Pair | tuple[Tap, Tap, Tap] = ("image", "image@1")
    """Two views, both ways. Of a third tap, such as text, the whole batch's vectors stand for the
    prototypes."""
    prototypes: Count = 512
    """How many are learnt, without a third tap. Scores with all prototypes take 4 bytes each for
    each of a worker's samples."""
    temperature: float = Field(0.1, gt=0)
    """Of the predictions."""
    epsilon: float = Field(0.05, ge=0.003)
    """Of the assignments: the smaller, the nearer each is to one prototype alone. Below 0.03 they
    are found in float64, in twice the time and room."""
    iterations: Count = 3
    """Of Sinkhorn's balancing."""

    @model_validator(mode="after")
    def _one_kind_of_prototypes(self) -> Self:
        if len(self.taps) == 3 and "prototypes" in self.model_fields_set:
            raise ValueError(f"prototypes: those of three taps are the batch's {self.taps[2]}")
        return self
