"""A weighted sum of objectives, each with its own parameters and state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gigabatch.data.decode.vectors import VectorSettings
from gigabatch.trainer.objectives.base import (
    Card,
    Context,
    Loss,
    Needs,
    Objective,
    Updates,
    reference_loss,
)
from gigabatch.trainer.objectives.module import ModuleSettings
from gigabatch.trainer.objectives.reference import Benchmark, Example, ReferenceBatch, Value
from gigabatch.trainer.objectives.registry import OBJECTIVES, build, class_of, register
from gigabatch.trainer.objectives.settings import ObjectiveSettings, SingleSettings, unique
from gigabatch.trainer.objectives.tables import SampleTable
from gigabatch.trainer.objectives.union import union_of

if TYPE_CHECKING:
    AnySingle = ObjectiveSettings
    from gigabatch.trainer.config import Config
else:
    AnySingle = union_of([*(kind.Settings for kind in OBJECTIVES.values()), ModuleSettings])


class SumSettings(ObjectiveSettings):
    name: Literal["sum"]
    """A weighted sum of objectives."""
    terms: tuple[AnySingle, ...] = Field(min_length=1)
    """The objectives, each with the same keys as on its own."""
    weights: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """One weight per term. Empty: all weights are 1."""

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if self.weights and len(self.weights) != len(self.terms):
            raise ValueError(f"{len(self.weights)} weights for {len(self.terms)} terms")
        return self

    @model_validator(mode="after")
    def _check_momentum(self) -> Self:
        momenta = {m for term in self.terms if (m := term.momentum_tower()) is not None}
        if len(momenta) > 1:
            raise ValueError(
                f"a run has one momentum tower; set one momentum instead of {sorted(momenta)}"
            )
        return self

    def singles(self) -> tuple[SingleSettings, ...]:
        return tuple(single for term in self.terms for single in term.singles())

    def columns(self) -> tuple[str, ...]:
        return unique(name for term in self.terms for name in term.columns())

    def numbers(self) -> tuple[str, ...]:
        return unique(name for term in self.terms for name in term.numbers())

    def flags(self) -> tuple[str, ...]:
        return unique(name for term in self.terms for name in term.flags())

    def ordered_texts(self) -> tuple[str, ...]:
        return unique(name for term in self.terms for name in term.ordered_texts())

    def positives_field(self) -> str | None:
        return next(filter(None, (term.positives_field() for term in self.terms)), None)

    def vectors(self) -> dict[str, VectorSettings]:
        return {name: vector for term in self.terms for name, vector in term.vectors().items()}

    def momentum_tower(self) -> float | None:
        momenta = (term.momentum_tower() for term in self.terms)
        return next((momentum for momentum in momenta if momentum is not None), None)

    def user_modules(self) -> tuple[str, ...]:
        return unique(module for term in self.terms for module in term.user_modules())

    def for_any_device(self) -> ObjectiveSettings:
        return self.model_copy(
            update={"terms": tuple(term.for_any_device() for term in self.terms)}
        )

    def check(self, config: Config) -> None:
        for term in self.terms:
            term.check(config)


@register
class Sum(Objective[SumSettings]):
    """The terms' parameters, buffers and tables are named `terms.N.NAME`."""

    Settings = SumSettings
    card = Card(
        "A weighted sum of objectives",
        "-",
        "sum_t weights_t loss_t",
        "the terms' passes",
        "several goals at once; Barlow Twins, BYOL and SwAV are meant as additions to another loss",
        ("multi", "combined"),
    )
    examples = {
        "infonce and sogclr": Example(
            {
                "weights": [1.0, 0.3],
                "terms": [{"name": "infonce"}, {"name": "sogclr", "gamma": 0.6}],
            }
        )
    }
    benchmarks = dict[str, Benchmark]()  # each term is timed on its own

    def __init__(self, settings: SumSettings, terms: Sequence[Objective[Any]]) -> None:
        super().__init__(settings)
        self.terms = nn.ModuleList(terms)
        self.weights = settings.weights or (1.0,) * len(terms)
        names = [single.name for single in settings.singles()]
        count = Counter(names)
        self.names = [n if count[n] == 1 else f"{n}{i}" for i, n in enumerate(names)]
        needs = [term.needs for term in terms]
        self.needs = Needs(
            taps=_union(need.taps for need in needs),
            columns=_union(need.columns for need in needs),
            numeric_columns=_union(need.numeric_columns for need in needs),
            vectors={name: v for need in needs for name, v in need.vectors.items()},
            teacher=_union(need.teacher for need in needs),
            momentum=max(need.momentum for need in needs),
            tables={
                _name(i, name): row
                for i, need in enumerate(needs)
                for name, row in need.tables.items()
            },
        )

    @classmethod
    def build(cls, settings: SumSettings, *, group: str | None = None, width: int = 0) -> Self:
        return cls(settings, [build(term, group=group, width=width) for term in settings.terms])

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        return sum(term.passes(outputs) for _, term in self._numbered())

    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        losses: list[Loss] = []
        for i, term in self._numbered():
            tables = {name: meta[_name(i, name)] for name in term.needs.tables}
            losses.append(term(outputs, {**meta, **tables}, ctx))
        weighted = [w * loss.value for w, loss in zip(self.weights, losses, strict=True)]
        metrics = {
            f"{name}/{tag}": value
            for name, loss in zip(self.names, losses, strict=True)
            for tag, value in loss.metrics.items()
        }

        def updates() -> Updates:
            return {
                _name(i, n): v for i, loss in enumerate(losses) for n, v in loss.updates().items()
            }

        return Loss(torch.stack(weighted).sum(), metrics, updates)

    @staticmethod
    def reference(settings: SumSettings, batch: ReferenceBatch) -> Value:
        value = surrogate = torch.zeros((), dtype=torch.float64)
        for i, term in enumerate(settings.terms):
            prefix = _name(i, "")
            parameters = {
                name.removeprefix(prefix): p
                for name, p in batch.parameters.items()
                if name.startswith(prefix)
            }
            memory = batch.memory.setdefault(i, {})
            part = replace(batch, parameters=parameters, memory=memory)
            term_value, term_surrogate = reference_loss(class_of(term), term.resolved(), part)
            weight = settings.weights[i] if settings.weights else 1.0
            value = value + weight * term_value.detach()
            term_surrogate = term_value if term_surrogate is None else term_surrogate
            surrogate = surrogate + weight * term_surrogate
        return value, surrogate

    def _numbered(self) -> Iterator[tuple[int, Objective[Any]]]:
        return enumerate(cast(Iterable[Objective[Any]], self.terms))

    def on_epoch(self, tables: Mapping[str, SampleTable], ctx: Context) -> Updates:
        updates: dict[str, Tensor] = {}
        for i, term in self._numbered():
            term_tables = {name: tables[_name(i, name)] for name in term.needs.tables}
            updates |= {_name(i, n): v for n, v in term.on_epoch(term_tables, ctx).items()}
        return updates

    def sample_values(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for i, term in self._numbered():
            term_tables = {name: tables[_name(i, name)] for name in term.needs.tables}
            term_values = term.sample_values(term_tables)
            values |= {f"{self.names[i]}/{name}": v for name, v in term_values.items()}
        return values


def _name(term: int, name: str) -> str:
    """Return the name of a term's buffer or table in the sum; `get_buffer` accepts it."""
    return f"terms.{term}.{name}"


def _union(parts: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return unique(name for part in parts for name in part)
