"""What a run is trained by: this code, named by a digest of its files, and the packages below it.

Only the same code gives the same losses to the last bit, so each attempt records its own, and says
where it is not that of the attempt before.
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

import gigabatch  # a namespace: its folders are what is installed, editable or not

_PACKAGES = (
    "gigabatch", "torch", "deepspeed", "ray", "webdataset", "transformers", "tokenizers", "numpy",
    "pillow",
)  # fmt: skip
_SUFFIXES = (".py", ".yaml", "py.typed")  # of the files that a wheel holds


def provenance() -> dict[str, Any]:
    """`code`: the digest of this code; `packages`: the version of each, None where it is not
    installed; `python`: its version."""
    packages = {name: _version(name) for name in _PACKAGES}
    return {"code": code_digest(), "packages": packages, "python": platform.python_version()}


def environment() -> dict[str, Any]:
    """`provenance`, and where and how this process was started."""
    return {
        **provenance(),
        "platform": platform.platform(),
        "host": platform.node(),
        "command": sys.argv,
        "started": time.time(),
    }


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two of `provenance`, as `NAME OLD -> NEW`; nothing where `old` does not
    tell. The same code may go by two versions (a job's wheel), so its digest alone counts."""
    if "code" not in old:
        return []
    before, after = _named(old), _named(new)
    found = [
        f"{name} {before[name]} -> {after[name]}"
        for name in after
        if name != "gigabatch" and name in before and before[name] != after[name]
    ]
    if old["code"] != new["code"]:
        found.insert(0, f"gigabatch {before['gigabatch']} -> {after['gigabatch']}")
    return found


def _named(found: Mapping[str, Any]) -> dict[str, str]:
    packages = {name: each or "(none)" for name, each in found["packages"].items()}
    own = f"{packages['gigabatch']} (code {found['code']})"
    return {**packages, "gigabatch": own, "Python": found["python"]}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def code_digest() -> str:
    """Of every Python file of the package, such as `1f3870be274f`; recipes do not count."""
    return digest_of({n: data for n, data in installed_files().items() if n.endswith(".py")})


def digest_of(files: Mapping[str, bytes]) -> str:
    """12 hexadecimal digits that change with any name or byte."""
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
                # Like an import: the first folder wins. A link to a removed file is no file.
                if path.is_file() and name not in contents:
                    contents[name] = path.read_bytes()
    return dict(sorted(contents.items()))
