"""What is minimised."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from gigabatch.data.settings import Settings


class ObjectiveSettings(Settings):
    name: Literal["infonce"] = "infonce"
    """CLIP's symmetric InfoNCE, with any number of positives."""
    positives: str | None = None
    """A field of the samples' json; samples that share it are right answers to each other.
    Unset: a caption's right answer is its own image."""
    same_id: Literal["positive", "exclude"] = "positive"
    """What other samples of the same `positives` field are: right answers too, or left out of the
    loss altogether, neither right nor wrong."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread evenly over all candidates."""
    schedule: Literal["gather", "ring"] = "gather"
    """How workers see each other's text embeddings: gather holds all of them, ring passes them
    round in the memory of one worker's. Sums round differently; the loss is the same."""
    backend: Literal["tiled", "triton"] = "tiled"
    """What computes the loss: tiled is plain torch on any device; triton is fused, for NVIDIA GPUs
    alone, and has not been run on one by us yet."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: embeddings are rounded for the loss, whose products then run on a GPU's tensor cores;
    logits and their sums stay fp32."""
    cache_mib: int = Field(0, ge=0)
    """MiB for scores of the forward pass that the backward pass then need not make again: up to
    three matrix products for four, the same bits. All scores take 4 N x N / workers bytes."""
    scale: float = Field(14.3, gt=0)
    """The logit scale (inverse temperature) at the start."""
    scale_max: float = Field(100.0, gt=0)
    """The logit scale is clamped to this in the forward pass."""
    learn_scale: bool = True

    @model_validator(mode="after")
    def _scale_fits(self) -> Self:
        if self.scale > self.scale_max:
            raise ValueError(f"scale ({self.scale}) is above scale_max ({self.scale_max})")
        return self
