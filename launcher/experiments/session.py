"""One call of `gigabatch reproduce`: runs the studies in turn and prints their results."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.experiments import report
from gigabatch.launcher.experiments.run import Stopped, run_study
from gigabatch.launcher.experiments.study import Study
from gigabatch.launcher.output import write, write_stderr
from gigabatch.launcher.signals import StopRequest, stop_on_signals
from gigabatch.trainer.distributed import exit_now

GRACE_S = 60.0


def run_studies(
    studies: Sequence[Study], seeds: int, out: Path, document: Path | None, as_json: bool
) -> int:
    """Run studies, print and save their results.

    Args:
        studies: Studies, in the order in which they run.
        seeds: Number of seeds per variant.
        out: Folder for data, runs and results.
        document: Markdown file for the verdicts of all papers; None for no file.
        as_json: Print one JSON object per study on stdout, and progress on stderr.

    Returns:
        Exit code: 0 if all studies pass, 1 if not, or that of the signal that stopped them.

    Raises:
        GigabatchError: if `out` cannot be created, or a study raises it.
    """
    logging.getLogger("gigabatch").setLevel(logging.WARNING)  # details are in each train.log
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GigabatchError(f"--out {out} cannot be created: {error.strerror}.") from error
    all_passed = True
    say = write_stderr if as_json else _write_line
    with stop_on_signals(GRACE_S, _abandon_step) as stop:
        for study in studies:
            say(f"{study.name} ({'; '.join(study.papers)}): {study.claim}")
            try:
                outcome = run_study(study, seeds, out.absolute(), say, stop)
            except Stopped:
                write_stderr("stopped; run the same command to continue")
                return stop.exit_code
            saved = report.save(out, study, report.as_json(outcome))
            all_passed &= outcome.passed
            if as_json:
                write(json.dumps(saved, ensure_ascii=False) + "\n")
            else:
                write("".join(f"  {line}\n" for line in _summary(saved)) + "\n")
    if document is not None:
        from gigabatch.launcher.experiments.studies import STUDIES, real_data_studies

        report.write_report(document, out, (*STUDIES, *real_data_studies(None)))
    return 0 if all_passed else 1


def _write_line(line: str) -> None:
    write(line + "\n")


def _summary(outcome: dict[str, Any]) -> Iterator[str]:
    yield from report.table_lines(outcome["results"])
    yield from report.check_lines(outcome)
    yield f"{report.verdict(outcome)}  {outcome['study']}"


def _abandon_step(stop: StopRequest) -> None:
    write_stderr(
        f"gigabatch: the step in progress did not finish within {GRACE_S:.0f} s; "
        "run the same command to continue"
    )
    sys.stdout.flush()
    exit_now(stop.exit_code)
