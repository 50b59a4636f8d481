"""Fixtures and settings of all tests: offline, deterministic, no writes to the home folder."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.internal.conjecture import providers
from support import TINY, Command, write_samples

# huggingface_hub reads this when it is imported, which the imports above do not do.
os.environ["HF_HUB_OFFLINE"] = "1"

if not torch.cuda.is_available():  # triton reads this when it is imported, to run on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell lets background jobs ignore Ctrl-C, which all processes below would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Hypothesis tries the same examples in every run and writes no files to the repository. By default,
# it also reads constants from every imported module of this package, which takes seconds per worker
# and changes the examples after every edit.
providers._get_local_constants = lambda: providers._local_constants
settings.register_profile("gigabatch", derandomize=True, database=None, deadline=None)
settings.load_profile("gigabatch")
HYPOTHESIS_HOME = tempfile.TemporaryDirectory(prefix="hypothesis-")
set_hypothesis_home_dir(HYPOTHESIS_HOME.name)


# Files with tests that take minutes; they start first, so that none runs alone at the end.
LONG = ("test_hosts", "test_jobs", "test_compile", "test_resume", "test_faults", "test_memory",
        "test_runs", "test_step")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort long tests first, in the same order on every worker."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


ALLOWED_SKIPS = ("needs root", "needs a GPU")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the test run if a test was skipped for a reason that is not in ALLOWED_SKIPS."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    reasons = [str(report.longrepr) for report in skipped]
    if any(not any(allowed in reason for allowed in ALLOWED_SKIPS) for reason in reasons):
        reporter.write_line("\nskipped for a reason that is not allowed", red=True)
        session.exitstatus = 1


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sets `train` (200 samples in 4 shards) and `val` (60 samples in 1)."""
    root = tmp_path_factory.mktemp("shards")
    write_samples(root / "train", 200, 50, seed=1)
    write_samples(root / "val", 60, 60, seed=2)
    return root


@pytest.fixture
def tiny(shards: Path, tmp_path: Path) -> Path:
    """The config file of a run that takes a second or two."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(root=shards) + f"run: {{dir: {tmp_path / 'runs'}}}\n")
    return path


@pytest.fixture(autouse=True)
def temporary_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Keep tests and their processes from writing to the user's home and cache."""
    home = tmp_path_factory.getbasetemp() / "home"
    home.mkdir(exist_ok=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("GIGABATCH_CACHE", str(home / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Processes of a test import `support_towers`.
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


@pytest.fixture
def start() -> Iterator[Any]:
    """Start commands; kill those that still run at the end of the test."""
    started: list[Command] = []

    def run(*arguments: str | Path, **options: Any) -> Command:
        started.append(Command(arguments, **options))
        return started[-1]

    yield run
    for command in started:
        if command.process.poll() is None:
            command.kill()
            command.process.communicate()


@pytest.fixture
def gigabatch(start: Any) -> Any:
    """Run a command until it ends."""

    def run(*arguments: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return start(*arguments).wait(timeout)

    return run
