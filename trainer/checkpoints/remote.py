"""A run's folder elsewhere: what `checkpoint.copy_to` holds of a run, and who may write there.

URL/NAME/environment.json   written once, by whoever began the run: it claims the name
         config.yaml  tokenizer.json  data.digest  metrics.jsonl  eval/
         attempts/000001.json      the highest number owns the folder
         checkpoints/step-00001200/   the manifest comes last: without it, it is no checkpoint
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote import access
from gigabatch.data.remote.access import Retry, ShardState
from gigabatch.data.remote.locations import writable_folder
from gigabatch.trainer.config import CheckpointSettings
from gigabatch.trainer.run.folder import RunFolder

_MANIFEST = re.compile(r"checkpoints/step-(\d{8})/manifest\.json")
_ATTEMPT = re.compile(r"(\d{6})\.json")
Files = dict[str, ShardState]
"""What lies in a folder elsewhere, by its path from there."""


class Overtaken(GigabatchError):
    """A later attempt has taken the run over: this one must write no more."""


@dataclass(frozen=True)
class RemoteRun:
    """What lies at `url`; each request is tried as `retry` says."""

    url: str
    retry: Retry = field(default_factory=Retry)

    def files(self, folder: str = "") -> Files:
        return access.find(f"{self.url}/{folder}".rstrip("/"), self.retry)

    def steps(self, files: Files | None = None) -> list[int]:
        """Steps whose copy is complete, oldest first; whether they are sound is not asked."""
        found = map(_MANIFEST.fullmatch, self.files() if files is None else files)
        return sorted(int(match[1]) for match in found if match)

    def read(self, name: str) -> str | None:
        return access.read_text(f"{self.url}/{name}", self.retry)

    def write(self, path: Path, name: str, new: bool = False) -> None:
        access.write(path, f"{self.url}/{name}", new, self.retry)

    def remove(self, name: str) -> None:
        access.remove(f"{self.url}/{name}", self.retry)

    def newest_attempt(self) -> int:
        """The highest that has begun to copy; 0 where none has."""
        found = map(_ATTEMPT.fullmatch, self.files("attempts"))
        return max((int(match[1]) for match in found if match), default=0)

    def claim(self, run: RunFolder) -> None:
        """Make the folder this run's. Raises GigabatchError where it is another's."""
        try:
            self.write(run.environment, "environment.json", new=True)
        except access.FileTaken:
            self.refuse_other(run)

    def refuse_other(self, run: RunFolder) -> None:
        """Raises GigabatchError where the copies are of another run than `run`."""
        if self.read("environment.json") != run.environment.read_text():
            raise GigabatchError(
                f"checkpoint.copy_to: {self.url} holds another run than {run.path} (their "
                "environment.json differ). Copy elsewhere, or choose another run.name."
            )

    def begin(self, run: RunFolder, attempt: int) -> None:
        """Register an attempt, and bring what a run needs beside checkpoints up to date.

        Raises Overtaken where another start of the run had the number, or a higher one.
        """
        name = f"attempts/{attempt:06d}.json"
        try:
            self.write(run.attempt_file(attempt), name, new=True)
        except access.FileTaken:  # by this attempt, if an answer was lost
            if self.read(name) != run.attempt_file(attempt).read_text():
                raise self._overtaken(attempt) from None
        self.refuse_overtaken(run, attempt)
        for path in (run.path / "config.yaml", run.tokenizer, run.path / "data.digest"):
            self.write(path, path.name)

    def refuse_overtaken(self, run: RunFolder, attempt: int) -> None:
        """Raises Overtaken, here or there."""
        if not run.owned_by(attempt) or self.newest_attempt() > attempt:
            raise self._overtaken(attempt)

    def _overtaken(self, attempt: int) -> Overtaken:
        return Overtaken(
            f"{self.url}: a later start of this run copies there now; attempt {attempt} writes "
            "there no more. If that other one is not meant to run, stop it, then resume this."
        )


def remote_run(settings: CheckpointSettings, name: str, retry: Retry = Retry()) -> RemoteRun | None:
    """Where the checkpoints of the run `name` are copied to, if anywhere."""
    if settings.copy_to is None:
        return None
    return RemoteRun(f"{writable_folder(settings.copy_to)}/{name}", retry)
