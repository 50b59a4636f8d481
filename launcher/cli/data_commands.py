"""Actions of `gigabatch data ...`: open shards, run an operation, print its result.

`decode` and `trainer` import torch, so they are imported inside the functions that use them;
indexing and packing do not need them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gigabatch.data.errors import GigabatchError
from gigabatch.data.shards.index import Index, read_manifest
from gigabatch.data.shards.indexing import index_folder, open_index, stored_index
from gigabatch.data.shards.json_columns import check_column_names, holds_json
from gigabatch.data.shards.scan import IndexSettings
from gigabatch.data.shards.sources import rows_without_value
from gigabatch.launcher.progress import progress_bar

LAST_POSITION = 1 << 62
"""Limit of positions in the epoch order; above it, their int64 arithmetic could overflow."""


def index_source(
    source: str,
    columns: Sequence[str],
    headers_only: bool,
    dotted: bool,
    partial: bool,
    processes: int | None,
) -> int:
    """Build or extend an index and print its contents; existing columns are kept.

    Returns:
        Exit code: 2 if samples lack members, unless `partial`.
    """
    check_column_names(columns)
    settings = IndexSettings(
        checksums=not headers_only, columns=_indexed_columns(source), dotted=dotted
    )
    columns = tuple(dict.fromkeys(columns))
    with progress_bar("indexing shards") as progress:
        index = open_index(source, progress, settings, columns=columns, processes=processes)
    members = ", ".join(f"{name} {count:,}" for name, count in index.member_counts)
    size = sum(shard.bytes for shard in index.shards)
    sums = "CRC-32C of every member" if index.settings.checksums else "no checksums"
    print(f"{source}: {len(index):,} samples in {len(index.shards):,} shards, {size / 1e6:,.1f} MB")
    print(f"  members: {members}; {sums}")
    if index.columns:
        print(f"  columns: {', '.join(_describe_column(index, name) for name in index.columns)}")
    print(f"  fingerprint {index.digest[:16]}; index in {index.folder}")
    for line in _several_members(index):
        print(f"  note: {line}")
    missing = _missing_members(index)
    for line in missing:
        print(f"  {'note' if partial else 'error'}: {line}")
    if missing and not partial:
        print(
            "  If this is intended (data.missing=mask), add --partial; otherwise write the shards "
            "again."
        )
    return 2 if missing and not partial else 0


def _indexed_columns(source: str) -> tuple[str, ...]:
    """Return the columns of an existing index."""
    settings = read_manifest(index_folder(source)).get("settings", {})
    return IndexSettings.model_validate(settings).columns


def _describe_column(index: Index, name: str) -> str:
    column = index.table[name]
    kind = "JSON text" if holds_json(index.table.schema.field(name)) else column.type
    missing = len(rows_without_value(index, name))
    return f"{name} ({kind}{f', {missing:,} without' if missing else ''})"


def _several_members(index: Index) -> list[str]:
    """Describe samples with several images or audio files, one line per modality."""
    from gigabatch.data.decode.audio import AUDIO_MEMBERS
    from gigabatch.data.decode.images import IMAGE_MEMBERS

    lines = []
    for noun, members, key in (
        ("images", IMAGE_MEMBERS, "data.image.member"),
        ("audio files", AUDIO_MEMBERS, "the tower's key member"),
    ):
        if count := index.samples_with_several(*members):
            lines.append(f"{count:,} samples have several {noun}; training needs {key} to name one")
    return lines


def _missing_members(index: Index) -> list[str]:
    """Describe samples without a member that other samples have, one line per kind of member."""
    if all(count == len(index) for _, count in index.member_counts):
        return []
    from gigabatch.data.decode.audio import AUDIO_MEMBERS
    from gigabatch.data.decode.images import IMAGE_MEMBERS

    alternatives = (IMAGE_MEMBERS, AUDIO_MEMBERS)  # of each group, a sample needs one member
    known = {member for members in alternatives for member in members}
    kinds = [tuple(m for m in members if m in index.members) for members in alternatives]
    kinds += [(member,) for member in index.members if member not in known]
    lines = []
    for kind in kinds:
        missing = index.samples_without(*kind)
        if kind and len(missing):
            first = int(missing[0])
            begin = min(offset for m in index.members if (offset := index.member_span(first, m)[0]))
            shard = index.shards[index.shard_of(first)].name
            lines.append(
                f"{len(missing):,} samples have no .{' or .'.join(kind)}; the first is "
                f"{index.key(first)!r} ({shard}: at byte {begin})"
            )
    return lines


def check_source(source: str, every: int, decode: bool, processes: int | None) -> int:
    """Read and verify samples; print the damaged ones.

    Returns:
        Exit code: 2 if a sample is damaged.
    """
    from gigabatch.data.decode.audio import AUDIO_MEMBERS, AudioSettings
    from gigabatch.data.decode.fields import Fields
    from gigabatch.data.decode.images import IMAGE_MEMBERS, ImageSettings
    from gigabatch.data.describe.check import check
    from gigabatch.data.text.captions import CaptionSettings

    # Use the stored index; a new one would accept the content of a changed shard.
    index = stored_index(source) or open_source(source)
    fields = Fields(
        image=ImageSettings() if set(IMAGE_MEMBERS) & set(index.members) else None,
        text=CaptionSettings() if "txt" in index.members else None,
        more={"audio": AudioSettings()} if set(AUDIO_MEMBERS) & set(index.members) else {},
        arrays=("npy",) if "npy" in index.members else (),
        allow_missing=True,
    )
    with progress_bar("checking samples") as progress:
        report = check(
            index, fields, every=every, decode=decode, processes=processes, progress=progress
        )
    print("\n".join(report.lines()))
    if not index.settings.checksums:
        print(
            "(the index has no checksums; add them: `gigabatch data index` without --headers-only)"
        )
    return 2 if report.bad else 0


def pack_source(source: str, out: Path, settings: Mapping[str, Any]) -> None:
    """Write shards from a table, or from other shards."""
    from gigabatch.data.packing.pack import PackSettings, pack

    try:
        pack_settings = PackSettings.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        name = "-".join(map(str, first["loc"])).replace("_", "-")
        raise GigabatchError(f"--{name}: {first['msg']}, not {first['input']!r}.") from None
    with progress_bar("packing samples") as progress:
        report = pack(source, out, pack_settings, progress)
    skipped = f", {report.skipped:,} skipped ({out}/skipped.jsonl)" if report.skipped else ""
    print(
        f"{out}: {report.samples:,} samples in {report.shards:,} shards, "
        f"{report.bytes / 1e6:,.1f} MB{skipped}"
    )


def filter_source(source: str, condition: str, out: Path | None) -> None:
    """Count the samples that meet a condition; with `out`, write a filtered view of them."""
    from gigabatch.data.shards.filtered_view import count_matches, create_view

    index = open_source(source)
    if out is None:
        count = count_matches(index, condition)
        print(f"{count:,} of {len(index):,} samples ({count / len(index):.1%})")
        return
    view = create_view(index, condition, out)
    print(
        f"{out}: a view of {len(view):,} of {len(index):,} samples ({len(view) / len(index):.1%})"
    )
    print(f"use it like any other source: data.train={out.absolute()}")


def print_batch(
    path: Path, overrides: Sequence[str], step: int, world: int, rank: int | None, long: bool
) -> None:
    """Print the samples of a step, in the order of the batch; with `rank`, only that rank's."""
    if rank is not None and rank >= world:
        raise GigabatchError(f"--rank {rank}: ranks go from 0 to {world - 1} (--world {world}).")
    from gigabatch.data.order.epoch_order import micro_batch_range
    from gigabatch.data.order.mixture import batch_sample_numbers
    from gigabatch.data.shards.sources import Sources
    from gigabatch.trainer.config.load import load_config
    from gigabatch.trainer.inputs import open_train

    config = load_config(path, overrides)
    if step * config.batch.global_size >= LAST_POSITION:
        raise GigabatchError(
            f"--step {step}: sample positions go up to 2^62; with batches of "
            f"{config.batch.global_size:,} the last step is "
            f"{(LAST_POSITION - 1) // config.batch.global_size}."
        )
    with progress_bar("indexing shards") as progress:
        data = open_train(config, progress)
    indices = batch_sample_numbers(data.mixture, step, config.batch.global_size)
    micro = config.batch.micro_size
    ranks = range(world) if rank is None else [rank]
    with Sources(data.indexes) as sources:
        for current in ranks:
            for j in micro_batch_range(len(indices) // micro, world, current):
                rows = indices[j * micro : (j + 1) * micro]
                for number, key in zip(rows.tolist(), sources.keys(rows), strict=True):
                    source, sample = sources.source_and_row(number)
                    name = data.names[source]
                    shard = sources.shard_name(number)
                    print(f"{current}\t{j}\t{name}\t{shard}\t{sample}\t{key}" if long else key)


def describe_source(
    source: str, sample: int, caption: str, sheet: Path | None, as_json: bool
) -> None:
    """Print statistics of a source; with `sheet`, also draw a contact sheet."""
    from gigabatch.data.describe.contact import contact_sheet
    from gigabatch.data.describe.stats import collect, render
    from gigabatch.data.text.captions import CaptionSettings

    member, _, field = caption.partition(":")
    captions = CaptionSettings(member=member, field=field or None)
    index = open_source(source)
    with progress_bar("reading samples") as progress:
        stats = collect(index, captions, sample or None, progress)
    print(json.dumps(stats.to_json()) if as_json else render(stats))
    for line in () if as_json else _several_members(index):
        print(f"note: {line}; these statistics use the first of their extensions")
    if sheet is not None:
        contact_sheet(index, captions, sheet)
        if not as_json:
            print(f"contact sheet: {sheet}")


def open_source(source: str) -> Index:
    """Open the index of a source; build it first if there is none, showing progress."""
    with progress_bar("indexing shards") as progress:
        return open_index(source, progress)
