"""Submission of runs as jobs to a Ray cluster, with this code, user modules and the config.

A job's driver is `gigabatch train` or `gigabatch resume`. The cluster starts it on its head node,
in a folder that contains the config. It trains with workers of the same cluster; see `workers`.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.cluster.connection import translate_errors
from gigabatch.launcher.cluster.job_status import STOP_S, STOP_WAIT
from gigabatch.launcher.cluster.user_code import check_user_code
from gigabatch.launcher.cluster.wheel import build_wheel, wheel_version
from gigabatch.launcher.start import resumed_config
from gigabatch.trainer.config import Config
from gigabatch.trainer.config.load import dump_config, parse_config, read_config, resolve
from gigabatch.trainer.run.folder import RunFolder

NOT_SENT = shutil.ignore_patterns("__pycache__", ".git", ".env", ".env.*", ".netrc", "*.pem")
"""Files of a `--with` folder that are not sent, because they are not code or may be secret."""


@dataclass(frozen=True)
class Job:
    """A job to submit.

    Attributes:
        arguments: Arguments of `gigabatch`.
        files: Text of each file in the job's working folder, by name.
        modules: Files and folders of user modules.
        label: Name in a list of jobs.
        stop_s: Seconds between a stop request and SIGKILL.
    """

    arguments: tuple[str, ...]
    files: dict[str, str]
    modules: tuple[Path, ...]
    label: str
    stop_s: int = STOP_S

    @property
    def entrypoint(self) -> str:
        """Shell command of the job; `exec` replaces the shell, so that a stop signal reaches it."""
        return "exec " + shlex.join(["python", "-m", "gigabatch.launcher", *self.arguments])


def train_job(path: Path, overrides: Sequence[str], modules: Sequence[Path]) -> Job:
    """Create the job of a new run.

    Args:
        path: Config file.
        overrides: Config settings as `key=value`.
        modules: Files and folders of user modules to send.

    Raises:
        GigabatchError: if the config is invalid, or a user module it names is missing.
    """
    config = resolve_for_cluster(parse_config(read_config(path), str(path), overrides))
    check_user_code(config, modules)
    # `train` names the run after the file; replace characters special to shells or Ray.
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", path.stem).lstrip(".-") or "run"
    name = f"{stem}.yaml"
    files = {name: dump_config(config)}
    label, stop_s = config.run.name or stem, _stop_s(config)
    return Job(("train", name), files, _absolute(modules), label, stop_s)


def resume_job(
    run: str, overrides: Sequence[str], allow: Sequence[str], modules: Sequence[Path]
) -> Job:
    """Create the job that resumes a run.

    Args:
        run: Absolute path of the run's folder on the cluster.
        overrides: Config settings as `key=value`.
        allow: Keys whose change is accepted.
        modules: Files and folders of user modules to send.

    Raises:
        GigabatchError: if the path is not absolute, the settings are invalid, or a user module
            is missing.
    """
    if not run.startswith("/"):
        raise GigabatchError(
            f"--resume {run}: the path is not absolute. Specify the run's absolute path on the "
            "cluster's nodes; the job's log starts with it."
        )
    folder = RunFolder(Path(run))
    if (folder.path / "config.yaml").exists():  # This machine shares the cluster's folder.
        config = resumed_config(folder, overrides, allow)
    else:
        config = parse_config("", "the command line", overrides)
    check_user_code(config, modules)
    allows = [f"--allow={key}" for key in allow]
    arguments = ("resume", run, *overrides, *allows)
    return Job(arguments, {}, _absolute(modules), Path(run).name, _stop_s(config))


def _stop_s(config: Config) -> int:
    """Compute a job's `stop_s`: the run's grace period plus 30 s for its processes to end."""
    return math.ceil(config.cluster.grace_s) + 30


def resolve_for_cluster(config: Config) -> Config:
    """Resolve a config except for `cluster.threads`, which depends on the cluster's cores."""
    threads = config.cluster.threads
    resolved = resolve(config)
    cluster = resolved.cluster.model_copy(update={"threads": threads})
    return resolved.model_copy(update={"cluster": cluster})


def _absolute(modules: Sequence[Path]) -> tuple[Path, ...]:
    return tuple(path.absolute() for path in modules)


def submit(client: Any, job: Job) -> str:
    """Send a job together with the installed code.

    Returns:
        Id of the job.

    Raises:
        GigabatchError: if the cluster does not accept the job.
    """
    with tempfile.TemporaryDirectory(prefix="gigabatch-") as name:
        folder = _working_folder(job, Path(name) / "work")
        wheel = build_wheel(Path(name))
        runtime_env = {
            "working_dir": str(folder),
            "py_modules": [str(wheel)],
            "env_vars": {"PYTHONUNBUFFERED": "1", STOP_WAIT: str(job.stop_s)},
        }
        metadata = {"gigabatch": wheel_version(), "run": job.label}
        with translate_errors("the cluster did not accept the job"), _ignore_gitignore():
            return client.submit_job(
                entrypoint=job.entrypoint, runtime_env=runtime_env, metadata=metadata
            )


def _working_folder(job: Job, folder: Path) -> Path:
    """Write the folder in which the job's processes start; it is on their Python path."""
    folder.mkdir()
    (folder / "SUBMITTED").write_text(f"{job.label}\n")  # Ray rejects an empty folder.
    for file, text in job.files.items():
        (folder / file).write_text(text, encoding="utf-8")
    for path in job.modules:
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=NOT_SENT)
        else:
            shutil.copy(path, folder)
    return folder


@contextmanager
def _ignore_gitignore() -> Iterator[None]:
    """Make Ray send files that a .gitignore lists: user modules may be ignored by git."""
    name = "RAY_RUNTIME_ENV_IGNORE_GITIGNORE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})
