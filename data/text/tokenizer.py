"""Captions to token numbers: a byte-pair tokeniser trained on the captions, or one by name.

Either is kept as `tokenizer.json` in the run folder, truncation and padding included, so that a
run, its evaluation and its export read the same tokens with no network.
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
    """How captions become tokens."""

    tokenizer: str = "bpe"
    """`bpe`: byte-pair, trained on this run's captions; else a Hugging Face tokeniser's name."""
    vocab_size: int = Field(4096, ge=300)
    """Size of the `bpe` vocabulary; a named tokeniser brings its own."""
    length: int = Field(32, ge=2)
    """Tokens a caption, end mark included; longer captions are cut."""


def train_bpe(captions: Iterable[str], settings: TextSettings) -> Tokenizer:
    """A lower-casing byte-level byte-pair tokeniser; the same captions give the same one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    pad_id, end_id = 0, 1  # the special tokens, in their order
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Sorted, each once with its count folded in, so that the order of reading cannot matter.
    counts = sorted(Counter(captions).items())
    tokenizer.train_from_iterator((t for t, n in counts for _ in range(n)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, end_id)]
    )
    return _fit(tokenizer, settings.length, pad_id, PAD)


def named_tokenizer(settings: TextSettings) -> Tokenizer:
    """The Hugging Face tokeniser `settings.tokenizer`, from its hub, cache or a local folder."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(settings.tokenizer)
    except (OSError, ValueError) as error:
        raise GigabatchError(
            f"text.tokenizer: {settings.tokenizer!r} cannot be loaded ({_first_line(error)}). Give "
            "`bpe`, a local folder with tokenizer.json, or a name that the hub or its cache has."
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise GigabatchError(
            f"text.tokenizer: {settings.tokenizer!r} has no `tokenizers` implementation; choose "
            "one that comes with a tokenizer.json."
        )
    pad = loaded.pad_token or loaded.eos_token
    if pad is None:
        raise GigabatchError(
            f"text.tokenizer: {settings.tokenizer!r} has neither a padding nor an end token."
        )
    return _fit(backend, settings.length, loaded.convert_tokens_to_ids(pad), pad)


def load_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises bare Exception
        raise GigabatchError(f"{path}: not a tokeniser: {_first_line(error)}") from error


def encode(tokenizer: Tokenizer, captions: list[str]) -> tuple[Tensor, Tensor]:
    """(tokens int64 [B, L], mask bool [B, L], true on real tokens); L is `text.length`."""
    encoded = tokenizer.encode_batch_fast(captions)  # fast: without offsets
    tokens = torch.tensor([e.ids for e in encoded], dtype=torch.int64)
    mask = torch.tensor([e.attention_mask for e in encoded], dtype=torch.bool)
    return tokens, mask


def of_length(tokenizer: Tokenizer, length: int) -> Tokenizer:
    """The tokeniser of a run, made to give another number of tokens."""
    padding = tokenizer.padding
    assert padding is not None
    return _fit(tokenizer, length, padding["pad_id"], padding["pad_token"])


def _fit(tokenizer: Tokenizer, length: int, pad_id: int, pad: str) -> Tokenizer:
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=pad_id, pad_token=pad)
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
