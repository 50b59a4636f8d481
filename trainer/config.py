"""The whole run as one typed description; each field's docstring is its help."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from gigabatch.data.augment import Augmentation
from gigabatch.data.captions import CaptionSettings
from gigabatch.data.decode import ImageSettings
from gigabatch.data.settings import Settings
from gigabatch.data.tokenizer import TextSettings

Count = Annotated[int, Field(ge=1, strict=True)]
Amount = Annotated[int, Field(ge=0, strict=True)]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Fraction = Annotated[float, Field(ge=0, lt=1)]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Part = Literal["image", "text", "image.encoder", "text.encoder"]


class RunSettings(Settings):
    name: Annotated[str, Field(pattern=NAME, max_length=100, coerce_numbers_to_str=True)] | None = (
        None
    )
    """The run's folder inside `run.dir`; unset takes a new one, named after the config file."""
    dir: Path = Path("runs")
    """Where run folders live; on several nodes, a path that all of them share."""
    seed: int = Field(0, ge=0, lt=1 << 62, strict=True)
    """Keys everything random: initial weights, order, augmentation, dropout."""


class SourceSettings(Settings):
    path: str
    """A folder of shards or a view, inside `data.root` or by its path; a pattern with `*`, `?` or
    `{000..123}`; or a URL of those (s3://, gs://, hf://, https://)."""
    weight: float = Field(1.0, ge=0)
    """Its share of the samples drawn, against the other sources' weights."""


class CurriculumSettings(Settings):
    from_sample: Amount
    """Samples of the run after which these weights hold."""
    weights: tuple[Annotated[float, Field(ge=0)], ...]
    """A weight for each source, in their order."""


def _sources(value: Any) -> Any:
    listed = value if isinstance(value, list | tuple) else [value]
    return tuple({"path": each} if isinstance(each, str) else each for each in listed)


class DataSettings(Settings):
    root: str = "demo:glyphs"
    """A folder or URL, or `demo:glyphs` for the demo set, which is made on first use."""
    train: Annotated[tuple[SourceSettings, ...], BeforeValidator(_sources)] = Field(
        (SourceSettings(path="train"),), min_length=1
    )
    """The training shards, inside `data.root`; `.` when the root holds them itself. A list mixes
    several sources, each a path or {path, weight}."""
    curriculum: tuple[CurriculumSettings, ...] = ()
    """Other weights of the sources, from later positions of the run on."""
    group: str | None = None
    """A field of the samples' json, or `source`: each batch holds samples of one value alone, and
    what is left over comes in mixed batches, where only samples of one value are compared."""
    window: Count = 64
    """Shards mixed at a time by the shuffle."""
    workers: Amount = 1
    """Loader processes of each rank; 0 reads in the training process."""
    prefetch: Count = 2
    """Micro-batches that each loader process keeps ready."""
    cache_gib: float = Field(64.0, gt=0)
    """Room for copies of remote shards on each node, in $GIGABATCH_CACHE."""
    missing: Literal["error", "mask"] = "error"
    """Samples without an image or a caption: refused, or kept, and left out of the loss where
    they have nothing to compare."""
    max_damaged: float = Field(0.001, ge=0, le=1)
    """Share of a source's samples that may be damaged (each is replaced and recorded) before the
    run stops."""
    stages: tuple[Annotated[str, Field(pattern=r"^[\w.]+:\w+$")], ...] = ()
    """`package.mod:name` of your own webdataset stages, from decoded sample to decoded sample."""
    image: ImageSettings = ImageSettings()
    captions: CaptionSettings = CaptionSettings()
    text: TextSettings = TextSettings()
    augment: Augmentation = Augmentation()

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        starts = [phase.from_sample for phase in self.curriculum]
        if starts != sorted(set(starts)) or (starts and starts[0] == 0):
            raise ValueError(
                "data.curriculum: from_sample must grow from line to line, from above 0"
            )
        for phase in self.curriculum:
            if len(phase.weights) != len(self.train):
                raise ValueError(
                    f"data.curriculum: {len(phase.weights)} weights for {len(self.train)} sources "
                    "of data.train; give one each, 0 for none"
                )
        given = [[source.weight for source in self.train], *(p.weights for p in self.curriculum)]
        if not all(map(sum, given)):
            raise ValueError("data.train, data.curriculum: some source needs a weight above 0")
        return self


