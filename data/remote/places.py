"""Where shards lie: local folders, or s3://, gs://, hf:// and https:// through fsspec.

Folders, globs and brace ranges become a list of files; each file has a size and a version, by which
a change shows. No address is ever run: `pipe:`, chained and unknown schemes are refused.
"""

from __future__ import annotations

import fnmatch
import glob
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote import ranges
from gigabatch.data.remote.ranges import Retry, ShardState, as_state
from gigabatch.data.remote.transport import SCHEMES, WRITTEN

log = logging.getLogger(__name__)
LISTED = 1000
"""From this many files of one remote folder on, they are stated by listing it."""


def is_remote(path: str) -> bool:
    """Whether `path` is read over the network. Raises GigabatchError for a scheme not known."""
    scheme, mark, _ = path.partition("://")
    chained = re.match(r"[\w+.-]+::", path) or (mark and "::" in re.sub(r"\[[^]]*\]", "", path))
    if path.lower().startswith("pipe:") or chained:
        raise GigabatchError(
            f"{path}: addresses that name a command or chain protocols are refused, and nothing "
            f"was executed. Name a local path, or one of {_schemes()}."
        )
    if not mark or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return False
    if scheme.lower() == "file":
        raise GigabatchError(
            f"{path}: name a local file or folder by its path alone, without {scheme}://."
        )
    if scheme not in SCHEMES:
        raise GigabatchError(
            f"{path}: {scheme}:// is not a place that shards are read from, and nothing was "
            f"executed. Name a local path, or one of {_schemes()}."
        )
    return True


def _schemes(schemes: Iterable[str] = SCHEMES) -> str:
    return ", ".join(f"{scheme}://" for scheme in schemes)


def writable_folder(url: str) -> str:
    """The URL of a folder that may be written to, without a slash at its end.

    Raises GigabatchError where it is none, or holds a secret, which the message does not repeat.
    """
    scheme, mark, rest = url.partition("://")
    if "@" in rest.partition("/")[0] or "?" in rest:
        raise GigabatchError(
            "the address holds a user, a password or a query, and is refused: it would stand in "
            "configs and logs. Set keys where the file system looks for them (AWS_* variables, "
            "fsspec's configuration)."
        )
    if scheme not in WRITTEN or not mark:
        raise GigabatchError(
            f"{url}: not a place that can be written to; it begins with one of {_schemes(WRITTEN)}."
        )
    path = rest.rstrip("/")
    if (scheme == "file") != rest.startswith("/") or not path:
        form = "file:///FOLDER" if scheme == "file" else f"{scheme}://BUCKET/FOLDER"
        raise GigabatchError(f"{url}: a folder is named as {form}.")
    if re.search(r"[\x00-\x1f*?\[\]{}#\\]|::|//|(^|/)\.\.?(/|$)", path):
        raise GigabatchError(
            f"{url!r}: a folder's name holds no pattern, empty part or control character."
        )
    return f"{scheme}://{path}"


def expand(paths: Sequence[str], default_glob: str = "*.tar", retry: Retry = Retry()) -> list[str]:
    """The files that `paths` name, as absolute paths or URLs.

    Each path is a file, a folder (its `default_glob`), a glob, or holds brace ranges such as
    `{000..123}`. In the order of `paths`, sorted inside each. A web server is asked for a listing
    by a glob alone; elsewhere a remote name that fits `default_glob` is taken for a file unseen.

    Raises GigabatchError for what is missing or empty, and for a file named twice.
    """
    found: list[str] = []
    for path in paths:
        if is_remote(path):
            names = (n for each in _braces(path) for n in _remote(each, default_glob, retry))
        else:
            local = os.path.expanduser(path)
            each_local = [local] if os.path.exists(local) else _braces(local)
            names = (n for each in each_local for n in _local(each, default_glob))
        found += sorted(names)
    twice = [name for name, count in Counter(found).items() if count > 1]
    if twice:
        raise GigabatchError(
            f"{twice[0]}: the shard is named {found.count(twice[0])} times ({len(twice)} such); "
            "its samples would come more than once an epoch. Name each shard once."
        )
    return found


