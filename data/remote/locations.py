"""Resolve locations of shards: local paths, and URLs of object stores, web servers and the Hub.

Folders, globs and brace ranges become a list of files. Each file has a size and a version, which
reveal a change. Nothing in an address is ever executed: `pipe:`, chained and unknown schemes are
rejected.
"""

from __future__ import annotations

import fnmatch
import glob
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote import access
from gigabatch.data.remote.access import Retry, ShardState, as_state
from gigabatch.data.remote.transport import SCHEMES, WRITTEN

log = logging.getLogger(__name__)
LISTED = 1000
"""Minimum number of files in one remote folder for which one listing replaces separate requests."""
READABLE = "Name a local path, or one of " + ", ".join(f"{scheme}://" for scheme in SCHEMES) + "."


def is_remote(path: str) -> bool:
    """Return whether `path` is read over the network.

    Raises:
        GigabatchError: if the scheme is not supported, or the address names a command.
    """
    scheme, mark, _ = path.partition("://")
    chained = re.match(r"[\w+.-]+::", path) or (mark and "::" in re.sub(r"\[[^]]*\]", "", path))
    if path.lower().startswith("pipe:") or chained:
        raise GigabatchError(
            f"{path}: addresses that name a command or chain protocols are refused, and nothing "
            f"was executed. {READABLE}"
        )
    if not mark or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return False
    if scheme.lower() == "file":
        raise GigabatchError(
            f"{path}: name a local file or folder by its path alone, without {scheme}://."
        )
    if scheme not in SCHEMES:
        raise GigabatchError(
            f"{path}: shards cannot be read from {scheme}://, and nothing was executed. {READABLE}"
        )
    return True


def writable_folder(url: str) -> str:
    """Return the URL of a folder to write to, without a slash at its end.

    Raises:
        GigabatchError: if the URL is malformed or contains a secret, which the message omits.
    """
    scheme, mark, rest = url.partition("://")
    if "@" in rest.partition("/")[0] or "?" in rest:
        raise GigabatchError(
            "the address contains a user, a password or a query, which would be written to configs "
            "and logs. Remove it, and set keys in the environment (AWS_*, GOOGLE_* or AZURE_*)."
        )
    if scheme not in WRITTEN or not mark:
        schemes = ", ".join(f"{scheme}://" for scheme in WRITTEN)
        raise GigabatchError(f"{url}: cannot be written to. Name a URL with one of {schemes}.")
    path = rest.rstrip("/")
    if (scheme == "file") != rest.startswith("/") or not path:
        form = "file:///FOLDER" if scheme == "file" else f"{scheme}://BUCKET/FOLDER"
        raise GigabatchError(f"{url}: not a folder. Write it as {form}.")
    if re.search(r"[\x00-\x1f*?\[\]{}#\\]|::|//|(^|/)\.\.?(/|$)", path):
        raise GigabatchError(
            f"{url!r}: name the folder without patterns, empty parts and control characters."
        )
    return f"{scheme}://{path}"


def expand(
    paths: Sequence[str],
    default_glob: str = "*.tar",
    retry: Retry = Retry(),
    omitted: list[str] | None = None,
) -> list[str]:
    """Return the files that `paths` name, as absolute paths or URLs.

    Args:
        paths: Files, folders, globs, or patterns with brace ranges such as `{000..123}`.
        default_glob: Pattern of the files to take from a folder. A remote path that matches it is
            assumed to be a file, without a request.
        retry: Limits of a request. A web server's listing is requested only for a glob.
        omitted: List to which the paths or URLs of files in a folder are added that `default_glob`
            does not match.

    Returns:
        Files in the order of `paths`, sorted within each.

    Raises:
        GigabatchError: if a path is missing or empty, or a file is named twice.
    """
    files: list[str] = []
    rest: list[str] = [] if omitted is None else omitted
    for path in paths:
        if is_remote(path):
            urls = _braces(path)
            names = [name for url in urls for name in _remote(url, default_glob, retry, rest)]
        else:
            local = os.path.expanduser(path)
            exact = [local] if os.path.exists(local) else _braces(local)
            names = [name for part in exact for name in _local(part, default_glob, rest)]
        files += sorted(names)
    twice = [name for name, count in Counter(files).items() if count > 1]
    if twice:
        raise GigabatchError(
            f"{twice[0]}: the shard is named {files.count(twice[0])} times ({len(twice)} such "
            "shards); its samples would be repeated in every epoch. Name each shard once."
        )
    return files


