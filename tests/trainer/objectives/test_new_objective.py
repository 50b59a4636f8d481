"""A new objective is one file: in the package, or in a module that a config names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import selected

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.config import columns_of, taps_of
from gigabatch.trainer.config.load import dump_config, parse_config
from gigabatch.trainer.objectives import build_objective

ROOT = Path(__file__).parents[3]
TUTORIAL = ROOT / "docs" / "tutorials"


TASK = '''
"""Task `count-rows`."""

from gigabatch.trainer.evaluation.registry import register
from gigabatch.trainer.evaluation.task import RunTask


@register
class CountRows(RunTask):
    """Number of rows."""

    name = "count-rows"
    summary = "number of rows"

    scale: float = 1.0
    """Factor of the number."""

    def read(self, run):
        return {"rows": self.scale * len(run.steps_evaluated())}
'''
TEMPLATE = '''
"""Template `nomad`."""

from gigabatch.launcher.templates.plan import Plan
from gigabatch.launcher.templates.registry import template


@template("nomad", needs_image=False)
def nomad(plan: Plan) -> str:
    """Return a line."""
    return f"job {plan.label} on {plan.nodes} nodes"
'''
AFFECTED = (
    "tests/test_docs.py", "tests/test_layout.py", "tests/test_readme.py", "tests/configs",
    "tests/trainer/config/test_config_keys.py::test_table_lists_every_key",
    "tests/trainer/config/test_config.py", "tests/trainer/config/test_explain.py",
    "tests/trainer/config/test_overrides.py", "tests/trainer/evaluation/test_task_registry.py",
    "tests/trainer/towers/test_kinds.py", "tests/launcher/templates",
    "tests/launcher/cli/test_objectives_command.py", "tests/launcher/cli/test_startup.py",
)  # fmt: skip
"""Fast tests that read a registry, apart from those of tests/trainer/objectives."""


@pytest.fixture
def extended(tmp_path: Path) -> Path:
    """A copy of the repository with a new objective and its test, tower kind, task and template."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in (".src", "configs", "data", "docs", "examples", "kernels", "launcher", "tests",
                 "trainer", "README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md",
                 "CITATION.cff", "pyproject.toml", "mkdocs.yml"):  # fmt: skip
        if (ROOT / path).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", Path(__file__).name)
            shutil.copytree(ROOT / path, copy / path, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / path, copy)
    shutil.copy(TUTORIAL / "dcl.py", copy / "trainer" / "objectives")
    shutil.copy(TUTORIAL / "test_dcl.py", copy / "tests" / "trainer" / "objectives")
    shutil.copy(TUTORIAL / "mean_color.py", copy / "trainer" / "towers")
    (copy / "trainer" / "evaluation" / "tasks" / "count_rows.py").write_text(TASK)
    (copy / "launcher" / "templates" / "nomad.py").write_text(TEMPLATE)
    return copy


def run_in(copy: Path, command: str) -> str:
    """Run a command of bash in a copy of the repository; return its output."""
    environment = os.environ | {
        "PYTHONPATH": str(copy / ".src"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    done = subprocess.run(
        ["bash", "-c", command], env=environment, cwd=copy, capture_output=True, text=True,
        timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_printed_command_tests_a_new_objective(extended: Path) -> None:
    page = (TUTORIAL / "own-objective.md").read_text()
    (command,) = re.findall(r"(?m)^OBJECTIVES=dcl .*$", page)
    output = run_in(extended, f"{command} -v")
    # Value, resume and state on 1, 2 and 4 ranks; rehearsal, passes, documentation and benchmark;
    # 7 keys.
    assert len(re.findall(r"PASSED \S*\[(?:\d-)?dcl\b", output)) == 3 * 3 + 4 + 7, output
    assert re.search(r"PASSED \S*::test_dcl_of_equal_scores_is_zero", output), output


@pytest.mark.slow
def test_new_files_need_no_change_of_any_other_file(extended: Path) -> None:
    run_in(extended, f"pytest -q {' '.join(AFFECTED)}")


def test_environment_limits_the_collected_tests() -> None:
    files = ("test_keys.py", "test_registry.py", "test_rehearsed_objectives.py")
    command = [
        sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", "-p", "no:cacheprovider",
        *(str(Path(__file__).with_name(name)) for name in files),
    ]  # fmt: skip

    done = subprocess.run(
        command, env=os.environ | {"OBJECTIVES": "siglip"}, cwd=ROOT, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    ids = re.findall(r"::\w+\[(.*)\]", done.stdout)
    assert len(ids) > 10
    assert [label for label in ids if "siglip" not in label] == []


def test_unknown_name_in_the_environment_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OBJECTIVES", "siglip siglop")
    with pytest.raises(ValueError, match="no objective is registered as siglop"):
        selected()


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
