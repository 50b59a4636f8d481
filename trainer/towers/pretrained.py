"""Adoption of what pretrained towers were trained with: pixels, tokenizer, mask convention.

It happens once, when a run is created. The adopted values are written into the run's config.yaml,
so a later change of the model's files does not change the run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from gigabatch.data.decode.images import ImageSettings
from gigabatch.data.errors import GigabatchError
from gigabatch.data.text.tokenizer import named_tokenizer
from gigabatch.trainer.towers.base import reason
from gigabatch.trainer.towers.huggingface import HuggingFaceTower, half_config

if TYPE_CHECKING:  # The config imports the tower kinds; this avoids an import cycle.
    from gigabatch.trainer.config import Config

log = logging.getLogger(__name__)
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of the filters that `data.image.interpolation` has."""
ATTENDS_PADDING = ("siglip_text_model", "siglip2_text_model")
"""Model types whose texts were padded to the full length, without a mask, in pretraining."""


def adopt_pretrained(config: Config) -> Config:
    """Return the config of a new run with the unset keys that its pretrained towers determine.

    `data.image` takes the values of the image tower's processor, `data.text.tokenizer` is the text
    towers' own, and `attend_padding` is true for SigLIP. What is adopted is logged; keys that are
    set to other values are kept, with a warning.

    Raises:
        GigabatchError: if a model's files cannot be read, a text tower has no tokenizer, or two
            text towers have different ones.
    """
    image = config.towers.image
    if "image" in config.modalities and isinstance(image, HuggingFaceTower) and image.name:
        config = _adopt_pixels(config, image.name)
    return _adopt_texts(config)


def _adopt_pixels(config: Config, name: str) -> Config:
    processor = read_image_processor(name, "towers.image.name")
    if processor is None:
        log.warning(
            "towers.image.name: %s has no image processor (%s), so data.image keeps its values. "
            "Compare them with the model's training.",
            name, PROCESSOR_FILES[0],
        )  # fmt: skip
        return config
    values = processor_settings(processor, f"towers.image.name: {name}")
    image = _adopted(config.data.image, values, name)
    return config.model_copy(update={"data": config.data.model_copy(update={"image": image})})


def read_image_processor(name: str, key: str) -> dict[str, Any] | None:
    """Return the settings of a model's image processor, or None if it has none.

    The JSON is parsed without the processor's class, which needs torchvision.

    Args:
        name: Folder of the model, or its name on the Hugging Face hub.
        key: Config key of the name, for error messages.

    Raises:
        GigabatchError: if the file cannot be read.
    """
    for file in PROCESSOR_FILES:
        try:
            from transformers.utils import cached_file

            path = cached_file(
                name, file,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )  # fmt: skip
            settings: Any = json.loads(Path(path).read_text(encoding="utf-8")) if path else None
        except Exception as error:
            raise GigabatchError(f"{key}: {name}: cannot read {file}: {reason(error)}.") from error
        if isinstance(settings, dict):
            settings = settings.get("image_processor", settings)
            if "image_mean" in settings or "size" in settings:
                return dict(settings)
    return None


