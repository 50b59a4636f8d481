"""Decode the fields of a sample: modalities from its members, columns from its json."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from gigabatch.data.decode.audio import AudioSettings, decode_audio
from gigabatch.data.decode.ids import (
    OLD_UNKNOWN_CODE,
    FieldsVersion,
    MissingIds,
    code_of,
    flag_of,
    is_missing,
    old_code_of,
    unknown_code,
)
from gigabatch.data.decode.images import ImageSettings, decode_image
from gigabatch.data.decode.members import (
    decode_array,
    json_record,
    missing_id,
    number_or_error,
)
from gigabatch.data.decode.vectors import MissingVector, VectorSettings, read_vectors
from gigabatch.data.errors import BadSample, GigabatchError, brief, describe_error
from gigabatch.data.order.mixture import SAMPLE_BITS
from gigabatch.data.remote.cache import ShardCache
from gigabatch.data.shards.index import Index
from gigabatch.data.shards.reader import DamagedMember
from gigabatch.data.shards.sources import (
    SOURCE_COLUMN,
    Sources,
    indexed_values,
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
_OF_ALL_SAMPLES = (GigabatchError, ImportError)
"""Errors of decoding that are clear already, or that any sample would raise. Any other error is
damage of the sample: libraries raise many types for content that they cannot parse."""


@dataclass(frozen=True)
class Fields:
    """The fields to decode from every sample.

    Attributes:
        image: Settings of images; None omits them.
        text: Settings of captions; None omits them.
        more: Settings of additional modalities, by the user's name for each.
        arrays: Extensions of .npy members to yield unchanged; all arrays have the same shape.
        columns: Fields of the json member to yield as integer codes.
        flags: The columns that are flags: 1 for true or 1, 0 for false or 0.
        numbers: Fields of the json member to yield as numbers.
        vectors: Settings of vectors that no tower reads, by name.
        allow_missing: Accept samples that lack a modality or vector, which is then masked.
        ordered: Texts of which a sample's first is the positive; see `read_captions`.
        missing_ids: Treatment of samples without a value in a column that is not a flag.
        version: Meaning of columns and lists; 1 only in runs that began with it.
        column_keys: Column -> key of the config that names it, for messages.
        missing_hint: What to do about samples without a modality, for messages.
    """

    image: ImageSettings | None = None
    text: CaptionSettings | None = None
    more: Mapping[str, ExtraModality] = field(default_factory=dict)
    arrays: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    vectors: Mapping[str, VectorSettings] = field(default_factory=dict)
    allow_missing: bool = False
    flags: tuple[str, ...] = ()
    ordered: tuple[str, ...] = ()
    missing_ids: MissingIds = "error"
    version: FieldsVersion = 2
    column_keys: Mapping[str, str] = field(default_factory=dict)
    missing_hint: str = ""

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
        return replace(self, image=None, more=more, arrays=(), columns=(), numbers=(), vectors={})

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
            except (MissingCaption, MissingVector) as error:
                if not self.allow_missing:
                    raise type(error)(f"{error} {self.missing_hint}".rstrip()) from error
            except _OF_ALL_SAMPLES:
                raise
            except Exception as error:
                why = describe_error(error)
                raise BadSample(f"{where}: the .{member} member cannot be read: {why}.") from error
        return out

    def _decode_modality(self, name: str, data: bytes, where: str, rng_key: int | None) -> Any:
        if name == "image" and self.image is not None:
            return decode_image(data, self.image, where)
        if name == "text" and self.text is not None:
            draws = self.text.choose == "random"  # then any text may be the positive
            captions = read_captions(data, self.text, where, name in self.ordered and not draws)
            if self.text.choose == "all":
                return captions[: self.text.most]
            if draws and rng_key is not None:
                return choose_caption(captions, rng_key)
            return captions[0]
        match self.more_and_vectors.get(name):
            case AudioSettings() as settings:
                return decode_audio(data, settings, where)
            case VectorSettings() as settings:
                return read_vectors(data, settings, where)
            case ExtraText() as settings:
                return read_captions(data, settings, where, name in self.ordered)[0]
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
            BadSample: if the json is damaged, or a column has no value in it.
        """
        try:
            return self._column_values(source, index, row, raw, where)
        except _OF_ALL_SAMPLES:
            raise
        except Exception as error:
            why = describe_error(error)
            raise BadSample(f"{where}: the json member cannot be read: {why}.") from error

    def _column_values(
        self, source: int, index: Index, row: int, raw: RawMembers, where: str
    ) -> dict[str, int | float]:
        out: dict[str, int | float] = {}
        unindexed = self.unindexed_columns(index)
        record = json_record(_intact(raw["json"]), where) if unindexed else {}
        for column in self.columns:
            if column == SOURCE_COLUMN:
                out[column] = source
                continue
            is_indexed = column in index.columns
            value = indexed_values(index, column, [row])[0] if is_indexed else record.get(column)
            if self.version == 1 and is_indexed and value is None:
                out[column] = OLD_UNKNOWN_CODE
            else:
                out[column] = self._code(column, value, source << SAMPLE_BITS | row, where)
        for column in self.numbers:
            out[column] = number_or_error(record.get(column), column, where)
        return out

    def _code(self, column: str, value: Any, number: int, where: str) -> int:
        """Return the int64 code of a column's value of the sample with this number."""
        if self.version == 1 and value is not None:
            return old_code_of(value)
        if column in self.flags:
            flag = flag_of(value)
            if flag is None:
                raise BadSample(
                    f"{where}: {column!r} of its json member is {brief(value)}, not true, false, "
                    f"1 or 0. Set {self._key(column)} to a field of flags that every sample has."
                )
            return flag
        if not is_missing(value):
            return code_of(value)
        if self.missing_ids == "unique":
            return unknown_code(number)
        raise missing_id(column, value, where, self._key(column))

    def _key(self, column: str) -> str:
        return self.column_keys.get(column, "objective.positives")


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
