"""`gigabatch reproduce`: the papers' small experiments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.output import write

if TYPE_CHECKING:
    from gigabatch.launcher.reproduce.papers import Paper
    from gigabatch.launcher.reproduce.study import Study


def reproduce(
    what: Annotated[
        str | None,
        typer.Argument(metavar="[NUMBER|NAME|all]", help="A paper by its number or an experiment."),
    ] = None,
    starts: Annotated[int, typer.Option(min=1, help="Random starts of each way.")] = 3,
    out: Annotated[
        Path, typer.Option(help="Where its data, its run folders and what it found are kept.")
    ] = Path("runs/reproduce"),
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a verdict for each paper, as Markdown."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each experiment.")
    ] = False,
) -> int:
    """Repeat a paper's small experiment: baseline and method through the real trainer.

    Each takes minutes on two cores. Every start leaves an ordinary run folder; what is there
    already is used again, so after Ctrl-C the same command goes on. Without an argument, lists
    them. Exit codes: 0 the effect shows, 1 it does not, 130 stopped.

    \b
    gigabatch reproduce 34
    gigabatch reproduce symile --starts 5 --json
    gigabatch reproduce all --report docs/reproductions.md
    """
    from gigabatch.launcher.reproduce.session import run_all
    from gigabatch.launcher.reproduce.studies import STUDIES

    if what is None:
        write("\n".join(_listed(STUDIES)) + "\n")
        return 0
    studies, papers = _chosen(what, STUDIES)
    for paper in papers:
        _tell_unmeasured(paper, as_json)
    return run_all(studies, starts, out, report, as_json)


def _listed(studies: tuple[Study, ...]) -> list[str]:
    width = max(len(study.name) for study in studies)
    numbers = {study.name: ", ".join(map(str, study.papers)) for study in studies}
    lines = [f"{numbers[study.name]:>6}  {study.name:{width}}  {study.claim}" for study in studies]
    return [*lines, "", "Run one: gigabatch reproduce NUMBER or NAME; or all."]


def _chosen(what: str, studies: tuple[Study, ...]) -> tuple[tuple[Study, ...], tuple[Paper, ...]]:
    """The studies asked for, and a paper that has none. Raises GigabatchError."""
    from gigabatch.launcher.reproduce.papers import PAPERS

    if what == "all":
        return studies, ()
    named = tuple(s for s in studies if what == s.name or what in map(str, s.papers))
    if named:
        return named, ()
    without = tuple(paper for paper in PAPERS if what == str(paper.number))
    if without:
        return (), without
    raise GigabatchError(
        f"{what}: neither a paper (1 to {len(PAPERS)}) nor an experiment; there are "
        f"{', '.join(s.name for s in studies)}, or all."
    )


def _tell_unmeasured(paper: Paper, as_json: bool) -> None:
    from gigabatch.launcher.reproduce.report import unmeasured

    if as_json:
        write(json.dumps(unmeasured(paper)) + "\n")
    else:
        write(f"{paper.number}, {paper.title}: {paper.verdict}. gigabatch gives: {paper.gives}\n")
