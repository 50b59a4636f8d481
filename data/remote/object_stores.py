"""Access S3, Google Cloud Storage and Azure through obstore: one client per process and bucket.

Keys, region and end point come from the usual environment variables (`AWS_*`, `GOOGLE_*`,
`AZURE_*`); without AWS keys, boto3 looks for a profile or a role.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import uuid
from contextlib import suppress
from datetime import timedelta
from functools import cache
from glob import has_magic
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

CLIENTS = {"s3": "S3Store", "gs": "GCSStore", "gcs": "GCSStore", "az": "AzureStore"}
PART = 32 << 20
"""Bytes per request of an upload. Larger files are sent in parts, at most 10,000 on S3."""
S3_COPY_LIMIT = 5 << 30  # bytes of the largest object that S3 copies on the server
TEMPORARY = ".uploading"  # ends the name of an incomplete upload
Info = dict[str, Any]
_old_modules: list[Any] = []  # kept in a fork: freeing them would touch the parent's sockets


def _load_again() -> None:
    """Load a second copy of obstore's extension in a fork, where every call to the first one hangs.

    Its runtime threads do not survive a fork. The dynamic linker would reuse the library that is
    already loaded, so an in-memory copy is loaded instead.
    """
    if "obstore" not in sys.modules:
        return
    library = next(Path(sys.modules["obstore"].__file__ or "").parent.glob("_obstore.*so"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "obstore"]:
        _old_modules.append(sys.modules.pop(name))
    with open(os.memfd_create("obstore"), "wb", buffering=0) as copy:
        copy.write(library.read_bytes())
        path = f"/proc/{os.getpid()}/fd/{copy.fileno()}"
        loader = ExtensionFileLoader("obstore._obstore", path)
        spec = spec_from_file_location(loader.name, path, loader=loader)
        assert spec is not None
        sys.modules[loader.name] = module_from_spec(spec)
        loader.exec_module(sys.modules[loader.name])


os.register_at_fork(after_in_child=_load_again)


@cache
def _client(pid: int, scheme: str, bucket: str, retries: int, *environment: str) -> Any:
    from obstore import store

    settings: dict[str, Any] = {}
    options = {"allow_http": True, "timeout": timedelta(days=1)}  # callers set time limits
    if scheme == "s3":
        settings["config"] = {"disable_bulk_delete": True, "copy_if_not_exists": "multipart"}
        if not {"AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE"} & os.environ.keys():
            with suppress(ImportError, ValueError):  # no boto3, or no keys found
                from obstore.auth.boto3 import Boto3CredentialProvider

                settings["credential_provider"] = Boto3CredentialProvider()
    return getattr(store, CLIENTS[scheme])(
        bucket, client_options=options, retry_config={"max_retries": retries}, **settings
    )


def _open(url: str, retries: int = 0) -> tuple[Any, str]:
    """Return the client for the bucket of `url`, and the key."""
    scheme, _, path = url.partition("://")
    bucket, _, key = path.partition("/")
    environment = (os.environ.get(f"AWS_{name}", "") for name in ("ENDPOINT_URL", "ACCESS_KEY_ID"))
    return _client(os.getpid(), scheme, bucket, retries, *environment), key


async def info(url: str) -> Info:
    """Return the `size` (bytes), `e_tag` and `last_modified` of an object."""
    client, key = _open(url)
    return dict(await client.head_async(key))


async def entries(url: str, recursive: bool = False) -> dict[str, Info]:
    """Return URL -> info of the objects in a folder or matching a glob, or of a single object."""
    from fsspec.utils import glob_translate

    client, key = _open(url)
    pattern = has_magic(key)
    folder = re.split(r"[*?[]", key)[0].rpartition("/")[0] if pattern else key.rstrip("/")
    try:
        if recursive or (pattern and "/" in key.removeprefix(f"{folder}/")):
            objects = await client.list(folder or None).collect_async()
        else:
            objects = (await client.list_with_delimiter_async(folder or None))["objects"]
            if not objects and not pattern:
                objects = [await client.head_async(key)]
    except Exception as error:  # GenericError if an S3 server lacks the bucket
        if isinstance(error, FileNotFoundError) or "status code: 404" in str(error):
            return {}
        raise
    fits = re.compile(glob_translate(key)).match if pattern else bool
    bucket = url.removesuffix(key)
    return {bucket + info["path"]: info for info in objects if fits(info["path"])}


async def read(url: str, start: int, end: int) -> Any:
    """Return the bytes [start, end) of an object; fewer if it ends before."""
    client, key = _open(url)
    return await client.get_range_async(key, start=start, end=end)


async def remove(url: str) -> None:
    """Remove an object; FileNotFoundError on some servers if there is none."""
    client, key = _open(url)
    await client.delete_async(key)


async def put(path: Path, url: str, new: bool) -> None:
    """Write a local file to `url`.

    Raises:
        FileExistsError: if `new` and the object exists.
    """
    size = path.stat().st_size
    client, key = _open(url, retries=3 if size > PART else 0)  # lost parts are sent again
    parts = {"chunk_size": max(PART, size // 9_000), "max_concurrency": 4}
    try:
        if size <= PART:
            await client.put_async(key, path, mode="create" if new else "overwrite")
        elif not new or (url.startswith("s3:") and size > S3_COPY_LIMIT):
            if new and await entries(url):  # not exclusive: an object that appears now is replaced
                raise FileExistsError(url)
            await client.put_async(key, path, **parts)
        else:
            await _put_and_copy(client, key, path, parts)
    except Exception as error:
        # S3 reports "conflict" while another write is in progress; the next attempt decides.
        if type(error).__name__ == "AlreadyExistsError" and "ConditionalRequest" not in str(error):
            raise FileExistsError(url) from error
        raise


async def _put_and_copy(client: Any, key: str, path: Path, parts: dict[str, int]) -> None:
    """Upload to a temporary name and copy that, because only the copy can be exclusive."""
    temporary = f"{key}.{uuid.uuid4().hex}{TEMPORARY}"
    try:
        await client.put_async(temporary, path, **parts)
        await client.copy_async(temporary, key, overwrite=False)
    finally:
        with suppress(Exception):
            await asyncio.wait_for(client.delete_async(temporary), timeout=10)
