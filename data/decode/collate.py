"""Collate decoded samples into the tensors of a micro-batch.

Loader workers write the tensors into shared memory, from which the training process reads them
without a copy.
"""

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
from gigabatch.data.text.captions import ExtraText
from gigabatch.data.text.tokenizer import encode, with_length


class Collate:
    """Stacks the samples of one micro-batch.

    Args:
        fields: Fields that were decoded from every sample.
        tokenizer_json: Contents of `tokenizer.json`; required if `fields` has text.
    """

    def __init__(self, fields: Fields, tokenizer_json: str | None) -> None:
        self.fields, self.tokenizer_json = fields, tokenizer_json

    def __call__(self, rows: Sequence[Sample]) -> dict[str, Tensor]:
        """Return `MicroBatch.tensors`.

        A modality that a sample lacks is zero (for text, an empty caption), and its
        `NAME_present` is false.

        Raises:
            GigabatchError: if arrays differ in shape.
        """
        tensors = {"sample": torch.tensor([row["__sample__"] for row in rows])}
        for column in self.fields.columns:
            tensors[column] = torch.tensor([row[column] for row in rows], dtype=torch.int64)
        for column in self.fields.numbers:
            tensors[column] = torch.tensor([row[column] for row in rows], dtype=torch.float32)
        for name in self.fields.modalities:
            if self.fields.allow_missing and name != "text":
                tensors[f"{name}_present"] = torch.tensor([name in row for row in rows])
            settings = self.fields.more_and_vectors.get(name)
            if name == "text":
                tensors |= self._captions(rows)
            elif isinstance(settings, ExtraText):
                tensors |= self._tokens(name, [row.get(name, "") for row in rows], settings.length)
            elif settings is not None:
                tensors |= _audio_or_vectors(name, settings, rows)
            else:
                tensors[name] = _stack([row.get(name) for row in rows], self._blank(name, rows))
        return tensors

    def _blank(self, name: str, rows: Sequence[Sample]) -> Tensor:
        """Return zeros of the shape and dtype of an image or array."""
        known = next((row[name] for row in rows if name in row), None)
        if known is not None:
            return torch.zeros_like(known)
        if name == "image" and self.fields.image is not None:
            size, channels = self.fields.image.size, self.fields.image.channels
            return torch.zeros((channels, size, size), dtype=torch.uint8)
        raise GigabatchError(
            f"no sample of a micro-batch has a .{name} member, so its shape is unknown. Arrays "
            "must be present in all samples."
        )

    def _captions(self, rows: Sequence[Sample]) -> dict[str, Tensor]:
        """Return the tokens of the captions, `most` rows per sample with `choose: all`."""
        settings = self.fields.text
        assert settings is not None
        per_sample = settings.most if settings.choose == "all" else 1
        captions: list[str] = []
        for row in rows:
            value = row.get("text", ())
            of_sample = [value] if isinstance(value, str) else list(value)[:per_sample]
            captions += of_sample + [""] * (per_sample - len(of_sample))
        out = self._tokens("text", captions)
        if self.fields.allow_missing or per_sample > 1:
            out["text_present"] = torch.tensor([caption != "" for caption in captions])
        return out

    def _tokens(self, name: str, texts: list[str], length: int | None = None) -> dict[str, Tensor]:
        """Return tokens and mask of texts."""
        assert self.tokenizer_json is not None
        tokens, mask = encode(_tokenizer(self.tokenizer_json, length), texts)
        return {name: _to_shared(tokens), f"{name}_mask": _to_shared(mask)}


def _audio_or_vectors(
    name: str, settings: AudioSettings | VectorSettings, rows: Sequence[Sample]
) -> dict[str, Tensor]:
    """Return audio with `NAME_length`, one vector per sample, or several with `NAME_mask`."""
    values = [row.get(name) for row in rows]
    if isinstance(settings, AudioSettings):
        lengths = torch.tensor([0 if value is None else value[1] for value in values])
        waves = [None if value is None else value[0] for value in values]
        return {name: _stack(waves, torch.zeros(settings.samples)), f"{name}_length": lengths}
    if not isinstance(settings, VectorsSettings):
        return {name: _stack(values, torch.zeros(settings.size))}
    blank = torch.zeros(settings.length, settings.size)
    counts = torch.tensor([0 if v is None else len(v) for v in values])
    padded = [None if v is None else F.pad(v, (0, 0, 0, len(blank) - len(v))) for v in values]
    mask = torch.arange(settings.length) < counts.unsqueeze(1)
    return {name: _stack(padded, blank), f"{name}_mask": _to_shared(mask)}


@lru_cache(maxsize=8)
def _tokenizer(text: str, length: int | None) -> Tokenizer:
    """Parse a tokenizer once per process, as it cannot be pickled; `length` replaces its own."""
    tokenizer = Tokenizer.from_str(text)
    return tokenizer if length is None else with_length(tokenizer, length)


def _stack(parts: Sequence[Tensor | None], blank: Tensor) -> Tensor:
    """Stack tensors [...] to [n, ...]; `blank` replaces None."""
    rows = [blank if part is None else part for part in parts]
    if any(row.shape != blank.shape for row in rows):
        shapes = sorted({tuple(row.shape) for row in rows})
        raise GigabatchError(
            f"samples of different shapes cannot be stacked ({shapes}). Make the shapes equal, in "
            "a stage (data.stages) or in the shards."
        )
    # An error now is one of memory, such as a full /dev/shm.
    return torch.stack(rows, out=_empty_shared((len(rows), *blank.shape), blank.dtype))


def _to_shared(tensor: Tensor) -> Tensor:
    """Copy a tensor to shared memory if this is a loader worker."""
    if get_worker_info() is None:
        return tensor
    return _empty_shared(tensor.shape, tensor.dtype).copy_(tensor)


def _empty_shared(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an empty tensor, in shared memory if this is a loader worker."""
    empty = torch.empty(shape, dtype=dtype)
    if get_worker_info() is None:
        return empty
    storage = empty.untyped_storage()._new_shared(empty.nbytes, device="cpu")
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)
