"""Decode the fields of a sample: modalities from its members, columns from its json."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from gigabatch.data.decode.audio import AudioSettings, decode_audio
from gigabatch.data.decode.images import ImageSettings, decode_image
from gigabatch.data.decode.members import decode_array, decode_column, decode_number
from gigabatch.data.decode.vectors import MissingVector, VectorSettings, read_vectors
from gigabatch.data.errors import BadSample, GigabatchError
from gigabatch.data.remote.cache import ShardCache
from gigabatch.data.shards.index import Index
from gigabatch.data.shards.reader import DamagedMember
from gigabatch.data.shards.sources import (
    SOURCE_COLUMN,
    Sources,
    indexed_codes,
    source_sample_numbers,
)
from gigabatch.data.text.captions import (
    CaptionSettings,
    ExtraText,
    MissingCaption,
    choose_caption,
    read_captions,
)

Sample = dict[str, Any]
RawMembers = Mapping[str, bytes | DamagedMember]
"""Extension -> bytes of one sample's members."""
ExtraModality = AudioSettings | VectorSettings | ExtraText
"""Settings of a modality other than image and caption."""


@dataclass(frozen=True)
class Fields:
    """The fields to decode from every sample.

    Attributes:
        image: Settings of images; None omits them.
        text: Settings of captions; None omits them.
        more: Settings of additional modalities, by the user's name for each.
        arrays: Extensions of .npy members to yield unchanged; all arrays have the same shape.
        columns: Fields of the json member to yield as integer codes.
        numbers: Fields of the json member to yield as numbers.
        vectors: Settings of vectors that no tower reads, by name.
        allow_missing: Accept samples that lack a modality or vector, which is then masked.
    """

    image: ImageSettings | None = None
    text: CaptionSettings | None = None
    more: Mapping[str, ExtraModality] = field(default_factory=dict)
    arrays: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    vectors: Mapping[str, VectorSettings] = field(default_factory=dict)
    allow_missing: bool = False

    @cached_property
    def modalities(self) -> dict[str, tuple[str, ...]]:
        """Modality -> its possible extensions."""
        extensions: dict[str, tuple[str, ...]] = {name: (name,) for name in self.arrays}
        if self.image is not None:
            extensions["image"] = self.image.members
        if self.text is not None:
            extensions["text"] = (self.text.member,)
        for name, settings in self.more_and_vectors.items():
            extensions[name] = _extensions(settings)
        return extensions

    @property
    def texts_only(self) -> Fields:
        """These fields, reduced to texts."""
        more = {name: s for name, s in self.more.items() if isinstance(s, ExtraText)}
        return Fields(text=self.text, more=more, allow_missing=self.allow_missing)

    @property
    def more_and_vectors(self) -> Mapping[str, ExtraModality]:
        """The modalities that are neither image nor caption nor array."""
        return {**self.more, **self.vectors}

    def members(self, indexes: Sequence[Index]) -> tuple[str, ...]:
        """Return the extensions to read.

        Raises:
            GigabatchError: if samples lack a member that they must have, or have several images or
                several audio files and no setting chooses one.
        """
        extensions: dict[str, None] = {}
        for index in indexes:
            for name, choices in self.modalities.items():
                present = index.require_members(
                    *choices,
                    allow_missing=self.allow_missing,
                    key=self._member_key(name),
                )
                if not self._takes_first(name):
                    self._reject_several(index, name, present)
                extensions |= dict.fromkeys(present)
            if self.unindexed_columns(index):
                extensions |= dict.fromkeys(index.require_members("json"))
        return tuple(extensions)

    def _member_key(self, modality: str) -> str | None:
        """Return the config key that names the member of a modality; None if there is none."""
        if modality == "image":
            return "data.image.member"
        if modality == "text" and self.text is not None:
            return "data.captions.field" if self.text.field is None else None
        return f"towers.more.{modality}.member" if modality in self.more else None

    def _takes_first(self, modality: str) -> bool:
        """Return whether a run began with a version that took the first of several images."""
        return modality == "image" and self.image is not None and self.image.version == 1

    def _reject_several(self, index: Index, modality: str, present: tuple[str, ...]) -> None:
        """Raise GigabatchError if samples have several members of a modality."""
        count = index.samples_with_several(*present)
        if not count:
            return
        counts = dict(index.member_counts)
        kinds = ", ".join(f"{counts[member]:,} .{member}" for member in present)
        noun = "images" if modality == "image" else "audio files"
        key = self._member_key(modality)
        raise GigabatchError(
            f"{index.source}: {count:,} of {len(index):,} samples have several {noun} ({kinds}). "
            f"Set {key} to the one to use, such as {key}={present[-1]}."
        )

    def unindexed_columns(self, index: Index) -> list[str]:
        """Return the columns that the index lacks, which are parsed from every sample's json."""
        codes = [c for c in self.columns if c != SOURCE_COLUMN and c not in index.columns]
        return [*codes, *self.numbers]

    def decode(self, raw: RawMembers, where: str, rng_key: int | None) -> Sample:
        """Decode the modalities of one sample.

        Args:
            raw: The sample's members.
            where: Name of the sample, for error messages.
            rng_key: Key of the random choice of a caption; None chooses the first.

        Returns:
            By modality: `image` uint8 [C, S, S]; `text` a string or a list of captions; further
            texts as strings; audio (float32 [T], samples); vectors as from `read_vectors`; arrays.
            A missing modality has no entry.

        Raises:
            BadSample: if a member is damaged or cannot be decoded.
        """
        out: Sample = {}
        for name, choices in self.modalities.items():
            member = next((m for m in choices if m in raw), None)
            if member is None:
                continue  # allowed: otherwise `members` would have rejected the set
            data = _intact(raw[member])
            try:
                out[name] = self._decode_modality(name, data, where, rng_key)
            except (MissingCaption, MissingVector):
                if not self.allow_missing:
                    raise
        return out

    def _decode_modality(self, name: str, data: bytes, where: str, rng_key: int | None) -> Any:
        if name == "image" and self.image is not None:
            return decode_image(data, self.image, where)
        if name == "text" and self.text is not None:
            captions = read_captions(data, self.text, where)
            if self.text.choose == "all":
                return captions[: self.text.most]
            if self.text.choose == "random" and rng_key is not None:
                return choose_caption(captions, rng_key)
            return captions[0]
        match self.more_and_vectors.get(name):
            case AudioSettings() as settings:
                return decode_audio(data, settings, where)
            case VectorSettings() as settings:
                return read_vectors(data, settings, where)
            case ExtraText() as settings:
                return read_captions(data, settings, where)[0]
        return decode_array(data, where)

    def column_values(
        self, source: int, index: Index, row: int, raw: RawMembers, where: str
    ) -> dict[str, int | float]:
        """Return the columns of one sample, from the index if it has them, else from the json.

        Args:
            source: Number of the source.
            index: Index of the source.
            row: The sample's row in it.
            raw: The sample's members.
            where: Name of the sample, for error messages.

        Raises:
            BadSample: if the json is damaged or lacks a column.
        """
        out: dict[str, int | float] = {}
        for column in self.columns:
            if column == SOURCE_COLUMN:
                out[column] = source
            elif column in index.columns:
                out[column] = int(indexed_codes(index, column, np.array([row]))[0])
            else:
                out[column] = decode_column(_intact(raw["json"]), column, where)
        for column in self.numbers:
            out[column] = decode_number(_intact(raw["json"]), column, where)
        return out


