"""Fast answers: help, version and missing paths need no torch and under a second of CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from gigabatch.launcher.cli.app import app
from gigabatch.launcher.templates.registry import all_templates

COMMAND = (sys.executable, "-m", "gigabatch.launcher")
CPU_SECONDS = 1.5
"""Bound for user CPU time. An answer takes 0.3 to 0.7 s; importing torch adds more than 3 s."""
HEAVY = ("torch", "ray", "transformers", "pandas", "deepspeed", "webdataset")
URL = ("--address", "http://127.0.0.1:1")
MISSING_PATHS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("train",): ("missing.yaml",),
    ("resume",): ("missing",),
    ("config",): ("missing.yaml",),
    ("eval",): ("missing", "--on", "val"),
    ("doctor",): ("missing.yaml",),
    ("board",): ("missing",),
    ("submit",): ("missing.yaml", *URL),
    ("template",): ("slurm", "missing.yaml"),
    ("reproduce",): ("symile", "--data", "missing"),
    ("data", "index"): ("missing",),
    ("data", "check"): ("missing/*.tar",),
    ("data", "stats"): ("missing",),
    ("data", "pack"): ("missing.csv", "out"),
    ("data", "filter"): ("missing", "x > 1"),
    ("data", "batch"): ("missing.yaml",),
    ("bench", "data"): ("missing.yaml",),
}
"""Command -> arguments with a path that does not exist."""
MISSING_OPTION_PATHS = (
    ("eval", "run", "--on", "/missing/set"),
    ("submit", "run/config.yaml", "--with", "missing.py", *URL),
    ("data", "pack", "run/config.yaml", "out", "--folder", "missing"),
)
WRONG_NAMES = (
    (("reproduce", "symlie"), "Did you mean symile?"),
    (("train", "quickstart", "data.root=/missing"), "data.root: /missing is not a folder."),
    (("train", "quickstart", "data.root=missing"), "/missing is not a folder."),
    (("train", "root.yaml"), "/missing is not a folder."),
    (("train", "quickstart", "data.root=/" + "z" * 5000), "is not a folder."),
    (("config", "z" * 5000), "there is no such config file or recipe."),
)
NO_PATHS = {
    ("objectives",), ("jobs", "list"), ("jobs", "status"), ("jobs", "logs"), ("jobs", "stop"),
    ("bench", "memory"), ("bench", "engine"), ("bench", "kernels"), ("bench", "objectives"),
    ("bench", "faults"),
}  # fmt: skip
"""Commands that read no path."""
CHILD = """
import contextlib, io, json, sys
from gigabatch.launcher.cli import app

def run(arguments):
    sys.argv = ["gigabatch", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app.main()
        except SystemExit as end:
            return [end.code or 0, out.getvalue(), err.getvalue()]

outcomes = [run(arguments) for arguments in json.loads(sys.argv[1])]
print(json.dumps({"outcomes": outcomes, "modules": list(sys.modules)}))
"""


def commands(group: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*prefix, name))
        else:
            yield (*prefix, name)


def run_all(lines: list[tuple[str, ...]], folder: Path) -> dict[str, Any]:
    """Run command lines in one process; return their outcomes and the modules it imported."""
    child = [sys.executable, "-c", CHILD, json.dumps(lines)]
    done = subprocess.run(child, capture_output=True, text=True, cwd=folder, timeout=120)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_every_command_has_a_missing_path_case_or_reads_no_path() -> None:
    assert set(commands(typer.main.get_command(app))) == MISSING_PATHS.keys() | NO_PATHS


def test_missing_paths_are_rejected_without_heavy_imports(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    lines = [(*command, *arguments) for command, arguments in MISSING_PATHS.items()]
    lines += MISSING_OPTION_PATHS
    result = run_all(lines, tmp_path)
    for line, (code, out, err) in zip(lines, result["outcomes"], strict=True):
        assert (code, out) == (2, ""), (line, err)
        assert "missing" in err
        assert "Traceback" not in err
    assert not set(HEAVY) & set(result["modules"])


def test_wrong_names_are_rejected_without_heavy_imports(tmp_path: Path) -> None:
    (tmp_path / "root.yaml").write_text("data: {root: missing}")
    result = run_all([line for line, _ in WRONG_NAMES], tmp_path)
    for (line, message), (code, out, err) in zip(WRONG_NAMES, result["outcomes"], strict=True):
        assert (code, out) == (2, ""), (line, err)
        assert message in err
        assert "Traceback" not in err
    assert not set(HEAVY) & set(result["modules"])


def test_help_of_every_command_needs_no_heavy_imports(tmp_path: Path) -> None:
    groups = [(), ("jobs",), ("data",), ("bench",)]
    # The help of `eval` imports the registered tasks, which import torch.
    names = [
        *groups,
        *(name for name in commands(typer.main.get_command(app)) if name != ("eval",)),
    ]
    lines = [*((*name, "-h") for name in names), ("train", "--help")]
    result = run_all(lines, tmp_path)
    for line, (code, out, _) in zip(lines, result["outcomes"], strict=True):
        assert code == 0, line
        assert out.startswith(f"Usage: gigabatch {' '.join(line[:-1])}".rstrip())
    assert not set(HEAVY) & set(result["modules"])


@pytest.mark.parametrize(
    "line",
    [
        ("--help",),
        ("--version",),
        *((*name, *arguments) for name, arguments in MISSING_PATHS.items()),
    ],
    ids=" ".join,
)
def test_answer_takes_little_cpu_time(line: tuple[str, ...], tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, *line], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == (0 if line[0].startswith("--") else 2)
    assert usage.ru_utime < CPU_SECONDS


def test_template_help_lists_every_registered_template(tmp_path: Path) -> None:
    result = run_all([("template", "--help")], tmp_path)
    ((code, out, _),) = result["outcomes"]
    assert code == 0
    rows = [line.split() for line in out.partition("Kinds:")[2].strip().splitlines()]
    assert [row[0] for row in rows] == list(all_templates())
    assert "requires --image and cluster.launcher=ray" in out
    assert not set(HEAVY) & set(result["modules"])


def test_version_option_prints_the_package_version(tmp_path: Path) -> None:
    ((code, out, _),) = run_all([("--version",)], tmp_path)["outcomes"]
    assert code == 0
    assert out.split()[0] == "gigabatch"
    assert out.split()[1][0].isdigit()


def test_no_command_prints_the_help_text(tmp_path: Path) -> None:
    ((code, _, err),) = run_all([()], tmp_path)["outcomes"]
    assert code == 2
    assert err.startswith("Usage: gigabatch")


def test_completion_script_completes_commands(tmp_path: Path) -> None:
    environment = os.environ | {
        "_GIGABATCH_COMPLETE": "complete_bash", "COMP_WORDS": "gigabatch res", "COMP_CWORD": "1",
    }  # fmt: skip
    start = "from gigabatch.launcher.__main__ import main; main()"
    script = f"import sys; sys.argv[0] = 'gigabatch'; {start}"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["resume"]
