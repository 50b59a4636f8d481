"""`gigabatch reproduce`: small experiments that repeat a paper's comparison."""

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
        typer.Argument(metavar="NAME|all", help="Experiment. Default: list all experiments."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FOLDER",
            help="Emoji images, for the experiments named emoji-...: a folder with train, "
            "val-artist and val-concept, laid out as configs/emoji.yaml says.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", "--starts", min=1, help="Number of seeds for each variant.")
    ] = 3,
    out: Annotated[
        Path, typer.Option(help="Folder for the synthetic data, the run folders and the results.")
    ] = Path("runs/reproduce"),
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a verdict for every paper, as Markdown."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each experiment.")
    ] = False,
) -> int:
    """Repeat a paper's comparison: baseline and method.

    Each experiment trains both with the real trainer: minutes on two CPU cores with synthetic data,
    an hour with emoji images (--data). Every seed leaves an ordinary run folder. Existing results
    are reused, so the same command continues after Ctrl-C.

    Exit codes: 0 the effect shows; 1 it does not; 130 stopped.

    \b
    Examples:
      gigabatch reproduce
      gigabatch reproduce symile --seeds 5 --json
      gigabatch reproduce emoji-languages --data emoji
      gigabatch reproduce all --data emoji --report docs/reproductions.md
    """
    from gigabatch.launcher.experiments.studies import STUDIES, studies_on

    with_images = studies_on(data)
    if name is None:
        write("\n".join(_listing(STUDIES, with_images)) + "\n")
        return 0
    from gigabatch.launcher.experiments.session import run_all

    studies, papers = _select(name, STUDIES, with_images, has_images=data is not None)
    for paper in papers:
        _print_unmeasured(paper, as_json)
    return run_all(studies, seeds, out, report, as_json)


def _listing(synthetic: Studies, with_images: Studies) -> list[str]:
    width = max(len(study.name) for study in (*synthetic, *with_images))

    def lines(studies: Studies) -> list[str]:
        return [f"  {study.name:{width}}  {study.claim}" for study in studies]

    return [
        "On synthetic data:", *lines(synthetic), "",
        "On emoji images, with --data FOLDER:", *lines(with_images), "",
        "Run one: gigabatch reproduce NAME",
    ]  # fmt: skip


def _select(
    name: str, synthetic: Studies, with_images: Studies, *, has_images: bool
) -> tuple[Studies, tuple[Paper, ...]]:
    """Return the studies of this name, and a paper without a study.

    A paper's number is an alias of its studies. Raises GigabatchError for unknown names.
    """
    from gigabatch.launcher.experiments.papers import PAPERS

    if not has_images and name in {study.name for study in with_images}:
        raise GigabatchError(
            f"{name} trains on emoji images. Add --data FOLDER: a folder with train, val-artist "
            "and val-concept, laid out as configs/emoji.yaml says."
        )
    studies = (*synthetic, *with_images) if has_images else synthetic
    if name == "all":
        return studies, ()
    matches = tuple(s for s in studies if name == s.name or name in map(str, s.papers))
    if matches:
        return matches, ()
    unmeasured = tuple(paper for paper in PAPERS if name == str(paper.number))
    if unmeasured:
        return (), unmeasured
    known = [study.name for study in (*synthetic, *with_images)]
    nearest = difflib.get_close_matches(name, known, 1)
    hint = f"Did you mean {nearest[0]}?" if nearest else f"There are {', '.join(known)}, or all."
    raise GigabatchError(f"there is no experiment {name!r}. {hint}")


def _print_unmeasured(paper: Paper, as_json: bool) -> None:
    from gigabatch.launcher.experiments.report import unmeasured

    if as_json:
        write(json.dumps(unmeasured(paper)) + "\n")
    else:
        write(f"{paper.title}: {paper.verdict}. gigabatch offers: {paper.gives}\n")