def processor_settings(processor: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Convert the settings of a Hugging Face image processor to keys of `data.image`.

    Args:
        processor: Contents of preprocessor_config.json.
        where: Name of the model, for messages.

    Raises:
        GigabatchError: if the images are not square, their channels are in a different order, or a
            value is malformed.
    """
    if processor.get("do_flip_channel_order"):
        raise GigabatchError(
            f"{where}: its processor flips the channels to BGR (do_flip_channel_order), and images "
            "of a run are RGB. Choose a different model."
        )
    try:
        return _processor_settings(processor, where)
    except (TypeError, ValueError, OverflowError) as error:
        raise GigabatchError(
            f"{where}: its preprocessor_config.json has a malformed value: {error}. Correct the "
            "file, or set data.image.size, mean and std yourself and remove it."
        ) from error


def _processor_settings(processor: Mapping[str, Any], where: str) -> dict[str, Any]:
    values: dict[str, Any] = {"draft": False, "crop": "huggingface"}
    if processor.get("do_resize", True):
        values |= _resizing(processor, where)
        number = processor.get("resample")
        if number in FILTERS:
            values["interpolation"] = FILTERS[number]
        else:
            log.warning(
                "%s: its processor names no filter that data.image.interpolation has (resample: "
                "%s). Compare the key with the model's training.",
                where, number,
            )  # fmt: skip
    else:
        log.warning(
            "%s: its processor resizes no image (do_resize: false); images of a run are resized to "
            "data.image.size.",
            where,
        )
    # The processor computes (v * factor - offset - mean) / std of bytes v; here (v/255 - m) / s.
    rescale = processor.get("do_rescale", True)
    factor = 255 * float(processor.get("rescale_factor") or 1 / 255) if rescale else 255.0
    offset = 1.0 if rescale and processor.get("rescale_offset") else 0.0
    normal = processor.get("do_normalize", True)
    mean = _numbers(processor.get("image_mean") or ()) if normal else (0.0,)
    std = _numbers(processor.get("image_std") or ()) if normal else (1.0,)
    if len(mean) not in (1, 3) or len(std) not in (1, 3):
        log.warning(
            "%s: its processor names no mean and standard deviation of the channels (image_mean: "
            "%s, image_std: %s). Compare data.image.mean and std with the model's training.",
            where, processor.get("image_mean"), processor.get("image_std"),
        )  # fmt: skip
        return values
    values["mean"] = _one_or_more(tuple((m + offset) / factor for m in mean))
    values["std"] = _one_or_more(tuple(s / factor for s in std))
    return values


def _resizing(processor: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return `size` and `resize`."""
    size, crop = processor.get("size"), processor.get("crop_size")
    crop = crop if processor.get("do_center_crop") else None
    if isinstance(size, int):  # an older format: the shorter side, or a square
        size = {"shortest_edge": size} if crop else {"height": size, "width": size}
    sides = _square(size, where), _square(crop, where)
    resized, cropped = sides
    if resized is None and cropped is None:
        log.warning(
            "%s: its processor's size (%s) is not adopted. Compare data.image.size and resize with "
            "the model's training.",
            where, size,
        )  # fmt: skip
        return {}
    if isinstance(size, Mapping) and "shortest_edge" in size and "longest_edge" in size:
        log.warning(
            "%s: its processor also limits the longer side to %s pixels; "
            "data.image.resize=shortest crops the center instead.",
            where, size["longest_edge"],
        )  # fmt: skip
    squashed = bool(size and "height" in size)
    if resized and cropped and resized != cropped:
        log.warning(
            "%s: its processor resizes to %d pixels and crops %d; data.image.size=%d resizes and "
            "crops to %d, so the model sees a wider view than in its training.",
            where, resized, cropped, cropped, cropped,
        )  # fmt: skip
    elif processor.get("crop_pct") and resized and resized < 384:
        log.warning(
            "%s: its processor crops a share of %g of the resized image (crop_pct); data.image "
            "keeps all of it.",
            where, processor["crop_pct"],
        )  # fmt: skip
    return {"size": cropped or resized, "resize": "squash" if squashed else "shortest"}


def _square(size: Any, where: str) -> int | None:
    """Return the side of a processor's size; None if it names none."""
    if isinstance(size, int):
        return size
    if not isinstance(size, Mapping):
        return None
    height, width = size.get("height"), size.get("width")
    if height != width:
        raise GigabatchError(
            f"{where}: its images have {height} x {width} pixels, but images of a run are square. "
            "Choose a model with square images."
        )
    side = height or size.get("shortest_edge")
    return int(side) if side else None


def _numbers(value: Any) -> tuple[float, ...]:
    return tuple(map(float, value)) if isinstance(value, list | tuple) else (float(value),)


def _one_or_more(values: tuple[float, ...]) -> float | tuple[float, ...]:
    return values[0] if len(set(values)) == 1 else values


def _equal(a: Any, b: Any) -> bool:
    """Compare two values; numbers within float32, one number equal to a list of it."""
    if isinstance(a, str | bool | None) or isinstance(b, str | bool | None):
        return bool(a == b)
    a, b = _numbers(a), _numbers(b)
    length = max(len(a), len(b))
    a, b = (values * length if len(values) == 1 else values for values in (a, b))
    return len(a) == len(b) and all(abs(x - y) < 1e-6 for x, y in zip(a, b, strict=True))


def _adopted(settings: ImageSettings, values: Mapping[str, Any], model: str) -> ImageSettings:
    """Return settings whose unset keys take `values`; warn of keys that are set to others."""
    adopted = {k: v for k, v in values.items() if k not in settings.model_fields_set}
    for name in values:
        if name not in adopted and not _equal(given := getattr(settings, name), values[name]):
            log.warning(
                "data.image.%s=%s is kept, but %s was trained with %s.",
                name, _short(given), model, _short(values[name]),
            )  # fmt: skip
    if adopted:
        text = ", ".join(f"{name}={_short(value)}" for name, value in adopted.items())
        log.info("data.image: adopted from %s: %s", model, text)
    try:
        return ImageSettings.model_validate({**settings.model_dump(), **adopted})
    except ValueError as error:
        raise GigabatchError(f"data.image: the values of {model} do not fit: {error}") from error


def _short(value: Any) -> str:
    numbers = value if isinstance(value, tuple) else None
    return f"[{', '.join(f'{n:.6g}' for n in numbers)}]" if numbers else str(value)


def _adopt_texts(config: Config) -> Config:
    """Adopt the mask convention, the length and the tokenizer of the text towers."""
    names: dict[str, str] = {}
    for modality in config.texts:
        tower = config.tower(modality)
        if modality in config.shared or not isinstance(tower, HuggingFaceTower):
            continue
        key = config.tower_key(modality)
        config = _adopt_mask(config, modality, key, tower)
        if tower.name:
            names[key] = tower.name
    from_run = {part.partition(".")[0] for part in config.train.init_parts}
    if not names or (config.train.init_from and from_run & {*config.texts}):
        return config  # with `train.init_from`, the tokenizer is that of the source run
    return _adopt_tokenizer(config, names)


def _adopt_mask(config: Config, modality: str, key: str, tower: HuggingFaceTower) -> Config:
    """Set `attend_padding` of a SigLIP tower, and the length that a pretrained one has."""
    half = half_config(tower, "text", key)
    if half.model_type not in ATTENDS_PADDING:
        return config
    if tower.attend_padding is None:
        log.info("%s: %s attends to padding (attend_padding=true)", key, half.model_type)
        config = config.with_tower(modality, tower.model_copy(update={"attend_padding": True}))
    length, text = half.max_position_embeddings, config.data.text
    if tower.name is None or config.text_length(modality) == length:
        return config
    if "length" in text.model_fields_set or config.text_length(modality) != text.length:
        log.warning(
            "%s: %s was trained on texts padded to %d tokens, but these have %d.",
            key, tower.name, length, config.text_length(modality),
        )  # fmt: skip
        return config
    log.info("data.text: adopted from %s: length=%d", tower.name, length)
    return _with_text(config, length=length)


def _adopt_tokenizer(config: Config, names: Mapping[str, str]) -> Config:
    """Adopt the tokenizer of the pretrained text towers, or compare it with the one that is set.

    Args:
        config: Config of the run.
        names: Config key of each pretrained text tower -> name of its model.
    """
    text = config.data.text
    is_set = "tokenizer" in text.model_fields_set
    own: dict[str, Tokenizer] = {}
    for key, name in names.items():
        try:
            own[key] = named_tokenizer(text.model_copy(update={"tokenizer": name}))
        except GigabatchError as error:
            if not is_set:
                raise GigabatchError(
                    f"{key}.name: {name} brings no tokenizer, and data.text.tokenizer is unset. "
                    "Its token embeddings fit its own tokenizer only. Add the tokenizer to the "
                    f"model's folder, or set data.text.tokenizer. Reason: {error}"
                ) from error
    if is_set:
        for key, tokenizer in own.items():
            if names[key] != text.tokenizer:
                _warn_of_other_ids(config, tokenizer, f"{key}.name={names[key]}")
        return config
    first, *others = own
    for other in others:
        if own[other].to_str() != own[first].to_str():
            raise GigabatchError(
                f"{first}.name={names[first]} and {other}.name={names[other]} have different "
                "tokenizers, but a run has one. Choose models with the same tokenizer, or set "
                "data.text.tokenizer to one of them on purpose."
            )
    log.info("data.text: adopted from %s: tokenizer=%s", names[first], names[first])
    return _with_text(config, tokenizer=names[first])


def _warn_of_other_ids(config: Config, own: Tokenizer, model: str) -> None:
    """Warn if the run's tokenizer gives tokens other ids than the model's own."""
    text = config.data.text
    if text.tokenizer == "bpe":
        log.warning(
            "data.text.tokenizer=bpe is kept, but its ids mean other tokens to %s, whose token "
            "embeddings fit its own tokenizer only.", model,
        )  # fmt: skip
        return
    vocabulary, ids = named_tokenizer(text).get_vocab(), own.get_vocab()
    moved = sum(ids.get(token) != number for token, number in vocabulary.items())
    if moved:
        log.warning(
            "data.text.tokenizer=%s is kept, but %s of its %s tokens have other ids, or none, in "
            "the tokenizer of %s.", text.tokenizer, f"{moved:,}", f"{len(vocabulary):,}", model,
        )  # fmt: skip


def _with_text(config: Config, **values: Any) -> Config:
    text = config.data.text.model_copy(update=values)
    return config.model_copy(update={"data": config.data.model_copy(update={"text": text})})
