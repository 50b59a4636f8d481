"""Assign roles to a table's columns (file, caption, key, JSON), as set by the user or guessed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import Field

from gigabatch.data.errors import GigabatchError
from gigabatch.data.packing.tables import Row, Table
from gigabatch.data.settings import Settings

FILE_NAMES = (
    "file", "path", "filename", "file_name", "filepath", "file_path", "image", "img", "image_path",
    "image_file", "image_name", "audio", "audio_path", "audio_file",
)  # fmt: skip
CAPTION_NAMES = (
    "caption", "captions", "text", "txt", "sentence", "sentences", "transcript", "transcription",
)  # fmt: skip
SECOND_CAPTION_NAMES = ("title", "description", "alt", "alt_text")
"""Names of caption columns in tables that have none of `CAPTION_NAMES`."""


NO_FILE = "none"
PREFIX = r"[^/\s.*?{}\[\]][^/*?{}\[\]]*"


class PackSettings(Settings):
    """Settings of a pack. Those up to `delimiter` apply to tables only."""

    folder: Path | None = None
    """Folder of the files that a table names. Default: the table's folder."""
    file_column: str | None = None
    """Column of file names or of file contents; `none` if rows have no file. Default: guessed from
    names and types."""
    caption_column: tuple[str, ...] = ()
    """Column of captions; additional ones go into the json member. Default: guessed from names."""
    key_column: str | None = None
    """Column of sample keys. Default: row numbers."""
    json_columns: tuple[str, ...] | None = None
    """Columns of the json member. Default: all remaining columns."""
    delimiter: str | None = Field(None, min_length=1, max_length=1)
    """Character between the fields of a CSV file. Default: the comma (.csv) or tab (.tsv), or the
    one of comma, tab, semicolon and bar that fits the first lines."""
    merge_splits: bool = False
    """Pack files of several splits, such as `train-*` and `validation-*`, into one set; false makes
    them an error."""
    skip_missing: bool = False
    """Skip rows without a caption or without a file of a known type, and list them in
    `skipped.jsonl`; false makes them an error."""
    per_shard: int = Field(10_000, ge=1)
    """Maximum number of samples in a shard."""
    shard_bytes: int = Field(512 << 20, ge=1 << 14)
    """Maximum size of a shard in bytes; a larger sample gets a separate shard."""
    shuffle_seed: int | None = None
    """Seed for shuffling the rows, so that shards contain a mix. Default: the table's order."""
    prefix: str | None = Field(None, pattern=rf"^{PREFIX}$")
    """First part of the shards' file names. Default: the output folder's name."""


@dataclass(frozen=True)
class Columns:
    """Role of each column.

    Attributes:
        file: Column of files; None if rows have no file.
        embedded: Whether that column contains files rather than file names.
        captions: Columns of captions; the first becomes the `txt` member.
        key: Column of sample keys; None numbers the rows.
        extra: Columns that go into the json member.
    """

    file: str | None
    embedded: bool
    captions: tuple[str, ...]
    key: str | None
    extra: tuple[str, ...]

    def to_read(self, include_file: bool) -> list[str]:
        """Return the columns that packing reads, each once."""
        names = [self.file] if include_file and self.file else []
        names += [*self.captions, *([self.key] if self.key else []), *self.extra]
        return list(dict.fromkeys(names))

    def describe(self) -> str:
        """Return one sentence on where each column goes."""
        file = f"files from {self.file!r}" if self.file else "no files"
        if self.captions:
            caption = f"captions (txt) from {self.captions[0]!r}"
        else:
            caption = (
                "no captions: no column is named like one, so samples have no txt member. Name one "
                "by --caption-column, or set data.captions.field to a json field when you train"
            )
        fields = [*self.captions[1:], *self.extra]
        return f"{file}, json from {', '.join(fields) or 'no column'}, {caption}"

    def in_json(self, row: Row) -> Sequence[str]:
        """Return the columns of a row that go into its json member.

        A list of captions is included, because `txt` holds only the first of them.
        """
        caption_is_list = any(isinstance(row.get(name), list) for name in self.captions[:1])
        captions = self.captions if caption_is_list else self.captions[1:]
        return [*captions, *(name for name in self.extra if name not in captions)]


