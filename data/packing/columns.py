"""Which column of a table is the file, which the caption: as set, or told by name and type."""

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


NO_FILE = "none"
PREFIX = r"[^/\s.*?{}\[\]][^/*?{}\[\]]*"


class PackSettings(Settings):
    """How a source is packed. The first five are for tables alone."""

    folder: Path | None = None
    """Where the files lie that a table names. Default: where the table lies."""
    file_column: str | None = None
    """The column of files' names, or of files' bytes; `none` where rows are texts and numbers
    alone. Default: guessed by name and type."""
    caption_column: tuple[str, ...] = ()
    """The column of captions; further ones go to the json member. Default: guessed by name."""
    key_column: str | None = None
    """The column of samples' keys. Default: the rows' numbers."""
    json_columns: tuple[str, ...] | None = None
    """What the json member holds. Default: every other column."""
    skip_missing: bool = False
    """Leave out rows that lack a caption or a sound file of a known type; `skipped.jsonl` in the
    new folder names each. Off: such rows are an error."""
    per_shard: int = Field(10_000, ge=1)
    """Samples in a shard, at most."""
    shard_bytes: int = Field(512 << 20, ge=1 << 14)
    """Bytes of a shard, at most; a sample larger than that has one of its own."""
    shuffle_seed: int | None = None
    """Permute the rows, so that a shard holds a mix. Default: the table's order."""
    prefix: str | None = Field(None, pattern=rf"^{PREFIX}$")
    """What the shards' names begin with. Default: the new folder's name."""


@dataclass(frozen=True)
class Columns:
    """`file`: None where rows have none. `embedded`: the files' bytes lie in the table. `rest`:
    what goes to the json member."""

    file: str | None
    embedded: bool
    captions: tuple[str, ...]
    key: str | None
    rest: tuple[str, ...]

    def used(self, files: bool) -> list[str]:
        """The columns to read, with that of the files or without."""
        names = [self.file] if files and self.file else []
        names += [*self.captions, *([self.key] if self.key else []), *self.rest]
        return list(dict.fromkeys(names))

    def in_json(self, row: Row) -> Sequence[str]:
        """The columns of a row that the json member holds: a list of captions too, since `txt` is
        but the first."""
        several = any(isinstance(row.get(name), list) for name in self.captions[:1])
        more = self.captions if several else self.captions[1:]
        return [*more, *(name for name in self.rest if name not in more)]


def choose(table: Table, settings: PackSettings) -> Columns:
    """The columns' parts. Raises GigabatchError, which lists the columns, where it cannot tell."""
    binary = [name for name, kind in table.types.items() if _is_file(kind)]
    guessed = _named(table, CAPTION_NAMES)
    if settings.file_column == NO_FILE and NO_FILE not in table.columns:
        file = None
        captions = settings.caption_column or tuple(guessed[:1] if len(guessed) == 1 else ())
    else:
        named = binary or _named(table, FILE_NAMES)
        file = _pick(table, "file_column", settings.file_column, named)
        captions = settings.caption_column or (_pick(table, "caption_column", None, guessed),)
    for name in captions:
        _pick(table, "caption_column", name, ())
    if settings.key_column:
        _pick(table, "key_column", settings.key_column, ())
    taken = {file, settings.key_column, *captions}
    rest = settings.json_columns
    if rest is None:
        rest = tuple(name for name in table.columns if name not in taken)
    for name in rest:
        _pick(table, "json_columns", name, ())
        if _has_bytes(table.types.get(name)):
            raise GigabatchError(
                f"{table.source}: column {name!r} holds bytes, which the json member cannot. Set "
                f"json_columns to those it shall hold; the columns are {', '.join(table.columns)}."
            )
    return Columns(file, file in binary, captions, settings.key_column, rest)


def _named(table: Table, names: Collection[str]) -> list[str]:
    return [column for column in table.columns if column.lower() in names]


def _pick(table: Table, setting: str, given: str | None, found: Sequence[str]) -> str:
    if given in table.columns:
        return str(given)
    if given is None and len(found) == 1:
        return found[0]
    if given is not None:
        what = f"has no column {given!r}"
    elif found:
        what = f"has more than one column that could be the {setting} ({', '.join(found)})"
    else:
        what = f"has no column that is plainly the {setting}"
    raise GigabatchError(
        f"{table.source}: {what}. Set {setting}; the columns are {', '.join(table.columns)}."
    )


def _is_bytes(kind: Any) -> bool:
    types = pa.types
    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    )


def _is_file(kind: Any) -> bool:
    """Bytes, or a struct of bytes and path, by which `datasets` keeps images and audio."""
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_bytes(field.type) for field in kind)
    return _is_bytes(kind)


def _has_bytes(kind: Any) -> bool:
    if kind is None or not pa.types.is_nested(kind):
        return kind is not None and _is_bytes(kind)
    return any(_has_bytes(kind.field(i).type) for i in range(kind.num_fields))
