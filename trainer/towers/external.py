"""Tower kinds `module`: user modules."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

from gigabatch.data.decode.audio import AudioSettings
from gigabatch.data.decode.fields import ExtraModality
from gigabatch.data.decode.vectors import VectorSettings, VectorsSettings
from gigabatch.data.errors import GigabatchError
from gigabatch.data.imports import OBJECT_PATH, import_object
from gigabatch.trainer.towers.base import TowerInput, TowerKind, reason, tower_kind


class OwnModuleKind(TowerKind):
    """Base class of the kinds `module`: keys that name a user's own module."""

    module: str = Field(pattern=OBJECT_PATH)
    """Import path of your own `nn.Module`, as `package.mod:Class`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for the constructor of your own module."""

    def build(self, data: TowerInput) -> nn.Module:
        return module_encoder(self, f"{data.key}.module")

    def user_modules(self) -> tuple[str, ...]:
        return (self.module,)


@tower_kind("image", "text")
class ModuleTower(OwnModuleKind):
    """Your own module over images or tokens."""

    kind: Literal["module"]
    """Kind of tower; module: your own `nn.Module`, called with images, or with tokens and mask.
    It returns [B, width] and has the integer attribute `width`."""


class ReadAudio(AudioSettings):
    """Input of your own module: audio."""

    kind: Literal["audio"]
    """Input of your own module; audio: waves float32 [B, rate * seconds] and their real lengths
    int64 [B]."""


class ReadVector(VectorSettings):
    """Input of your own module: a vector per sample."""

    kind: Literal["vector"]
    """Input of your own module; vector: float32 [B, size]."""


class ReadVectors(VectorsSettings):
    """Input of your own module: several vectors per sample."""

    kind: Literal["set", "sequence"]
    """Input of your own module; set, sequence: float32 [B, length, size] and a mask bool
    [B, length], true for real vectors."""


@tower_kind("more")
class ExtraModuleTower(OwnModuleKind):
    """Your own module over audio or vectors."""

    kind: Literal["module"]
    """Kind of extra tower; module: your own `nn.Module`, called with what `reads` describes. It
    returns [B, width] and has the integer attribute `width`."""
    reads: Annotated[ReadAudio | ReadVector | ReadVectors, Field(discriminator="kind")]

    def decode_settings(self) -> ExtraModality:
        return self.reads


def module_encoder(settings: OwnModuleKind, where: str) -> nn.Module:
    """Import `package.mod:Class` and call it with `args`.

    Args:
        settings: Import path and arguments.
        where: Config key of the import path, for error messages.

    Raises:
        GigabatchError: if the import or the call fails, or the result is not an encoder.
    """
    encoder_class = import_object(settings.module, where)
    class_name = settings.module.partition(":")[2]
    try:
        encoder: Any = encoder_class(**settings.args)
    except Exception as error:
        arguments = ", ".join(f"{name}={value!r}" for name, value in settings.args.items())
        raise GigabatchError(
            f"{where}: {class_name}({arguments}) failed: {reason(error)}. Set "
            f"{where.removesuffix('.module')}.args to its arguments, or fix the class."
        ) from error
    if not isinstance(encoder, nn.Module) or not isinstance(getattr(encoder, "width", None), int):
        raise GigabatchError(
            f"{where}: {settings.module!r} must be an nn.Module with an integer attribute `width`, "
            "the size of the vectors that it returns."
        )
    return encoder
