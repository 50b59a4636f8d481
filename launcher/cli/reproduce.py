"""`gigabatch reproduce`: the papers' small experiments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.output import write

if TYPE_CHECKING:
    from gigabatch.launcher.experiments.papers import Paper
    from gigabatch.launcher.experiments.study import Study

    Studies = tuple[Study, ...]


def reproduce(
    what: Annotated[
        str | None,
        typer.Argument(metavar="[NUMBER|NAME|all]", help="A paper by its number or an experiment."),
    ] = None,
    given: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FOLDER",
            help="Real drawings, for the experiments called emoji-...: a folder with train, "
            "val-artist and val-concept, laid out as configs/emoji.yaml says.",
        ),
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

    Each takes minutes on two cores, those on real drawings (--data) an hour. Every start leaves an
    ordinary run folder; what is there already is used again, so after Ctrl-C the same command goes
    on. Without an argument, lists them. Exit codes: 0 the effect shows, 1 it does not, 130 stopped.

    \b
    gigabatch reproduce 34
    gigabatch reproduce symile --starts 5 --json
    gigabatch reproduce emoji-languages --data emoji
    gigabatch reproduce all --data emoji --report docs/reproductions.md
    """
    from gigabatch.launcher.experiments.studies import STUDIES, studies_on

    real = studies_on(given)
    if what is None:
        write("\n".join(_listed(STUDIES, real)) + "\n")
        return 0
    from gigabatch.launcher.experiments.session import (
        run_all,  # seconds, which a list need not wait
    )

    studies, papers = _chosen(what, STUDIES, real, is_given=given is not None)
    for paper in papers:
        _tell_unmeasured(paper, as_json)
    return run_all(studies, starts, out, report, as_json)


def _listed(made_up: Studies, real: Studies) -> list[str]:
    width = max(len(study.name) for study in (*made_up, *real))

    def lines(studies: Studies) -> list[str]:
        numbers = {study.name: ", ".join(map(str, study.papers)) for study in studies}
        return [f"{numbers[each.name]:>6}  {each.name:{width}}  {each.claim}" for each in studies]

    return [
        *lines(made_up), "", "On real drawings, with --data FOLDER:", *lines(real), "",
        "Run one: gigabatch reproduce NUMBER or NAME; or all.",
    ]  # fmt: skip


def _chosen(
    what: str, made_up: Studies, real: Studies, *, is_given: bool
) -> tuple[Studies, tuple[Paper, ...]]:
    """The studies asked for, and a paper that has none; the `real` ones by a number, or with all,
    where their data `is_given`. Raises GigabatchError."""
    from gigabatch.launcher.experiments.papers import PAPERS

    if not is_given and what in {study.name for study in real}:
        raise GigabatchError(
            f"{what} is an experiment on real drawings: say where they are, --data FOLDER, which "
            "holds train, val-artist and val-concept, laid out as configs/emoji.yaml says."
        )
    studies = (*made_up, *real) if is_given else made_up
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
        f"{', '.join(s.name for s in (*made_up, *real))}, or all."
    )


def _tell_unmeasured(paper: Paper, as_json: bool) -> None:
    from gigabatch.launcher.experiments.report import unmeasured

    if as_json:
        write(json.dumps(unmeasured(paper)) + "\n")
    else:
        write(f"{paper.number}, {paper.title}: {paper.verdict}. gigabatch gives: {paper.gives}\n")
