"""Config sections `train`, `optimizer`, `schedule`, `checkpoint`, `monitor` and `eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote.locations import writable_folder
from gigabatch.data.settings import Settings
from gigabatch.trainer.fields import ONE_OR_MORE, Amount, Count, Fraction

Part = Annotated[str, Field(pattern=r"^[a-z]+(\.encoder)?$")]


class TrainSettings(Settings):
    """Length, precision and safety of training."""

    steps: Count = 1000
    """Total number of optimizer steps. Set either this or `epochs`."""
    epochs: float | None = Field(None, gt=0)
    """Length of the run in passes over the data instead of in steps; fractions such as 0.5 are
    allowed. One epoch is as many samples as all sources of `data.train` have together. When a run
    is created, this becomes `steps` = epochs * samples / `batch.global_size`, rounded up."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the towers. bf16: bf16 autocast inside the towers; weights, logits and loss stay
    fp32."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage. 1 shards the optimizer's moments over workers, 2 also gradients, 3 also
    weights. 0 shards nothing."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Largest norm of the towers' gradient; larger gradients are scaled down to it. 0 never
    clips."""
    ema: Fraction = 0.0
    """Momentum of an average of the towers' weights over steps, such as 0.9999; evaluations then
    use the average. 0: none. After step t the momentum is at most (1 + t) / (10 + t). Each worker
    keeps a complete copy."""
    max_bad_steps: Count = 10
    """Consecutive non-finite steps to skip before `on_bad_steps` applies."""
    on_bad_steps: Literal["stop", "rewind"] = "stop"
    """Reaction to `max_bad_steps` consecutive non-finite steps. stop: end with an error. rewind:
    restore the last checkpoint, and continue with the step after the bad ones."""
    max_rewinds: Count = 3
    """Rewinds (`on_bad_steps: rewind`) before the run stops with an error."""
    hang_timeout_s: float = Field(600.0, ge=0, le=1500)
    """Seconds without progress of a rank that count as a hang; 0: never. The watchdog then logs
    which rank is behind, its step and phase, writes stacks to RUN/hangs, and ends the process; the
    launcher restarts the group. Set it above the slowest phase, such as the compilation in the
    first step or the write of a checkpoint."""
    rehearse: bool = True
    """Before workers start, pass two samples of the training data and of each evaluation set
    through decoding, towers, objective and metrics, in the process that starts the run, on its CPU.
    A mistake then fails at once and leaves no run folder. false: skip it, for towers that run on a
    GPU only or do not fit in this machine's memory."""
    init_from: Path | None = None
    """Run, or checkpoint folder of a run, whose weights initialize a new run's towers; everything
    else starts fresh. The run's config records the checkpoint. Unset: random weights, or those of
    pretrained towers."""
    init_parts: Annotated[tuple[Part, ...], ONE_OR_MORE] = Field(("image", "text"), min_length=1)
    """Towers to initialize from `init_from`: a tower such as `text`, or an encoder without its head
    such as `text.encoder`. A text tower brings its tokenizer."""
    init_weights: Literal["ema", "last"] | None = None
    """Weights to use of `init_from`. ema: the average over steps. last: those of the last step.
    Unset: the average if that run has one (`train.ema`)."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and "steps" in self.model_fields_set:
            raise ValueError("set either `steps` or `epochs`, not both")
        return self

    @model_serializer(mode="wrap")
    def _without_unused_steps(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit the default of `steps` if `epochs` is set, so that the result validates again."""
        tree: dict[str, Any] = handler(self)
        if self.epochs is not None:
            del tree["steps"]
        return tree


class OptimizerSettings(Settings):
    """AdamW's hyperparameters."""

    lr: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW for the towers."""
    beta1: Fraction = 0.9
    """AdamW's decay rate of the gradient's running mean."""
    beta2: Fraction = 0.98
    """AdamW's decay rate of the squared gradient's running mean."""
    eps: float = Field(1e-6, gt=0)
    """AdamW's term in the denominator against division by zero."""
    weight_decay: float = Field(0.1, ge=0)
    """AdamW's weight decay of matrices; norms, biases and scales are never decayed."""
    objective_lr: float | None = Field(None, gt=0)
    """Peak learning rate of the objective's own parameters, such as the logit scale. Unset: the
    same as `optimizer.lr`."""


class ScheduleSettings(Settings):
    """Learning rate over the steps of a run."""

    name: Literal["cosine", "constant", "wsd"] = "cosine"
    """Learning rate after the warmup. cosine: a cosine down to the floor. constant: the peak. wsd:
    the peak, then a linear decay to the floor."""
    warmup_steps: Amount = 100
    """Steps of the linear warmup to the peak learning rate; 0: none."""
    decay_steps: Count = 100
    """Steps of the final linear decay of schedule wsd."""
    floor: Fraction = 0.0
    """Learning rate of the last step, as a fraction of the peak."""


class CheckpointSettings(Settings):
    """When checkpoints are saved, which are kept, and where they are copied."""

    every_steps: Amount = 0
    """Steps between two checkpoints; 0: not by steps. The last step is always saved."""
    every_minutes: float = Field(10.0, ge=0)
    """Minutes between two checkpoints; 0: not by time. The last step is always saved."""
    keep: Count = 3
    """Number of newest checkpoints to keep."""
    keep_every: Amount = 0
    """Multiple of steps at which a checkpoint is also saved and never removed; 0: none."""
    best: Annotated[str, Field(pattern=r"^eval/[^/]+/[^/]+$")] | None = None
    """Metric of eval/step-*.json, such as `eval/val/mean_recall@10`. Each evaluated step is saved,
    and the checkpoint with the highest value so far is kept. Unset: none."""
    asynchronous: bool = True
    """Write checkpoints in the background; training waits only for a copy to host memory."""
    copy_to: str | None = None
    """URL to copy each checkpoint to, as URL/RUN_NAME (s3://BUCKET/FOLDER, gs://, file:///FOLDER).
    `gigabatch resume URL/RUN_NAME` resumes from it on any machine. No step waits for the copy, and
    `keep` applies there too. Credentials come from the environment (such as AWS_*). Unset: no
    copies."""

    @model_validator(mode="after")
    def _check_copy_to(self) -> Self:
        # A validator of the field would put its value, which may have a password, into its error.
        if self.copy_to is not None:
            try:
                writable_folder(self.copy_to)
            except GigabatchError as error:
                raise ValueError(f"copy_to: {error}") from None
        return self


class MonitorSettings(Settings):
    """Metrics while training."""

    every_steps: Count = 10
    """Steps between two lines of metrics."""
    record_samples: bool = False
    """Write the sample numbers of each step to samples.jsonl, for audits."""


class EvalSettings(Settings):
    """Evaluations while training."""

    sets: Annotated[tuple[str, ...], ONE_OR_MORE] = ()
    """Evaluation sets: folders of shards, inside `data.root` or by path. Retrieval is measured on
    each set, between all modalities that the objective compares; with symile, each modality is
    retrieved by all others together. Default: none."""
    every_steps: Amount = 0
    """Steps between two evaluations; 0: only after the last step."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [Path(name).name for name in self.sets]
        if len(set(names)) < len(names):
            raise ValueError(
                "two sets share a folder name, and so their metrics' tags: "
                f"{', '.join(self.sets)}; rename one"
            )
        return self