def _intact(data: bytes | DamagedMember) -> bytes:
    """Return the bytes of a member; raise BadSample if it is damaged."""
    if isinstance(data, DamagedMember):
        raise BadSample(data.why)
    return data


def _extensions(settings: ExtraModality) -> tuple[str, ...]:
    """Return the possible extensions of a modality."""
    if isinstance(settings, AudioSettings):
        return settings.members
    return (settings.extension if isinstance(settings, VectorSettings) else settings.member,)


def captions_for_tokenizer(
    indexes: Sequence[Index], fields: Fields, limit: int, cache: ShardCache | None = None
) -> Iterator[str]:
    """Yield the texts to train a tokenizer on.

    With `choose: random`, all captions of a sample are yielded, since a run may draw any of them.

    Args:
        indexes: The sources.
        fields: Fields that the run decodes; only the texts are read.
        limit: Maximum number of samples to read, evenly spaced.
        cache: Cache of remote shards; None uses this node's cache.
    """
    step = -(-sum(map(len, indexes)) // limit)
    texts = fields.texts_only
    if texts.text is not None and texts.text.choose == "random":
        all_captions = texts.text.model_copy(update={"choose": "all", "most": sys.maxsize})
        texts = replace(texts, text=all_captions)
    members = texts.members(indexes)
    with Sources(indexes, cache) as sources:
        for source, index in enumerate(indexes):
            for first in range(0, len(index), step << 10):
                rows = np.arange(first, min(first + (step << 10), len(index)), step)
                numbers = source_sample_numbers(source, rows)
                raws = sources.read(numbers, members)
                for number, raw in zip(numbers.tolist(), raws, strict=True):
                    yield from _texts(texts, raw, sources.where(number))


def _texts(fields: Fields, raw: RawMembers, where: str) -> list[str]:
    """Return all texts of a sample; none if it is bad."""
    try:
        values = fields.decode(raw, where, None).values()
    except BadSample:
        return []  # the run reports bad samples itself
    return [t for value in values for t in ([value] if isinstance(value, str) else value)]
