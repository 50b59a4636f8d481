"""Wheel of the installed code, built without a network, build tools or a checkout.

A cluster stores uploaded wheels by file name, so the name must change with the code: the local part
of the version is a digest of all files. The wheel declares no dependencies, because the cluster's
image has them and a starting job must not download anything.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

from gigabatch.trainer.run.provenance import digest_of, installed_files

_EPOCH = (1980, 1, 1, 0, 0, 0)  # a constant, so that the same files give the same bytes
_TAG = "py3-none-any"


def build_wheel(folder: Path) -> Path:
    """Write `gigabatch-VERSION+DIGEST-py3-none-any.whl` into a folder.

    Args:
        folder: Folder for the wheel; must exist.

    Returns:
        The path of the wheel. The same files give the same bytes.
    """
    version, files = wheel_version(), installed_files()
    info = f"gigabatch-{version}.dist-info"
    metadata = {
        "METADATA": f"Metadata-Version: 2.1\nName: gigabatch\nVersion: {version}\n",
        "WHEEL": f"Wheel-Version: 1.0\nGenerator: gigabatch\nRoot-Is-Purelib: true\nTag: {_TAG}\n",
    }
    members = files | {f"{info}/{name}": text.encode() for name, text in metadata.items()}
    record = "".join(f"{name},{_digest(data)},{len(data)}\n" for name, data in members.items())
    members[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    path = folder / f"gigabatch-{version}-{_TAG}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return path


def wheel_version() -> str:
    """Return the version with a digest of the files, such as `0.1.0+code.1f3870be274f`."""
    public = distribution("gigabatch").version.partition("+")[0]
    return f"{public}+code.{digest_of(installed_files())}"


def _digest(data: bytes) -> str:
    coded = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()
    return "sha256=" + coded.rstrip("=")
