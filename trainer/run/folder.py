"""The run folder: everything that a run writes and needs to resume.

config.yaml  environment.json  tokenizer.json  data.digest  train.log
metrics.jsonl  quarantine.jsonl  samples.jsonl
attempts/     one file per start of the workers; only the highest number may write the folder
checkpoints/  step-00001200/, LATEST
tb/           TensorBoard events
eval/         step-00001200.json; from `gigabatch eval`, SET-TASK-[SETTINGS-]step-00001200.json
heartbeats/   the progress of each rank while workers run; hangs/ keeps stacks of hung ranks
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.config import Config
from gigabatch.trainer.config.load import dump_config, parse_run_config, read_config
from gigabatch.trainer.run.files import create_numbered, to_json, write_atomically
from gigabatch.trainer.run.provenance import changes, provenance

log = logging.getLogger(__name__)


class Superseded(GigabatchError):
    """A later attempt trains the run; this attempt's errors must not be recorded in the folder."""


@dataclass(frozen=True)
class RunFolder:
    """Paths, records and requests of one run."""

    path: Path

    @property
    def environment(self) -> Path:
        """File that records how and when the run was created; tells runs of the same name apart."""
        return self.path / "environment.json"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def quarantine(self) -> Path:
        return self.path / "quarantine.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "train.log"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tb"

    def config(self) -> Config:
        """Read the run's config."""
        path = self.path / "config.yaml"
        return parse_run_config(read_config(path), str(path))

    def write_config(self, config: Config) -> None:
        """Write the run's config."""
        write_atomically(self.path / "config.yaml", dump_config(config))

    def write_data_digest(self, digest: str) -> None:
        """Write the fingerprint of the shards that the run trains on."""
        write_atomically(self.path / "data.digest", digest + "\n")

    def data_digest(self) -> str | None:
        """Return the fingerprint of the shards, or None before it is written."""
        text = _read_if_exists(self.path / "data.digest")
        return text.strip() if text else None

    def write_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of a step that was evaluated while training."""
        folder = self.path / "eval"
        folder.mkdir(exist_ok=True)
        write_atomically(folder / f"step-{step:08d}.json", to_json(metrics))

    def evaluation(self, step: int) -> dict[str, float]:
        """Return a step's metrics by tag; empty if it was not evaluated."""
        text = _read_if_exists(self.path / "eval" / f"step-{step:08d}.json")
        metrics: dict[str, float] = {} if text is None else json.loads(text)
        return metrics

    def evaluated(self, step: int) -> bool:
        """Return whether a step was evaluated while training."""
        return (self.path / "eval" / f"step-{step:08d}.json").exists()

    def steps_evaluated(self) -> list[int]:
        """Return the steps that were evaluated while training, in order."""
        return sorted(step for path, step in self._evaluations() if path.stem.startswith("step-"))

    def write_measurement(self, name: str, step: int, metrics: dict[str, Any]) -> Path:
        """Write the results of `gigabatch eval` to eval/NAME-step-00001200.json."""
        path = self.measurement(name, step)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, to_json(metrics))
        return path

    def measurement(self, name: str, step: int) -> Path:
        """Return the file of `write_measurement`.

        Args:
            name: Set, task, and the task's settings if any.
            step: Step of the checkpoint.
        """
        safe = re.sub(r"[^\w.=-]+", "_", name) or "set"
        if len(safe) > 150:  # file names may have 255 bytes
            safe = f"{safe[:133]}-{sha256(name.encode()).hexdigest()[:16]}"
        # A set named `step` gets a prefix, because evaluations while training start with `step`.
        return self.path / "eval" / f"{'set_' * safe.startswith('step')}{safe}-step-{step:08d}.json"

    def remove_evaluations_after(self, step: int) -> None:
        """Remove the evaluations of later steps, which will be trained again."""
        for path, evaluated_step in self._evaluations():
            if evaluated_step > step:
                path.unlink()

    def _evaluations(self) -> Iterator[tuple[Path, int]]:
        for path in sorted((self.path / "eval").glob("*.json")):
            if match := re.search(r"(?:^|-)step-(\d{8})$", path.stem):
                yield path, int(match[1])

    def steps_saved(self) -> list[int]:
        """Return the steps with a checkpoint folder, in order, without verifying them."""
        names = (p.name for p in self.checkpoints.glob("step-*") if p.is_dir())
        matches = (re.fullmatch(r"step-(\d{8})", name) for name in names)
        return sorted(int(match[1]) for match in matches if match)

    def is_finished(self) -> bool:
        """Return whether the last step is saved and evaluated."""
        config = self.config()
        steps = self.steps_saved()
        last = config.train.steps
        return bool(steps) and steps[-1] >= last and (self.evaluated(last) or not config.eval.sets)

    def take_attempt(self, **details: Any) -> int:
        """Record a start of the workers; return its number, which is higher than all before.

        The file is created exclusively, so no two starts get the same number.

        Args:
            details: Further fields of the record.
        """
        for name in ("crash.txt", "stopped"):
            (self.path / name).unlink(missing_ok=True)
        record = {
            "time": time.time(),
            "host": platform.node(),
            "saved": (self.steps_saved() or [0])[-1],
            **details,
            **provenance(),
            "config": dump_config(self.config()),
        }
        text = to_json(record)
        number = create_numbered(self.path / "attempts", "{:06d}.json".format, text)
        self._warn_of_changes(number)
        return number

    def _warn_of_changes(self, number: int) -> None:
        """Warn if this attempt's code differs from that of the last attempt that recorded it."""
        for earlier in range(number - 1, 0, -1):
            if "code" in (old := self.attempt(earlier)):
                if differences := changes(old, self.attempt(number)):
                    log.warning(
                        "attempt %d runs different code from attempt %d: %s. From this step on, "
                        "losses may differ in the last bits from an uninterrupted run.",
                        number, earlier, ", ".join(differences),
                    )  # fmt: skip
                return

    def attempt(self, number: int) -> dict[str, Any]:
        """Return an attempt's record; empty if a kill left it incomplete."""
        text = _read_if_exists(self.path / "attempts" / f"{number:06d}.json")
        try:
            record: dict[str, Any] = json.loads(text or "{}")
        except ValueError:
            return {}
        return record

    def attempts(self) -> int:
        """Return the number of the last attempt; 0 before the first."""
        return max((int(p.stem) for p in (self.path / "attempts").glob("*.json")), default=0)

    def attempt_file(self, number: int) -> Path:
        """Return the file of an attempt's record."""
        return self.path / "attempts" / f"{number:06d}.json"

    def reserve_attempts(self, newest: int, where: str) -> None:
        """Make the next attempt's number higher than `newest`.

        Args:
            newest: Number of the last attempt in a remote copy of the run.
            where: URL of that copy.
        """
        self.attempt_file(newest).parent.mkdir(exist_ok=True)
        for number in range(1, newest + 1):
            _write_if_new(self.attempt_file(number), to_json({"known": where}))

    def owned_by(self, attempt: int) -> bool:
        """Return whether no later attempt has started; otherwise this attempt must not write."""
        return not self.attempt_file(attempt + 1).exists()

    @contextmanager
    def fenced(self, attempt: int) -> Iterator[None]:
        """Convert errors in the block to `Superseded` if a later attempt has started meanwhile."""
        try:
            yield
        except Exception as error:
            if self.owned_by(attempt):
                raise
            raise Superseded(
                f"{self.path}: attempt {attempt} was superseded: a later attempt trains this run."
            ) from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run while its workers train.

        A POSIX lock ends with its process, however the process ends, and children do not inherit
        it. On a file system without locks, a later attempt still keeps earlier ones from writing.

        Raises:
            GigabatchError: if another process holds the lock.
        """
        with open(self.path / "lock", "a+", encoding="utf-8") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                file.seek(0)
                raise GigabatchError(
                    f"{self.path}: this run is being trained (by {file.read().strip()}). Stop it "
                    f"or wait until it ends. If that machine no longer exists, delete {file.name}."
                ) from None
            except OSError as error:
                log.warning("%s cannot be locked (%s)", self.path, error)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            file.flush()
            yield

    # Requests and failures are files, because the launcher and the workers share only this folder:
    # under Ray nothing else reaches a worker during a step.

    def request_stop(self) -> None:
        """Request a stop after the step in progress."""
        (self.path / "stop").touch()

    def stop_requested(self) -> bool:
        """Return whether a stop was requested."""
        return (self.path / "stop").exists()

    def record_stop(self) -> None:
        """Record that the workers stopped as requested, with a checkpoint."""
        (self.path / "stopped").touch()

    def stopped(self) -> bool:
        """Return whether the workers stopped as requested."""
        return (self.path / "stopped").exists()

    def is_over(self) -> bool:
        """Return whether the workers are done: finished, stopped, or failed with a user error."""
        return self.failure() is not None or self.stopped() or self.is_finished()

    def request_save(self) -> None:
        """Request a checkpoint after the step in progress."""
        (self.path / "save").touch()

    def take_save_request(self) -> bool:
        """Return whether a checkpoint was requested since the last call."""
        try:
            (self.path / "save").unlink()
        except FileNotFoundError:
            return False
        return True

    def record_failure(self, message: str) -> None:
        """Record an error that only the user can fix, unless one is recorded already."""
        _write_if_new(self.path / "failure.txt", message)

    def failure(self) -> str | None:
        """Return the recorded error, or None."""
        text = _read_if_exists(self.path / "failure.txt")
        # On a full disk the file is created but stays empty.
        return f"{self.log} may show what went wrong; is its disk full?" if text == "" else text

    def record_crash(self, traceback: str) -> None:
        """Record an attempt's first traceback; it is the cause of the other ranks' errors."""
        _write_if_new(self.path / "crash.txt", traceback)

    def crash(self) -> str | None:
        """Return the recorded traceback, or None."""
        return _read_if_exists(self.path / "crash.txt")

    def clear_requests(self) -> None:
        """Remove requests and failures of earlier starts."""
        for name in ("stop", "stopped", "save", "failure.txt", "crash.txt"):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / ".ray", ignore_errors=True)  # Ray's files after a kill.


def _write_if_new(path: Path, text: str) -> None:
    with suppress(FileExistsError), open(path, "x", encoding="utf-8") as file:
        file.write(text)


def _read_if_exists(path: Path) -> str | None:
    return path.read_text() if path.exists() else None
