"""What a task of `gigabatch eval` measures, and what it finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.data.shards.index import Index
from gigabatch.data.shards.indexing import open_index
from gigabatch.kernels import gather_rows
from gigabatch.trainer.config import Config, positives_of
from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.embedding import (
    NAMED_BY_NUMBER,
    Embed,
    Embedded,
    Reading,
    embed_set,
)
from gigabatch.trainer.evaluation.labels import codes_of, field_values
from gigabatch.trainer.evaluation.ranking import summary
from gigabatch.trainer.evaluation.statistics import Tell
from gigabatch.trainer.evaluation.taps import HEAD, compared, tapped
from gigabatch.trainer.inputs import cache_of, open_eval
from gigabatch.trainer.run.folder import RunFolder
from gigabatch.trainer.towers import Towers


@dataclass(frozen=True)
class Subject:
    """What is measured, and where: a run's towers as of `step`, on the set `on`."""

    run: RunFolder
    config: Config
    towers: Towers
    world: World
    on: str
    step: int

    @property
    def name(self) -> str:
        """Of the set."""
        return Path(self.on).resolve().name if Path(self.on).is_dir() else self.index.name

    @cached_property
    def index(self) -> Index:
        return self.open(self.on)

    def open(self, on: str) -> Index:
        """A folder as the user sees it; else the name of one of the run's own sets."""
        return open_index(on) if Path(on).is_dir() else open_eval(self.config, on)

    def embed(self, reading: Reading, tap: str = HEAD, index: Index | None = None) -> Embedded:
        """Vectors of each modality by itself, read at a tap."""
        if reading.width is not None and tap != HEAD:
            raise GigabatchError(
                f"width={reading.width}: it cuts what the loss sees; leave out tap=."
            )
        return self._embed(tapped(self.towers, tap), reading, index or self.index)

    def embed_compared(self, reading: Reading, place: str) -> Embedded:
        """What is compared across modalities, vectors or tokens: see `place_compared`."""
        return self._embed(compared(self.towers, place), reading, self.index)

    def _embed(self, embed: Embed, reading: Reading, index: Index) -> Embedded:
        found = embed_set(embed, index, self.config, self.run, self.world, reading)
        assert found is not None  # nobody asked it to stop
        return found

    def values(self, name: str, index: Index | None = None, required: bool = True) -> list[Any]:
        """A field of every sample: read by rank 0 for all. Raises GigabatchError on every rank."""
        index = index or self.index
        found: list[Any] | str = []
        if self.world.is_main:
            try:
                found = field_values(index, name, cache_of(self.config), required)
            except GigabatchError as error:
                found = str(error)
        found = self.world.share(found)
        if isinstance(found, str):
            raise GigabatchError(found)
        return list(found)

    def numbers(self, found: Embedded) -> Tensor:
        """int64 [N]: which samples were embedded, on every rank."""
        return gather_rows(found.columns[NAMED_BY_NUMBER], self.world.group)

    def positives(self, given: str | None) -> str | None:
        """The field that right answers share: the one given, else the run's; None for `none`."""
        named = positives_of(self.config.objective) if given is None else given
        return None if named == "none" else named

    def groups(self, name: str | None, measured: Measured) -> Tensor | None:
        """int64 [N]: of each query the code of its sample's field; None without a field, or
        queries. Raises GigabatchError where queries are no samples."""
        if name is None or not measured.figures:
            return None
        if measured.samples is None:
            raise GigabatchError(
                f"intervals by {name}: what asks here are no samples, which have such a field. "
                "Take intervals over single queries."
            )
        return codes_of(self.values(name))[measured.samples.cpu()]

    def codes(self, name: str, found: Embedded, index: Index | None = None) -> Tensor:
        """int64 [n]: the codes of a field of this rank's rows."""
        number = found.columns[NAMED_BY_NUMBER]
        return codes_of(self.values(name, index)).to(number.device)[number]


@dataclass(frozen=True)
class Measured:
    """`name`: of the set. `figures`: of every query, float64 [N], in order; `tell` makes metrics of
    them, or of some of them. `told`: metrics that are of no query. `samples`: int64 [N], whose
    metadata a query has; None where there is none."""

    name: str
    figures: Mapping[str, Tensor] = field(default_factory=dict)
    tell: Tell = summary
    told: Mapping[str, float] = field(default_factory=dict)
    samples: Tensor | None = None

    def metrics(self) -> dict[str, float]:
        return {**(self.tell(self.figures) if self.figures else {}), **self.told}
