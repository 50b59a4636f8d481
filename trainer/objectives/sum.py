"""A weighted sum of objectives, each with its own parameters and state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from gigabatch.trainer.objectives.base import Context, Loss, Needs, Objective, Updates
from gigabatch.trainer.objectives.tables import SampleTable


class Sum(Objective):
    """`terms`: by name; `weights`: one each."""

    def __init__(
        self, terms: Sequence[Objective], names: Sequence[str], weights: Sequence[float]
    ) -> None:
        super().__init__()
        self.terms, self.weights = nn.ModuleList(terms), tuple(weights)
        twice = Counter(names)
        self.names = [n if twice[n] == 1 else f"{n}{i}" for i, n in enumerate(names)]
        each = [term.needs for term in terms]
        self.needs = Needs(
            taps=_joined(needs.taps for needs in each),
            columns=_joined(needs.columns for needs in each),
            numbers=_joined(needs.numbers for needs in each),
            vectors={name: v for needs in each for name, v in needs.vectors.items()},
            teacher=_joined(needs.teacher for needs in each),
            momentum=max(needs.momentum for needs in each),
            tables={
                _name(i, name): row
                for i, needs in enumerate(each)
                for name, row in needs.tables.items()
            },
        )

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        return sum(term.passes(outputs) for _, term in self._numbered())

    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        losses: list[Loss] = []
        for i, term in self._numbered():
            own = {name: meta[_name(i, name)] for name in term.needs.tables}
            losses.append(term(outputs, {**meta, **own}, ctx))
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

    def _numbered(self) -> Iterator[tuple[int, Objective]]:
        return enumerate(cast(Iterable[Objective], self.terms))

    def on_epoch(self, tables: Mapping[str, SampleTable], ctx: Context) -> Updates:
        found: dict[str, Tensor] = {}
        for i, term in self._numbered():
            own = {name: tables[_name(i, name)] for name in term.needs.tables}
            found |= {_name(i, n): v for n, v in term.on_epoch(own, ctx).items()}
        return found

    def of_samples(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for i, term in self._numbered():
            own = {name: tables[_name(i, name)] for name in term.needs.tables}
            told = term.of_samples(own)
            found |= {f"{self.names[i]}/{name}": values for name, values in told.items()}
        return found


def _name(term: int, name: str) -> str:
    """A term's buffer, as `get_buffer` of the sum finds it, or table."""
    return f"terms.{term}.{name}"


def _joined(parts: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for part in parts for name in part))