def _braces(path: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        return list(braceexpand(path))
    except ValueError as error:
        raise GigabatchError(f"{path}: the braces do not match: {error}.") from None


def _local(path: str, default_glob: str, omitted: list[str]) -> list[str]:
    full = os.path.abspath(path)
    if os.path.isdir(full):
        with os.scandir(full) as entries:
            # Keep dangling links: their shards are lost, which must be reported.
            names = [entry.path for entry in entries if not entry.is_dir()]
        omitted += [name for name in names if not _fits(name, default_glob)]
        names = [name for name in names if _fits(name, default_glob)]
        problem = (
            f"the folder contains no {default_glob}. Name deeper or other files by a glob such as"
        )
        problem += f" '{path}/**/{default_glob}'."
    elif os.path.exists(full):
        return [full]
    elif glob.has_magic(path):
        names = [name for name in glob.glob(full, recursive=True) if os.path.isfile(name)]
        problem = "the glob matches no file. Check the path and the pattern."
    else:
        names, problem = [], "there is no such file or folder. Check the path."
    if not names:
        raise GigabatchError(f"{full}: {problem}")
    return names


def _remote(url: str, default_glob: str, retry: Retry, omitted: list[str]) -> list[str]:
    web = url.startswith("http")
    is_glob = "*" in url if web else glob.has_magic(url)  # a web address may end in ?query
    if not is_glob and (web or _fits(url, default_glob)):
        return [url]
    listed = access.entries(url, retry)
    if list(listed) == [url]:
        return [url]
    names = [name for name in listed if is_glob or _fits(name, default_glob)]
    omitted += sorted(set(listed) - set(names))
    if not names:
        problem = f"there is no such file, and no folder that contains {default_glob}"
        remedy = "that the bucket may be listed"
        if web:
            remedy = "that the server lists its folders; if it does not, use a brace range"
        problem = "the glob matches no file" if is_glob else problem
        raise GigabatchError(f"{url}: {problem}. Check the address, and {remedy}.")
    return names


def _fits(name: str, pattern: str) -> bool:
    name = name.rpartition("/")[2]
    return not name.startswith(".") and fnmatch.fnmatchcase(name, pattern)


def stat_all(urls: Sequence[str], threads: int = 32, retry: Retry = Retry()) -> list[ShardState]:
    """Return the state of each file, in order.

    Args:
        urls: Absolute paths or URLs, as `expand` returns them.
        threads: Number of parallel requests.
        retry: Limits of a request.

    Raises:
        GigabatchError: if a file is missing, unreadable or without a size; the message names the
            first.
    """
    remote = [url for url in urls if is_remote(url) and not url.startswith("http")]
    folders = Counter(url.rpartition("/")[0] for url in remote)
    large = [folder for folder, count in folders.items() if count >= LISTED]
    with ThreadPoolExecutor(threads) as pool:
        known: dict[str, ShardState] = {}
        for states in pool.map(lambda folder: _listed(folder, retry), large):
            known |= states
        return list(pool.map(lambda url: known.get(url) or _stat(url, retry), urls))


def _stat(url: str, retry: Retry) -> ShardState:
    if is_remote(url):
        return access.stat(url, retry)
    try:
        status = os.stat(url)
    except OSError as error:
        raise GigabatchError(
            f"{url}: the shard cannot be read: {error.strerror or error}. Restore it, or index "
            "the set without it."
        ) from None
    if not stat.S_ISREG(status.st_mode):  # reading a pipe or a socket may never end
        raise GigabatchError(
            f"{url}: is not a regular file, but a pipe, socket, device or folder. Remove it, or "
            "name the shards by a pattern that omits it."
        )
    return ShardState(url, status.st_size, str(status.st_mtime_ns))


def _listed(folder: str, retry: Retry) -> dict[str, ShardState]:
    """Return the state of each file in a folder; empty if listing is not permitted.

    The files may be readable even then.
    """
    try:
        infos = access.entries(folder, replace(retry, attempts=1))
    except GigabatchError as error:
        log.warning("requesting the state of every shard separately: %s", error)
        return {}
    return {url: as_state(url, info) for url, info in infos.items()}
