"""One call of `gigabatch reproduce`: studies one after the other, told as they come."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.experiments import report
from gigabatch.launcher.experiments.run import Stopped, run_study
from gigabatch.launcher.experiments.study import Study
from gigabatch.launcher.output import complain, write
from gigabatch.launcher.signals import StopRequest, stop_on_signals
from gigabatch.trainer.distributed import leave

GRACE_S = 60.0


def run_all(
    studies: Sequence[Study], starts: int, out: Path, document: Path | None, as_json: bool
) -> int:
    """Run them, say and keep what was found; the exit code. Raises GigabatchError."""
    logging.getLogger("gigabatch").setLevel(logging.WARNING)  # train.log has the rest
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GigabatchError(f"--out {out} cannot be made: {error.strerror}.") from error
    hold = True
    say = complain if as_json else _say
    with stop_on_signals(GRACE_S, _leave) as stop:
        for study in studies:
            say(f"{', '.join(map(str, study.papers))} {study.name}: {study.claim}")
            try:
                outcome = run_study(study, starts, out.absolute(), say, stop)
            except Stopped:
                complain("stopped; the same command goes on")
                return stop.exit_code
            found = report.keep(out, study, report.as_json(outcome))
            hold &= outcome.holds
            if as_json:
                write(json.dumps(found, ensure_ascii=False) + "\n")
            else:
                write("\n".join(f"  {line}" for line in _told(found)) + "\n\n")
    if document is not None:
        from gigabatch.launcher.experiments.studies import STUDIES, studies_on

        report.write_report(document, out, (*STUDIES, *studies_on(None)))
    return 0 if hold else 1


def _say(line: str) -> None:
    write(line + "\n")


def _told(found: dict[str, object]) -> list[str]:
    return [*report.table(found), *report.checks(found), f"=> {report.verdict(found)}"]


def _leave(stop: StopRequest) -> None:
    complain("gigabatch: the step in progress was not done in time; the same command goes on")
    sys.stdout.flush()
    leave(stop.exit_code)
