"""Decoded samples to the tensors of a micro-batch, written into shared memory in loader workers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import get_worker_info

from gigabatch.data.decode.audio import AudioSettings
from gigabatch.data.decode.fields import Fields, Sample
from gigabatch.data.decode.vectors import VectorSettings, VectorsSettings
from gigabatch.data.errors import GigabatchError
from gigabatch.data.text.captions import OneText
from gigabatch.data.text.tokenizer import encode, of_length


class Collate:
    """Stacks the samples of one micro-batch. `tokenizer_json`: where there is text."""

    def __init__(self, fields: Fields, tokenizer_json: str | None) -> None:
        self.fields, self.tokenizer_json = fields, tokenizer_json

    def __call__(self, rows: Sequence[Sample]) -> dict[str, Tensor]:
        """See MicroBatch. A modality that a sample lacks is zero (no text: an empty caption), and
        its `..._present` false."""
        tensors = {"sample": torch.tensor([row["__sample__"] for row in rows])}
        for column in self.fields.columns:
            tensors[column] = torch.tensor([row[column] for row in rows], dtype=torch.int64)
        for column in self.fields.numbers:
            tensors[column] = torch.tensor([row[column] for row in rows], dtype=torch.float32)
        for name in self.fields.modalities:
            here = [name in row for row in rows]
            if self.fields.partial and name != "text":
                tensors[f"{name}_present"] = torch.tensor(here)
            other = self.fields.beside.get(name)
            if name == "text":
                tensors |= self._text(rows)
            elif isinstance(other, OneText):
                tensors |= self._tokens(name, [row.get(name, "") for row in rows], other.length)
            elif other is not None:
                tensors |= _other(name, other, rows)
            else:
                tensors[name] = _stack([row.get(name) for row in rows], self._blank(name, rows))
        return tensors

    def _blank(self, name: str, rows: Sequence[Sample]) -> Tensor:
        """What stands where a sample lacks a modality."""
        known = next((row[name] for row in rows if name in row), None)
        if known is not None:
            return torch.zeros_like(known)
        if name == "image" and self.fields.image is not None:
            size, channels = self.fields.image.size, self.fields.image.channels
            return torch.zeros((channels, size, size), dtype=torch.uint8)
        raise GigabatchError(
            f"a whole micro-batch has no .{name} member, so its shape is not known. Arrays must "
            "be present in all samples."
        )

    def _text(self, rows: Sequence[Sample]) -> dict[str, Tensor]:
        settings = self.fields.text
        assert settings is not None
        width = settings.most if settings.choose == "all" else 1
        captions: list[str] = []
        for row in rows:
            own = row.get("text", ())
            own = [own] if isinstance(own, str) else list(own)[:width]
            captions += own + [""] * (width - len(own))
        out = self._tokens("text", captions)
        if self.fields.partial or width > 1:
            out["text_present"] = torch.tensor([caption != "" for caption in captions])
        return out

    def _tokens(self, name: str, texts: list[str], length: int | None = None) -> dict[str, Tensor]:
        assert self.tokenizer_json is not None
        tokens, mask = encode(_tokenizer(self.tokenizer_json, length), texts)
        return {name: _own(tokens), f"{name}_mask": _own(mask)}


def _other(
    name: str, settings: AudioSettings | VectorSettings, rows: Sequence[Sample]
) -> dict[str, Tensor]:
    """Audio with `..._length`, vectors, several of them with `..._mask`."""
    found = [row.get(name) for row in rows]
    if isinstance(settings, AudioSettings):
        lengths = torch.tensor([length for _, length in (each or (0, 0) for each in found)])
        waves = [each and each[0] for each in found]
        return {name: _stack(waves, torch.zeros(settings.samples)), f"{name}_length": lengths}
    if not isinstance(settings, VectorsSettings):
        return {name: _stack(found, torch.zeros(settings.size))}
    blank = torch.zeros(settings.length, settings.size)
    counts = torch.tensor([0 if each is None else len(each) for each in found])
    padded = [None if e is None else F.pad(e, (0, 0, 0, len(blank) - len(e))) for e in found]
    mask = torch.arange(settings.length) < counts.unsqueeze(1)
    return {name: _stack(padded, blank), f"{name}_mask": _own(mask)}


@lru_cache(maxsize=8)
def _tokenizer(text: str, length: int | None) -> Tokenizer:
    """Parsed once a process: it does not pickle. `length`: other than its own."""
    tokenizer = Tokenizer.from_str(text)
    return tokenizer if length is None else of_length(tokenizer, length)


def _stack(parts: Sequence[Tensor | None], blank: Tensor) -> Tensor:
    rows = [blank if part is None else part for part in parts]
    try:
        return torch.stack(rows, out=_room((len(rows), *blank.shape), blank.dtype))
    except RuntimeError as error:
        shapes = sorted({tuple(row.shape) for row in rows})
        raise GigabatchError(
            f"samples of different shapes cannot be stacked ({shapes}): {error}. Make them equal, "
            "in a stage or in the shards."
        ) from error


def _own(tensor: Tensor) -> Tensor:
    """In a loader worker, a copy in shared memory."""
    return tensor if get_worker_info() is None else _room(tensor.shape, tensor.dtype).copy_(tensor)


def _room(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor; in a loader worker in shared memory, from where the training process takes
    it without a copy."""
    empty = torch.empty(shape, dtype=dtype)
    if get_worker_info() is None:
        return empty
    storage = empty.untyped_storage()._new_shared(empty.nbytes, device="cpu")
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)
