"""A folder that a pack writes into: its lock, what is finished, and files that appear whole.

`pack.json` says from which source and with which settings the pack was begun, and which shards are
whole. A shard is written under a temporary name, synced, renamed, and only then recorded there.
"""

from __future__ import annotations

import fcntl
import filecmp
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from gigabatch.data.errors import GigabatchError
from gigabatch.data.files import sync_folder
from gigabatch.data.packing.samples import Samples, Skipped

log = logging.getLogger(__name__)
FORMAT = 1
MANIFEST, SKIPPED, LOCK = "pack.json", "skipped.jsonl", ".pack.lock"


@dataclass(frozen=True)
class PackReport:
    """What a pack has written, earlier attempts included. `skipped`: rows left out."""

    shards: int
    samples: int
    bytes: int
    skipped: int


@dataclass
class State:
    """What `pack.json` says. `rows`: how many are dealt with; `skipped_bytes`: of `skipped.jsonl`;
    `shards`: name, samples and bytes of each that is whole."""

    source: dict[str, Any]
    settings: dict[str, Any]
    format: int = FORMAT
    complete: bool = False
    rows: int = 0
    skipped: int = 0
    skipped_bytes: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)

    def report(self) -> PackReport:
        samples, size = (sum(shard[what] for shard in self.shards) for what in ("samples", "bytes"))
        return PackReport(len(self.shards), samples, size, self.skipped)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """One pack at a time in a folder; the system frees it where the holder is killed."""
    made = not out.exists()
    while True:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / LOCK, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise GigabatchError(
                    f"{out}: another pack is writing there. Wait for it, or name another folder."
                ) from None
            except OSError:
                log.warning("%s cannot be locked; let no other pack write there", out)
            if not os.path.exists(out / LOCK) or not os.path.samestat(
                os.fstat(file.fileno()), os.stat(out / LOCK)
            ):
                continue  # its last holder removed it just now
            try:
                yield
            finally:
                (out / LOCK).unlink(missing_ok=True)
                if made and not any(out.iterdir()):
                    out.rmdir()  # refused before anything was written
            return


def begin(out: Path, samples: Samples) -> State:
    """The state of an earlier attempt, or a new one. Raises where `out` holds anything else."""
    state = State(samples.fingerprint, samples.settings.model_dump(mode="json"))
    if (out / MANIFEST).exists():
        state = _taken_up(out, state)
    names = {shard["name"] for shard in state.shards}
    # The next one may have been renamed just before the end of the last attempt.
    names.add(shard_name(samples, len(state.shards)))
    if not (out / MANIFEST).exists():
        names.clear()
    there = sorted(out.glob("*.tar"))
    if not names:
        there += out.glob(SKIPPED)
    for path in there:
        if path.name not in names:
            raise GigabatchError(
                f"{path}: is there already, and not by this pack. Name another folder."
            )
    for shard in state.shards:
        path = out / shard["name"]
        if not path.exists() or path.stat().st_size != shard["bytes"]:
            raise GigabatchError(
                f"{path}: was packed, and is now gone or of another size. Restore it, or pack into "
                "another folder."
            )
    return state


def _taken_up(out: Path, fresh: State) -> State:
    path = out / MANIFEST
    try:
        state = State(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise GigabatchError(f"{path}: is damaged: {error}. Pack into another folder.") from error
    if state.format != FORMAT:
        raise GigabatchError(f"{path}: is of another version. Pack into another folder.")
    if state.source != fresh.source:
        raise GigabatchError(
            f"{out}: was begun from another source, or the source has changed since. Pack into "
            "another folder."
        )
    differ = [
        f"{name} {state.settings.get(name)!r} and not {value!r}"
        for name, value in fresh.settings.items()
        if name != "skip_missing" and state.settings.get(name) != value
    ]
    if differ:
        raise GigabatchError(
            f"{out}: was begun with other settings: {', '.join(differ)}. Set those, or pack into "
            "another folder."
        )
    return state


def shard_name(samples: Samples, number: int) -> str:
    return f"{samples.settings.prefix}-{number:06d}.tar"


@contextmanager
def temporary(final: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A file beside `final`, gone at the end unless it was renamed."""
    path = final.with_name(f".{final.name}.tmp")
    try:
        with open(path, "wb") as file:
            yield path, file
    finally:
        path.unlink(missing_ok=True)


def sync(file: BinaryIO) -> int:
    file.flush()
    os.fsync(file.fileno())
    return os.fstat(file.fileno()).st_size


def publish(fresh: Path, final: Path) -> None:
    """Give a finished file its name. One that has it already must hold the same bytes."""
    if not final.exists():
        os.rename(fresh, final)
        sync_folder(final.parent)
    elif not filecmp.cmp(fresh, final, shallow=False):
        raise GigabatchError(
            f"{final}: is there already, and not by this pack. Move it away and pack again."
        )


def note_skipped(out: Path, state: State, skipped: list[Skipped]) -> None:
    """Add lines to `skipped.jsonl`, in place of those of an attempt that was cut off."""
    if not skipped and not (out / SKIPPED).exists():
        return
    with open(out / SKIPPED, "ab") as file:
        file.truncate(state.skipped_bytes)
        for item in skipped:
            file.write(json.dumps(asdict(item), ensure_ascii=False).encode() + b"\n")
        state.skipped_bytes = sync(file)
    state.skipped += len(skipped)


def save(out: Path, state: State) -> None:
    with temporary(out / MANIFEST) as (path, file):
        file.write(json.dumps(asdict(state), indent=1).encode() + b"\n")
        sync(file)
        os.replace(path, out / MANIFEST)
        sync_folder(out)
