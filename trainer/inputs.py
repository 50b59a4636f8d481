"""Opening a run's data: folders from the config, their indexes, the tokeniser."""

from __future__ import annotations

import logging
from pathlib import Path

from tokenizers import Tokenizer

from gigabatch.data import glyphs
from gigabatch.data.errors import GigabatchError
from gigabatch.data.index import Index, Progress, open_index
from gigabatch.data.stream import captions
from gigabatch.data.tokenizer import named_tokenizer, train_bpe
from gigabatch.trainer.config import Config

log = logging.getLogger(__name__)
BPE_CAPTIONS = 1_000_000  # at most this many captions train a tokeniser


def data_root(config: Config) -> Path:
    """The folder of `data.root`; the demo set is made if it is asked for and not there."""
    root = config.data.root
    if root == glyphs.NAME:
        return glyphs.glyphs_root()
    if root.startswith("demo:"):
        raise GigabatchError(f"data.root: {root!r} is not a demo set; there is {glyphs.NAME}.")
    if not Path(root).is_dir():
        raise GigabatchError(f"data.root: {root} is not a folder. Set it to the folder of shards.")
    return Path(root)


def open_train(config: Config, progress: Progress | None = None) -> Index:
    return open_index(data_root(config) / config.data.train, progress)


def open_eval(config: Config, name: str, progress: Progress | None = None) -> Index:
    """A set of `eval.sets`, inside `data.root`, or by its path."""
    own = Path(name).expanduser()
    if own.is_absolute():
        return open_index(own, progress)
    inside = data_root(config) / name
    return open_index(inside if inside.is_dir() or not own.is_dir() else own, progress)


def make_tokenizer(config: Config, index: Index) -> Tokenizer:
    """The tokeniser that `data.text` asks for; a byte-pair one is trained on the captions."""
    if config.data.text.tokenizer != "bpe":
        return named_tokenizer(config.data.text)
    log.info("training a byte-pair tokeniser on the captions of %s", index.root)
    return train_bpe(captions(index, BPE_CAPTIONS), config.data.text)
