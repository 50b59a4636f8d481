"""Wheels of the running code, and the package's files in every kind of install."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import gigabatch
from gigabatch.launcher.cluster.wheel import build_wheel, wheel_version
from gigabatch.trainer.run.provenance import installed_files

ROOT = Path(__file__).parents[3]
FOLDERS = ("launcher", "trainer", "data", "kernels", "configs")


def run(*command: object, cwd: Path) -> str:
    """Run a command outside the checkout and return what it prints."""
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_checkout(to: Path) -> Path:
    """Copy what an install needs, so that it leaves nothing in the checkout."""
    to.mkdir()
    for name in (*FOLDERS, ".src"):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, to / name, symlinks=True, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to / name)
    return to


def empty_environment(folder: Path) -> Path:
    """Create a virtual environment with this one's packages except gigabatch; return its Python."""
    venv.create(folder, with_pip=False)
    packages = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    paths = [path for path in sys.path if path.endswith("-packages")]
    (packages / "packages.pth").write_text("\n".join(paths))
    return folder / "bin" / "python"


def install(python: Path, *arguments: object, cwd: Path) -> None:
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", "-q")
    run(python, "-m", "pip", "install", *options, *arguments, cwd=cwd)


@pytest.mark.slow
def test_wheel_holds_the_running_code_and_pip_installs_it(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    assert wheel.name == f"gigabatch-{wheel_version()}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"gigabatch-{wheel_version()}.dist-info/METADATA").decode()
    assert {"gigabatch/launcher/cli/app.py", "gigabatch/configs/quickstart.yaml"} <= names
    assert not any("__pycache__" in name for name in names)
    assert "Requires-Dist" not in metadata
    python = empty_environment(tmp_path / "env")
    install(python, wheel, cwd=tmp_path)
    code = "import gigabatch.data.errors as module; print(module.__file__)"
    assert run(python, "-c", code, cwd=tmp_path).startswith(str(tmp_path / "env"))


def test_wheel_name_changes_if_and_only_if_a_byte_changes(
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
    unchanged = build_wheel(tmp_path / "two")
    assert (unchanged.name, unchanged.read_bytes()) == (first.name, first.read_bytes())
    code.write_text("A = 2\n")
    assert build_wheel(tmp_path).name != first.name


def test_installed_files_follows_links_and_skips_removed_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout, package = tmp_path / "data", tmp_path / "gigabatch"
    (checkout / "deep").mkdir(parents=True)
    (checkout / "deep" / "code.py").write_text("A = 1\n")
    (checkout / "notes.txt").write_text("not part of the package")
    (checkout / "removed.py").symlink_to(checkout / "missing.py")
    package.mkdir()
    (package / "data").symlink_to("../data")
    monkeypatch.setattr(gigabatch, "__path__", [str(package)])
    assert installed_files() == {"gigabatch/data/deep/code.py": b"A = 1\n"}


LIST = """
import json
from gigabatch.launcher.cluster.wheel import wheel_version
from gigabatch.trainer.run.provenance import installed_files
print(json.dumps([wheel_version(), list(installed_files())]))
"""
MODES: dict[str, list[str]] = {
    "wheel": ["."],
    "editable": ["-e", "."],
    "strict": ["-e", ".", "--config-settings", "editable_mode=strict"],
}


@pytest.mark.slow
def test_every_kind_of_install_has_the_same_files_and_wheel(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    files_by_mode = {}
    for mode, arguments in MODES.items():
        python = empty_environment(tmp_path / mode)
        install(python, *arguments, cwd=checkout)
        files_by_mode[mode] = json.loads(run(python, "-c", LIST, cwd=tmp_path))
    assert files_by_mode["editable"] == files_by_mode["strict"] == files_by_mode["wheel"]
    suffixes = (".py", ".yaml", "py.typed")
    names = {
        f"gigabatch/{path.relative_to(checkout)}"
        for folder in FOLDERS
        for path in (checkout / folder).rglob("*")
        if path.name.endswith(suffixes)
    }
    assert set(files_by_mode["wheel"][1]) == names


@pytest.mark.slow
def test_new_module_of_an_editable_install_needs_no_second_install(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    python = empty_environment(tmp_path / "env")
    install(python, "-e", ".", cwd=checkout)
    (checkout / "trainer" / "objectives" / "new_one.py").write_text("A = 1\n")
    (checkout / "data" / "new_folder").mkdir()
    (checkout / "data" / "new_folder" / "__init__.py").write_text("B = 2\n")
    code = "import gigabatch.trainer.objectives.new_one as a, gigabatch.data.new_folder as b"
    assert run(python, "-c", f"{code}; print(a.A + b.B)", cwd=tmp_path) == "3\n"
    assert "gigabatch/trainer/objectives/new_one.py" in run(python, "-c", LIST, cwd=tmp_path)


@pytest.mark.slow
def test_installed_wheel_trains_the_quick_start_from_another_folder(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    python = empty_environment(tmp_path / "env")
    install(python, ".", cwd=checkout)
    shutil.rmtree(checkout)
    (tmp_path / "elsewhere").mkdir()
    code = "import gigabatch.configs; print(gigabatch.configs.__path__[0])"
    configs = Path(run(python, "-c", code, cwd=tmp_path).strip())
    assert configs.is_relative_to(tmp_path / "env")
    out = run(
        python, "-m", "gigabatch.launcher", "train", configs / "quickstart.yaml",
        "cluster.launcher=inline", "cluster.workers=1", "train.steps=4", "run.name=a",
        "batch.global_size=64", "batch.micro_size=32", "eval.sets=[]", cwd=tmp_path / "elsewhere",
    )  # fmt: skip
    assert "finished: 4 steps" in out
    assert (tmp_path / "elsewhere" / "runs" / "a" / "checkpoints" / "step-00000004").is_dir()
