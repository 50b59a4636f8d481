"""One try at a remote file: its size and version, what a folder holds, a range of its bytes.

Also one try at writing and at removing. fsspec does the talking, one file system a scheme and
process: neither its thread nor its connections survive a fork. Its own retries are off, but for
parts of a file that is written; `remote` retries, so that they are counted once. What a file system
needs (keys, end points, anonymous access) is configured as everywhere with fsspec: the AWS_*
variables, or FSSPEC_S3_ANON=true and the like.
"""

from __future__ import annotations

import asyncio
import glob
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gigabatch.data.errors import GigabatchError
from gigabatch.data.files import atomic_create, atomic_replace

SCHEMES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
}
"""The schemes read from, each with the package that it needs."""
WRITTEN = ("s3", "gs", "gcs", "file")
"""The schemes written to; `file` for a disk that is mounted here."""
LISTING = 10
"""A listing, of many pages, may take this many times as long as one request."""
SLOWEST = 1 << 20
"""Bytes a second: a write may take so much longer than one request."""
_RETRIABLE = (408, 425, 429)
"""Of the answers 4xx, those that a later try may change."""

# A file system of a parent process is kept: finalised in the child, it would unregister the
# parent's own sockets, which lie in an epoll set that both share.
_open: dict[tuple[int, str, bool], Any] = {}


def scheme_of(url: str) -> str:
    return url.partition("://")[0]


def forget_connections() -> None:
    """Connect anew from now on: keys or the end point have changed."""
    for key in [key for key in _open if key[0] == os.getpid()]:
        del _open[key]


def _file_system(url: str, parts: bool = False) -> Any:
    """`parts`: it tries parts of a large file again by itself, lest one lost make all go anew."""
    import fsspec

    scheme = scheme_of(url)
    key = (os.getpid(), scheme, parts)
    if key not in _open:
        try:
            system = fsspec.filesystem(
                scheme, skip_instance_cache=True, use_listings_cache=False, **_options(scheme)
            )
        except ImportError as error:
            raise GigabatchError(
                f"{url}: {scheme}:// needs the package {SCHEMES[scheme]}, which cannot be imported "
                f'({error}). Install it: pip install "gigabatch[remote]"'
            ) from None
        if scheme == "s3" and not parts:
            system.retries = 1
        _open.setdefault(key, system)
    return _open[key]


def _options(scheme: str) -> dict[str, Any]:
    """Ours, under what the user's fsspec configuration says."""
    from fsspec.config import conf

    ours: dict[str, dict[str, Any]] = {
        "s3": {"config_kwargs": {"retries": {"total_max_attempts": 1, "mode": "standard"}}},
        "http": {"client_kwargs": {"trust_env": True}},  # HTTPS_PROXY, NO_PROXY, .netrc
    }
    options = ours.get(scheme.replace("https", "http"), {})
    return {name: value | conf.get(scheme, {}).get(name, {}) for name, value in options.items()}


def _call(
    url: str, method: str, *args: Any, timeout: float, parts: bool = False, **kwargs: Any
) -> Any:
    from fsspec.asyn import AsyncFileSystem, sync

    system = _file_system(url, parts)
    if isinstance(system, AsyncFileSystem):
        return sync(system.loop, getattr(system, f"_{method}"), *args, timeout=timeout, **kwargs)
    return getattr(system, method)(*args, **kwargs)  # disks; hf has timeouts of its own


def info(url: str, timeout: float) -> dict[str, Any]:
    """`size` in bytes (None where it is not told), `type`, and what tells versions apart."""
    if scheme_of(url).startswith("http"):
        return _run_http(_http_info, url, timeout)
    found: dict[str, Any] = _call(url, "info", url, timeout=timeout)
    return found


def entries(url: str, timeout: float) -> dict[str, dict[str, Any]]:
    """URL -> info of what a folder or a glob holds; empty where there is no such thing."""
    scheme = scheme_of(url)
    try:
        if scheme.startswith("http") or glob.has_magic(url):
            found = _call(url, "glob", url, detail=True, timeout=LISTING * timeout).values()
        else:
            found = _call(url, "ls", url, detail=True, timeout=LISTING * timeout)
    except FileNotFoundError:
        return {}
    return _by_url(scheme, found)


def find(url: str, timeout: float) -> dict[str, dict[str, Any]]:
    """URL -> info of every file below a folder; empty where there is no such thing."""
    try:
        found = _call(url, "find", url, detail=True, timeout=LISTING * timeout).values()
    except FileNotFoundError:
        return {}
    return _by_url(scheme_of(url), found)


