"""The code and package versions that train a run, recorded by every attempt.

Losses are equal to the last bit only with equal code. An attempt therefore compares its code and
packages with those of the attempt before, and logs the differences.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gigabatch  # a namespace package: `__path__` has the installed folders, editable or not

_PACKAGES = (
    "gigabatch", "torch", "deepspeed", "ray", "webdataset", "transformers", "tokenizers", "numpy",
    "pillow",
)  # fmt: skip
_SUFFIXES = (".py", ".yaml", "py.typed")  # the files that a wheel contains


def provenance() -> dict[str, Any]:
    """Return the digest of this code and the versions of Python and of the packages it uses.

    Returns:
        `code`: the digest. `packages`: a version by package name, None if it is not installed.
        `python`: the version of Python.
    """
    packages = {name: _version(name) for name in _PACKAGES}
    return {"code": code_digest(), "packages": packages, "python": platform.python_version()}


def environment() -> dict[str, Any]:
    """Return `provenance()` with the host, the platform, the command and the start time."""
    return {
        **provenance(),
        "platform": platform.platform(),
        "host": platform.node(),
        "command": sys.argv,
        "started": time.time(),
    }


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the differences between two results of `provenance()`, as `NAME OLD -> NEW`.

    The version of gigabatch is not compared, only its digest: a job's wheel has a different version
    for the same code. If `old` was written before digests were recorded, the list is empty.
    """
    if "code" not in old:
        return []
    before, after = _versions(old), _versions(new)
    differences = [
        f"{name} {before[name]} -> {after[name]}"
        for name in after
        if name != "gigabatch" and name in before and before[name] != after[name]
    ]
    if old["code"] != new["code"]:
        differences.insert(0, f"gigabatch {before['gigabatch']} -> {after['gigabatch']}")
    return differences


def _versions(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the versions of the packages, of Python and of gigabatch, as they are printed."""
    packages = {name: version or "(none)" for name, version in record["packages"].items()}
    gigabatch_version = f"{packages['gigabatch']} (code {record['code']})"
    return {**packages, "gigabatch": gigabatch_version, "Python": record["python"]}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def code_digest() -> str:
    """Return the digest of the package's Python files, such as `1f3870be274f`, without recipes."""
    return digest_of({n: data for n, data in installed_files().items() if n.endswith(".py")})


def digest_of(files: Mapping[str, bytes]) -> str:
    """Return 12 hexadecimal digits that change with any name or byte of the files."""
    digest = hashlib.sha256()
    for name, data in files.items():
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()[:12]


def installed_files() -> dict[str, bytes]:
    """Return the content of every file of the package by its name (`gigabatch/...`), sorted.

    The result is the same for a wheel, an editable install and a strict editable install.
    """
    contents: dict[str, bytes] = {}
    for root in map(Path, gigabatch.__path__):
        for folder, _, names in os.walk(root, followlinks=True):  # an editable install has links
            for path in (Path(folder, name) for name in names if name.endswith(_SUFFIXES)):
                name = f"gigabatch/{path.relative_to(root).as_posix()}"
                # The first folder wins, as for an import. A link to a removed file is skipped.
                if path.is_file() and name not in contents:
                    contents[name] = path.read_bytes()
    return dict(sorted(contents.items()))
