"""Failures of code that gigabatch calls, and of the processes that load data.

User code can raise anything. Some exceptions mean an exit to Python, to typer or to Ray: SystemExit
(success, if its code is 0), EOFError and KeyboardInterrupt (aborted), GeneratorExit. Raised by code
and not by Ctrl-C, each of them is a failure like any other; `as_failure` makes it one.
"""

from __future__ import annotations

import errno
import re
import resource
import traceback
from collections.abc import Iterator

from gigabatch.data.errors import GigabatchError

OPEN_FILES = 4096
"""Number of open files that a rank may need for shards, and for its loaders' pipes and shared
memory."""
MAX_OPEN_FILES = 65536
"""Limit of open files to which a process raises its own, if it may."""
_LOST = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([^.]*)|exited unexp)"
)
_NO_SHARED_MEMORY = ("unable to allocate shared memory", "unable to open shared memory",
                     "unable to mmap", "unable to resize file", "/torch_")  # fmt: skip


class UnexpectedExit(Exception):
    """Code called by a command tried to exit, or raised an exception that means an exit."""


class LostProcess(GigabatchError):
    """A process that loads data was killed. A restart of the workers may succeed."""


def name_of(error: BaseException) -> str:
    """Return the class and the text of an exception, such as `ValueError: no rows`."""
    name = type(error).__qualname__
    if isinstance(error, SystemExit):
        return f"{name}({error.code!r})"
    text = str(error)
    return f"{name}: {text}" if text else name


def place_of(error: BaseException) -> str:
    """Return file, line and function in which an exception was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "an unknown place"
    return f"{frames[-1].filename}, line {frames[-1].lineno}, in {frames[-1].name}"


def as_failure(error: BaseException) -> Exception:
    """Return an exception that no caller can mistake for an exit.

    Args:
        error: Raised by any code; a KeyboardInterrupt must not be that of a Ctrl-C.

    Returns:
        The message of a known failure of the loader as GigabatchError; UnexpectedExit for an
        exception that means an exit; else `error` itself.
    """
    if explained := explain_loader_failure(error):
        return explained
    if isinstance(error, Exception) and not isinstance(error, EOFError):
        return error
    return UnexpectedExit(
        f"{name_of(error)} was raised at {place_of(error)}. It was not Ctrl-C; code that a run "
        "calls must return, or raise an ordinary exception such as ValueError."
    )


def explain_loader_failure(error: BaseException) -> GigabatchError | None:
    """Return the message of a lost loader process or of an exhausted resource; None if unknown."""
    if isinstance(error, GigabatchError):
        return None
    for cause in _chain(error):
        if isinstance(cause, GigabatchError):
            return None  # it explains itself
        text = str(cause)
        if match := _LOST.search(text):
            return _lost_process(match[1].strip(), (match[2] or "").strip())
        too_many = isinstance(cause, OSError) and cause.errno == errno.EMFILE
        # The process that sends an open file could not open one more.
        too_many |= isinstance(cause, EOFError) and place_of(cause).endswith("in recvfds")
        if too_many or "Too many open files" in text or "items of ancdata" in text:
            return _too_many_open_files()
        if isinstance(cause, RuntimeError) and any(part in text for part in _NO_SHARED_MEMORY):
            return _no_shared_memory(text)
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and its causes."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _lost_process(pid: str, signal_name: str) -> GigabatchError:
    if signal_name == "Bus error":
        return _no_shared_memory(f"loader worker {pid} died of a bus error")
    if signal_name == "Killed":
        return LostProcess(
            f"loader worker {pid} was killed (SIGKILL), usually because the machine ran out of "
            "memory; `dmesg` names the process. Lower data.workers, data.prefetch or "
            "batch.micro_size, or request more memory."
        )
    end = (
        f"died of a signal ({signal_name})"
        if signal_name
        else (
            "exited without a message or was killed, usually because the machine ran out of memory"
        )
    )
    return LostProcess(
        f"loader worker {pid} {end}, in a library or in a stage of data.stages. data.workers=0 "
        "reads in the training process, which shows where."
    )


def _no_shared_memory(detail: str) -> GigabatchError:
    detail = re.sub(r" for file <[^>]*>", "", detail).strip().rstrip(".")
    return GigabatchError(
        f"/dev/shm has no room for the micro-batches that loader workers pass on ({detail}). "
        "Enlarge it (docker: --shm-size), free it, or lower data.workers or data.prefetch; "
        "data.workers=0 needs none."
    )


def _too_many_open_files() -> GigabatchError:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return GigabatchError(
        f"too many open files: this process may open {soft:,} (ulimit -n; hard limit "
        f"{'none' if hard < 0 else format(hard, ',')}). Set `ulimit -n {OPEN_FILES}` or more "
        "before the start, or lower data.workers or data.prefetch."
    )


def raise_open_file_limit() -> None:
    """Raise this process's soft limit of open files to MAX_OPEN_FILES, or to its hard limit.

    The usual soft limit, 1,024, is kept low for programs that call `select`; micro-batches in
    shared memory need one open file a tensor.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard < 0 else min(hard, MAX_OPEN_FILES)
    if 0 <= soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
