"""Ends of a run that were not planned: failures, and stops that take too long."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from gigabatch.data.errors import GigabatchError
from gigabatch.data.failures import LostProcess, as_failure
from gigabatch.launcher.output import write_stderr
from gigabatch.launcher.signals import StopRequest
from gigabatch.trainer.distributed import exit_now
from gigabatch.trainer.run.folder import RunFolder


def raise_with_resume(run: RunFolder, error: BaseException) -> NoReturn:
    """Raise the failure of a run in this process, with the command that continues it."""
    failure = as_failure(error)
    resume = f"`gigabatch resume {shown_path(run.path)}` continues from the last checkpoint."
    if isinstance(failure, LostProcess):
        raise GigabatchError(f"{run.path}: {failure}\n{resume}") from error
    if isinstance(failure, GigabatchError):
        raise failure from error
    failure.add_note(f"gigabatch: {resume}")
    if failure is error:
        raise failure
    raise failure from error


def exit_overdue(run: RunFolder, stop: StopRequest) -> None:
    """Exit this process because a stop took longer than `cluster.grace_s`."""
    write_stderr(overdue_message(run))
    exit_now(stop.exit_code)


def overdue_message(run: RunFolder) -> str:
    """Return the message for a stop that took longer than `cluster.grace_s`."""
    saved = run.steps_saved()
    last = f"the checkpoint of step {saved[-1]}" if saved else "no checkpoint"
    unfinished = (
        "the copy of the checkpoint was" if run.stopped()
        else "the current step and its checkpoint were"
    )  # fmt: skip
    return (
        f"gigabatch: {unfinished} not finished within "
        f"cluster.grace_s={run.config().cluster.grace_s:g} s; the run has {last}.\n"
        f"to continue: gigabatch resume {shown_path(run.path)}"
    )


def shown_path(path: Path) -> Path:
    """Return a path as the user would type it: relative if it is below the working directory."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