class BatchSettings(Settings):
    global_size: Count = 256
    """Samples a step, over all workers: the N of the contrastive loss."""
    micro_size: Count = 256
    """Samples that pass the towers together. Part of the run: it may not change on resume."""


class HeadSettings(Settings):
    layers: Count = 1
    """1: a linear map. More: that many linear layers with GELU between them."""
    hidden: Count = 512
    """Width between the layers."""


class Tower(Settings):
    head: HeadSettings = HeadSettings()
    freeze: bool = False
    """Keep the encoder as it is; the head still trains."""
    checkpoint_activations: bool = False
    """Recompute the encoder's activations in the backward pass: less memory, more time."""


class ConvTower(Tower):
    kind: Literal["conv"] = "conv"
    """A small residual convolutional encoder that trains well on a CPU."""
    widths: tuple[Count, ...] = Field((32, 64, 128), min_length=1)
    """Channels of each stage; each stage halves the side."""
    depths: tuple[Amount, ...] = (1, 1, 2)
    """Residual blocks of each stage."""
    dropout: Fraction = 0.0
    """Of the pooled features, while training."""

    @model_validator(mode="after")
    def _stages_match(self) -> Self:
        if len(self.widths) != len(self.depths):
            raise ValueError(
                f"{len(self.widths)} widths and {len(self.depths)} depths; give as many"
            )
        return self


class TextTower(Tower):
    kind: Literal["conv"] = "conv"
    """A small residual convolutional encoder over the caption's tokens."""
    width: Count = 128
    layers: Amount = 1
    """Convolutions of width 3; 0 is a bag of tokens with positions."""
    dropout: Fraction = 0.0
    """Of the pooled features, while training."""


class HuggingFaceTower(Tower):
    kind: Literal["huggingface"]
    """A `transformers` model; of a two-tower model such as CLIP, this modality's half."""
    name: str | None = None
    """A pretrained model: a local folder, or a name on the hub. Or give `config`."""
    config: dict[str, Any] | None = None
    """`model_type` and that model's own keys: random weights, nothing downloaded."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.name is None) == (self.config is None):
            raise ValueError("give either `name` (pretrained) or `config` (random weights)")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("`config` needs `model_type`, such as vit, bert or clip_text_model")
        return self


class ModuleTower(Tower):
    kind: Literal["module"]
    """Your own `nn.Module`: called with images, or tokens and mask; returns [B, self.width]."""
    module: str = Field(pattern=r"^[\w.]+:\w+$")
    """`package.mod:Class`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of its constructor."""


_ANY = HuggingFaceTower | ModuleTower


class TowersSettings(Settings):
    width: Count = 256
    """D: width of the shared space."""
    image: Annotated[ConvTower | _ANY, Field(discriminator="kind")] = ConvTower()
    text: Annotated[TextTower | _ANY, Field(discriminator="kind")] = TextTower()

    @model_validator(mode="before")
    @classmethod
    def _default_kind(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {
            k: {"kind": "conv", **v} if isinstance(v, Mapping) else v for k, v in values.items()
        }


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


class TrainSettings(Settings):
    steps: Count = 1000
    """Optimizer steps of the whole run."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: fp32 weights, towers under bf16 autocast; logits and loss stay fp32."""
    zero: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage. 1 shards the optimizer over workers, 2 gradients too, 3 weights too."""
    clip: float = Field(1.0, ge=0)
    """Towers' gradient norm is clipped to this; 0 never clips."""
    max_bad_steps: Count = 10
    """Steps in a row with a loss or gradient that is not finite, each left out, that are borne."""
    on_bad_steps: Literal["stop", "rewind"] = "stop"
    """What follows them. stop: an error. rewind: back to the weights, moments and objective of the
    last checkpoint, and on with the step after the bad ones."""
    max_rewinds: Count = 3
    """rewind: after so many of them, stop all the same."""
    hang_after_s: float = Field(600.0, ge=0, le=1500)
    """Where a rank makes no progress for so many seconds (more than the slowest phase needs, the
    first step's compilation or a checkpoint's write), its watchdog names the rank that is behind,
    with its step and phase, leaves stacks in RUN/hangs, and ends the process; the launcher starts
    the group again. 0: never."""
    init_from: Path | None = None
    """A run, or one of its checkpoint folders, whose weights a new run's towers begin with; all
    else begins anew. The config of the run says which checkpoint it was."""
    init_parts: Annotated[tuple[Part, ...], BeforeValidator(_listed)] = Field(
        ("image", "text"), min_length=1
    )
    """What to take of it: a whole tower, or its encoder without the head. A text tower brings its
    tokeniser."""


