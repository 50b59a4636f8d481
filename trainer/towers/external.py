"""Tower kinds `huggingface` and `module`: encoders from `transformers`, and user modules."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gigabatch.data.decode.audio import AudioSettings
from gigabatch.data.decode.fields import ExtraModality
from gigabatch.data.decode.vectors import VectorSettings, VectorsSettings
from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.towers.base import Encoded, TowerInput, TowerKind, tower_kind


@tower_kind("image", "text")
class HuggingFaceTower(TowerKind):
    """A `transformers` model."""

    kind: Literal["huggingface"]
    """Kind of tower; huggingface: a `transformers` model. Only this modality's half of a two-tower
    model such as CLIP is used."""
    name: str | None = None
    """Pretrained `transformers` model: a local folder or a name on the Hugging Face hub. Set either
    this or `config`."""
    config: dict[str, Any] | None = None
    """Configuration of a `transformers` model with random weights: `model_type` and the model's own
    keys. Nothing is downloaded. Set either this or `name`."""
    pool: Literal["own", "mean", "first"] = "own"
    """Pooling of a `transformers` model's last states. own: the model's pooled output if it has
    one, else the mean. mean: over the real tokens, as E5 does. first: the first token."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.name is None) == (self.config is None):
            raise ValueError("set either `name` (pretrained) or `config` (random weights)")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("`config` needs `model_type`, such as vit, bert or clip_text_model")
        return self

    def build(self, data: TowerInput) -> nn.Module:
        return huggingface_encoder(self, data)

    def with_absolute_paths(self) -> Self:
        folder = Path(self.name or "").expanduser()
        if self.name is None or not folder.is_dir():
            return self  # A name on the hub, or a config.
        return self.model_copy(update={"name": str(folder.absolute())})


class OwnModuleKind(TowerKind):
    """Base class of the kinds `module`: keys that name a user's own module."""

    module: str = Field(pattern=r"^[\w.]+:\w+$")
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


class HuggingFaceEncoder(nn.Module):
    """A `transformers` model as an encoder; its last states are the tokens [B, T, token_width]."""

    def __init__(self, model: Any, slot: str, pool: str = "own") -> None:
        super().__init__()
        self.model, self.slot, self.pool = model, slot, pool
        self.width: int = model.config.hidden_size
        self.token_width = self.width

    def forward(self, x: Tensor, mask: Tensor | None = None, tokens: bool = False) -> Encoded:
        if self.slot == "image":
            out = self.model(pixel_values=x)
        else:
            out = self.model(input_ids=x, attention_mask=mask)
        states: Tensor = out.last_hidden_state
        if states.ndim == 4:  # the feature map of a convolutional network
            states = states.flatten(2).mT
        pooled = self._pool(getattr(out, "pooler_output", None), states, mask)
        return (pooled, states) if tokens else pooled

    def _pool(self, pooled: Tensor | None, states: Tensor, mask: Tensor | None) -> Tensor:
        if pooled is not None and self.pool == "own":
            return pooled.flatten(1)
        if self.pool == "first":
            return states[:, 0]
        if mask is None:
            return states.mean(1)
        real = mask.unsqueeze(-1)
        return (states * real).sum(1) / real.sum(1).clamp(min=1)

    def checkpoint_activations(self) -> None:
        # transformers 5 renamed the method. Its default is the non-reentrant kind, which the
        # two-pass step needs.
        model = self.model
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()


def huggingface_encoder(settings: HuggingFaceTower, data: TowerInput) -> HuggingFaceEncoder:
    """Build or load a `transformers` model.

    Only this modality's half of a two-tower model (CLIP, SigLIP) is built, which also leaves out
    its 0-dimensional logit scale.

    Raises:
        GigabatchError: if the model cannot be loaded or does not fit the data.
    """
    from transformers import AutoConfig

    half_name = "vision_config" if data.slot == "image" else "text_config"
    try:
        if settings.name is not None:
            config = AutoConfig.from_pretrained(settings.name)
        else:
            keys = dict(settings.config or {})
            config = AutoConfig.for_model(keys.pop("model_type"), **keys)
        half = getattr(config, half_name, config)
        model_class = _model_class(half)
        if settings.name is None:
            model = getattr(model_class, "from_config", model_class)(half)
        else:
            model = model_class.from_pretrained(settings.name, config=half)
    except (OSError, ValueError, TypeError, KeyError) as error:
        name = settings.name or (settings.config or {}).get("model_type")
        reason = str(error).strip()
        raise GigabatchError(f"{data.key}: cannot build the model {name!r}: {reason}") from error
    _check_sizes(half, data)
    # All weights get float32, the dtype of checkpoints and ZeRO; autocast lowers it in use.
    return HuggingFaceEncoder(model.to(torch.float32), data.slot, settings.pool)


def _model_class(config: Any) -> Any:
    """Return the class of a config's model; AutoModel lacks some, such as SiglipTextModel."""
    import transformers

    if type(config) in transformers.MODEL_MAPPING:
        return transformers.AutoModel
    name = type(config).__name__.removesuffix("Config") + "Model"
    return getattr(transformers, name, transformers.AutoModel)


def _check_sizes(model: Any, data: TowerInput) -> None:
    """Check the model's sizes against the data's; an error in the first batch would be vague."""
    image = data.image
    equal = {
        "image_size": (image.size, "data.image.size"),
        "num_channels": (image.channels, "data.image.channels"),
    }
    for name, (wanted, key) in equal.items():
        actual = getattr(model, name, None)
        if isinstance(actual, int) and actual != wanted:
            raise GigabatchError(
                f"{data.key}: the model's {name} is {actual}, but {key} is {wanted}; "
                f"set {key}={actual}."
            )
    tokenizer_fix, length_key = "set data.text.tokenizer to the model's", data.text_length_key
    at_least = {
        "vocab_size": (data.vocab_size, "the tokenizer has", tokenizer_fix),
        "max_position_embeddings": (data.text_length, f"{length_key} is", f"lower {length_key}"),
    }
    for name, (needed, what, fix) in at_least.items():
        actual = getattr(model, name, None)
        if isinstance(actual, int) and actual < needed:
            raise GigabatchError(
                f"{data.key}: the model's {name} is {actual}, but {what} {needed}; {fix}."
            )


def module_encoder(settings: OwnModuleKind, where: str) -> nn.Module:
    """Import `package.mod:Class` and call it with `args`.

    Args:
        settings: Import path and arguments.
        where: Config key of the import path, for error messages.

    Raises:
        GigabatchError: if the import or the call fails, or the result is not an encoder.
    """
    module_name, _, class_name = settings.module.partition(":")
    try:
        encoder: Any = getattr(importlib.import_module(module_name), class_name)(**settings.args)
    except (ImportError, AttributeError) as error:
        raise GigabatchError(
            f"{where}: {settings.module!r} cannot be imported: {error}. Install it, or add its "
            "folder to PYTHONPATH, on every node."
        ) from error
    except TypeError as error:
        raise GigabatchError(f"{where}: {class_name}(**args) failed: {error}") from error
    if not isinstance(encoder, nn.Module) or not isinstance(getattr(encoder, "width", None), int):
        raise GigabatchError(
            f"{where}: {settings.module!r} must be an nn.Module with an integer attribute `width`, "
            "the size of the vectors that it returns."
        )
    return encoder
