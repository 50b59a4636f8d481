"""Check a data set: reread members, compare checksums, and decode samples."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from gigabatch.data.decode.audio import AudioSettings
from gigabatch.data.decode.fields import Fields
from gigabatch.data.errors import BadSample, GigabatchError
from gigabatch.data.processes import ctrl_c_deferred, worker_pool
from gigabatch.data.remote.locations import is_remote
from gigabatch.data.shards.index import I64, Index
from gigabatch.data.shards.reader import DamagedMember, Reader

CHUNK = 64
"""Number of samples checked at a time."""
LISTED = 20
"""Maximum number of bad samples, and of shards, that a report lists."""
Progress = Callable[[int, int], None]


@dataclass
class Report:
    """Result of a check.

    Attributes:
        samples: Number of samples read.
        bytes: Size of their members in bytes.
        bad: Problem of each bad sample.
        by_shard: Number of bad samples in each shard.
    """

    samples: int = 0
    bytes: int = 0
    bad: list[str] = field(default_factory=list)
    by_shard: Counter[str] = field(default_factory=Counter)

    def add(self, other: Report) -> None:
        """Add the counts and problems of another part of the set."""
        self.samples += other.samples
        self.bytes += other.bytes
        self.bad += other.bad
        self.by_shard += other.by_shard

    def lines(self) -> Iterator[str]:
        """Yield the report as lines of text."""
        yield from self.bad[:LISTED]
        if len(self.bad) > LISTED:
            yield f"... and {len(self.bad) - LISTED:,} more"
        for shard, count in self.by_shard.most_common(LISTED if len(self.by_shard) > 1 else 0):
            yield f"{shard}: {count:,} bad samples"
        yield (
            f"{self.samples:,} samples, {self.bytes / 1e6:,.1f} MB read: "
            + (f"{len(self.bad):,} bad" if self.bad else "all valid")
        )


def check(
    index: Index,
    fields: Fields,
    *,
    every: int = 1,
    decode: bool = True,
    processes: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Read samples and compare the checksums of all their members.

    Args:
        index: Set to check.
        fields: Fields to decode; of several images or audio files of a sample, every one.
        every: Check every n-th sample.
        decode: Decode `fields`; false compares checksums only.
        processes: Number of processes; None uses all available cores.
        progress: Called with the number of samples done and their total.

    Raises:
        GigabatchError: if a shard cannot be read at all.
    """
    chosen = np.arange(0, len(index), every)
    chunks = [chosen[i : i + CHUNK] for i in range(0, len(chosen), CHUNK)]
    work = partial(_check_chunk, index, _each_member(fields, index) if decode else [])
    processes = min(processes or len(os.sched_getaffinity(0)), len(chunks))
    total = Report(bad=list(_resized_shards(index)))
    for report in _map(work, chunks, processes):
        if isinstance(report, str):
            raise GigabatchError(report)
        total.add(report)
        if progress:
            progress(total.samples, len(chosen))
    return total


def _map(
    work: Callable[[I64], Report | str], chunks: list[I64], processes: int
) -> Iterator[Report | str]:
    if processes == 1 or len(chunks) < 8:
        yield from map(work, chunks)
        return
    pool = worker_pool(processes)
    try:
        with ctrl_c_deferred():
            reports = pool.map(work, chunks)
        yield from reports
    finally:
        pool.shutdown(cancel_futures=True)


def _each_member(fields: Fields, index: Index) -> list[Fields]:
    """Split fields so that every image and audio member of a sample is decoded."""
    singles = []
    if fields.image is not None and fields.image.member is None:
        for member in _present(index, fields.image.members):
            image = fields.image.model_copy(update={"member": member})
            singles.append(Fields(image=image, allow_missing=True))
    for name, audio in fields.more.items():
        if isinstance(audio, AudioSettings) and audio.member is None:
            for member in _present(index, audio.members):
                one = audio.model_copy(update={"member": member})
                singles.append(Fields(more={name: one}, allow_missing=True))
    return [fields, *singles]


def _present(index: Index, members: Sequence[str]) -> list[str]:
    """Return those of `members` that occur; none if one occurs alone, which is decoded anyway."""
    present = [member for member in members if member in index.members]
    return present if len(present) > 1 else []


def _decode(raw: Mapping[str, bytes | DamagedMember], fields: list[Fields], where: str) -> None:
    for part in fields:
        part.decode(raw, where, None)
    if isinstance(text := raw.get("json"), bytes) and fields and fields[0].modalities:
        try:
            json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadSample(f"{where}: the json member cannot be read: {error}.") from error


def _resized_shards(index: Index) -> Iterator[str]:
    """Describe local shards whose size has changed since indexing."""
    for shard in index.shards:
        if not is_remote(shard.name) and os.path.exists(shard.name):
            size = os.stat(shard.name).st_size
            if size != shard.bytes:
                yield f"{shard.name}: size is {size:,} bytes, but was {shard.bytes:,} when indexed"


def _check_chunk(index: Index, fields: list[Fields], samples: I64) -> Report | str:
    report = Report()
    try:
        with Reader(index) as reader:
            raws = reader.read_batch(samples, index.members)
    except GigabatchError as error:
        return str(error)
    for sample, raw in zip(samples.tolist(), raws, strict=True):
        report.samples += 1
        report.bytes += sum(len(data) for data in raw.values() if isinstance(data, bytes))
        problems = [data.why for data in raw.values() if isinstance(data, DamagedMember)]
        if not problems:
            try:
                _decode(raw, fields, index.where(sample))
            except BadSample as error:
                problems = [str(error)]
        if problems:
            report.bad += problems[:1]
            report.by_shard[index.shards[index.shard_of(sample)].name] += 1
    return report
