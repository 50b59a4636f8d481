"""What is minimised: one description for each objective, told apart by `name`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from gigabatch.data.decode.vectors import VectorSettings
from gigabatch.data.settings import Settings
from gigabatch.trainer.config.additions import BarlowSettings, BYOLSettings, SwAVSettings
from gigabatch.trainer.fields import Amount, Count, Fraction, Pair, Tap


class ObjectiveSettings(Settings):
    """What every objective over scores has."""

    gather_mode: Literal["gather", "ring"] = "gather"
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


class ScaledSettings(ObjectiveSettings):
    """Of a loss of logits."""

    init_logit_scale: float = Field(14.3, gt=0)
    """The logit scale (inverse temperature) at the start."""
    scale_max: float = Field(100.0, gt=0)
    """The logit scale is clamped to this in the forward pass."""
    learn_scale: bool = True
    """Whether it is learnt."""

    @model_validator(mode="after")
    def _scale_fits(self) -> Self:
        if self.init_logit_scale > self.scale_max:
            raise ValueError(
                f"init_logit_scale ({self.init_logit_scale}) is above scale_max ({self.scale_max})"
            )
        return self


class Nested(Settings):
    """Of a loss whose vectors may be cut short."""

    widths: tuple[Count, ...] = ()
    """Matryoshka: [64, 128, 256] makes vectors of which the first 64 coordinates are vectors of
    their own. The loss is the mean over these widths of that of the first coordinates, made unit
    vectors again; rising up to `towers.width` = D. Cost: sum(widths) / D times the passes."""

    @model_validator(mode="after")
    def _widths_rise(self) -> Self:
        if list(self.widths) != sorted(set(self.widths)):
            raise ValueError(f"widths must rise, each from the one before, not {self.widths}")
        return self


class TeacherSettings(VectorSettings):
    """A frozen model's vector of each sample, and what it is for."""

    threshold: float = Field(0.95, ge=-1, le=1)
    """Two samples whose vectors' cosine is above this are no negatives of each other."""

    @property
    def name(self) -> str:
        """That of its vectors; no field of a json is called so."""
        return f"teacher: {', '.join(self.fields) or self.member}"


class InfoNCESettings(ScaledSettings, Nested):
    name: Literal["infonce"] = "infonce"
    """CLIP's symmetric InfoNCE, with any number of positives."""
    taps: Pair = ("image", "text")
    """What is compared with what."""
    positives: str | None = None
    """A field of the samples' json; samples that share it are right answers to each other.
    Unset: a caption's right answer is its own image."""
    same_id: Literal["positive", "exclude"] = "positive"
    """What other samples of the same `positives` field are: right answers too, or left out of the
    loss altogether, neither right nor wrong."""
    within: str | None = None
    """A field of the samples' json: only samples that share it are compared, so that the loss
    cannot be lowered by telling languages or domains apart. Unset: `data.group`."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread evenly over all candidates."""
    teacher: TeacherSettings | None = None
    """Vectors of the samples by a frozen model, which tell what is too alike to be a negative:
    `{fields: [embedding], size: 384, threshold: 0.95}` from the json, or `member: teacher.npy`.
    With data.missing=mask a sample without one is a negative of all others."""

    @model_validator(mode="after")
    def _all_are_candidates(self) -> Self:
        if self.teacher and self.label_smoothing:
            raise ValueError(
                "label_smoothing spreads the target over all candidates of the batch, some of which"
                " `teacher` leaves out; set one of them to nothing"
            )
        return self


class SigLIPSettings(ObjectiveSettings, Nested):
    name: Literal["siglip"]
    """Every pair of the batch is a question of its own: does this caption belong to this image?"""
    taps: Pair = ("image", "text")
    """What is compared with what."""
    positives: str | None = None
    """A field of the samples' json; pairs of different samples that share it are left out."""
    init_logit_scale: float = Field(10.0, gt=0)
    """The logit scale (inverse temperature) at the start."""
    scale_max: float = Field(200.0, gt=0)
    """The logit scale is clamped to this in the forward pass."""
    bias: float = -10.0
    """The logits' learnt bias at the start: nearly all pairs are wrong ones."""


class SupConSettings(ScaledSettings, Nested):
    name: Literal["supcon"]
    """Samples of one label attract each other, over one tap or several; without a label, views of
    one sample do (SimCLR)."""
    taps: tuple[Tap, ...] = Field(("image", "image@1"), min_length=1)
    """Vectors that stand side by side: views, modalities."""
    positives: str | None = None
    """The field of the samples' json that is the label. Unset: the sample itself."""