def _by_url(scheme: str, found: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    named = {str(each["name"]): each for each in found if each["type"] == "file"}
    return {n if "://" in n else f"{scheme}://{n}": each for n, each in named.items()}


def put(path: Path, url: str, new: bool, timeout: float) -> None:
    """Write a local file to `url`, which has all of it or nothing. `new`: raise FileExistsError
    where there is something already (if the server knows conditional writes; else replace it)."""
    if scheme_of(url) == "file":
        return _put_locally(path, Path(url.removeprefix("file://")), new)
    mode = "create" if new else "overwrite"
    limit = timeout + path.stat().st_size / SLOWEST
    try:
        _call(url, "put_file", str(path), url, mode=mode, timeout=limit, parts=True)
    except Exception as error:
        if new and _status(error) == 412:
            raise FileExistsError(url) from error
        raise


def _put_locally(path: Path, to: Path, new: bool) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    with (atomic_create if new else atomic_replace)(to) as fresh:
        shutil.copyfile(path, fresh)


def remove(url: str, timeout: float) -> None:
    """Remove a file; nothing where there is none."""
    with suppress(FileNotFoundError):
        _call(url, "rm_file", url, timeout=timeout)
    if scheme_of(url) == "file":
        with suppress(OSError):  # an object store has no empty folders
            Path(url.removeprefix("file://")).parent.rmdir()


def copy_range(
    url: str, start: int, end: int, last: int, write: Callable[[bytes], Any], timeout: float
) -> int:
    """Write the bytes [start, end) of `url`, and return how many were written.

    A server that knows no ranges sends the whole file: then it is [start, last) that is written,
    lest the file be sent once a range.
    """
    if scheme_of(url).startswith("http"):
        return _run_http(_http_range, url, timeout, start, end, last, write)
    data = _call(url, "cat_file", url, start=start, end=end, timeout=timeout)
    if len(data) > end - start:
        data = data[start:end]
    write(data)
    return len(data)


def _run_http(coroutine: Callable[..., Any], url: str, timeout: float, *args: Any) -> Any:
    """Straight on aiohttp: fsspec's own reading does not say whether the range was heeded, and its
    `info` calls every fault "not found". No time limit out here: nothing may still be writing when
    this returns."""
    from fsspec.asyn import sync

    system = _file_system(url)
    return sync(system.loop, coroutine, system, url, timeout, *args)


async def _http_info(system: Any, url: str, timeout: float) -> dict[str, Any]:
    """By a GET of one byte: HEAD is refused where the address is signed for GET."""
    session = await system.set_session()
    headers = {"Range": "bytes=0-0", "Accept-Encoding": "identity"}
    async with (
        asyncio.timeout(timeout),
        session.get(system.encode_url(url), headers=headers) as answer,
    ):
        ranged = answer.headers.get("Content-Range", "").rpartition("/")[2]
        if answer.status != 416:  # the range of an empty file
            answer.raise_for_status()
        size = ranged if answer.status in (206, 416) else answer.headers.get("Content-Length", "")
        versions = {k: answer.headers[k] for k in ("ETag", "Last-Modified") if k in answer.headers}
        return {"size": int(size) if size.isdigit() else None, "type": "file", **versions}


async def _http_range(
    system: Any,
    url: str,
    timeout: float,
    start: int,
    end: int,
    last: int,
    write: Callable[[bytes], Any],
) -> int:
    import aiohttp

    session = await system.set_session()
    headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    silence = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
    async with (
        asyncio.timeout(timeout) as limit,
        session.get(system.encode_url(url), headers=headers, timeout=silence) as answer,
    ):
        answer.raise_for_status()
        if answer.content_type == "text/html":
            raise OSError("a web page (text/html) was sent in place of the file")
        skip, wanted = 0, end - start
        if answer.status != 206:
            skip, wanted = start, last - start
            limit.reschedule(None)  # a whole file may take its time, as long as bytes come
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise OSError(f"another range was sent: {answer.headers.get('Content-Range')}")
        written = 0
        async for data in answer.content.iter_any():
            piece = data[skip : skip + wanted - written]
            skip = max(0, skip - len(data))
            write(piece)
            written += len(piece)
            if written == wanted:
                break
        return written


def reason(error: BaseException) -> str:
    """What went wrong, on one line."""
    status = _status(error)
    if isinstance(error, TimeoutError):  # fsspec's and asyncio's say no more
        return "no complete answer in time"
    text = " ".join(str(getattr(error, "message", "") or error).split())
    if status:
        return f"HTTP {status}" + (f" ({text})" if text else "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def is_final(error: BaseException) -> bool:
    """Whether another try is of no use: not found, not allowed, no keys."""
    if isinstance(error, TimeoutError):
        return False
    if isinstance(error, FileNotFoundError | PermissionError | NotImplementedError):
        return True
    status = _status(error)
    if status is not None:
        return 400 <= status < 500 and status not in _RETRIABLE
    return "Credentials" in type(error).__name__  # botocore's NoCredentialsError and its kin


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of aiohttp, gcsfs, botocore (through s3fs) or the hub."""
    for each in (error, error.__cause__):
        answer = getattr(each, "response", None)
        if isinstance(answer, dict):
            answer = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        # aiohttp's errors about a torn body carry a code as well, 400, which nobody answered.
        answered = "status" if hasattr(each, "request_info") else "code"
        ours = not type(each).__module__.startswith("aiohttp.http")
        for status in (
            getattr(each, answered, None) if ours else None,
            getattr(answer, "status_code", answer),
        ):
            if str(status).isdigit() and 400 <= int(str(status)) < 600:
                return int(str(status))
    return None
