"""The towers of modalities beyond image and text, and what they read of a sample."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from gigabatch.data.decode.audio import AudioSettings
from gigabatch.data.decode.fields import ExtraModality
from gigabatch.data.decode.vectors import VectorSettings, VectorsSettings
from gigabatch.data.text.captions import ExtraText
from gigabatch.trainer.config.tower import (
    HuggingFaceTower,
    ModuleTower,
    OwnModule,
    Stages,
    TextTower,
    Tower,
)
from gigabatch.trainer.fields import Amount, Count, Fraction

Numbers = float | tuple[float, ...]


class AudioTower(Tower, AudioSettings, Stages):
    kind: Literal["audio"]
    """Sound (wav, flac, ogg or mp3): a small convolutional encoder of its log-mel spectrogram."""
    mels: Count = 64
    """Bands of the spectrogram, evenly spaced on the mel scale from 0 to rate / 2."""
    window_ms: float = Field(25.0, gt=0)
    """Milliseconds of sound that one column of the spectrogram sees."""
    hop_ms: float = Field(10.0, gt=0)
    """Milliseconds from one window to the next."""
    dropout: Fraction = 0.0
    """Of the pooled features, while training."""


class Standardised(VectorSettings):
    """A vector's numbers, less `mean`, over `std`."""

    mean: Numbers = 0.0
    """Subtracted from a vector: one number, or `size` of them."""
    std: Annotated[float, Field(gt=0)] | tuple[Annotated[float, Field(gt=0)], ...] = 1.0
    """Divides what remains: one number, or `size` of them."""

    @model_validator(mode="after")
    def _as_many_as_numbers(self) -> Self:
        for name, given in (("mean", self.mean), ("std", self.std)):
            if isinstance(given, tuple) and len(given) != self.size:
                raise ValueError(f"{name}: {len(given)} numbers for a vector of size {self.size}")
        return self


class VectorTower(Tower, Standardised):
    kind: Literal["vector"]
    """A vector of numbers, such as a row of a table: a residual multi-layer perceptron."""
    width: Count = 128
    layers: Amount = 2
    """Residual blocks; 0 is a linear map."""
    dropout: Fraction = 0.0
    """In the blocks, while training."""


class VectorsTower(Tower, Standardised, VectorsSettings):
    kind: Literal["set", "sequence"]
    """Several vectors: a small transformer; a sequence's vectors also have positions."""
    width: Count = 128
    layers: Amount = 1
    """Transformer blocks; 0 leaves each vector by itself until they are pooled."""
    heads: Count = 4
    """Of each block's attention."""
    pool: Literal["mean", "attention"] = "mean"
    """How the vectors become one. attention: a mean whose weights are learnt."""
    dropout: Fraction = 0.0
    """In the blocks, while training."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.layers and self.width % self.heads:
            raise ValueError(f"width ({self.width}) cannot be cut into heads ({self.heads})")
        return self


class ReadAudio(AudioSettings):
    kind: Literal["audio"]
    """Called with waves float32 [B, rate * seconds] and their real lengths int64 [B]."""


class ReadVector(VectorSettings):
    kind: Literal["vector"]
    """Called with float32 [B, size]."""


class ReadVectors(VectorsSettings):
    kind: Literal["set", "sequence"]
    """Called with float32 [B, length, size] and a mask bool [B, length] of what is real."""


class OtherModuleTower(Tower, OwnModule):
    kind: Literal["module"]
    """Your own `nn.Module`, called with what `reads` says; returns [B, self.width]."""
    reads: Annotated[ReadAudio | ReadVector | ReadVectors, Field(discriminator="kind")]


def _conv(value: Any) -> Any:
    return {"kind": "conv", **value} if isinstance(value, dict) else value


OfText = Annotated[
    Annotated[TextTower | HuggingFaceTower | ModuleTower, Field(discriminator="kind")],
    BeforeValidator(_conv),
]


class OtherText(ExtraText):
    kind: Literal["text"]
    """A further text, such as a query beside its passage, by the run's tokeniser."""
    share: Literal["text"] | None = None
    """text: read by the tower of the captions, head and all. Or give `tower`."""
    tower: OfText | None = None
    """A tower of its own, described as `towers.text`."""

    @model_validator(mode="after")
    def _one_tower(self) -> Self:
        if (self.share is None) == (self.tower is None):
            raise ValueError(
                "give either `share: text` (the same weights) or `tower`, such as {kind: conv}"
            )
        return self


OtherTower = Annotated[
    AudioTower | VectorTower | VectorsTower | OtherText | OtherModuleTower,
    Field(discriminator="kind"),
]


def what_is_read(tower: Tower | OtherText) -> ExtraModality:
    """How the samples of a tower are decoded."""
    found = tower.reads if isinstance(tower, OtherModuleTower) else tower
    assert isinstance(found, ExtraModality)
    return found