class SogCLRSettings(ObjectiveSettings):
    name: Literal["sogclr"]
    """A contrastive loss against the whole data set, by a running estimate for each sample: small
    batches lose their bias."""
    taps: Pair = ("image", "text")
    """What is compared with what. Two views of one modality, such as `[image, image@1]`: each of
    both against both views of all other samples, with one estimate a sample."""
    positives: str | None = None
    """A field of the samples' json; samples that share it are no negatives of each other."""
    temperatures: Literal["fixed", "shared", "individual"] = "fixed"
    """fixed: SogCLR, FastCLIP-v1. shared: one learnt temperature, FastCLIP-v3. individual: one
    learnt for each sample and side, iSogCLR, FastCLIP-v2."""
    temperature: float = Field(0.07, gt=0)
    """At the start."""
    temperature_min: float = Field(0.01, gt=0)
    """shared, individual: none falls below."""
    temperature_max: float = Field(1.0, gt=0)
    """shared, individual: none rises above."""
    rho: float = Field(6.5, ge=0)
    """What a temperature costs: the larger, the smaller learnt temperatures become."""
    gamma: float = Field(0.9, gt=0, le=1)
    """Share of the batch's own estimate in a sample's running one."""
    gamma_epochs: Amount = 0
    """Epochs over which that share falls from 1 to `gamma`, as a cosine; 0: always `gamma`."""
    temperature_lr: float = Field(0.01, gt=0)
    """individual: the step of a sample's temperature."""
    temperature_momentum: Fraction = 0.9
    """individual: of the temperatures' gradients."""

    @model_validator(mode="after")
    def _temperatures_fit(self) -> Self:
        if not self.temperature_min <= self.temperature <= self.temperature_max:
            raise ValueError("temperature must lie between temperature_min and temperature_max")
        return self


class LateInteractionSettings(ScaledSettings, Nested):
    name: Literal["late_interaction"]
    """Token by token: each token of one side is scored by its best match on the other (FILIP)."""
    taps: Pair = ("image.tokens", "text.tokens")
    """What is compared with what."""
    symmetric: bool = True
    """Both ways, each with the score of its own tokens (FILIP); else the first tap's alone, which
    asks (ColBERT, with the queries first)."""


class QueueSettings(ScaledSettings):
    name: Literal["queue"]
    """InfoNCE whose negatives are the batch and a queue of earlier samples, as a slowly moving
    copy of the towers saw them (MoCo)."""
    taps: Pair = ("image", "text")
    """What is compared with what."""
    positives: str | None = None
    """A field of the samples' json; samples that share it are right answers to each other, and
    left out of each other's queues."""
    within: str | None = None
    """A field of the samples' json: only samples that share it are compared, so that each language
    or domain has a queue of its own. Unset: `data.group`."""
    size: Count = 4096
    """Samples in the queue."""
    momentum: Fraction = 0.999
    """Of the copy's weights, a step; 0.99 for short runs. Far lower, the queue is stale."""


class NoisySettings(ScaledSettings):
    name: Literal["noisy"]
    """InfoNCE for pairs of which many do not belong together: once an epoch a mixture of two
    Gaussians splits the samples' losses, and each counts by how likely it is clean."""
    taps: Pair = ("image", "text")
    """What is compared with what."""
    warmup_epochs: Count = 1
    """Epochs before the first split, in which all count alike."""
    head: Literal["softmax", "hinge"] = "softmax"
    """softmax: InfoNCE weighted by cleanness. hinge: against the hardest negative, with a margin
    that shrinks with it (mean over all negatives until the first split)."""
    margin: float = Field(0.2, gt=0)
    """hinge: of a clean pair."""
    curve: float = Field(10.0, gt=1)
    """hinge: a pair clean with probability w has the margin's share (curve^w - 1) / (curve - 1)."""


class SymileSettings(ScaledSettings):
    name: Literal["symile"]
    """Three taps or more at once: the sum over coordinates of the product of all vectors, which
    also sees what no two of them tell."""
    taps: tuple[Tap, ...] = Field(min_length=2, max_length=8)
    """The modalities; each asks in turn."""
    keys: Literal["paired", "shuffled", "all"] = "paired"
    """What a tap's vectors are compared with. paired: the other samples' products; shuffled:
    products of other taps' vectors, each shuffled by itself; all: every combination, N^(taps - 1)
    of them."""
    init_logit_scale: float = Field(14.3, gt=0)
    """The logit scale at the start; products of several unit vectors are small."""
    scale_max: float = Field(10_000.0, gt=0)
    """The logit scale is clamped to this in the forward pass."""


