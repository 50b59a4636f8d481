"""Getting a run back from `checkpoint.copy_to`: its newest copy that is sound, and what it needs.

A copy is a checkpoint when its manifest is there and each file is of the size and SHA-256 that it
says. A damaged one is passed over, loudly.
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
NEEDED = ("environment.json", "tokenizer.json", "data.digest")
_LAST = "config.yaml"  # it makes a folder a run


def is_copy(where: str) -> bool:
    """Whether a run is named by the URL of its copies rather than by a path."""
    return "://" in where


def open_copy(url: str, retry: Retry = Retry()) -> RemoteRun:
    """The copies of a run at URL/NAME. Raises GigabatchError where it is no such place."""
    return RemoteRun(writable_folder(url), retry)


def copied_config(place: RemoteRun) -> str:
    """The text of the config. Raises GigabatchError where no run was copied there."""
    text = place.read(_LAST)
    if text is None:
        raise GigabatchError(
            f"{place.url}: no run was copied there (it holds no {_LAST}). Name what was its "
            "checkpoint.copy_to, a slash, and its run.name."
        )
    return text


def fetch_run(place: RemoteRun, run: RunFolder) -> None:
    """Make the folder of `run`, which must not exist, from its copies; it appears whole.

    Raises GigabatchError where something is missing or no copy of a checkpoint is sound.
    """
    files = place.files()
    if run.path.exists():
        raise GigabatchError(f"{run.path}: exists and is no run. Move it, or set run.dir.")
    missing = [name for name in (*NEEDED, _LAST) if name not in files]
    if missing:
        raise GigabatchError(f"{place.url}: {', '.join(missing)} is missing there; restore it.")
    half = RunFolder(run.path.with_name(f".{run.path.name}.fetch"))
    try:
        half.path.mkdir(parents=True, exist_ok=True)  # of a fetch that was killed: written over
        with half.lock():
            if _fetch_newest(place, files, half, 0) is None:
                raise GigabatchError(
                    f"{place.url}: there is no sound checkpoint to go on from (complete copies: "
                    f"{', '.join(map(str, place.steps(files))) or 'none'}). Start a new run."
                )
            evaluations = [name for name in files if name.startswith("eval/step-")]
            curves = [name for name in files if name == "metrics.jsonl"]
            for name in (*NEEDED, *evaluations, *curves, _LAST):
                _fetch(place, files, name, half.path / name)
            half.path.rename(run.path)
    except OSError as error:
        raise GigabatchError(
            f"run.dir: {run.path.parent} cannot take the run that lies at {place.url}: "
            f"{error.strerror or error}. Make room, or set run.dir elsewhere."
        ) from error


def fetch_newer(place: RemoteRun, run: RunFolder) -> None:
    """Bring the newest sound copy into a run that has none as new. Raises GigabatchError where
    the copies are of another run."""
    place.refuse_other(run)
    try:
        _fetch_newest(place, place.files(), run, _newest(run))
    except OSError as error:
        raise GigabatchError(f"{run.checkpoints} cannot be written: {error}.") from error


def say_newer(place: RemoteRun, run: RunFolder, here: int) -> None:
    """Name a copy that is newer than the step that `run` goes on from."""
    copied = max(place.steps(), default=0)
    if copied > here:
        log.warning(
            "%s holds a newer checkpoint, of step %d; this goes on from step %d, as %s has it. To "
            "go on from the newer one: gigabatch resume %s",
            place.url, copied, here, run.path, place.url,
        )  # fmt: skip


def _newest(run: RunFolder) -> int:
    try:
        newest = latest_checkpoint(run)
    except GigabatchError:  # all are damaged
        return 0
    return newest.step if newest else 0


def _fetch_newest(place: RemoteRun, files: Files, run: RunFolder, after: int) -> int | None:
    """The step of the newest sound copy, which is in `run` now; None where none is newer than
    `after`."""
    for step in reversed(place.steps(files)):
        if step <= after:
            break
        fault = _fetch_checkpoint(place, files, run, step)
        if not fault:
            log.info("fetched checkpoint step-%08d from %s", step, place.url)
            return step
        log.warning("copy passed over: %s", fault)
    return None


def _fetch_checkpoint(place: RemoteRun, files: Files, run: RunFolder, step: int) -> str:
    """What is wrong with the copy of `step`; if nothing, it is in `run` now."""
    folder = f"checkpoints/step-{step:08d}"
    fresh, final = run.checkpoints / f".step-{step:08d}.fetch.tmp", run.path / folder
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        _fetch(place, files, f"{folder}/manifest.json", fresh / "manifest.json")
        for name, size in _sizes(fresh / "manifest.json").items():
            found = files.get(f"{folder}/{name}")
            if found is None or found.bytes != size:
                there = "missing" if found is None else f"{found.bytes} bytes"
                return f"{place.url}/{folder}/{name} is {there}, not {size} bytes"
            _fetch(place, files, f"{folder}/{name}", fresh / name)
        if fault := damage_in(fresh):
            return fault.replace(str(fresh), f"{place.url}/{folder}")
        shutil.rmtree(final, ignore_errors=True)  # damaged, or it would not be fetched
        fresh.rename(final)
        sync_folder(run.checkpoints)
        return ""
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{place.url}/{folder}/manifest.json is damaged ({error!r})"
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _sizes(manifest: Path) -> dict[str, Any]:
    entries = json.loads(manifest.read_text())["files"]
    for name in entries:
        if Path(name).name != name or name.startswith("."):
            raise ValueError(f"it names {name!r}, outside its folder")
    return {name: entry["bytes"] for name, entry in entries.items()}


def _fetch(place: RemoteRun, files: Files, name: str, to: Path) -> None:
    to.parent.mkdir(exist_ok=True)
    found = files[name]
    access.fetch(found.url, found.bytes, to, found.version, place.retry)