def choose_columns(table: Table, settings: PackSettings) -> Columns:
    """Assign roles to the columns of a table.

    Raises:
        GigabatchError: if a column does not exist, or no column or several columns fit a role; the
            message lists the columns.
    """
    binary = [name for name, column_type in table.types.items() if _is_file(column_type)]
    caption_candidates = _matching_columns(table, CAPTION_NAMES) or _matching_columns(
        table, SECOND_CAPTION_NAMES
    )
    if settings.file_column == NO_FILE and NO_FILE not in table.columns:
        file = None
        captions = settings.caption_column or (
            tuple(caption_candidates) if len(caption_candidates) == 1 else ()
        )
    else:
        file_candidates = binary or _matching_columns(table, FILE_NAMES)
        file = _resolve(table, "--file-column", settings.file_column, file_candidates)
        captions = settings.caption_column or (
            _resolve(table, "--caption-column", None, caption_candidates),
        )
    for name in captions:
        _resolve(table, "--caption-column", name, ())
    if settings.key_column:
        _resolve(table, "--key-column", settings.key_column, ())
    assigned = {file, settings.key_column, *captions}
    extra = settings.json_columns
    if extra is None:
        extra = tuple(name for name in table.columns if name not in assigned)
    for name in extra:
        _resolve(table, "--json-column", name, ())
        if _contains_bytes(table.types.get(name)):
            raise GigabatchError(
                f"{table.source}: column {name!r} contains bytes, which JSON cannot represent. Set "
                "--json-column to each column to include; the columns are "
                f"{', '.join(table.columns)}."
            )
    return Columns(file, file in binary, captions, settings.key_column, extra)


def _matching_columns(table: Table, names: Collection[str]) -> list[str]:
    return [column for column in table.columns if column.lower() in names]


def _resolve(table: Table, option: str, requested: str | None, candidates: Sequence[str]) -> str:
    """Return the requested column, or the only candidate if none is requested."""
    if requested in table.columns:
        return str(requested)
    if requested is None and len(candidates) == 1:
        return candidates[0]
    role = option.removeprefix("--").replace("-", " ")
    if requested is not None:
        problem = f"there is no column {requested!r}"
    elif candidates:
        problem = f"several columns could be the {role} ({', '.join(candidates)})"
    else:
        problem = f"no column is clearly the {role}"
    fix = f"Set {option} to one of the columns: {', '.join(table.columns)}"
    if option == "--file-column" and not candidates:
        fix += f". If rows have no file, set --file-column {NO_FILE}"
    if len(table.columns) == 1 and table.untyped:
        fix += ". If this is several columns in one, set --delimiter to the character between them"
    raise GigabatchError(f"{table.source}: {problem}. {fix}.")


def _is_bytes(column_type: Any) -> bool:
    types = pa.types
    return bool(
        types.is_binary(column_type)
        or types.is_large_binary(column_type)
        or types.is_binary_view(column_type)
        or types.is_fixed_size_binary(column_type)
    )


def _is_file(column_type: Any) -> bool:
    """Accept bytes, and the struct of bytes and path in which `datasets` stores images."""
    if pa.types.is_struct(column_type):
        return any(field.name == "bytes" and _is_bytes(field.type) for field in column_type)
    return _is_bytes(column_type)


def _contains_bytes(column_type: Any) -> bool:
    if column_type is None or not pa.types.is_nested(column_type):
        return column_type is not None and _is_bytes(column_type)
    return any(_contains_bytes(column_type.field(i).type) for i in range(column_type.num_fields))
