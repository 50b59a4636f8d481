"""Open the index of a set: build it if there is none, update it if the set has changed."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shlex
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote.cache import ShardCache
from gigabatch.data.remote.locations import ShardState, expand, is_remote, stat_all
from gigabatch.data.shards.index import Index, cache_folder, index_from_manifest, read_manifest
from gigabatch.data.shards.index_build import (
    FULL,
    Progress,
    build_index,
    full_name,
    manifest_name,
    scan_jobs,
)
from gigabatch.data.shards.pack_hint import ZIP, pack_hint
from gigabatch.data.shards.scan import IndexSettings
from gigabatch.data.shards.unread import (
    count_splits,
    files_by_split,
    folders_by_split,
    split_pattern,
    unread_data,
)

log = logging.getLogger(__name__)


def open_index(
    source: str | Path,
    progress: Progress | None = None,
    settings: IndexSettings | None = None,
    *,
    columns: Sequence[str] = (),
    processes: int | None = None,
    cache: ShardCache | None = None,
) -> Index:
    """Open the index of a set; build or update it first if needed.

    Args:
        source: A folder of `*.tar`, a pattern, or a filtered view.
        progress: Called with (done, total) after each shard scanned.
        settings: Required content of the index; None keeps the current content.
        columns: Additional fields of the json member that the index must contain.
        processes: Number of processes that scan shards; None uses one per core.
        cache: Cache of remote shards; None uses this node's cache at its default size.

    Raises:
        GigabatchError: if shards are damaged (the message lists them with byte offsets), the set
            has no samples, or the index cannot be written.
    """
    source = str(source)
    view = read_manifest(Path(source)) if not is_remote(source) else {}
    if "view" in view:
        return _open_view(source, view, columns)
    states = _shard_states(source)
    folder, manifest = _find_index(source, states, settings, columns)
    wanted = _wanted_settings(manifest, settings, columns)
    try:
        if not _is_current(manifest, states, wanted, source):
            with _lock(folder):
                manifest = read_manifest(folder)  # another process may just have built it
                wanted = _wanted_settings(manifest, settings, columns)
                if not _is_current(manifest, states, wanted, source):
                    jobs = scan_jobs(
                        _in_index_order(manifest, states, source), wanted, folder, cache
                    )
                    manifest = build_index(jobs, manifest, folder, source, progress, processes)
    except OSError as error:
        problem = "Free space on its disk" if error.errno in FULL else "Make the folder writable"
        raise GigabatchError(
            f"{folder}: the index cannot be written: {error.strerror or error}. {problem}, or set "
            "GIGABATCH_CACHE to another folder."
        ) from error
    unused = sum(shard.get("unused", 0) for shard in manifest["shards"])
    if not any(shard["samples"] for shard in manifest["shards"]):
        why = f"; {unused:,} members have no extension, such as .jpg, to say what they are"
        raise GigabatchError(
            f"{source}: the shards contain no samples{why if unused else ''}. Name a set with "
            "samples."
        )
    if unused:
        _warn_once(
            f"{source}: not used: {unused:,} members without an extension, such as .jpg, to say "
            "what they are"
        )
    return _index(source, folder, manifest)


def stored_index(source: str) -> Index | None:
    """Return the index as last written, even if the shards have changed; None if there is none."""
    view = read_manifest(Path(source)) if not is_remote(source) else {}
    folders = [Path(source)] if view else [Path(source) / ".gigabatch", index_folder(source)]
    for folder in folders:
        if manifest := read_manifest(folder):
            return _index(source, folder, manifest)
    return None


def index_folder(source: str) -> Path:
    """Return the folder for the index of a set: in the set if writable, else in the cache."""
    root = Path(source)
    if os.path.isdir(source):  # `Path.is_dir` would raise for a pattern longer than a path may be
        # `access` is true for root in every folder, so the mode bits are checked too.
        writable = os.access(root, os.W_OK) and root.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP)
        if writable:
            return root / ".gigabatch"
    identity = source if is_remote(source) else str(root.resolve())
    name = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return cache_folder() / "index" / f"{Path(source).name.strip('*.{}[]')[:64]}-{name}"


def _index(source: str, folder: Path, manifest: dict[str, Any]) -> Index:
    names = [full_name(source, shard["name"]) for shard in manifest["shards"]]
    return index_from_manifest(source, folder, manifest, names)


def _shard_states(source: str) -> list[ShardState]:
    """Return URL, size and version of every shard of a set; warn of data that it does not read."""
    path = Path(source)
    if os.path.isdir(source) and not any(path.glob("*.tar")):
        raise GigabatchError(f"{source}: contains no .tar shards. {_no_shards_fix(source)}")
    if not os.path.isdir(source) and (hint := pack_hint(source)):
        raise GigabatchError(f"{source}: {hint}")
    is_pattern = any(character in source for character in "*?[{")
    if not is_remote(source) and not os.path.exists(source) and not is_pattern:
        raise GigabatchError(
            f"{source}: is not a folder. Name a folder of shards or a pattern (training: data.root "
            "and data.train; sets: eval.sets)."
        )
    omitted: list[str] = []
    shards = expand([source], omitted=omitted)
    for warning in _warnings(source, tuple(shards), tuple(omitted)):
        _warn_once(warning)
    return stat_all(shards)


def _no_shards_fix(source: str) -> str:
    """Return what to do about a folder without shards."""
    path = Path(source)
    hint = pack_hint(source)
    unread = unread_data(os.listdir(source), source) if hint != ZIP else []
    if unread:
        return " ".join([f"Data there that is not read: {'; '.join(unread)}.", hint or ""]).strip()
    if hint:
        return hint
    if any(path.parent.glob("*.tar")):
        return f"{path.parent} contains shards itself: to train on them, set data.train=. (a dot)."
    return "Name a folder of shards (training: data.root and data.train; sets: eval.sets)."


def _warnings(source: str, shards: Sequence[str], omitted: Sequence[str]) -> Iterator[str]:
    """Yield a warning about data that is not read, and one about several splits."""
    folder = source if os.path.isdir(source) else None
    unread = unread_data([name.rpartition("/")[2] for name in omitted], folder)
    if unread:
        yield f"{source}: not read: {'; '.join(unread)}"
    splits = files_by_split(shards)
    if splits and folder is not None:
        patterns = [shlex.quote(f"{folder}/{split_pattern(split, splits)}") for split in splits]
        yield (
            f"{source}: its shards are of several splits, which this set merges: "
            f"{count_splits(splits)}. To keep them apart, name them by pattern: "
            f"{', '.join(patterns)}"
        )
    if folders := folders_by_split(shards):
        names = ", ".join(shlex.quote(of_split[0]) for of_split in folders.values())
        yield (
            f"{source}: its shards are of several splits, which this set merges, as their folders "
            f"state: {', '.join(folders)}. To keep them apart, name one folder for each set: "
            f"{names}"
        )


@lru_cache
def _warn_once(message: str) -> None:
    """Log a warning the first time; a process opens the same set more than once."""
    log.warning("%s", message)


def _find_index(
    source: str,
    states: Sequence[ShardState],
    settings: IndexSettings | None,
    columns: Sequence[str],
) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the index to use, and its manifest; {} if there is none."""
    folder = index_folder(source)
    inside = Path(source) / ".gigabatch"
    if folder != inside and not is_remote(source):
        # The set is read-only here, but its owner may keep an index in it.
        manifest = read_manifest(inside)
        wanted = _wanted_settings(manifest, settings, columns)
        if _is_current(manifest, states, wanted, source):
            return inside, manifest
    return folder, read_manifest(folder)


