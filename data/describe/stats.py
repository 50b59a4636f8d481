"""`gigabatch data stats`: what a set holds, as numbers and as text.

Counts, sizes, equal images and indexed fields are of all samples, by the index alone; images'
headers and captions are of the samples that are opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from gigabatch.data.decode.members import IMAGE_MEMBERS
from gigabatch.data.describe.opened import (
    Captions,
    CaptionStats,
    Images,
    ImageStats,
    attempt,
    one_line,
)
from gigabatch.data.describe.rowstats import (
    Column,
    Duplicates,
    Frequencies,
    Member,
    Spread,
    column_of,
    duplicates,
    member_of,
    spread,
    spread_lines,
)
from gigabatch.data.shards.index import I64, Index
from gigabatch.data.shards.reader import Reader
from gigabatch.data.text.captions import CaptionSettings

PIECE = 64
"""Samples read at a time."""
SHOWN = 10
WIDE = 76
"""Letters of a value in the text."""
LANGUAGE_COLUMNS = ("lang", "language", "languages", "locale")
Progress = Callable[[int, int], None]


@dataclass
class SetStats:
    """What `collect` found.

    `bad`: opened samples that a run could not use, an empty caption among the reasons;
    `bad_samples`: the first of them. `images`, `captions`: None where no sample has any.
    `duplicates`: None without images or, see `checksums`, checksums.
    """

    source: str
    shards: int
    shard_bytes: int
    samples: int
    per_shard: Spread | None
    members: list[Member]
    checksums: bool
    duplicates: Duplicates | None
    columns: list[Column]
    opened: int = 0
    bad: int = 0
    bad_samples: list[str] = field(default_factory=list)
    images: ImageStats | None = None
    captions: CaptionStats | None = None
    caption_member: str = ""

    def to_json(self) -> dict[str, Any]:
        """Of plain values, for `json.dumps`."""
        return asdict(self)


def collect(
    index: Index,
    captions: CaptionSettings,
    sample: int | None = None,
    progress: Progress | None = None,
) -> SetStats:
    """Describe a set. At most `sample` samples are opened, evenly spaced; None or 0: all.

    Raises GigabatchError where a shard cannot be read at all.
    """
    sizes = index.shard_sizes[index.shard_sizes > 0]  # a view may use few of its shards
    stats = SetStats(
        source=index.source,
        shards=len(sizes),
        shard_bytes=sum(shard.bytes for shard in index.shards if shard.samples),
        samples=len(index),
        per_shard=spread(sizes),
        members=[member_of(index, name) for name in index.members],
        checksums=index.settings.checksums,
        duplicates=duplicates(index, IMAGE_MEMBERS),
        columns=[column_of(index, name) for name in index.columns],
        caption_member=":".join(filter(None, (captions.member, captions.field))),
    )
    count = min(sample or len(index), len(index))
    _open(stats, index, captions, np.arange(count) * len(index) // count, progress)
    return stats


def _open(
    stats: SetStats,
    index: Index,
    settings: CaptionSettings,
    chosen: I64,
    progress: Progress | None,
) -> None:
    """Fill in what opening the samples `chosen` tells."""
    kinds = [name for name in IMAGE_MEMBERS if name in index.members]
    texts = [settings.member] if settings.member in index.members else []
    images, captions = Images(), Captions(settings)
    if progress:
        progress(0, len(chosen))
    with Reader(index) as reader:
        for first in range(0, len(chosen) if kinds or texts else 0, PIECE):
            rows = chosen[first : first + PIECE]
            raws = reader.read_batch(rows, [*kinds, *texts])
            for row, raw in zip(rows.tolist(), raws, strict=True):
                where = partial(index.where, row)
                whys = [attempt(images, kinds, raw, row, where)]
                whys += [attempt(captions, texts, raw, row, where)]
                _note(stats, [why for why in whys if why])
            stats.opened += len(rows)
            if progress:
                progress(stats.opened, len(chosen))
        stats.images = images.found() if kinds else None
        stats.captions = captions.found(reader) if texts else None


def _note(stats: SetStats, whys: list[str]) -> None:
    stats.bad += bool(whys)
    if whys and len(stats.bad_samples) < SHOWN:
        stats.bad_samples.append(whys[0])


def render(stats: SetStats) -> str:
    """The same as text, of at most about 100 columns."""
    parts = [_whole, _images, _captions, _equals, _columns, _bad]
    blocks = ["\n".join(part(stats)) for part in parts]
    return "\n\n".join(block for block in blocks if block)


def _whole(stats: SetStats) -> Iterator[str]:
    yield one_line(stats.source)
    many = stats.shard_bytes
    size = f"{many / 1e6:,.1f} MB" if many >= 1e5 else f"{many / 1e3:,.1f} kB"
    yield f"{_many(stats.samples, 'sample')} in {_many(stats.shards, 'shard')}, {size}"
    yield ""
    yield from spread_lines(
        [
            ("samples a shard", stats.per_shard, ","),
            *((f".{member.name}, bytes", member.bytes, ",") for member in stats.members),
        ]
    )
    for member in stats.members:
        if member.lacking:
            yield (
                f"  {_part(member.lacking, stats.samples)} without .{member.name}; "
                f"the first: {one_line(str(member.first_lacking))}"
            )


def _images(stats: SetStats) -> Iterator[str]:
    images = stats.images
    if images is None:
        return
    yield f"Images: the headers of {_opened(images.opened, stats)}"
    yield from _lacking(images.lacking, "one")
    if not images.opened:
        return
    yield from spread_lines(
        [
            ("width, pixels", images.width, ","),
            ("height, pixels", images.height, ","),
            ("width / height", images.aspect, ",.2f"),
        ],
        total=False,
    )
    yield f"  formats  {_frequent(images.formats)}"
    yield f"  modes    {_frequent(images.modes)}"
    yield f"  sizes    {_frequent(images.sizes)}"
    for side, count in images.small.items():
        yield f"  shorter side below {side}: {_part(count, images.opened)}"


def _captions(stats: SetStats) -> Iterator[str]:
    captions = stats.captions
    if captions is None:
        yield f"Captions: no sample has a .{stats.caption_member.partition(':')[0]}; set --caption"
        return
    yield f"Captions ({stats.caption_member}): those of {_opened(captions.samples, stats)}"
    yield from _lacking(captions.lacking, "one")
    yield from _lacking(captions.empty, "a text in it")
    if captions.each is None:
        return
    yield from spread_lines(
        [
            ("captions a sample", captions.each, ","),
            ("characters", captions.characters, ","),
            ("words, by spaces", captions.words, ","),
        ]
    )
    yield f"  scripts, by most letters: {_frequent(captions.scripts)}"
    if captions.keys:
        yield f"  {stats.caption_member} holds: {_frequent(captions.keys, captions.samples)}"
    yield (
        f"  {captions.distinct:,} different ones; {_part(captions.repeated, captions.samples)} "
        "of the samples share one with another"
    )
    for text, count in captions.top:
        yield f"  {count:>9,} x {one_line(text, WIDE)}"


def _equals(stats: SetStats) -> Iterator[str]:
    if not stats.checksums:
        yield "Equal images: not sought, since the index has no checksums (--headers-only)"
    equal = stats.duplicates
    if equal is None:
        return
    if not equal.groups:
        yield f"Equal images, by CRC-32C and size: none among {equal.samples:,}"
        return
    yield (
        f"Equal images, by CRC-32C and size: {_part(equal.repeated, equal.samples)}, in "
        f"{_many(equal.groups, 'group')}"
    )
    told = f"{equal.different} differed" if equal.different else "all equal byte by byte"
    yield f"  {_many(equal.compared, 'group')} compared: {told}"
    if equal.by_chance >= 0.5:
        yield f"  (by chance about {equal.by_chance:,.0f} pairs that differ look equal so)"
    for size, samples in equal.examples:
        yield f"  {size:>9,} x {one_line(samples[0])}"
        yield from (f"{'':>14}{one_line(where)}" for where in samples[1:])


def _columns(stats: SetStats) -> Iterator[str]:
    for column in stats.columns:
        name = column.name
        is_language = name.lower() in LANGUAGE_COLUMNS
        span = (
            f" from {_number(column.min)} to {_number(column.max)}"
            if column.max is not None
            else ""
        )
        yield (
            f"{'Languages, by field' if is_language else 'Field'} {one_line(name)}: "
            f"{'more than ' if column.values.more else ''}{column.values.distinct:,} different "
            f"values{span}; null in {_part(column.nulls, stats.samples)}"
        )
        most = max((count for _, count in column.values.top), default=0)
        for value, count in column.values.top if most > 1 else ():
            yield f"  {count:>9,} x {one_line(str(value), WIDE)}"


def _bad(stats: SetStats) -> Iterator[str]:
    if stats.bad:
        yield f"Not usable: {_part(stats.bad, stats.opened)} of the samples opened"
        yield from (f"  {one_line(why)}" for why in stats.bad_samples)
        if stats.bad > len(stats.bad_samples):
            yield f"  ... and {stats.bad - len(stats.bad_samples):,} more"
        yield "  (`gigabatch data check` reads and decodes every sample)"


def _lacking(count: int, what: str) -> Iterator[str]:
    if count:
        yield f"  {_many(count, 'sample')} without {what}"


def _opened(count: int, stats: SetStats) -> str:
    if stats.opened == stats.samples:
        return f"{count:,} samples"
    return f"{count:,} of {stats.opened:,} opened samples, evenly spaced"


def _frequent(found: Frequencies, of: int | None = None) -> str:
    shown = [f"{one_line(str(v))} {_share(n, of or found.count)}" for v, n in found.top[:SHOWN]]
    if rest := found.distinct - len(shown):
        shown += [f"and {rest:,}{' or more' if found.more else ''} others"]
    return ", ".join(shown)


def _part(count: int, of: float) -> str:
    return f"{count:,} ({_share(count, of)})"


def _share(count: float, of: float) -> str:
    """Never "0.0%" of something, nor "100.0%" of less than all."""
    share = count / of if of else 0.0
    if 0 < share < 0.0005:
        return "<0.1%"
    return f"{min(share, 0.999) if share < 1 else share:.1%}"


def _number(value: float | None) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' if count != 1 else ''}"
