"""`gigabatch reproduce`: small experiments that test papers' claims."""

from __future__ import annotations

import difflib
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
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME|all", help="Experiment to run. Default: list the experiments."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Real drawings for the emoji-... experiments: a folder with train, val-artist "
            "and val-concept, as configs/emoji.yaml describes.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", "--starts", min=1, help="Seeds per variant.")
    ] = 3,
    out: Annotated[Path, typer.Option(help="Folder for data, runs and results.")] = Path(
        "runs/reproduce"
    ),
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the verdict of every paper as Markdown."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per experiment.")
    ] = False,
) -> int:
    """Run a paper's small experiment: baseline and method, with the real trainer.

    An experiment takes minutes on two CPU cores; one on real drawings (--data) takes an hour. Every
    variant and seed has an ordinary run folder. Finished runs are reused: after Ctrl-C, the same
    command continues. Exit codes: 0 all checks pass, 1 some fail, 2 user error, 130 Ctrl-C.

    \b
    gigabatch reproduce symile
    gigabatch reproduce queue --seeds 5 --json
    gigabatch reproduce emoji-languages --data emoji
    gigabatch reproduce all --data emoji --report docs/reproductions.md
    """
    from gigabatch.launcher.experiments.studies import STUDIES, real_data_studies

    on_real_data = real_data_studies(data)
    if name is None:
        write("\n".join(_list_lines(STUDIES, on_real_data)) + "\n")
        return 0
    studies, papers = _select(name, STUDIES, on_real_data, has_data=data is not None)
    # Imported after the name is checked, because it imports torch, which takes seconds.
    from gigabatch.launcher.experiments.session import run_studies

    for paper in papers:
        _write_unmeasured(paper, as_json)
    return run_studies(studies, seeds, out, report, as_json)


def _list_lines(synthetic: Studies, on_real_data: Studies) -> list[str]:
    width = max(len(study.name) for study in (*synthetic, *on_real_data))

    def lines(studies: Studies) -> list[str]:
        return [
            f"  {study.name:{width}}  {'; '.join(study.papers)}: {study.claim}" for study in studies
        ]

    return [
        "On synthetic data:", *lines(synthetic), "",
        "On real drawings, with --data FOLDER:", *lines(on_real_data), "",
        "Run one: gigabatch reproduce NAME. Run all: gigabatch reproduce all.",
    ]  # fmt: skip


def _select(
    name: str, synthetic: Studies, on_real_data: Studies, *, has_data: bool
) -> tuple[Studies, tuple[Paper, ...]]:
    """Return the studies that a name or a paper's alias selects, and selected papers without one.

    Studies on real data are part of `all` and of a paper's alias only if `has_data`.

    Raises:
        GigabatchError: if the name is unknown, or its study needs `--data`.
    """
    from gigabatch.launcher.experiments.papers import PAPERS

    if not has_data and name in {study.name for study in on_real_data}:
        raise GigabatchError(
            f"{name} needs real drawings: add --data FOLDER, a folder with train, val-artist and "
            "val-concept, as configs/emoji.yaml describes."
        )
    studies = (*synthetic, *on_real_data) if has_data else synthetic
    if name == "all":
        return studies, ()
    titles = {paper.title for paper in PAPERS if name == str(paper.alias)}
    selected = tuple(s for s in studies if name == s.name or titles & set(s.papers))
    if selected:
        return selected, ()
    without_study = tuple(paper for paper in PAPERS if paper.title in titles)
    if without_study:
        return (), without_study
    known = [study.name for study in (*synthetic, *on_real_data)]
    close = difflib.get_close_matches(name, known, 1)
    hint = f"Did you mean {close[0]}?" if close else f"Choose one of {', '.join(known)}, or all."
    raise GigabatchError(f"{name}: no such experiment. {hint}")


def _write_unmeasured(paper: Paper, as_json: bool) -> None:
    from gigabatch.launcher.experiments.report import unmeasured_json

    if as_json:
        write(json.dumps(unmeasured_json(paper)) + "\n")
    else:
        write(f"{paper.title}: {paper.status_text}. gigabatch offers: {paper.offers}\n")