class OptimizerSettings(Settings):
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW."""
    beta1: Fraction = 0.9
    beta2: Fraction = 0.98
    eps: float = Field(1e-6, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    """On matrices only: norms, biases and scales are never decayed."""
    objective_lr: float | None = Field(None, gt=0)
    """Peak learning rate of the objective's own parameters (logit scale); unset: `lr`."""


class ScheduleSettings(Settings):
    name: Literal["cosine", "constant", "wsd"] = "cosine"
    """After the warm-up: cosine to the floor; constant; or constant, then a linear decay."""
    warmup_steps: Amount = 100
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


class MonitorSettings(Settings):
    every_steps: Count = 10
    """Steps between two lines of metrics."""
    record_samples: bool = False
    """Write the numbers of the samples that each step trained on to samples.jsonl, for audits."""


class EvalSettings(Settings):
    sets: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """Folders of shards, inside `data.root` or by path; retrieval is measured on each."""
    every_steps: Amount = 0
    """0: only after the last step."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [Path(name).name for name in self.sets]
        if len(set(names)) < len(names):
            raise ValueError(f"two sets share a folder name, so a tag: {', '.join(self.sets)}")
        return self


class ClusterSettings(Settings):
    launcher: Literal["ray", "torchrun", "inline"] = "ray"
    """ray: Ray Train starts and restarts the workers. torchrun: torch's own launcher. inline:
    this process, one worker."""
    workers: Count = 2
    """Ranks, one a device."""
    threads: Amount = 0
    """CPU threads of each worker; 0: this machine's cores shared out. Pinned when the run starts,
    since gradients differ in the last bit between thread counts."""
    max_restarts: Amount = 3
    """ray, torchrun: how often a failed group of workers is started again."""
    grace_s: float = Field(120.0, gt=0)
    """After SIGTERM, SIGUSR1 or SIGUSR2 (exit code 75: start it again) or Ctrl-C (130), the step in
    progress and its checkpoint have so many seconds; then the run is left with its last
    checkpoint. Set it below what the scheduler gives (SIGKILL comes 30 s after SIGTERM from a
    torchrun of your own, and in Slurm by default)."""


class Config(Settings):
    """A run. The names of these keys are an API."""

    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    batch: BatchSettings = BatchSettings()
    towers: TowersSettings = TowersSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    train: TrainSettings = TrainSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    monitor: MonitorSettings = MonitorSettings()
    eval: EvalSettings = EvalSettings()
    cluster: ClusterSettings = ClusterSettings()

    @model_validator(mode="after")
    def _batch_is_cut(self) -> Self:
        size, micro = self.batch.global_size, self.batch.micro_size
        if size % micro:
            near = max(d for d in range(1, min(micro, size) + 1) if size % d == 0)
            raise ValueError(
                f"batch.global_size ({size}) cannot be cut into micro-batches of "
                f"batch.micro_size ({micro}); the nearest size that divides it is {near}"
            )
        if self.data.group and self.objective.label_smoothing:
            raise ValueError(
                "objective.label_smoothing spreads the target over all candidates of the batch, "
                "which data.group divides; set one of them to nothing"
            )
        if self.objective.same_id == "exclude" and (
            self.data.captions.choose == "all" or self.data.missing == "mask"
        ):
            raise ValueError(
                "objective.same_id=exclude pairs each image with one caption; it goes with neither "
                "data.captions.choose=all nor data.missing=mask"
            )
        self._refuse_unmeasured()
        if self.cluster.launcher == "inline" and self.cluster.workers != 1:
            raise ValueError(
                "cluster.launcher=inline is one worker; add cluster.workers=1, or take torchrun"
            )
        return self

    def _refuse_unmeasured(self) -> None:
        best, sets = self.checkpoint.best, [Path(name).name for name in self.eval.sets]
        if best is None:
            return
        _, measured, metric = best.split("/")
        if measured not in sets or not self.eval.every_steps:
            raise ValueError(
                f"checkpoint.best: {best} is never measured while training; name one of eval.sets "
                f"({', '.join(sets) or 'none'}) and set eval.every_steps"
            )
        if metric.endswith("median_rank"):
            raise ValueError(f"checkpoint.best: {best} is better when lower; take a recall")
