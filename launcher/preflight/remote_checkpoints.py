"""What is looked at where checkpoints are copied to, before a worker starts."""

from __future__ import annotations

from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote.access import check_writable
from gigabatch.trainer.checkpoints.download import say_newer
from gigabatch.trainer.checkpoints.remote import RemoteRun, remote_run
from gigabatch.trainer.config import CheckpointSettings, Config
from gigabatch.trainer.run.folder import RunFolder


def is_taken(settings: CheckpointSettings, name: str) -> bool:
    """Whether the copies of some run have this name already."""
    place = remote_run(settings, name)
    return place is not None and place.read("environment.json") is not None


def refuse_taken(config: Config) -> None:
    """Early, before the data is read, say that `run.name` is taken there."""
    name = config.run.name
    if name and is_taken(config.checkpoint, name):
        url = f"{str(config.checkpoint.copy_to).rstrip('/')}/{name}"
        raise GigabatchError(
            f"run.name: {url} (checkpoint.copy_to) holds copies of a run of this name. `gigabatch "
            f"resume {url}` goes on with it; or choose another name."
        )


def copies_of(run: RunFolder, settings: CheckpointSettings) -> RemoteRun | None:
    """Where a run is to be copied to, if anywhere. Raises GigabatchError where nothing can be
    written there."""
    place = remote_run(settings, run.path.name)
    if place:
        try:
            check_writable(place.url.rpartition("/")[0])
        except GigabatchError as error:
            raise GigabatchError(
                f"checkpoint.copy_to: {error} To go on without copies: checkpoint.copy_to=null."
            ) from error
    return place


def take_over(place: RemoteRun, run: RunFolder, here: int) -> None:
    """Make ready to copy a run that goes on from step `here`: attempts that have copied so far are
    the past. Raises GigabatchError where another run lies there."""
    place.claim(run)
    run.reserve_attempts(place.newest_attempt(), place.url)
    say_newer(place, run, here)
