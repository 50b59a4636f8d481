"""What the members of a sample become: which are read, and how one sample is decoded."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from gigabatch.data.decode.audio import AUDIO_MEMBERS, AudioSettings, decode_audio
from gigabatch.data.decode.members import (
    IMAGE_MEMBERS,
    ImageSettings,
    decode_array,
    decode_column,
    decode_image,
    decode_number,
)
from gigabatch.data.decode.vectors import NoVector, VectorSettings, read_vectors
from gigabatch.data.errors import BadSample
from gigabatch.data.remote.cache import ShardCache
from gigabatch.data.shards.index import Index
from gigabatch.data.shards.reader import Damaged
from gigabatch.data.shards.sources import SOURCE, Sources, indexed_codes, renumber
from gigabatch.data.text.captions import (
    CaptionSettings,
    NoCaption,
    OneText,
    choose_caption,
    read_captions,
)

Sample = dict[str, Any]
Other = AudioSettings | VectorSettings | OneText
"""How a modality beyond image and text is read."""


@dataclass(frozen=True)
class Fields:
    """What a stream yields of each sample.

    `image`, `text`: how that modality is read; None leaves it out. `more`: other modalities, by
    names of the user's. `arrays`: extensions of .npy members to bring along, each of one shape.
    `columns`: fields of the json member, as codes; `numbers`: as they are; `vectors`: of no tower,
    by names of the caller's. `partial`: samples may lack a modality or a vector, which is then
    masked.
    """

    image: ImageSettings | None = None
    text: CaptionSettings | None = None
    more: Mapping[str, Other] = field(default_factory=dict)
    arrays: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    vectors: Mapping[str, VectorSettings] = field(default_factory=dict)
    partial: bool = False

    @cached_property
    def modalities(self) -> dict[str, tuple[str, ...]]:
        """Modality -> the extensions that it may have."""
        named: dict[str, tuple[str, ...]] = {name: (name,) for name in self.arrays}
        if self.image is not None:
            named["image"] = IMAGE_MEMBERS
        if self.text is not None:
            named["text"] = (self.text.member,)
        for name, settings in self.beside.items():
            named[name] = _members_of(settings)
        return named

    @property
    def texts(self) -> Fields:
        """The texts alone."""
        more = {name: s for name, s in self.more.items() if isinstance(s, OneText)}
        return Fields(text=self.text, more=more, partial=self.partial)

    @property
    def beside(self) -> Mapping[str, Other | VectorSettings]:
        """What is neither image nor text nor an array: `more` and `vectors`."""
        return {**self.more, **self.vectors}

    def members(self, indexes: Sequence[Index]) -> tuple[str, ...]:
        """The extensions to be read. Raises GigabatchError where samples lack one."""
        found: dict[str, None] = {}
        for index in indexes:
            for choices in self.modalities.values():
                found |= dict.fromkeys(index.require(*choices, partial=self.partial))
            if self.loose_columns(index):
                found |= dict.fromkeys(index.require("json"))
        return tuple(found)

    def loose_columns(self, index: Index) -> list[str]:
        """The columns that the index does not hold, so that each sample's json is parsed."""
        codes = [c for c in self.columns if c != SOURCE and c not in index.columns]
        return [*codes, *self.numbers]

    def decode(self, raw: Mapping[str, bytes | Damaged], where: str, stream: int | None) -> Sample:
        """`image` uint8 [C, S, S], `text` (a string, or all captions), further texts, audio
        (float32 [T], samples), vectors (see `read_vectors`), the arrays. `stream` keys the choice
        of a caption; None takes the first.

        Raises BadSample for what cannot be used.
        """
        out: Sample = {}
        for name, choices in self.modalities.items():
            member = next((m for m in choices if m in raw), None)
            if member is None:
                continue  # allowed, or `members` would have refused the set
            data = raw[member]
            if isinstance(data, Damaged):
                raise BadSample(data.why)
            try:
                out[name] = self._decode_one(name, data, where, stream)
            except (NoCaption, NoVector):
                if not self.partial:
                    raise
        return out

    def _decode_one(self, name: str, data: bytes, where: str, stream: int | None) -> Any:
        if name == "image" and self.image is not None:
            return decode_image(data, self.image, where)
        if name == "text" and self.text is not None:
            found = read_captions(data, self.text, where)
            if self.text.choose == "all":
                return found[: self.text.most]
            if self.text.choose == "random" and stream is not None:
                return choose_caption(found, stream)
            return found[0]
        match self.beside.get(name):
            case AudioSettings() as settings:
                return decode_audio(data, settings, where)
            case VectorSettings() as settings:
                return read_vectors(data, settings, where)
            case OneText() as settings:
                return read_captions(data, settings, where)[0]
        return decode_array(data, where)

    def codes(
        self,
        source: int,
        index: Index,
        sample: int,
        raw: Mapping[str, bytes | Damaged],
        where: str,
    ) -> dict[str, int | float]:
        """The asked-for columns of one sample, from the index where it holds their codes."""
        out: dict[str, int | float] = {}
        for column in self.columns:
            if column == SOURCE:
                out[column] = source
            elif column in index.columns:
                out[column] = int(indexed_codes(index, column, np.array([sample]))[0])
            else:
                data = raw["json"]
                if isinstance(data, Damaged):
                    raise BadSample(data.why)
                out[column] = decode_column(data, column, where)
        for column in self.numbers:
            data = raw["json"]
            if isinstance(data, Damaged):
                raise BadSample(data.why)
            out[column] = decode_number(data, column, where)
        return out


def _members_of(settings: Other) -> tuple[str, ...]:
    """The extensions that a modality may have."""
    if isinstance(settings, AudioSettings):
        return AUDIO_MEMBERS
    return (settings.extension if isinstance(settings, VectorSettings) else settings.member,)


def some_captions(
    indexes: Sequence[Index], fields: Fields, limit: int, cache: ShardCache | None = None
) -> Iterator[str]:
    """The texts of at most `limit` samples, evenly spaced: what a tokeniser is trained on. All of a
    sample's that a run may take, so of `choose: random` every one."""
    step = -(-sum(map(len, indexes)) // limit)
    text = fields.texts
    if text.text is not None and text.text.choose == "random":
        every = text.text.model_copy(update={"choose": "all", "most": sys.maxsize})
        text = replace(text, text=every)
    members = text.members(indexes)
    with Sources(indexes, cache) as sources:
        for source, index in enumerate(indexes):
            for first in range(0, len(index), step << 10):
                rows = np.arange(first, min(first + (step << 10), len(index)), step)
                numbers = renumber(source, rows)
                for number, raw in zip(
                    numbers.tolist(), sources.read(numbers, members), strict=True
                ):
                    yield from _captions_of(text, raw, sources.where(number))


def _captions_of(fields: Fields, raw: Mapping[str, bytes | Damaged], where: str) -> list[str]:
    try:
        found = fields.decode(raw, where, None)
    except BadSample:
        return []  # the run itself will tell
    return [t for text in found.values() for t in ([text] if isinstance(text, str) else text)]
