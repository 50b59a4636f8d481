"""How long and with what optimizer a run trains, what it saves and what it measures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote.places import writable_folder
from gigabatch.data.settings import Settings
from gigabatch.trainer.fields import ONE_OR_MORE, Amount, Count, Fraction

Part = Annotated[str, Field(pattern=r"^[a-z]+(\.encoder)?$")]


class TrainSettings(Settings):
    steps: Count = 1000
    """Optimizer steps of the whole run. Or give `epochs`."""
    epochs: float | None = Field(None, gt=0)
    """Length of the run in passes over the data instead of in steps; fractions such as 0.5 are
    allowed. One epoch is as many samples as all sources of `data.train` hold together. When a run
    is created, this becomes `steps` = epochs * samples / `batch.global_size`, rounded up."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: fp32 weights, towers under bf16 autocast; logits and loss stay fp32."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage. 1 shards the optimizer over workers, 2 gradients too, 3 weights too."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Towers' gradient norm is clipped to this; 0 never clips."""
    ema: Fraction = 0.0
    """Momentum of an average of the towers' weights over steps, such as 0.9999, which evaluations
    then use; 0: none. After step t it is at most (1 + t) / (10 + t). A whole copy on each rank."""
    max_bad_steps: Count = 10
    """Steps in a row with a loss or gradient that is not finite, each left out, that are borne."""
    on_bad_steps: Literal["stop", "rewind"] = "stop"
    """What follows them. stop: an error. rewind: back to the weights, moments and objective of the
    last checkpoint, and on with the step after the bad ones."""
    max_rewinds: Count = 3
    """rewind: after so many of them, stop all the same."""
    hang_timeout_s: float = Field(600.0, ge=0, le=1500)
    """Where a rank makes no progress for so many seconds (more than the slowest phase needs, the
    first step's compilation or a checkpoint's write), its watchdog names the rank that is behind,
    with its step and phase, leaves stacks in RUN/hangs, and ends the process; the launcher starts
    the group again. 0: never."""
    init_from: Path | None = None
    """A run, or one of its checkpoint folders, whose weights a new run's towers begin with; all
    else begins anew. The config of the run says which checkpoint it was."""
    init_parts: Annotated[tuple[Part, ...], ONE_OR_MORE] = Field(("image", "text"), min_length=1)
    """What to take of it: a whole tower, or its encoder without the head. A text tower brings its
    tokeniser."""
    init_weights: Literal["ema", "last"] | None = None
    """Its weights averaged over steps, or those of its last step. Unset: the average where it has
    one (`train.ema`)."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and "steps" in self.model_fields_set:
            raise ValueError("give either `steps` or `epochs`, not both")
        return self

    @model_serializer(mode="wrap")
    def _without_unused_steps(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the default of `steps` beside `epochs`, so that the result validates again."""
        tree: dict[str, Any] = handler(self)
        if self.epochs is not None:
            del tree["steps"]
        return tree


class OptimizerSettings(Settings):
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW."""
    beta1: Fraction = 0.9
    """AdamW's decay rate of the first moment."""
    beta2: Fraction = 0.98
    """AdamW's decay rate of the second moment."""
    eps: float = Field(1e-6, gt=0)
    """AdamW's epsilon, added to the root of the second moment."""
    weight_decay: float = Field(0.1, ge=0)
    """On matrices only: norms, biases and scales are never decayed."""
    objective_lr: float | None = Field(None, gt=0)
    """Peak learning rate of the objective's own parameters (logit scale); unset: `lr`."""


class ScheduleSettings(Settings):
    name: Literal["cosine", "constant", "wsd"] = "cosine"
    """After the warm-up: cosine to the floor; constant; or constant, then a linear decay."""
    warmup_steps: Amount = 100
    """Steps over which the learning rate rises linearly from 0 to its peak."""
    decay_steps: Count = 100
    """wsd: length of the final decay."""
    floor: Fraction = 0.0
    """The last learning rate, as a fraction of the peak."""


class CheckpointSettings(Settings):
    every_steps: Amount = 0
    """0: not by steps."""
    every_minutes: float = Field(10.0, ge=0)
    """0: not by time. The last step is always saved."""
    keep: Count = 3
    """Newest checkpoints kept."""
    keep_every: Amount = 0
    """Also save, and keep for good, at each multiple of this many steps; 0: none."""
    best: Annotated[str, Field(pattern=r"^eval/[^/]+/[^/]+$")] | None = None
    """A metric of eval/step-*.json, such as `eval/val/mean_recall@10`: also save at each evaluated
    step, and keep the one where it is highest so far."""
    asynchronous: bool = True
    """Write in the background, from a copy in host memory; training waits for the copy alone."""
    copy_to: str | None = None
    """Also copy each checkpoint to this URL (s3://BUCKET/FOLDER, gs://, file:///FOLDER), as
    URL/RUN_NAME, from where `gigabatch resume URL/RUN_NAME` goes on anywhere. No step waits for it;
    retention holds there too. Keys are found where the file system looks for them (AWS_*)."""

    @model_validator(mode="after")
    def _refuse_secrets(self) -> Self:
        # On the whole model: a field's own error would show its value, with the password.
        if self.copy_to is not None:
            try:
                writable_folder(self.copy_to)
            except GigabatchError as error:
                raise ValueError(f"copy_to: {error}") from None
        return self


class MonitorSettings(Settings):
    every_steps: Count = 10
    """Steps between two lines of metrics."""
    record_samples: bool = False
    """Write the numbers of the samples that each step trained on to samples.jsonl, for audits."""


class EvalSettings(Settings):
    sets: Annotated[tuple[str, ...], ONE_OR_MORE] = ()
    """Folders of shards, inside `data.root` or by path; retrieval is measured on each, between all
    modalities that the objective compares; with symile, of each by all others together."""
    every_steps: Amount = 0
    """0: only after the last step."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [Path(name).name for name in self.sets]
        if len(set(names)) < len(names):
            raise ValueError(f"two sets share a folder name, so a tag: {', '.join(self.sets)}")
        return self
