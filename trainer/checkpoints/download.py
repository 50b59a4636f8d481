"""Download of a run from its copies: its files and the newest valid checkpoint.

A copy is valid if it has a manifest and each file has the size and SHA-256 in the manifest. Damaged
copies are skipped with a warning.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from gigabatch.data.errors import GigabatchError
from gigabatch.data.files import sync_folder
from gigabatch.data.remote import access
from gigabatch.data.remote.access import Retry
from gigabatch.data.remote.locations import writable_folder
from gigabatch.trainer.checkpoints.format import damage_in, latest_checkpoint
from gigabatch.trainer.checkpoints.remote import Files, RemoteRun
from gigabatch.trainer.run.folder import RunFolder

log = logging.getLogger(__name__)
_REQUIRED = ("environment.json", "tokenizer.json", "data.digest")
_CONFIG = "config.yaml"  # fetched last: a folder that has it counts as a run


def open_remote_run(url: str, retry: Retry = Retry()) -> RemoteRun:
    """Return the copies of a run.

    Args:
        url: `checkpoint.copy_to`/NAME.
        retry: Attempts and waits of each request.

    Raises:
        GigabatchError: if the URL is not one to which checkpoints can be copied.
    """
    return RemoteRun(writable_folder(url), retry)


def read_copied_config(remote: RemoteRun) -> str:
    """Return the text of the run's config.

    Raises:
        GigabatchError: if `remote` has none.
    """
    text = remote.read(_CONFIG)
    if text is None:
        raise GigabatchError(
            f"{remote.url}: not a copy of a run ({_CONFIG} is missing). Give the URL as "
            "`checkpoint.copy_to`/`run.name` of the run."
        )
    return text


def fetch_run(remote: RemoteRun, run: RunFolder) -> None:
    """Create the folder of `run` from its copies, completely or not at all.

    Args:
        remote: Copies of the run.
        run: Folder to create.

    Raises:
        GigabatchError: if the folder exists or cannot be written, if a required file is missing
            from the copies, or if no copy of a checkpoint is valid.
    """
    files = remote.files()
    if run.path.exists():
        raise GigabatchError(
            f"{run.path}: exists but is not a run folder. Move it, or set a different run.dir."
        )
    missing = [name for name in (*_REQUIRED, _CONFIG) if name not in files]
    if missing:
        raise GigabatchError(
            f"{remote.url}: {', '.join(missing)} missing from the copies of the run. Restore it."
        )
    partial_run = RunFolder(run.path.with_name(f".{run.path.name}.fetch"))
    try:
        # The folder exists if an earlier fetch was killed; its files are overwritten.
        partial_run.path.mkdir(parents=True, exist_ok=True)
        with partial_run.lock():
            if _fetch_newest(remote, files, partial_run, 0) is None:
                raise GigabatchError(
                    f"{remote.url}: no valid checkpoint to resume from (steps of finished copies: "
                    f"{', '.join(map(str, remote.steps(files))) or 'none'}). Start a new run."
                )
            evaluations = [name for name in files if name.startswith("eval/step-")]
            curves = [name for name in files if name == "metrics.jsonl"]
            for name in (*_REQUIRED, *evaluations, *curves, _CONFIG):
                _fetch(remote, files, name, partial_run.path / name)
            partial_run.path.rename(run.path)
    except OSError as error:
        raise GigabatchError(
            f"run.dir: cannot write the run from {remote.url} to {run.path.parent}: "
            f"{error.strerror or error}. Free space, or set a different run.dir."
        ) from error


def fetch_newer_checkpoint(remote: RemoteRun, run: RunFolder) -> None:
    """Fetch the newest valid copy if it is newer than the newest valid checkpoint of `run`.

    Args:
        remote: Copies of the run.
        run: Existing run folder, whose lock is held.

    Raises:
        GigabatchError: if the copies belong to a different run, or the folder cannot be written.
    """
    remote.check_same_run(run)
    try:
        _fetch_newest(remote, remote.files(), run, _newest_step(run))
    except OSError as error:
        raise GigabatchError(
            f"{run.checkpoints}: cannot write the checkpoint from {remote.url}: {error}. Free "
            "space, or make the folder writable."
        ) from error


def warn_if_copy_is_newer(remote: RemoteRun, run: RunFolder, step: int) -> None:
    """Log a warning if a copy is newer than `step`, from which `run` resumes."""
    copied_step = max(remote.steps(), default=0)
    if copied_step > step:
        log.warning(
            "%s has a newer checkpoint, of step %d; resuming from step %d of %s. To resume from "
            "the newer one: gigabatch resume %s",
            remote.url, copied_step, step, run.path, remote.url,
        )  # fmt: skip


def _newest_step(run: RunFolder) -> int:
    """Return the step of the newest valid checkpoint; 0 if there is none."""
    try:
        checkpoint = latest_checkpoint(run)
    except GigabatchError:  # all are damaged
        return 0
    return checkpoint.step if checkpoint else 0


def _fetch_newest(remote: RemoteRun, files: Files, run: RunFolder, after: int) -> int | None:
    """Fetch the newest valid copy later than step `after`; return its step, or None."""
    for step in reversed(remote.steps(files)):
        if step <= after:
            break
        damage = _fetch_checkpoint(remote, files, run, step)
        if not damage:
            log.info("fetched checkpoint step-%08d from %s", step, remote.url)
            return step
        log.warning("skipping damaged copy: %s", damage)
    return None


def _fetch_checkpoint(remote: RemoteRun, files: Files, run: RunFolder, step: int) -> str:
    """Fetch and verify the copy of `step`; return what is damaged, or "" once it is in `run`."""
    folder = f"checkpoints/step-{step:08d}"
    temporary, final = run.checkpoints / f".step-{step:08d}.fetch.tmp", run.path / folder
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _fetch(remote, files, f"{folder}/manifest.json", temporary / "manifest.json")
        for name, size in _sizes(temporary / "manifest.json").items():
            file = files.get(f"{folder}/{name}")
            if file is None or file.bytes != size:
                state = "missing" if file is None else f"{file.bytes} bytes"
                return f"{remote.url}/{folder}/{name} is {state}, not {size} bytes"
            _fetch(remote, files, f"{folder}/{name}", temporary / name)
        if damage := damage_in(temporary):
            return damage.replace(str(temporary), f"{remote.url}/{folder}")
        # A local checkpoint of this step is damaged; a valid one would not be fetched again.
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync_folder(run.checkpoints)
        return ""
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{remote.url}/{folder}/manifest.json is damaged ({error!r})"
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sizes(manifest: Path) -> dict[str, Any]:
    """Return file name -> bytes.

    Raises:
        ValueError: if a name is outside the manifest's folder.
    """
    entries = json.loads(manifest.read_text())["files"]
    for name in entries:
        if Path(name).name != name or name.startswith("."):
            raise ValueError(f"it names {name!r}, outside its folder")
    return {name: entry["bytes"] for name, entry in entries.items()}


def _fetch(remote: RemoteRun, files: Files, name: str, to: Path) -> None:
    """Download one file of the run to the local path `to`."""
    to.parent.mkdir(exist_ok=True)
    file = files[name]
    access.fetch(file.url, file.bytes, to, file.version, remote.retry)