def _wanted_settings(
    manifest: dict[str, Any], settings: IndexSettings | None, columns: Sequence[str]
) -> IndexSettings:
    """Return the required content of the index: the old settings by default, and `columns`."""
    if settings is None:
        settings = IndexSettings.model_validate(manifest.get("settings", {}))
    new = [name for name in columns if name not in settings.columns]
    return settings.model_copy(update={"columns": (*settings.columns, *new)})


def _is_current(
    manifest: dict[str, Any], states: Sequence[ShardState], wanted: IndexSettings, source: str
) -> bool:
    """Return whether an index covers the current shards with the wanted settings."""
    if not manifest or IndexSettings.model_validate(manifest["settings"]) != wanted:
        return False
    indexed = {s["name"]: (s["bytes"], s["version"]) for s in manifest["shards"]}
    return indexed == {manifest_name(source, s.url): (s.bytes, s.version) for s in states}


def _in_index_order(
    manifest: dict[str, Any], states: Sequence[ShardState], source: str
) -> list[ShardState]:
    """Sort shards: indexed ones in the index's order, then new ones, so that samples keep rows."""
    by_name = {manifest_name(source, state.url): state for state in states}
    indexed = [shard["name"] for shard in manifest.get("shards", ())]
    if not indexed or not set(indexed) <= set(by_name):
        return list(states)  # a shard was removed: rows change anyway
    added = [state for name, state in by_name.items() if name not in set(indexed)]
    return [by_name[name] for name in indexed] + added


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Let one process at a time build the index; the kernel releases the lock of a killed one."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("%s: waiting for another process that writes the index", folder)
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: all processes build the same files
            log.warning("%s: no file locks here; other processes may index the same shards", folder)
        yield


def _open_view(source: str, manifest: dict[str, Any], columns: Sequence[str]) -> Index:
    """Open a filtered view; raise GigabatchError if a shard that it uses changed."""
    view = manifest["view"]
    used = [shard for shard in manifest["shards"] if shard["samples"]]
    now = {s.url: (s.bytes, s.version) for s in stat_all([shard["name"] for shard in used])}
    for shard in used:
        if now[shard["name"]] != (shard["bytes"], shard["version"]):
            raise GigabatchError(
                f"{source}: {shard['name']} changed after this view was made. Make it again with "
                f"`{_command('filter', view['source'], view['where'], source)}`."
            )
    names = [shard["name"] for shard in manifest["shards"]]
    index = index_from_manifest(source, Path(source), manifest, names)
    if missing := [name for name in columns if name not in index.columns]:
        raise GigabatchError(
            f"{source}: the view has no column {', '.join(missing)}. Run "
            f"`{_command('index', view['source'], '--columns', ','.join(missing))}`, then make the "
            f"view again: `{_command('filter', view['source'], view['where'], source)}`."
        )
    return index


def _command(*arguments: str) -> str:
    """Return a `gigabatch data` command as typed into a shell."""
    return shlex.join(["gigabatch", "data", *arguments])