def _braces(path: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        return list(braceexpand(path))
    except ValueError as error:
        raise GigabatchError(f"{path}: the braces do not match: {error}.") from None


def _local(path: str, default_glob: str) -> list[str]:
    full = os.path.abspath(path)
    if os.path.isdir(full):
        with os.scandir(full) as entries:
            # A dangling link counts: it is a shard that is lost, not one that was never there.
            names = [entry.path for entry in entries if not entry.is_dir()]
        found = [name for name in names if _fits(name, default_glob)]
        if not found:
            raise GigabatchError(
                f"{full}: the folder holds no {default_glob}. If its shards lie deeper or are "
                f"called otherwise, name them by a glob such as '{path}/**/{default_glob}'."
            )
        return found
    if os.path.exists(full):
        return [full]
    if not glob.has_magic(path):
        raise GigabatchError(f"{full}: there is no such file or folder. Check the path.")
    found = [name for name in glob.glob(full, recursive=True) if os.path.isfile(name)]
    if not found:
        raise GigabatchError(f"{full}: the glob matches no file. Check the path and the pattern.")
    return found


def _remote(url: str, default_glob: str, retry: Retry) -> list[str]:
    web = url.startswith("http")
    is_glob = "*" in url if web else glob.has_magic(url)  # a web address may end in ?query
    if not is_glob and (web or _fits(url, default_glob)):
        return [url]
    listed = ranges.entries(url, retry)
    if list(listed) == [url]:
        return [url]
    found = [name for name in listed if is_glob or _fits(name, default_glob)]
    if not found and is_glob:
        remedy = " Does the server list its folders? If not, use a brace range." if web else ""
        raise GigabatchError(f"{url}: the glob matches no file. Check the address.{remedy}")
    if not found:
        raise GigabatchError(
            f"{url}: there is no such file, and no folder that holds {default_glob}. Check the "
            "address, and that its bucket may be listed."
        )
    return found


def _fits(name: str, pattern: str) -> bool:
    name = name.rpartition("/")[2]
    return not name.startswith(".") and fnmatch.fnmatchcase(name, pattern)


def stat_all(urls: Sequence[str], threads: int = 32, retry: Retry = Retry()) -> list[ShardState]:
    """The state of each file (as `expand` gives them), in order.

    Raises GigabatchError naming the first that is missing, may not be read or has no size.
    """
    far = [url for url in urls if is_remote(url)]
    folders = Counter(url.rpartition("/")[0] for url in far if not url.startswith("http"))
    with ThreadPoolExecutor(threads) as pool:
        many = [folder for folder, count in folders.items() if count >= LISTED]
        known: dict[str, ShardState] = {}
        for listed in pool.map(lambda folder: _listed(folder, retry), many):
            known.update(listed)
        return list(pool.map(lambda url: known.get(url) or _stat(url, retry), urls))


def _stat(url: str, retry: Retry) -> ShardState:
    if is_remote(url):
        return ranges.stat(url, retry)
    try:
        status = os.stat(url)
    except OSError as error:
        raise GigabatchError(
            f"{url}: the shard cannot be read: {error.strerror or error}. Put it back, or index "
            "the set without it."
        ) from None
    if not stat.S_ISREG(status.st_mode):  # to read a pipe or a socket may take for ever
        raise GigabatchError(
            f"{url}: is no regular file, but a pipe, socket, device or folder. Remove it, or name "
            "the shards by a pattern that leaves it out."
        )
    return ShardState(url, status.st_size, str(status.st_mtime_ns))


def _listed(folder: str, retry: Retry) -> dict[str, ShardState]:
    """Empty where the folder may not be listed, though its files may be read."""
    try:
        found = ranges.entries(folder, replace(retry, attempts=1))
    except GigabatchError as error:
        log.warning("each of its shards is asked for by itself: %s", error)
        return {}
    return {url: as_state(url, info) for url, info in found.items()}
