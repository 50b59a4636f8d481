"""Tower kind `huggingface`: encoders from `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.towers.base import Encoded, TowerInput, TowerKind, reason, tower_kind


@tower_kind("image", "text")
class HuggingFaceTower(TowerKind):
    """A `transformers` model."""

    kind: Literal["huggingface"]
    """Kind of tower; huggingface: a `transformers` model. Only this modality's half of a two-tower
    model such as CLIP is used."""
    name: str | None = None
    """Pretrained `transformers` model: a local folder or a name on the Hugging Face hub. It brings
    its image processor's values or its tokenizer, where keys of `data` are unset. Set either this
    or `config`."""
    config: dict[str, Any] | None = None
    """Configuration of a `transformers` model with random weights: `model_type` and the model's own
    keys. Nothing is downloaded. Set either this or `name`."""
    pool: Literal["own", "mean", "first"] = "own"
    """Pooling of a `transformers` model's last states. own: the model's pooled output if it has
    one, else the mean. mean: over the real tokens, as E5 does. first: the first token."""
    attend_padding: bool | None = None
    """Let a `transformers` text model attend to padding too, as SigLIP's are trained; true passes
    it no mask. Unset: true for SigLIP in a new run, whose config.yaml records it; else false."""

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


class HuggingFaceEncoder(nn.Module):
    """A `transformers` model as an encoder; its last states are the tokens [B, T, token_width].

    Args:
        model: The model.
        slot: `image` or `text`.
        width: Width of its pooled output and of its states.
        pool: See `HuggingFaceTower.pool`.
        attend_padding: See `HuggingFaceTower.attend_padding`.
    """

    def __init__(
        self, model: Any, slot: str, width: int, pool: str = "own", attend_padding: bool = False
    ) -> None:
        super().__init__()
        self.model, self.slot, self.pool = model, slot, pool
        self.attend_padding = attend_padding
        self.width = self.token_width = width

    def forward(self, x: Tensor, mask: Tensor | None = None, tokens: bool = False) -> Encoded:
        if self.slot == "image":
            out = self.model(pixel_values=x)
        elif self.attend_padding:
            out = self.model(input_ids=x)
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
    its 0-dimensional logit scale, and only the encoder of an encoder-decoder model (T5, BART).

    Raises:
        GigabatchError: if the model cannot be loaded or does not fit the data.
    """
    if data.slot == "image" and settings.attend_padding is not None:
        raise GigabatchError(f"{data.key}.attend_padding: images have no padding. Remove the key.")
    half = half_config(settings, data.slot, data.key)
    call = "finding its class"
    try:
        model_class = _model_class(half)
        call = f"building {model_class.__name__}"
        if settings.name is None:
            model = getattr(model_class, "from_config", model_class)(half)
        else:
            model = model_class.from_pretrained(settings.name, config=half)
    except Exception as error:  # a broken dependency of `transformers` raises any type
        raise _cannot_build(settings, data.key, call, error) from error
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()  # the decoder would need separate texts
    _check_sizes(half, data)
    # All weights get float32, the dtype of checkpoints and ZeRO; autocast lowers it in use.
    model = model.to(torch.float32)
    width = _width(model, data)
    return HuggingFaceEncoder(model, data.slot, width, settings.pool, bool(settings.attend_padding))


def half_config(settings: HuggingFaceTower, slot: str, tower_key: str) -> Any:
    """Return the `transformers` config of a tower: of its half if the model has two.

    Raises:
        GigabatchError: if it cannot be loaded.
    """
    try:
        from transformers import AutoConfig

        if settings.name is not None:
            config = AutoConfig.from_pretrained(settings.name)
        else:
            keys = dict(settings.config or {})
            config = AutoConfig.for_model(keys.pop("model_type"), **keys)
    except Exception as error:  # a broken dependency of `transformers` raises any type
        raise _cannot_build(settings, tower_key, "loading its config", error) from error
    return getattr(config, "vision_config" if slot == "image" else "text_config", config)


def _cannot_build(
    settings: HuggingFaceTower, tower_key: str, call: str, error: Exception
) -> GigabatchError:
    name = settings.name or (settings.config or {}).get("model_type")
    key = f"{tower_key}.{'name' if settings.name else 'config'}"
    return GigabatchError(
        f"{key}: cannot build the model {name!r}: {call} failed: {reason(error)}. Fix {key}, or "
        "what the reason names."
    )


def _model_class(config: Any) -> Any:
    """Return the class of a config's model; AutoModel lacks some, such as SiglipTextModel."""
    import transformers

    if getattr(config, "is_encoder_decoder", False):
        # Loads the encoder alone; the models that it lacks are built whole and then halved.
        encoders = transformers.MODEL_FOR_TEXT_ENCODING_MAPPING
        return encoders.get(type(config), transformers.AutoModel)
    if type(config) in transformers.MODEL_MAPPING:
        return transformers.AutoModel
    name = type(config).__name__.removesuffix("Config") + "Model"
    return getattr(transformers, name, transformers.AutoModel)


def _width(model: Any, data: TowerInput) -> int:
    """Return the width of a model's states; convolutional models often do not name it."""
    width = getattr(model.config, "hidden_size", None)
    widths = getattr(model.config, "hidden_sizes", None)
    if isinstance(width, int):
        return width
    if isinstance(widths, list | tuple) and widths:
        return int(widths[-1])
    if data.slot != "image":
        raise GigabatchError(
            f"{data.key}: the config of {type(model).__name__} has no hidden_size, so the width of "
            "its vectors is unknown. Use a different model."
        )
    image, training = data.image, model.training
    pixels = torch.zeros(1, image.channels, image.size, image.size)
    try:
        # In evaluation mode, so that batch norms do not count the zeros.
        with torch.no_grad():
            states = model.eval()(pixel_values=pixels).last_hidden_state
    except Exception as error:
        raise GigabatchError(
            f"{data.key}: calling {type(model).__name__} with an image of {image.size} x "
            f"{image.size} pixels failed: {reason(error)}."
        ) from error
    model.train(training)
    return int(states.shape[1] if states.ndim == 4 else states.shape[-1])


def _check_sizes(model: Any, data: TowerInput) -> None:
    """Check the model's sizes against the data's; an error in the first batch would be vague."""
    image = data.image
    equal = {
        "image_size": (image.size, "data.image.size"),
        "num_channels": (image.channels, "data.image.channels"),
    }
    for name, (wanted, key) in equal.items():
        actual = getattr(model, name, None)
        if name == "image_size" and not isinstance(getattr(model, "hidden_size", None), int):
            continue  # a convolutional network reads every size
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
