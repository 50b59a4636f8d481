"""Write files atomically: a file appears complete and synced, or not at all."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_replace(
    path: Path, install: Callable[[Path, Path], object] | None = None
) -> Iterator[Path]:
    """Yield a temporary file, then sync it and move it to `path`.

    If the block raises, `path` stays as it was and the temporary file is removed.

    Args:
        path: The file to write; its folder must exist.
        install: Function that moves the temporary file to `path`; None uses `os.replace`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as lock:
        with suppress(OSError):  # a file system without locks: see `remove_stale_temporaries`
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            with with_umask_mode(temporary):
                yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            (install or os.replace)(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def atomic_create(path: Path) -> AbstractContextManager[Path]:
    """Yield a temporary file as `atomic_replace` does, but never overwrite `path`.

    Raises:
        FileExistsError: at the end of the block, if `path` exists by then.
    """
    return atomic_replace(path, _link)


def _link(temporary: Path, path: Path) -> None:
    """Move `temporary` to `path`; raise FileExistsError if `path` exists."""
    try:
        os.link(temporary, path)  # only one of two writers succeeds
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(path) from None
        os.replace(temporary, path)


def remove_stale_temporaries(folder: Path, pattern: str) -> None:
    """Remove temporary files in `folder` whose writers were killed.

    A live writer holds a lock on its file; the kernel releases the lock of a dead one. On a file
    system without locks, nothing is removed.

    Args:
        folder: The folder to clean.
        pattern: Glob pattern of the final names of the files.
    """
    for path in folder.glob(f".{pattern}.*.tmp"):
        with suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


@contextmanager
def with_umask_mode(path: Path) -> Iterator[None]:
    """Give the file that the block writes the permissions of any new file, as the umask says.

    Some libraries write a private temporary file and rename it, which leaves mode 0600:
    safetensors does. Such a file could not be read by the user's group beside others that can.

    Args:
        path: The file that the block writes; it is created here, and its folder must exist.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)  # from the umask, or from the folder's default ACL
    yield
    if stat.S_IMODE(path.stat().st_mode) != mode:
        with suppress(PermissionError):  # a file system without permissions
            path.chmod(mode)


def sync_folder(path: Path) -> None:
    """Sync a folder to disk, which makes renames inside it durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