class HardNegativesSettings(ScaledSettings, Nested):
    name: Literal["hard_negatives"]
    """InfoNCE with negatives made for the purpose, weighted by their relation to the row. With
    data.captions.choose=all a sample's first caption is right, and its others are such negatives.
    Or samples come in pairs, an original and a changed one (reversed in time, say)."""
    taps: Pair = ("image", "text")
    """What is compared with what."""
    pair: str | None = None
    """A field of the samples' json that an original and its changed one share; with `changed`."""
    changed: str | None = None
    """A field of the samples' json: 0 for an original, 1 for a changed one."""
    own_weight: float = Field(1.0, ge=0)
    """How much a row's own changed counterpart counts among its negatives."""
    other_weight: float = Field(1.0, ge=0)
    """How much the changed counterparts of others count; 0 leaves them out."""
    changed_weight: float = Field(1.0, ge=0)
    """How much the row of a changed sample counts in the mean; an original counts 1."""

    @model_validator(mode="after")
    def _both_columns(self) -> Self:
        if (self.pair is None) != (self.changed is None):
            raise ValueError("give both `pair` and `changed`, or neither")
        return self


class LabelDistanceSettings(ScaledSettings, Nested):
    name: Literal["label_distance"]
    """SupCon for continuous labels: samples of one label attract each other, and the farther
    another label is, the more it counts as a negative."""
    taps: tuple[Tap, ...] = Field(("image", "image@1"), min_length=1)
    """Vectors that stand side by side: views, modalities."""
    label: str
    """A field of the samples' json that holds a number."""
    distance: float = Field(1.0, ge=0)
    """A negative weighs 1 + distance |y_i - y_j|."""
    mixed_negatives: bool = False
    """Further negatives, between a row and each of another label, and nearer to the row; constants.
    A pass more for each that the loss takes."""
    mixed_positives: Amount = 0
    """Further positives of a row, this many: between two rows drawn from either side of its label;
    constants."""
    window: float = Field(5.0, gt=0)
    """mixed_positives: how far from the row's label theirs may be, in the label's units."""


Single = (
    InfoNCESettings
    | SigLIPSettings
    | SupConSettings
    | SogCLRSettings
    | LateInteractionSettings
    | QueueSettings
    | NoisySettings
    | SymileSettings
    | HardNegativesSettings
    | LabelDistanceSettings
    | BarlowSettings
    | BYOLSettings
    | SwAVSettings
)


def _named(value: Any) -> Any:
    return {"name": "infonce", **value} if isinstance(value, dict) else value


AnySingle = Annotated[Annotated[Single, Field(discriminator="name")], BeforeValidator(_named)]


class SumSettings(Settings):
    name: Literal["sum"]
    """A weighted sum of objectives."""
    terms: tuple[AnySingle, ...] = Field(min_length=1)
    """The objectives, each described as if it were alone."""
    weights: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """One for each of `terms`; none: all count 1."""

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        if self.weights and len(self.weights) != len(self.terms):
            raise ValueError(f"{len(self.weights)} weights for {len(self.terms)} terms")
        return self

    @model_validator(mode="after")
    def _one_teacher(self) -> Self:
        asked = {m for term in self.terms if (m := getattr(term, "momentum", None)) is not None}
        if len(asked) > 1:
            raise ValueError(f"there is one momentum tower; got momenta {sorted(asked)}")
        return self


AnyObjective = Annotated[
    Annotated[Single | SumSettings, Field(discriminator="name")], BeforeValidator(_named)
]


def singles(settings: Single | SumSettings) -> Iterator[Single]:
    """The objectives of a sum, or the one there is."""
    yield from settings.terms if isinstance(settings, SumSettings) else (settings,)


def taps_of(settings: Single | SumSettings) -> tuple[str, ...]:
    """All taps that the objectives read, each once."""
    return tuple(dict.fromkeys(tap for each in singles(settings) for tap in each.taps))


def positives_of(settings: Single | SumSettings) -> str | None:
    """The field that right answers share, by the first objective that names one."""
    named = (getattr(each, "positives", None) for each in singles(settings))
    return next(filter(None, named), None)


def columns_of(settings: Single | SumSettings) -> tuple[str, ...]:
    """The fields of the samples' json that the objectives read."""
    named = (
        getattr(each, key, None)
        for each in singles(settings)
        for key in ("positives", "within", "pair", "changed", "label")
    )
    return tuple(dict.fromkeys(name for name in named if name))


def vectors_of(settings: Single | SumSettings) -> dict[str, VectorSettings]:
    """The vectors of the samples, not of a tower, that the objectives read, by name."""
    teachers = (getattr(each, "teacher", None) for each in singles(settings))
    return {teacher.name: teacher for teacher in teachers if teacher is not None}
