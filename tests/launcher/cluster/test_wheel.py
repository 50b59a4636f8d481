"""Wheel of the installed code: importable, named by its content, without dependencies."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import gigabatch
from gigabatch.launcher.cluster.wheel import build_wheel, wheel_version


@pytest.mark.slow
def test_wheel_holds_installed_code_and_pip_installs_it(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    assert wheel.name == f"gigabatch-{wheel_version()}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"gigabatch-{wheel_version()}.dist-info/METADATA").decode()
    assert {"gigabatch/launcher/cli/app.py", "gigabatch/configs/quickstart.yaml"} <= names
    assert not any("__pycache__" in name for name in names)
    assert "Requires-Dist" not in metadata
    target = tmp_path / "target"
    install = ["-m", "pip", "install", "-q", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run([sys.executable, *install], check=True, capture_output=True)
    code = "import gigabatch.data.errors as e; print(e.__file__)"
    result = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(target)}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert result.stdout.strip() == str(target / "gigabatch" / "data" / "errors.py")


def test_wheel_name_depends_only_on_file_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "gigabatch"
    (package / "data").mkdir(parents=True)
    code = package / "data" / "code.py"
    code.write_text("A = 1\n")
    monkeypatch.setattr(gigabatch, "__path__", [str(package)])
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    first = build_wheel(tmp_path / "one")
    code.touch()
    (package / "data" / "__pycache__").mkdir()
    (package / "data" / "__pycache__" / "code.pyc").write_bytes(b"x")
    again = build_wheel(tmp_path / "two")
    assert (again.name, again.read_bytes()) == (first.name, first.read_bytes())
    code.write_text("A = 2\n")
    assert build_wheel(tmp_path).name != first.name
