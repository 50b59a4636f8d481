"""Exclusive locks on files that other processes may rename or remove.

A lock is released when its process ends.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

_held: set[FileIO] = set()


def _after_fork() -> None:
    for file in _held:
        file.close()  # otherwise the lock would outlive its process
    _held.clear()


os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[FileIO | None]:
    """Create the file at `path` if it is missing, open it and lock it.

    Args:
        path: The file, on a local disk.
        wait: Wait while another process or thread holds the lock.

    Yields:
        The open file; None if it is locked and `wait` is false.
    """
    while True:
        file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+")
        _held.add(file)
        try:
            if not _lock(file, wait):
                yield None
                return
            if _is_at(path, file):  # otherwise it was renamed or removed
                yield file
                return
        finally:
            _held.discard(file)
            fcntl.flock(file, fcntl.LOCK_UN)  # needed if a child shares the descriptor
            file.close()


def remove_unlocked(path: Path) -> None:
    """Remove a file unless a process holds its lock; without one, its writer has ended."""
    try:
        file = FileIO(str(path))
    except FileNotFoundError:
        return
    with file:
        if _lock(file, wait=False) and _is_at(path, file):
            path.unlink(missing_ok=True)


def _lock(file: FileIO, wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, file: FileIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
