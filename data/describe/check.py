"""`gigabatch data check`: read every member again, compare its checksum, decode it; a report."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from gigabatch.data.decode.fields import Fields
from gigabatch.data.errors import BadSample, GigabatchError
from gigabatch.data.processes import ctrl_c_deferred, worker_pool
from gigabatch.data.remote.places import is_remote
from gigabatch.data.shards.index import I64, Index
from gigabatch.data.shards.reader import DamagedMember, Reader

PIECE = 64
"""Samples checked at a time."""
SHOWN = 20
Progress = Callable[[int, int], None]


@dataclass
class Report:
    """What a check found. `bad`: why each unusable sample is so; `by_shard`: how many in each."""

    samples: int = 0
    bytes: int = 0
    bad: list[str] = field(default_factory=list)
    by_shard: Counter[str] = field(default_factory=Counter)

    def add(self, other: Report) -> None:
        self.samples += other.samples
        self.bytes += other.bytes
        self.bad += other.bad
        self.by_shard += other.by_shard

    def lines(self) -> Iterator[str]:
        """The report, as text."""
        yield from self.bad[:SHOWN]
        if len(self.bad) > SHOWN:
            yield f"... and {len(self.bad) - SHOWN:,} more"
        for shard, count in self.by_shard.most_common(SHOWN if len(self.by_shard) > 1 else 0):
            yield f"{shard}: {count:,} bad samples"
        yield (
            f"{self.samples:,} samples, {self.bytes / 1e6:,.1f} MB read: "
            + (f"{len(self.bad):,} bad" if self.bad else "all sound")
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
    """Read every `every`-th sample: all members' checksums and, with `decode`, all that `fields`
    reads. Raises GigabatchError where a shard cannot be read at all."""
    chosen = np.arange(0, len(index), every)
    pieces = [chosen[i : i + PIECE] for i in range(0, len(chosen), PIECE)]
    work = partial(_check_piece, index, fields if decode else Fields())
    processes = min(processes or len(os.sched_getaffinity(0)), len(pieces))
    whole = Report(bad=list(_resized(index)))
    for report in _run(work, pieces, processes):
        if isinstance(report, str):
            raise GigabatchError(report)
        whole.add(report)
        if progress:
            progress(whole.samples, len(chosen))
    return whole


def _run(
    work: Callable[[I64], Report | str], pieces: list[I64], processes: int
) -> Iterator[Report | str]:
    if processes == 1 or len(pieces) < 8:
        yield from map(work, pieces)
        return
    pool = worker_pool(processes)
    try:
        with ctrl_c_deferred():
            found = pool.map(work, pieces)
        yield from found
    finally:
        pool.shutdown(cancel_futures=True)


def _open_all(raw: Mapping[str, bytes | DamagedMember], fields: Fields, where: str) -> None:
    fields.decode(raw, where, None)
    if isinstance(told := raw.get("json"), bytes) and fields.modalities:
        try:
            json.loads(told)
        except ValueError as error:
            raise BadSample(f"{where}: the json member cannot be read: {error}.") from error


def _resized(index: Index) -> Iterator[str]:
    """Local shards whose size is not what it was."""
    for shard in index.shards:
        if not is_remote(shard.name) and os.path.exists(shard.name):
            now = os.stat(shard.name).st_size
            if now != shard.bytes:
                yield f"{shard.name}: has {now:,} bytes, and had {shard.bytes:,} when indexed"


def _check_piece(index: Index, fields: Fields, samples: I64) -> Report | str:
    report = Report()
    try:
        with Reader(index) as reader:
            raws = reader.read_batch(samples, index.members)
    except GigabatchError as error:
        return str(error)
    for sample, raw in zip(samples.tolist(), raws, strict=True):
        report.samples += 1
        report.bytes += sum(len(data) for data in raw.values() if isinstance(data, bytes))
        damaged = [data.why for data in raw.values() if isinstance(data, DamagedMember)]
        if not damaged:
            try:
                _open_all(raw, fields, index.where(sample))
            except BadSample as error:
                damaged = [str(error)]
        if damaged:
            report.bad += damaged[:1]
            report.by_shard[index.shards[index.shard_of(sample)].name] += 1
    return report
