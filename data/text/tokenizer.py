"""Tokenizers: byte-pair encoding trained on a run's captions, or a Hugging Face tokenizer.

Both are stored as `tokenizer.json` in the run folder, with truncation and padding, so that a run,
its evaluation and its export use the same tokens without a network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from pydantic import Field
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.data.settings import Settings

PAD, END = "[PAD]", "[END]"


class TextSettings(Settings):
    """Tokenization of captions."""

    tokenizer: str = "bpe"
    """Tokenizer: `bpe`, byte-pair encoding trained on this run's captions, or the name of a
    Hugging Face tokenizer. Unset: that of the pretrained text towers, if the run has any."""
    vocab_size: int = Field(4096, ge=300)
    """Size of the `bpe` vocabulary; a Hugging Face tokenizer has its own."""
    length: int = Field(32, ge=2)
    """Maximum number of tokens of a caption, including the end token; longer captions are
    truncated."""


def train_bpe(captions: Iterable[str], settings: TextSettings) -> Tokenizer:
    """Train a lower-casing byte-level BPE tokenizer.

    The result depends on the captions and their counts, not on their order.

    Args:
        captions: The captions to train on.
        settings: Vocabulary size and length.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    pad_id, end_id = 0, 1  # the positions in `special_tokens`
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Sort, so that the order of reading has no effect.
    counts = sorted(Counter(captions).items())
    tokenizer.train_from_iterator((t for t, n in counts for _ in range(n)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, end_id)]
    )
    return _set_length(tokenizer, settings.length, pad_id, PAD)


def named_tokenizer(settings: TextSettings) -> Tokenizer:
    """Load the Hugging Face tokenizer `settings.tokenizer` from the hub, its cache or a folder.

    Raises:
        GigabatchError: if it cannot be loaded, or has no padding.
    """
    try:
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(settings.tokenizer)
    except Exception as error:  # a broken dependency of `transformers` raises any type
        raise GigabatchError(
            f"data.text.tokenizer: {settings.tokenizer!r} cannot be loaded ({_first_line(error)}). "
            "Set it to `bpe`, a local folder with tokenizer.json, or a name on the Hugging Face "
            "hub or in its cache."
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise GigabatchError(
            f"data.text.tokenizer: {settings.tokenizer!r} has no `tokenizers` implementation. "
            "Choose one that comes with a tokenizer.json."
        )
    if not loaded.get_vocab().keys() - {*loaded.all_special_tokens}:
        raise GigabatchError(  # transformers makes an empty tokenizer of a folder without files
            f"data.text.tokenizer: {settings.tokenizer!r} has no vocabulary. Choose one that comes "
            "with a tokenizer.json."
        )
    pad = loaded.pad_token or loaded.eos_token
    if pad is None:
        raise GigabatchError(
            f"data.text.tokenizer: {settings.tokenizer!r} has neither a padding nor an end token. "
            "Choose another tokenizer."
        )
    pad_id = loaded.convert_tokens_to_ids(pad)
    return _set_length(backend, settings.length, pad_id, pad, loaded.padding_side)


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a `tokenizer.json`.

    Raises:
        GigabatchError: if the file is missing or is not a tokenizer.
    """
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises bare Exception
        raise GigabatchError(f"{path}: not a tokenizer: {_first_line(error)}") from error


def encode(tokenizer: Tokenizer, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Tokenize B captions.

    Returns:
        Tokens int64 [B, L], and mask bool [B, L], true on tokens that are not padding. L is the
        tokenizer's length.
    """
    encoded = tokenizer.encode_batch_fast(captions)  # "fast" omits offsets
    tokens = torch.tensor([e.ids for e in encoded], dtype=torch.int64)
    mask = torch.tensor([e.attention_mask for e in encoded], dtype=torch.bool)
    return tokens, mask


def with_length(tokenizer: Tokenizer, length: int) -> Tokenizer:
    """Make a run's tokenizer return `length` tokens per text, in place, and return it."""
    padding = tokenizer.padding
    assert padding is not None
    side = padding["direction"]
    return _set_length(tokenizer, length, padding["pad_id"], padding["pad_token"], side)


def _set_length(
    tokenizer: Tokenizer, length: int, pad_id: int, pad: str, side: str = "right"
) -> Tokenizer:
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(direction=side, length=length, pad_id=pad_id, pad_token=pad)
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
