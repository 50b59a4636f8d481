"""The run folder: everything a run leaves, and everything it needs to go on.

config.yaml  environment.json  tokenizer.json  data.digest  train.log
metrics.jsonl  quarantine.jsonl  samples.jsonl
attempts/     one file for each start of the workers; the highest number owns the folder
checkpoints/  step-00001200/, LATEST
tb/           TensorBoard events
eval/         step-00001200.json; of `gigabatch eval`, SET-TASK-[SETTINGS-]step-00001200.json
heartbeats/   where each rank is, while workers run; hangs/ keeps their stacks where they hung
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
from gigabatch.trainer.config.load import dump_config, parse_config, read_config
from gigabatch.trainer.run.files import create_numbered, to_json, write_atomically
from gigabatch.trainer.run.provenance import changes, provenance

log = logging.getLogger(__name__)


class Superseded(GigabatchError):
    """A later attempt trains the run: whatever this one has met is nobody's concern any more, and
    must leave no word in the run folder."""


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def environment(self) -> Path:
        """What the run was begun with and when: it tells runs of one name apart."""
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
        path = self.path / "config.yaml"
        return parse_config(read_config(path), str(path))

    def write_config(self, config: Config) -> None:
        write_atomically(self.path / "config.yaml", dump_config(config))

    def write_data_digest(self, digest: str) -> None:
        """The fingerprint of the shards that the run is trained on."""
        write_atomically(self.path / "data.digest", digest + "\n")

    def data_digest(self) -> str | None:
        found = _read_if_there(self.path / "data.digest")
        return found.strip() if found else None

    def write_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        folder = self.path / "eval"
        folder.mkdir(exist_ok=True)
        write_atomically(folder / f"step-{step:08d}.json", to_json(metrics))

    def evaluation(self, step: int) -> dict[str, float]:
        """The metrics of a step, by tag; empty where it was not evaluated."""
        text = _read_if_there(self.path / "eval" / f"step-{step:08d}.json")
        return {} if text is None else json.loads(text)

    def evaluated(self, step: int) -> bool:
        return (self.path / "eval" / f"step-{step:08d}.json").exists()

    def steps_evaluated(self) -> list[int]:
        """Steps that were evaluated while training, oldest first."""
        return sorted(step for path, step in self._evaluations() if path.stem.startswith("step-"))

    def write_measurement(self, name: str, step: int, metrics: dict[str, Any]) -> Path:
        """What `gigabatch eval` found: eval/NAME-step-00001200.json."""
        path = self.measurement(name, step)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, to_json(metrics))
        return path

    def measurement(self, name: str, step: int) -> Path:
        """Where it is kept. `name`: the set, the task, and its settings where it was given any."""
        safe = re.sub(r"[^\w.=-]+", "_", name) or "set"
        if len(safe) > 150:  # file names may have 255 bytes
            safe = f"{safe[:133]}-{sha256(name.encode()).hexdigest()[:16]}"
        # Its own name for a set that is called `step`: those of training begin so.
        return self.path / "eval" / f"{'set_' * safe.startswith('step')}{safe}-step-{step:08d}.json"

    def forget_evaluations_after(self, step: int) -> None:
        """Those of steps that are about to be trained again."""
        for path, of in self._evaluations():
            if of > step:
                path.unlink()

    def _evaluations(self) -> Iterator[tuple[Path, int]]:
        for path in sorted((self.path / "eval").glob("*.json")):
            if match := re.search(r"(?:^|-)step-(\d{8})$", path.stem):
                yield path, int(match[1])

    def steps_saved(self) -> list[int]:
        """Steps with a checkpoint folder, oldest first; whether they are sound is not asked."""
        names = (p.name for p in self.checkpoints.glob("step-*") if p.is_dir())
        found = (re.fullmatch(r"step-(\d{8})", name) for name in names)
        return sorted(int(match[1]) for match in found if match)

    def is_finished(self) -> bool:
        config = self.config()
        steps = self.steps_saved()
        last = config.train.steps
        return bool(steps) and steps[-1] >= last and (self.evaluated(last) or not config.eval.sets)

    def take_attempt(self, **about: Any) -> int:
        """A number for this start of the workers, higher than all before. An exclusive create;
        `about` is recorded with it."""
        for name in ("crash.txt", "stopped"):
            (self.path / name).unlink(missing_ok=True)
        made = {
            "time": time.time(),
            "host": platform.node(),
            "saved": (self.steps_saved() or [0])[-1],
            **about,
            **provenance(),
            "config": dump_config(self.config()),
        }
        text = to_json(made)
        number = create_numbered(self.path / "attempts", "{:06d}.json".format, text)
        self._tell_changes(number)
        return number

    def _tell_changes(self, number: int) -> None:
        """Warn where this attempt runs other code than the last one that told its own."""
        for earlier in range(number - 1, 0, -1):
            if "code" in (old := self.attempt(earlier)):
                if found := changes(old, self.attempt(number)):
                    log.warning(
                        "attempt %d runs other code than attempt %d: %s. From here on losses need "
                        "not equal an undisturbed run's to the last bit.",
                        number, earlier, ", ".join(found),
                    )  # fmt: skip
                return

    def attempt(self, number: int) -> dict[str, Any]:
        """What an attempt left of itself; nothing where a kill cut that off."""
        text = _read_if_there(self.path / "attempts" / f"{number:06d}.json")
        try:
            return json.loads(text or "{}")
        except ValueError:
            return {}

    def attempts(self) -> int:
        """The number of the last attempt; 0 before the first."""
        return max((int(p.stem) for p in (self.path / "attempts").glob("*.json")), default=0)

    def attempt_file(self, number: int) -> Path:
        return self.path / "attempts" / f"{number:06d}.json"

    def reserve_attempts(self, newest: int, where: str) -> None:
        """Let the next attempt's number be higher than `newest`, the last that is known `where`."""
        self.attempt_file(newest).parent.mkdir(exist_ok=True)
        for number in range(1, newest + 1):
            _write_first(self.attempt_file(number), to_json({"known": where}))

    def owned_by(self, attempt: int) -> bool:
        """Whether no later attempt has started: a cut-off worker must not write any more."""
        return not self.attempt_file(attempt + 1).exists()

    @contextmanager
    def fenced(self, attempt: int) -> Iterator[None]:
        """What goes wrong inside is `Superseded` where a later attempt has started meanwhile."""
        try:
            yield
        except Exception as error:
            if self.owned_by(attempt):
                raise
            raise Superseded(
                f"{self.path}: attempt {attempt} was cut off, and a later one trains this run."
            ) from error

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the run while its workers train. Raises GigabatchError where another process does.

        A POSIX lock: it ends with the process, however that ends, and children do not inherit it.
        (Where a file system has no locks, attempts still fence each other off.)
        """
        with open(self.path / "lock", "a+", encoding="utf-8") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                file.seek(0)
                raise GigabatchError(
                    f"{self.path}: this run is being trained now (by {file.read().strip()}). Stop "
                    f"that first, or wait for its end; if its machine is gone, remove {file.name}."
                ) from None
            except OSError as error:
                log.warning("%s cannot be locked (%s)", self.path, error)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            file.flush()
            yield

    # Requests and failures travel as files: workers and their starter share this folder, and
    # under Ray nothing else reaches a worker that is inside a step.

    def request_stop(self) -> None:
        (self.path / "stop").touch()

    def stop_requested(self) -> bool:
        return (self.path / "stop").exists()

    def record_stop(self) -> None:
        """The workers have stopped as asked, with a checkpoint."""
        (self.path / "stopped").touch()

    def stopped(self) -> bool:
        return (self.path / "stopped").exists()

    def is_over(self) -> bool:
        """Whether nothing is left for workers to do: finished, stopped as asked, or refused."""
        return self.failure() is not None or self.stopped() or self.is_finished()

    def request_save(self) -> None:
        """Ask for a checkpoint after the step in progress."""
        (self.path / "save").touch()

    def take_save_request(self) -> bool:
        """Whether a checkpoint was asked for since this was last called."""
        try:
            (self.path / "save").unlink()
        except FileNotFoundError:
            return False
        return True

    def record_failure(self, message: str) -> None:
        """Keep the first fault that only the user can put right: restarting would not help."""
        _write_first(self.path / "failure.txt", message)

    def failure(self) -> str | None:
        found = _read_if_there(self.path / "failure.txt")
        # A full disk makes the file and takes no word of it.
        return f"{self.log} may say what went wrong; is its disk full?" if found == "" else found

    def record_crash(self, traceback: str) -> None:
        """Keep the first traceback of an attempt: those of other ranks follow from it."""
        _write_first(self.path / "crash.txt", traceback)

    def crash(self) -> str | None:
        return _read_if_there(self.path / "crash.txt")

    def clear_requests(self) -> None:
        for name in ("stop", "stopped", "save", "failure.txt", "crash.txt"):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / ".ray", ignore_errors=True)  # Ray's own, of a killed start


def _write_first(path: Path, text: str) -> None:
    with suppress(FileExistsError), open(path, "x", encoding="utf-8") as file:
        file.write(text)


def _read_if_there(path: Path) -> str | None:
    return path.read_text() if path.exists() else None
