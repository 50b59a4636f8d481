"""Describe a data set, as numbers and as text.

Counts, sizes, equal images and indexed fields cover all samples and come from the index. Image
headers and captions cover only the samples that are opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from gigabatch.data.decode.images import IMAGE_MEMBERS
from gigabatch.data.describe.content_stats import (
    Captions,
    CaptionStats,
    Images,
    ImageStats,
    count_member,
    one_line,
)
from gigabatch.data.describe.index_stats import (
    Column,
    Distribution,
    Duplicates,
    Frequencies,
    Member,
    column_stats,
    distribution,
    distribution_lines,
    find_duplicates,
    member_stats,
)
from gigabatch.data.shards.index import I64, Index
from gigabatch.data.shards.reader import Reader
from gigabatch.data.text.captions import CaptionSettings

CHUNK = 64
"""Number of samples read at a time."""
LISTED = 10
"""Maximum number of values or bad samples that the text lists."""
VALUE_WIDTH = 76
"""Maximum number of characters of a value in the text."""
LANGUAGE_COLUMNS = ("lang", "language", "languages", "locale")
Progress = Callable[[int, int], None]


@dataclass
class SetStats:
    """Description of a set.

    Attributes:
        source: Source of the set, as the user named it.
        shards: Number of shards with samples.
        shard_bytes: Size of these shards in bytes.
        samples: Number of samples.
        per_shard: Distribution of the number of samples in a shard.
        members: Statistics of each kind of member.
        checksums: Whether the index contains checksums.
        duplicates: Samples with equal images; None without images or checksums.
        columns: Statistics of each indexed json field.
        opened: Number of opened samples.
        bad: Number of opened samples that a run cannot use, for instance without a caption.
        bad_samples: Problems of the first bad samples.
        images: Statistics of image headers; None if no sample has an image.
        captions: Statistics of captions; None if no sample has the caption member.
        caption_member: Extension of the caption member, and `:FIELD` if it is a json field.
    """

    source: str
    shards: int
    shard_bytes: int
    samples: int
    per_shard: Distribution | None
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
        """Return the statistics as values for `json.dumps`."""
        return asdict(self)


def collect(
    index: Index,
    captions: CaptionSettings,
    sample: int | None = None,
    progress: Progress | None = None,
) -> SetStats:
    """Describe a set.

    Args:
        index: Set to describe.
        captions: Captions to count.
        sample: Number of evenly spaced samples to open; None or 0 opens all.
        progress: Called with the number of opened samples and their total.

    Raises:
        GigabatchError: if a shard cannot be read at all.
    """
    sizes = index.shard_sizes[index.shard_sizes > 0]  # A filtered view may use few shards.
    stats = SetStats(
        source=index.source,
        shards=len(sizes),
        shard_bytes=sum(shard.bytes for shard in index.shards if shard.samples),
        samples=len(index),
        per_shard=distribution(sizes),
        members=[member_stats(index, name) for name in index.members],
        checksums=index.settings.checksums,
        duplicates=find_duplicates(index, IMAGE_MEMBERS),
        columns=[column_stats(index, name) for name in index.columns],
        caption_member=":".join(filter(None, (captions.member, captions.field))),
    )
    count = min(sample or len(index), len(index))
    _add_content(stats, index, captions, np.arange(count) * len(index) // count, progress)
    return stats


def _add_content(
    stats: SetStats,
    index: Index,
    settings: CaptionSettings,
    chosen: I64,
    progress: Progress | None,
) -> None:
    """Open the samples `chosen` and add the statistics of their content."""
    kinds = [name for name in IMAGE_MEMBERS if name in index.members]
    texts = [settings.member] if settings.member in index.members else []
    images, captions = Images(), Captions(settings)
    if progress:
        progress(0, len(chosen))
    with Reader(index) as reader:
        for first in range(0, len(chosen) if kinds or texts else 0, CHUNK):
            rows = chosen[first : first + CHUNK]
            raws = reader.read_batch(rows, [*kinds, *texts])
            for row, raw in zip(rows.tolist(), raws, strict=True):
                where = partial(index.where, row)
                problems = [count_member(images, kinds, raw, row, where)]
                problems += [count_member(captions, texts, raw, row, where)]
                _add_bad_sample(stats, [problem for problem in problems if problem])
            stats.opened += len(rows)
            if progress:
                progress(stats.opened, len(chosen))
        stats.images = images.stats() if kinds else None
        stats.captions = captions.stats(reader) if texts else None


def _add_bad_sample(stats: SetStats, problems: list[str]) -> None:
    stats.bad += bool(problems)
    if problems and len(stats.bad_samples) < LISTED:
        stats.bad_samples.append(problems[0])


def render(stats: SetStats) -> str:
    """Format the statistics as text of at most about 100 columns."""
    parts = [_summary, _images, _captions, _duplicates, _columns, _bad_samples]
    blocks = ["\n".join(part(stats)) for part in parts]
    return "\n\n".join(block for block in blocks if block)


def _summary(stats: SetStats) -> Iterator[str]:
    yield one_line(stats.source)
    size = stats.shard_bytes
    size_text = f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
    yield f"{_plural(stats.samples, 'sample')} in {_plural(stats.shards, 'shard')}, {size_text}"
    yield ""
    yield from distribution_lines(
        [
            ("samples per shard", stats.per_shard, ","),
            *((f".{member.name}, bytes", member.bytes, ",") for member in stats.members),
        ]
    )
    for member in stats.members:
        if member.missing:
            yield (
                f"  {_part(member.missing, stats.samples)} without .{member.name}; "
                f"first: {one_line(str(member.first_missing))}"
            )


def _images(stats: SetStats) -> Iterator[str]:
    images = stats.images
    if images is None:
        return
    yield f"Images: headers of {_opened(images.opened, stats)}"
    yield from _missing(images.missing, "an image")
    if not images.opened:
        return
    yield from distribution_lines(
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
        member = stats.caption_member.partition(":")[0]
        yield f"Captions: no sample has a .{member} member; set --caption"
        return
    yield f"Captions ({stats.caption_member}): {_opened(captions.samples, stats)}"
    yield from _missing(captions.missing, "the member")
    yield from _missing(captions.empty, "text in the member")
    if captions.per_sample is None:
        return
    yield from distribution_lines(
        [
            ("captions per sample", captions.per_sample, ","),
            ("characters", captions.characters, ","),
            ("words", captions.words, ","),
        ]
    )
    yield f"  scripts (of most letters): {_frequent(captions.scripts)}"
    if captions.keys:
        yield f"  {stats.caption_member} contains: {_frequent(captions.keys, captions.samples)}"
    yield (
        f"  {captions.distinct:,} distinct captions; {_part(captions.repeated, captions.samples)} "
        "of the samples share one with another sample"
    )
    for text, count in captions.top:
        yield f"  {count:>9,} x {one_line(text, VALUE_WIDTH)}"


def _duplicates(stats: SetStats) -> Iterator[str]:
    if not stats.checksums:
        yield "Equal images: not searched, because the index has no checksums (--headers-only)"
    duplicates = stats.duplicates
    if duplicates is None:
        return
    if not duplicates.groups:
        yield f"Equal images (CRC-32C and size): 0 of {duplicates.samples:,}"
        return
    yield (
        f"Equal images (CRC-32C and size): {_part(duplicates.repeated, duplicates.samples)}, in "
        f"{_plural(duplicates.groups, 'group')}"
    )
    different = duplicates.different
    outcome = f"{different} differ" if different else "all equal byte by byte"
    yield f"  {_plural(duplicates.compared, 'group')} compared: {outcome}"
    if duplicates.chance_pairs >= 0.5:
        pairs = f"{duplicates.chance_pairs:,.0f}"
        yield f"  (about {pairs} pairs of different images are expected to match by chance)"
    for size, samples in duplicates.examples:
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
            f"{'Languages, field' if is_language else 'Field'} {one_line(name)}: "
            f"{'more than ' if column.values.truncated else ''}{column.values.distinct:,} distinct "
            f"values{span}; null in {_part(column.nulls, stats.samples)}"
        )
        highest = max((count for _, count in column.values.top), default=0)
        for value, count in column.values.top if highest > 1 else ():
            yield f"  {count:>9,} x {one_line(str(value), VALUE_WIDTH)}"


def _bad_samples(stats: SetStats) -> Iterator[str]:
    if stats.bad:
        yield f"Unusable: {_part(stats.bad, stats.opened)} of the opened samples"
        yield from (f"  {one_line(problem)}" for problem in stats.bad_samples)
        if stats.bad > len(stats.bad_samples):
            yield f"  ... and {stats.bad - len(stats.bad_samples):,} more"
        yield "  (`gigabatch data check` reads and decodes every sample)"


def _missing(count: int, part: str) -> Iterator[str]:
    if count:
        yield f"  {_plural(count, 'sample')} without {part}"


def _opened(count: int, stats: SetStats) -> str:
    if stats.opened == stats.samples:
        return f"{count:,} samples"
    return f"{count:,} of {stats.opened:,} opened samples, evenly spaced"


def _frequent(values: Frequencies, total: int | None = None) -> str:
    total = total or values.count
    listed = [f"{one_line(str(v))} {_share(n, total)}" for v, n in values.top[:LISTED]]
    if rest := values.distinct - len(listed):
        listed += [f"and {rest:,}{' or more' if values.truncated else ''} others"]
    return ", ".join(listed)


def _part(count: int, total: float) -> str:
    return f"{count:,} ({_share(count, total)})"


def _share(count: float, total: float) -> str:
    """Format a percentage; "0.0%" means none and "100.0%" means all."""
    share = count / total if total else 0.0
    if 0 < share < 0.0005:
        return "<0.1%"
    return f"{min(share, 0.999) if share < 1 else share:.1%}"


def _number(value: float | None) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' if count != 1 else ''}"
