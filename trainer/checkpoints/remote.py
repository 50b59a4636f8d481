"""Copies of a run in `checkpoint.copy_to`: their layout, and which attempt may write them.

URL/NAME/environment.json   created once, when the run is created; claims the name
         config.yaml  tokenizer.json  data.digest  metrics.jsonl  eval/
         attempts/000001.json      the attempt with the highest number may write
         checkpoints/step-00001200/   manifest.json is written last
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
"""Files of a remote folder: path relative to the folder -> URL, size and version."""


class UploadSuperseded(GigabatchError):
    """A later attempt copies this run; this attempt must not write or remove copies."""


@dataclass(frozen=True)
class RemoteRun:
    """The copies of one run.

    Args:
        url: URL of the run's remote folder, without a trailing slash.
        retry: Attempts and waits of each request.
    """

    url: str
    retry: Retry = field(default_factory=Retry)

    def files(self, folder: str = "") -> Files:
        """Return all files below `folder`, by path relative to it; empty if it does not exist."""
        return access.find(f"{self.url}/{folder}".rstrip("/"), self.retry)

    def steps(self, files: Files | None = None) -> list[int]:
        """Return the steps of finished copies, in order. Does not verify checksums.

        Args:
            files: Result of `files()`; None lists them again.
        """
        matches = map(_MANIFEST.fullmatch, self.files() if files is None else files)
        return sorted(int(match[1]) for match in matches if match)

    def read(self, name: str) -> str | None:
        """Return the text of a file, or None if it does not exist."""
        return access.read_text(f"{self.url}/{name}", self.retry)

    def write(self, path: Path, name: str, new: bool = False) -> None:
        """Upload a local file.

        Args:
            path: Local file.
            name: Path in the remote folder.
            new: Create the file; fail if it exists.

        Raises:
            FileTaken: if `new` and the remote file exists.
            GigabatchError: if it cannot be written.
        """
        access.write(path, f"{self.url}/{name}", new, self.retry)

    def remove(self, name: str) -> None:
        """Remove a file."""
        access.remove(f"{self.url}/{name}", self.retry)

    def newest_attempt(self) -> int:
        """Return the number of the last registered attempt; 0 if there is none."""
        matches = map(_ATTEMPT.fullmatch, self.files("attempts"))
        return max((int(match[1]) for match in matches if match), default=0)

    def claim(self, run: RunFolder) -> None:
        """Reserve the remote folder for `run`.

        Raises:
            GigabatchError: if it belongs to a different run.
        """
        try:
            self.write(run.environment, "environment.json", new=True)
        except access.FileTaken:
            self.check_same_run(run)

    def check_same_run(self, run: RunFolder) -> None:
        """Check that the copies belong to `run`.

        Raises:
            GigabatchError: if they belong to a different run.
        """
        if self.read("environment.json") != run.environment.read_text():
            raise GigabatchError(
                f"checkpoint.copy_to: {self.url} belongs to a different run than {run.path} (their "
                "environment.json differ). Set a different checkpoint.copy_to or run.name."
            )

    def register_attempt(self, run: RunFolder, attempt: int) -> None:
        """Register an attempt, and upload the files that a run needs in addition to checkpoints.

        Args:
            run: Local run folder.
            attempt: Number of the attempt.

        Raises:
            UploadSuperseded: if a different start has registered this number, or a higher number is
                registered.
        """
        name = f"attempts/{attempt:06d}.json"
        try:
            self.write(run.attempt_file(attempt), name, new=True)
        except access.FileTaken:
            # The file is this attempt's own if an earlier try wrote it and its response was lost.
            if self.read(name) != run.attempt_file(attempt).read_text():
                raise self._superseded(attempt) from None
        self.check_not_superseded(run, attempt)
        for path in (run.path / "config.yaml", run.tokenizer, run.path / "data.digest"):
            self.write(path, path.name)

    def check_not_superseded(self, run: RunFolder, attempt: int) -> None:
        """Check that this attempt may write the copies.

        Raises:
            UploadSuperseded: if a later attempt owns the run folder or its copies.
        """
        if not run.owned_by(attempt) or self.newest_attempt() > attempt:
            raise self._superseded(attempt)

    def _superseded(self, attempt: int) -> UploadSuperseded:
        return UploadSuperseded(
            f"{self.url}: a later start of this run copies its checkpoints; attempt {attempt} "
            "stops copying. If the later start is a mistake, stop it, then resume this run."
        )


def remote_run(settings: CheckpointSettings, name: str, retry: Retry = Retry()) -> RemoteRun | None:
    """Return the copies of the run `name`, which need not exist; None without `copy_to`."""
    if settings.copy_to is None:
        return None
    return RemoteRun(f"{writable_folder(settings.copy_to)}/{name}", retry)
