"""Inputs of an evaluation task: the towers of a run, a set, and fields of its samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
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
    SAMPLE_COLUMN,
    Embed,
    Embedded,
    EmbedSpec,
    caption_settings,
    embed_set,
)
from gigabatch.trainer.evaluation.labels import codes_of, field_values
from gigabatch.trainer.evaluation.result import TaskResult
from gigabatch.trainer.evaluation.taps import HEAD, comparison_reader, tap_reader
from gigabatch.trainer.inputs import cache_of, open_eval
from gigabatch.trainer.required_fields import check_eval_columns
from gigabatch.trainer.run.folder import RunFolder
from gigabatch.trainer.towers import Towers


@dataclass(frozen=True)
class EvalContext:
    """A run's towers at one step, and the set to measure them on.

    Attributes:
        run: Folder of the run.
        config: Config of the run.
        towers: The towers, in evaluation mode, on `world.device`.
        world: The ranks that share the work.
        set_argument: The set, as given to `--on`.
        step: Training step of the towers.
    """

    run: RunFolder
    config: Config
    towers: Towers
    world: World
    set_argument: str
    step: int

    @property
    def set_name(self) -> str:
        """Name of the set in metric tags."""
        return (
            Path(self.set_argument).resolve().name
            if Path(self.set_argument).is_dir()
            else self.index.name
        )

    @cached_property
    def index(self) -> Index:
        """Index of the set."""
        return self.open_set(self.set_argument)

    def open_set(self, set_argument: str) -> Index:
        """Open a set by its folder, or by its name in the run's `data.root`."""
        if Path(set_argument).is_dir():
            return open_index(set_argument)
        return open_eval(self.config, set_argument)

    def embed(
        self,
        modalities: Sequence[str],
        tap: str = HEAD,
        width: int | None = None,
        index: Index | None = None,
    ) -> Embedded:
        """Embed modalities separately, as vectors of a tower output.

        Args:
            modalities: Modalities of the run.
            tap: `head`, `encoder`, `projection`, or the path of a module.
            width: Number of leading coordinates to keep, normalized again; None keeps all.
            index: Set to embed; None embeds the context's.

        Raises:
            GigabatchError: if `width` is combined with a tap other than `head`, or the run lacks
                a modality, a tap or coordinates.
        """
        if width is not None and tap != HEAD:
            raise GigabatchError(
                f"width={width}: only the output of the head can be truncated. Remove tap={tap}."
            )
        spec = EmbedSpec(modalities, width=width)
        return self._embed(tap_reader(self.towers, tap), spec, index or self.index)

    def embed_for_comparison(
        self,
        modalities: Sequence[str],
        output: str,
        columns: Sequence[str] = (),
        captions: str | None = None,
        width: int | None = None,
    ) -> Embedded:
        """Embed modalities that are compared with each other.

        Args:
            modalities: Modalities of the run.
            output: `head` for vectors, `tokens` for token vectors; see `comparisons.choose_output`.
            columns: JSON fields to read as codes.
            captions: `txt`, or the JSON field of the captions; None reads the run's captions.
            width: Number of leading coordinates to keep, normalized again; None keeps all.
        """
        settings = caption_settings(self.config, captions) if captions else None
        spec = EmbedSpec(modalities, columns, settings, width)
        return self._embed(comparison_reader(self.towers, output), spec, self.index)

    def _embed(self, embed: Embed, spec: EmbedSpec, index: Index) -> Embedded:
        self._on_rank_0(partial(check_eval_columns, self.config, index, spec.columns))
        embedded = embed_set(embed, index, self.config, self.run, self.world, spec)
        assert embedded is not None  # embed_set returns None only if its `stop` returns true
        return embedded

    def field_values(
        self, field: str, index: Index | None = None, required: bool = True
    ) -> list[Any]:
        """Return a JSON field of every sample; rank 0 reads it for all ranks.

        Raises:
            GigabatchError: on every rank, if a sample lacks the field and `required` is true.
        """
        cache = cache_of(self.config)
        read = partial(field_values, index or self.index, field, cache, required)
        return list(self._on_rank_0(read))

    def _on_rank_0(self, function: Callable[[], Any]) -> Any:
        """Return a function's result on rank 0, on every rank; an error is raised on every rank."""
        # An error on rank 0 is broadcast as text; raised only there, it would block other ranks.
        result: tuple[Any, str | None] = (None, None)
        if self.world.is_main:
            try:
                result = (function(), None)
            except GigabatchError as error:
                result = (None, str(error))
        value, problem = self.world.broadcast(result)
        if problem is not None:
            raise GigabatchError(problem)
        return value

    def field_codes(self, field: str, embedded: Embedded) -> Tensor:
        """Return int64 [n]: codes of a JSON field for this rank's rows."""
        indices = embedded.columns[SAMPLE_COLUMN]
        return codes_of(self.field_values(field)).to(indices.device)[indices]

    def sample_indices(self, embedded: Embedded) -> Tensor:
        """Return int64 [N]: the indices of the embedded samples, on every rank."""
        return gather_rows(embedded.columns[SAMPLE_COLUMN], self.world.group)

    def positives_field(self, override: str | None) -> str | None:
        """Return the JSON field that positives share.

        Args:
            override: A field, or `none` for pairs only; None means that of the run.
        """
        field = positives_of(self.config.objective) if override is None else override
        return None if field == "none" else field

    def query_groups(self, field: str | None, result: TaskResult) -> Tensor | None:
        """Return int64 [N]: the code of a JSON field of each query's sample.

        Returns None without a field or without queries.

        Raises:
            GigabatchError: if the queries are not samples.
        """
        if field is None or not result.query_values:
            return None
        if result.sample_indices is None:
            raise GigabatchError(
                f"--intervals-by {field}: the queries of this task are not samples and have no "
                "JSON fields. Use --intervals."
            )
        return codes_of(self.field_values(field))[result.sample_indices.cpu()]
