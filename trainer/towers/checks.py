"""Comparison of built towers with a run: what an encoder returns, and its model's tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.towers.huggingface import HuggingFaceEncoder, HuggingFaceTower

LEGACY_END = 2
"""`eos_token_id` of configs whose model pools at the largest token id instead."""
EQUALITY_ONLY = ("metaclip_2", "aimv2")
"""Prefixes of model types without that exception."""
PROBE = "a photo of a cat"


def check_output(encoder: nn.Module, key: str, arguments: tuple[Tensor, ...], output: Any) -> None:
    """Check an encoder's result in a training pass.

    Args:
        encoder: The encoder, with its attributes `width` and, for tokens, `token_width`.
        key: Config key of the tower, for error messages.
        arguments: Its arguments; the first has one row per sample.
        output: Pooled [B, width], or (pooled, tokens [B, T, token_width]).

    Raises:
        GigabatchError: if the result has another type, dtype or shape, or no gradient reaches any
            weight of an encoder that is not frozen.
    """
    call, rows = f"{key}: {type(encoder).__name__}.forward", len(arguments[0])
    pooled = output
    if isinstance(output, tuple):
        pooled, states = output
        length = arguments[1].shape[1] if len(arguments) > 1 and arguments[1].ndim == 2 else None
        _check_shape(call, "tokens", states, (rows, length, encoder.token_width), "token_width")
    _check_shape(call, "one vector per sample", pooled, (rows, encoder.width), "width")
    trained = [p for p in encoder.parameters() if p.requires_grad]
    if trained and torch.is_grad_enabled() and not _reaches(pooled, trained):
        raise GigabatchError(
            f"{call} returned vectors without a gradient, so none of its {len(trained)} weights "
            "would be trained. Remove the detach() or no_grad() inside, or set "
            f"{key}.freeze=true."
        )


def _check_shape(
    call: str, what: str, actual: Any, shape: tuple[int | Tensor | nn.Module | None, ...], name: str
) -> None:
    """Raise unless `actual` is floating, of this shape; None fits any size."""
    expected = f"floats [{', '.join('T' if n is None else str(n) for n in shape)}]"
    returned = type(actual).__name__
    if isinstance(actual, Tensor):
        returned = f"{str(actual.dtype).removeprefix('torch.')} {list(actual.shape)}"
        fits = len(actual.shape) == len(shape) and all(
            n is None or n == m for n, m in zip(shape, actual.shape, strict=True)
        )
        if fits and actual.is_floating_point():
            return
    raise GigabatchError(
        f"{call} returned {returned}, but {what}, {expected}, is expected; the last size is the "
        f"encoder's attribute `{name}`. Fix the encoder or that attribute."
    )


def _reaches(output: Tensor, weights: list[nn.Parameter]) -> bool:
    """Return whether the graph of `output` contains one of the weights."""
    wanted, seen = {id(weight) for weight in weights}, set()
    nodes: list[Any] = [output.grad_fn] if output.grad_fn else []
    while nodes:
        node = nodes.pop()
        if id(getattr(node, "variable", None)) in wanted or "CheckpointFunction" in node.name():
            return True  # a checkpointed part hides its weights
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return False


def check_text_model(
    encoder: nn.Module, settings: Any, key: str, tokenizer: Tokenizer, length: int, length_key: str
) -> None:
    """Compare a `transformers` text model with the run's tokenizer; other encoders always pass.

    Args:
        encoder: Encoder of the tower.
        settings: Settings of the tower.
        key: Config key of the tower.
        tokenizer: The run's tokenizer.
        length: Tokens per text.
        length_key: Config key that sets `length`.

    Raises:
        GigabatchError: if the model pools at a token that no text has, needs another padding id,
            or has too few positions.
    """
    if not isinstance(encoder, HuggingFaceEncoder) or not isinstance(settings, HuggingFaceTower):
        return
    real = [e for e in (tokenizer.encode(PROBE), tokenizer.encode(PROBE * 999)) if e.ids]
    ends = {[i for i, m in zip(e.ids, e.attention_mask, strict=True) if m][-1] for e in real}
    if encoder.pool == "own":
        _check_end(encoder.model, settings, key, tokenizer, ends)
    padding = tokenizer.padding
    if padding is not None:
        _check_padding(encoder.model, settings, key, padding["pad_id"])
    _check_positions(encoder.model, key, length, length_key)


def _check_end(
    model: Any, settings: HuggingFaceTower, key: str, tokenizer: Tokenizer, ends: set[int]
) -> None:
    """Check that the model pools at the token with which every text ends."""
    end = next(
        (m.eos_token_id for m in model.modules() if isinstance(getattr(m, "eos_token_id", 0), int)
         and hasattr(m, "eos_token_id")), None,
    )  # fmt: skip
    kind = str(model.config.model_type)
    if kind.startswith(("owlvit", "owlv2")):
        end = LEGACY_END
    if end is None:
        return
    largest = max(tokenizer.get_vocab().values())
    is_legacy = end == LEGACY_END and not kind.startswith(EQUALITY_ONLY)
    wanted = largest if is_legacy else end
    if ends == {wanted}:
        return
    last = min(ends - {wanted})
    pools = (
        f"at the largest token id of a text (eos_token_id={end}, the convention of older configs)"
        if is_legacy else f"at the token eos_token_id={end}"
    )  # fmt: skip
    raise GigabatchError(
        f"{key}: {type(model).__name__} pools {pools}, but texts of the run's tokenizer end with "
        f"{tokenizer.id_to_token(last)!r} ({last}; the largest id is {largest}), so every text "
        f"would get the vector of another token. {_fix(settings, key, 'eos_token_id', last)}"
    )


def _check_padding(model: Any, settings: HuggingFaceTower, key: str, pad: int) -> None:
    """Check the id whose embedding the model never trains, and that shifts its positions."""
    embedding = model.get_input_embeddings()
    expected = getattr(embedding, "padding_idx", None)
    if expected is not None and expected != pad:
        raise GigabatchError(
            f"{key}: {type(model).__name__} takes token {expected} (pad_token_id) for padding, but "
            f"the run's tokenizer pads with {pad}. {_fix(settings, key, 'pad_token_id', pad)}"
        )


def _fix(settings: HuggingFaceTower, key: str, name: str, value: int) -> str:
    if settings.name is None:
        return f"Set {key}.config.{name}={value}."
    return f"Set data.text.tokenizer={settings.name}, the model's own."


def _check_positions(model: Any, key: str, length: int, length_key: str) -> None:
    """Check that a model whose positions start after the padding id, as RoBERTa's, has enough."""
    for name, module in model.named_modules():
        if not name.endswith("position_embeddings") or not isinstance(module, nn.Embedding):
            continue
        first = 0 if module.padding_idx is None else module.padding_idx + 1
        if length > module.num_embeddings - first:
            raise GigabatchError(
                f"{key}: {type(model).__name__} has {module.num_embeddings} positions "
                f"(max_position_embeddings), of which {first} are reserved for padding, but "
                f"{length_key} is {length}. Set {length_key}={module.num_embeddings - first}."
            )
