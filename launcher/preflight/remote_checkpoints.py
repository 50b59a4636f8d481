"""Checks of `checkpoint.copy_to`, made before workers start."""

from __future__ import annotations

from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote.access import check_writable
from gigabatch.trainer.checkpoints.download import warn_if_copy_is_newer
from gigabatch.trainer.checkpoints.remote import RemoteRun, remote_run
from gigabatch.trainer.config import CheckpointSettings, Config
from gigabatch.trainer.run.folder import RunFolder


def is_copied_name(settings: CheckpointSettings, name: str) -> bool:
    """Return whether `checkpoint.copy_to` already contains copies of a run called `name`."""
    remote = remote_run(settings, name)
    return remote is not None and remote.read("environment.json") is not None


def check_copy_name_is_free(config: Config) -> None:
    """Check that `checkpoint.copy_to` contains no copies of a run called `run.name`.

    Call it before the data is read, which may take minutes.

    Raises:
        GigabatchError: if it contains copies of such a run.
    """
    name = config.run.name
    if name and is_copied_name(config.checkpoint, name):
        url = f"{str(config.checkpoint.copy_to).rstrip('/')}/{name}"
        raise GigabatchError(
            f"run.name: {url} (checkpoint.copy_to) contains copies of a run of this name. Resume "
            f"it with `gigabatch resume {url}`, or set a different run.name."
        )


def writable_remote_run(run: RunFolder, settings: CheckpointSettings) -> RemoteRun | None:
    """Return the copies of `run`, after a test write; None without `checkpoint.copy_to`.

    Args:
        run: Run folder; its name is also the name of the copies.
        settings: Checkpoint settings of the run.

    Raises:
        GigabatchError: if `checkpoint.copy_to` cannot be written.
    """
    remote = remote_run(settings, run.path.name)
    if remote:
        try:
            check_writable(remote.url.rpartition("/")[0])
        except GigabatchError as error:
            raise GigabatchError(
                f"checkpoint.copy_to: {error} To resume without copies: checkpoint.copy_to=null."
            ) from error
    return remote


def claim_copies(remote: RemoteRun, run: RunFolder, step: int) -> None:
    """Take over the copies of a resumed run, so that earlier attempts cannot write them.

    Args:
        remote: Copies of the run.
        run: Run folder, whose lock is held.
        step: Step from which the run resumes; 0 for a new run. If a copy is newer, a warning is
            logged.

    Raises:
        GigabatchError: if the copies belong to a different run.
    """
    remote.claim(run)
    run.reserve_attempts(remote.newest_attempt(), remote.url)
    warn_if_copy_is_newer(remote, run, step)
