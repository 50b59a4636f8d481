"""Manage the output folder of a pack: lock, saved state, atomic file creation.

`pack.json` records the source, the settings, and the finished shards. A shard is written under a
temporary name, synced and renamed before it is recorded there.
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
    """Totals of a pack, earlier attempts included.

    Attributes:
        shards: Number of shards.
        samples: Number of samples in them.
        bytes: Size of the shards in bytes.
        skipped: Number of skipped rows.
    """

    shards: int
    samples: int
    bytes: int
    skipped: int


@dataclass
class State:
    """Content of `pack.json`.

    Attributes:
        source: Fingerprint of the source.
        settings: Settings of the pack, as JSON values.
        format: Version of this file's layout.
        complete: Whether all rows are packed.
        rows: Number of rows packed or skipped.
        skipped: Number of skipped rows.
        skipped_bytes: Size of `skipped.jsonl` that belongs to these rows.
        shards: Name, samples and bytes of each finished shard.
    """

    source: dict[str, Any]
    settings: dict[str, Any]
    format: int = FORMAT
    complete: bool = False
    rows: int = 0
    skipped: int = 0
    skipped_bytes: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)

    def report(self) -> PackReport:
        """Return the totals of the finished shards."""
        samples, size = (sum(shard[key] for shard in self.shards) for key in ("samples", "bytes"))
        return PackReport(len(self.shards), samples, size, self.skipped)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Create `out` if needed and hold its lock; the system releases it if the process is killed.

    Raises:
        GigabatchError: if another pack holds the lock.
    """
    created = not out.exists()
    while True:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / LOCK, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise GigabatchError(
                    f"{out}: another pack is writing to this folder. Wait for it to finish, or "
                    "choose another folder."
                ) from None
            except OSError:
                log.warning("%s: file locks are not supported; run only one pack here", out)
            if not os.path.exists(out / LOCK) or not os.path.samestat(
                os.fstat(file.fileno()), os.stat(out / LOCK)
            ):
                continue  # The previous holder deleted this lock file after it was opened here.
            try:
                yield
            finally:
                (out / LOCK).unlink(missing_ok=True)
                if created and not any(out.iterdir()):
                    out.rmdir()  # The pack failed before it wrote anything.
            return


def open_state(out: Path, samples: Samples) -> State:
    """Load the state of an earlier attempt, or create a new one.

    Raises:
        GigabatchError: if `out` contains other files, the earlier attempt had a different source
            or different settings, or one of its shards has changed.
    """
    state = State(samples.fingerprint, samples.settings.model_dump(mode="json"))
    if (out / MANIFEST).exists():
        state = _load_state(out, state)
    expected = {shard["name"] for shard in state.shards}
    # The last attempt may have ended between renaming its next shard and recording it.
    expected.add(shard_name(samples, len(state.shards)))
    if not (out / MANIFEST).exists():
        expected.clear()
    present = sorted(out.glob("*.tar"))
    if not expected:
        present += out.glob(SKIPPED)
    for path in present:
        if path.name not in expected:
            raise GigabatchError(
                f"{path}: this file already exists and is not part of this pack. Choose another "
                "folder."
            )
    for shard in state.shards:
        path = out / shard["name"]
        if not path.exists() or path.stat().st_size != shard["bytes"]:
            raise GigabatchError(
                f"{path}: this finished shard is now missing or has a different size. Restore it, "
                "or pack into another folder."
            )
    return state


def _load_state(out: Path, new: State) -> State:
    """Read `pack.json` and require the source and settings of `new`."""
    path = out / MANIFEST
    try:
        state = State(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise GigabatchError(
            f"{path}: this file is damaged: {error}. Pack into another folder."
        ) from error
    if state.format != FORMAT:
        raise GigabatchError(
            f"{path}: format {state.format} is not supported, only {FORMAT}. Pack into another "
            "folder."
        )
    if state.source != new.source:
        raise GigabatchError(
            f"{out}: this folder contains a pack of a different source, or the source has "
            "changed. Pack into another folder."
        )
    differences = [
        f"{name} {state.settings.get(name)!r}, now {value!r}"
        for name, value in new.settings.items()
        if name not in ("skip_missing", "merge_splits") and state.settings.get(name) != value
    ]
    if differences:
        raise GigabatchError(
            f"{out}: this pack was started with different settings: {', '.join(differences)}. Use "
            "the original values, or pack into another folder."
        )
    return state


def shard_name(samples: Samples, number: int) -> str:
    """Return the file name of shard `number`, counted from 0."""
    return f"{samples.settings.prefix}-{number:06d}.tar"


@contextmanager
def temporary_file(final: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Open a new file next to `final`; delete it on exit unless it was renamed.

    Yields:
        The file's path and the open file.
    """
    path = final.with_name(f".{final.name}.tmp")
    try:
        with open(path, "wb") as file:
            yield path, file
    finally:
        path.unlink(missing_ok=True)


def sync(file: BinaryIO) -> int:
    """Write a file to disk and return its size in bytes."""
    file.flush()
    os.fsync(file.fileno())
    return os.fstat(file.fileno()).st_size


def publish(finished: Path, final: Path) -> None:
    """Rename a finished file to `final`.

    Raises:
        GigabatchError: if `final` exists with different content.
    """
    if not final.exists():
        os.rename(finished, final)
        sync_folder(final.parent)
    elif not filecmp.cmp(finished, final, shallow=False):
        raise GigabatchError(
            f"{final}: this file already exists and is not part of this pack. Move it away and run "
            "the pack again."
        )


def append_skipped(out: Path, state: State, skipped: list[Skipped]) -> None:
    """Append lines to `skipped.jsonl`, replacing those of an interrupted attempt."""
    if not skipped and not (out / SKIPPED).exists():
        return
    with open(out / SKIPPED, "ab") as file:
        file.truncate(state.skipped_bytes)
        for row in skipped:
            file.write(json.dumps(asdict(row), ensure_ascii=False).encode() + b"\n")
        state.skipped_bytes = sync(file)
    state.skipped += len(skipped)


def save_state(out: Path, state: State) -> None:
    """Replace `pack.json` atomically."""
    with temporary_file(out / MANIFEST) as (path, file):
        file.write(json.dumps(asdict(state), indent=1).encode() + b"\n")
        sync(file)
        os.replace(path, out / MANIFEST)
        sync_folder(out)
