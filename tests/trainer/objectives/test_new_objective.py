"""A new objective is one file: in the package, or in a module that a config names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.config import columns_of, taps_of
from gigabatch.trainer.config.load import dump_config, parse_config
from gigabatch.trainer.objectives import build_objective

ROOT = Path(__file__).parents[3]
TUTORIAL = ROOT / "docs" / "tutorials"
HERE = Path(__file__).parent


@pytest.mark.slow
def test_new_file_passes_all_registry_tests(tmp_path: Path) -> None:
    """Add only the tutorial's two files to a copy of the package; install nothing."""
    package, tests = tmp_path / "gigabatch", tmp_path / "tests"
    package.mkdir()
    for folder in ("launcher", "data", "kernels", "configs"):
        (package / folder).symlink_to(ROOT / folder)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "trainer", package / "trainer", ignore=ignored)
    shutil.copytree(HERE, tests, ignore=shutil.ignore_patterns("__pycache__", Path(__file__).name))
    shutil.copy(TUTORIAL / "dcl.py", package / "trainer" / "objectives")
    shutil.copy(TUTORIAL / "test_dcl.py", tests)
    paths = [str(tmp_path), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    command = [
        sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", "dcl", "-m", "slow or not slow",
        "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tests), str(tests),
    ]  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OBJECTIVES": "dcl"},
        cwd=tmp_path, capture_output=True, text=True, timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    passed = int(done.stdout.split(" passed")[0].split()[-1])
    # Value and resume on 1, 2 and 4 ranks; passes, documentation, benchmark; 7 keys; test_dcl.py.
    assert passed == 3 * 2 + 3 + 7 + 1, done.stdout


def test_config_loads_a_user_objective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (TUTORIAL / "dcl.py").read_text()
    (tmp_path / "my_losses.py").write_text(source.replace("@register\n", ""))
    monkeypatch.syspath_prepend(tmp_path)
    text = "objective: {module: 'my_losses:DCL', args: {taps: [text, image]}}"
    config = parse_config(text, "c")
    assert taps_of(config.objective) == ("text", "image")
    assert columns_of(config.objective) == ()
    assert type(build_objective(config.objective, width=8)).__name__ == "DCL"
    assert parse_config(dump_config(config), "again") == config
    sum_text = f"objective: {{name: sum, terms: [{{}}, {text.partition(': ')[2]}]}}"
    assert build_objective(parse_config(sum_text, "c").objective, width=8).needs.taps


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("{module: 'no_such_module:DCL'}", "cannot be imported"),
        ("{module: 'torch.nn:Linear'}", "is not a subclass of"),
        ("{module: 'my_losses:DCL', args: {tap: [text, image]}}", "args.tap"),
        ("{module: nonsense}", "objective.module"),
    ],
)
def test_invalid_module_raises_with_its_problem(
    objective: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_losses.py").write_text(
        (TUTORIAL / "dcl.py").read_text().replace("@register\n", "")
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(GigabatchError, match=message):
        parse_config(f"objective: {objective}", "c")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "needs a class attribute Settings"),
        ("Settings = int", "needs a class attribute Settings"),
        ("Settings = None", "needs a class attribute Settings"),
        ("Settings = ObjectiveSettings", "its Settings need a field name"),
    ],
)
def test_class_without_settings_raises_with_its_key(
    line: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"losses_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(
        "from gigabatch.trainer.objectives.base import Objective\n"
        "from gigabatch.trainer.objectives.settings import ObjectiveSettings\n"
        f"class A(Objective):\n    {line or 'pass'}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(GigabatchError, match=rf"objective\.module: '{name}:A'.* {message}"):
        parse_config(f"objective: {{module: '{name}:A'}}", "c")
