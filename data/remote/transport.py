"""Make single requests for remote files; `access.retrying` repeats those that fail.

Object stores are reached through obstore, web servers through aiohttp, the Hugging Face Hub and
mounted disks (`file://`) through fsspec.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import cache, partial
from glob import has_magic
from pathlib import Path
from typing import Any

from gigabatch.data.files import atomic_create, atomic_replace
from gigabatch.data.remote import object_stores
from gigabatch.data.remote.object_stores import CLIENTS, Info

WEB = ("http", "https")
SCHEMES = dict.fromkeys(CLIENTS, "obstore") | {"hf": "huggingface_hub"}
SCHEMES |= dict.fromkeys(WEB, "aiohttp")
"""Schemes from which shards can be read, with the package that each needs."""
WRITTEN = (*CLIENTS, "file")
"""Schemes to which checkpoints can be copied; `file` is a mounted disk."""
LISTING = 10  # time limit of a listing, which has many pages, relative to that of a request
SLOWEST = 1 << 20  # lowest accepted upload speed in bytes per second, for its time limit
_RETRIABLE = (408, 409, 425, 429)  # HTTP statuses below 500 that a later attempt may change


def scheme_of(url: str) -> str:
    return url.partition("://")[0]


def _run(function: Callable[..., Any], *args: Any, timeout: float | None) -> Any:
    """Run a coroutine in fsspec's event loop. Unlike a blocking call, Ctrl-C can end it."""
    from fsspec.asyn import get_loop, sync

    return sync(get_loop(), function, *args, timeout=timeout)


def _file_system(url: str) -> Any:
    return _cached_file_system(scheme_of(url), os.getpid())


@cache  # by process: freeing the parent's file system in a fork would close the parent's sockets
def _cached_file_system(scheme: str, pid: int) -> Any:
    import fsspec

    # trust_env: HTTPS_PROXY, NO_PROXY and .netrc apply.
    options = {"client_kwargs": {"trust_env": True}} if scheme in WEB else {}
    return fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **options)


def info(url: str, timeout: float) -> Info:
    """Return `size` in bytes (None if unknown), `type`, and fields that identify the version."""
    if scheme_of(url) in CLIENTS:
        return dict(_run(object_stores.info, url, timeout=timeout))
    if scheme_of(url) in WEB:
        return dict(_run(_web_info, url, timeout, timeout=None))
    return dict(_file_system(url).info(url))


def entries(url: str, timeout: float, recursive: bool = False) -> dict[str, Info]:
    """Return URL -> info of the files in a folder, below it (`recursive`), or matching a glob."""
    timeout *= LISTING
    if scheme_of(url) in CLIENTS:
        return dict(_run(object_stores.entries, url, recursive, timeout=timeout))
    system = _file_system(url)
    try:
        if scheme_of(url) in WEB:
            infos = _run(partial(system._glob, detail=True), url, timeout=timeout).values()
        elif recursive or has_magic(url):
            infos = (system.find if recursive else system.glob)(url, detail=True).values()
        else:
            infos = system.ls(url, detail=True)
    except FileNotFoundError:
        return {}
    named = {str(info["name"]): info for info in infos if info["type"] == "file"}
    return {n if "://" in n else f"{scheme_of(url)}://{n}": info for n, info in named.items()}


def put(path: Path, url: str, new: bool, timeout: float) -> None:
    """Write a local file to `url`, completely or not at all.

    Raises:
        FileExistsError: if `new`, the file exists and the server supports conditional writes.
    """
    if scheme_of(url) in CLIENTS:
        timeout += path.stat().st_size / SLOWEST
        _run(object_stores.put, path, url, new, timeout=timeout)
    else:
        target = Path(url.removeprefix("file://"))
        target.parent.mkdir(parents=True, exist_ok=True)
        with (atomic_create if new else atomic_replace)(target) as fresh:
            shutil.copyfile(path, fresh)


def remove(url: str, timeout: float) -> None:
    """Remove a file if it exists; on a mounted disk, also its folder if that becomes empty."""
    if scheme_of(url) in CLIENTS:
        with suppress(FileNotFoundError):
            _run(object_stores.remove, url, timeout=timeout)
    else:
        path = Path(url.removeprefix("file://"))
        path.unlink(missing_ok=True)
        with suppress(OSError):
            path.parent.rmdir()


