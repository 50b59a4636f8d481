"""Base classes of the objectives' settings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from gigabatch.data.decode.vectors import VectorSettings
from gigabatch.data.settings import Settings
from gigabatch.trainer.fields import Count
from gigabatch.trainer.taps import parse_tap

if TYPE_CHECKING:
    from gigabatch.trainer.config import Config


class ObjectiveSettings(Settings):
    """Settings of any objective. The methods return what the rest of a run must provide."""

    name: str

    def resolved(self) -> ObjectiveSettings:
        """Return the settings that describe the objective; for a user's module, those of the class
        that it names."""
        return self

    def singles(self) -> tuple[SingleSettings, ...]:
        """Return the settings of all terms of a sum; for any other objective, only its own."""
        raise TypeError(f"{type(self).__name__} must define singles()")

    def columns(self) -> tuple[str, ...]:
        """Return the fields of the samples' json that the objective reads."""
        return ()

    def numbers(self) -> tuple[str, ...]:
        """Return those of `columns()` that must be numbers."""
        return ()

    def flags(self) -> tuple[str, ...]:
        """Return those of `columns()` that must be flags: true, false, 1 or 0."""
        return ()

    def ordered_texts(self) -> tuple[str, ...]:
        """Return the texts of which a sample's first is its positive, and others are negatives."""
        return ()

    def positives_field(self) -> str | None:
        """Return the field whose equal values mark positives, if one is set."""
        return None

    def vectors(self) -> dict[str, VectorSettings]:
        """Return settings of the samples' vectors that only the objective reads, by name."""
        return {}

    def momentum_tower(self) -> float | None:
        """Return the momentum of the momentum tower, or None if none is needed."""
        return None

    def retrieval_score(self) -> Literal["pair", "product"]:
        """Return how retrieval scores taps: "pair", two at a time; "product", all together."""
        return "pair"

    def user_modules(self) -> tuple[str, ...]:
        """Return the user's own classes that the settings name, as `package.mod:Class`."""
        return ()

    def for_any_device(self) -> ObjectiveSettings:
        """Return settings of the same objective that work without a GPU."""
        return self

    def check(self, config: Config) -> None:
        """Check the objective against the rest of the config.

        Raises:
            ValueError: If it cannot work with the config.
        """


class SingleSettings(ObjectiveSettings):
    """Settings of one objective, as opposed to a sum."""

    takes_groups: ClassVar[bool] = False
    """Whether the objective can limit comparisons to samples of one group (`data.group`)."""
    takes_several_captions: ClassVar[bool] = False
    """Whether the objective accepts several texts per sample (`data.captions.choose: all`)."""

    taps: tuple[str, ...]

    def singles(self) -> tuple[SingleSettings, ...]:
        return (self,)

    def check(self, config: Config) -> None:
        if config.data.group and not self.takes_groups:
            raise ValueError(
                f"data.group: objective {self.name} compares all samples of a mixed batch; choose "
                "an objective with the key `within`, such as infonce or queue"
            )
        reads_text = "text" in {parse_tap(tap).modality for tap in self.taps}
        if config.data.captions.choose == "all" and reads_text and not self.takes_several_captions:
            raise ValueError(
                f"objective.name={self.name} takes one caption per sample; set "
                "data.captions.choose=random"
            )


class EngineSettings(SingleSettings):
    """Settings of an objective that is computed from the scores of all pairs."""

    gather_mode: Literal["gather", "ring"] = "gather"
    """How workers exchange embeddings. gather: each worker holds all of them. ring: they are passed
    from worker to worker, so that each needs memory for a few workers' shares only. The loss is the
    same up to rounding."""
    backend: Literal["tiled", "triton"] = "tiled"
    """Implementation of the loss. tiled: plain PyTorch on any device. triton: fused kernels for
    NVIDIA GPUs, not yet run on one by this project."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the embeddings in the loss. bf16 lets its matrix products use a GPU's tensor cores;
    logits and their sums stay fp32."""

    @model_validator(mode="before")
    @classmethod
    def _drop_unused_cache(cls, values: Any) -> Any:
        """Accept `cache_mib: 0` from older configs, in which every objective had this key."""
        unused = "cache_mib" not in cls.model_fields
        if unused and isinstance(values, dict) and values.get("cache_mib") == 0:
            return {key: value for key, value in values.items() if key != "cache_mib"}
        return values

    def for_any_device(self) -> ObjectiveSettings:
        return self.model_copy(update={"backend": "tiled"})


class CachedSettings(EngineSettings):
    """Settings of an objective whose backward pass can reuse the scores of the forward pass."""

    cache_mib: int = Field(0, ge=0)
    """MiB of scores to keep for the backward pass. If all scores fit, a step takes three matrix
    products instead of four; results are bit-identical. All scores take 4 N x N / workers bytes."""


class ScaledSettings(EngineSettings):
    """Settings of a loss over scaled logits."""

    init_logit_scale: float = Field(14.3, gt=0)
    """Initial logit scale (inverse temperature)."""
    scale_max: float = Field(100.0, gt=0)
    """Largest logit scale in the forward pass."""
    learn_scale: bool = True
    """Train the logit scale; false keeps its initial value."""

    @model_validator(mode="after")
    def _check_scale(self) -> Self:
        if self.init_logit_scale > self.scale_max:
            raise ValueError(
                f"init_logit_scale ({self.init_logit_scale}) is above scale_max ({self.scale_max})"
            )
        return self


class WidthsSettings(SingleSettings):
    """Settings of a loss whose vectors may be truncated (Matryoshka representations)."""

    widths: tuple[Count, ...] = ()
    """Matryoshka widths. [64, 128, 256] also trains the first 64 and the first 128 coordinates as
    vectors: the loss is the mean over these widths, each with the truncated vectors normalized
    again. Widths must increase, and the last must be `towers.width` = D. Cost: sum(widths) / D
    times the matrix passes."""

    @model_validator(mode="after")
    def _check_widths(self) -> Self:
        if list(self.widths) != sorted(set(self.widths)):
            raise ValueError(f"widths must increase strictly; got {self.widths}")
        return self

    def check(self, config: Config) -> None:
        if self.widths and self.widths[-1] != config.towers.width:
            raise ValueError(
                f"objective.widths: the last must be towers.width={config.towers.width}, not "
                f"{self.widths[-1]}; coordinates beyond it would never be trained"
            )
        inner = [tap for tap in self.taps if parse_tap(tap).output == "encoder"]
        if self.widths and inner:
            raise ValueError(
                f"objective.widths: {inner[0]} is read before the head and does not have "
                "towers.width coordinates; use taps after the head"
            )
        super().check(config)


class TeacherSettings(VectorSettings):
    """A frozen model's vector of each sample, used to leave out near-duplicates."""

    threshold: float = Field(0.95, ge=-1, le=1)
    """Cosine of two samples' vectors above which they are not negatives of each other."""

    @property
    def name(self) -> str:
        """Name of the vectors in `meta`, distinct from the name of any json field."""
        return f"teacher: {', '.join(self.fields) or self.member}"


def named_fields(*names: str | None) -> tuple[str, ...]:
    """Return the names that are not empty, in order and without repetitions."""
    return unique(name for name in names if name)


def unique(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names without repetitions, in order."""
    return tuple(dict.fromkeys(names))