def copy_range(
    url: str, start: int, end: int, last: int, write: Callable[[Any], object], timeout: float
) -> int:
    """Write the bytes [start, end) of `url`.

    A web server that ignores ranges sends the complete file. In this case [start, last) is written,
    so that the file is not sent once per range.

    Args:
        url: The file.
        start: First byte.
        end: End of the range.
        last: End of the range to write if the server sends the complete file.
        write: Receives the bytes, in order.
        timeout: Time limit in seconds.

    Returns:
        The number of bytes written, at least end - start.

    Raises:
        OSError: if fewer bytes arrive.
    """
    if scheme_of(url) in WEB:  # time-limited inside, so nothing writes after the return
        count = int(_run(_copy_web_range, url, start, end, last, write, timeout, timeout=None))
    else:
        if scheme_of(url) in CLIENTS:
            data = _run(object_stores.read, url, start, end, timeout=timeout)
        else:
            data = _file_system(url).cat_file(url, start=start, end=end)[: end - start]
        write(data)
        count = len(data)
    if count < end - start:
        raise OSError(f"{count} of {end - start} bytes arrived")
    return count


@asynccontextmanager
async def _web_response(url: str, start: int, end: int, timeout: float) -> AsyncIterator[Any]:
    """Request a range directly, because fsspec hides whether the server respected it."""
    import aiohttp

    system = _file_system(url)
    headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    silence = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
    session = await system.set_session()
    async with (
        asyncio.timeout(timeout) as limit,
        session.get(system.encode_url(url), headers=headers, timeout=silence) as response,
    ):
        yield response, limit


async def _web_info(url: str, timeout: float) -> Info:
    # Request one byte: servers reject HEAD for a URL that is signed for GET.
    async with _web_response(url, 0, 1, timeout) as (response, _):
        if response.status != 416:  # an empty file
            response.raise_for_status()
        size = response.headers.get("Content-Range", "").rpartition("/")[2]
        if response.status not in (206, 416):
            size = response.headers.get("Content-Length", "")
        headers = response.headers
        versions = {name: headers[name] for name in ("ETag", "Last-Modified") if name in headers}
        return {"size": int(size) if size.isdigit() else None, **versions}


async def _copy_web_range(
    url: str, start: int, end: int, last: int, write: Callable[[bytes], object], timeout: float
) -> int:
    async with _web_response(url, start, end, timeout) as (response, limit):
        response.raise_for_status()
        if response.content_type == "text/html":
            raise OSError("a web page (text/html) was sent instead of the file")
        skip, wanted = 0, end - start
        if response.status != 206:
            skip, wanted = start, last - start
            limit.reschedule(None)  # a complete file may take any time while bytes arrive
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise OSError(f"a different range was sent: {response.headers.get('Content-Range')}")
        written = 0
        async for data in response.content.iter_any():
            piece = data[skip : skip + wanted - written]
            skip = max(0, skip - len(data))
            write(piece)
            written += len(piece)
            if written == wanted:
                break
        return written


def reason(error: BaseException) -> str:
    """Explain a failed request on one line."""
    if isinstance(error, TimeoutError):
        return "no complete response in time"
    code = _status(error)
    text = str(getattr(error, "message", "") or error).partition("\n\nDebug source")[0]
    part = re.search(r"<Message>(.*?)<", text) or re.search(r"(?s)status code: [^:]*:(.*)", text)
    text = " ".join((part[1] if part else text).split())
    if _lacks_credentials(error):
        return f"no credentials were found: {text}"
    if code:
        return f"HTTP {code}" + (f" ({text})" if text else "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def is_final(error: BaseException) -> bool:
    """Return whether no retry can succeed: not found, not allowed, no credentials."""
    final = FileNotFoundError | PermissionError | NotImplementedError | ValueError
    if isinstance(error, final) or _lacks_credentials(error):
        return True
    code = _status(error)
    return code is not None and code < 500 and code not in _RETRIABLE


def _lacks_credentials(error: BaseException) -> bool:
    """Return whether obstore found neither keys nor a role of this machine."""
    return bool(re.search(r"169\.254\.169\.254|metadata\.google|Account must", str(error)))


def _status(error: BaseException) -> int | None:
    """Return the HTTP status in an error of obstore, aiohttp or huggingface_hub."""
    named = re.search(r"status code: (\d{3})", str(error))
    source = getattr(error, "response", error)
    code = named[1] if named else getattr(source, "status_code", getattr(source, "status", None))
    return int(code) if code else None
