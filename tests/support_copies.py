"""Small run folders, checkpoints and copies of checkpoints, written without training."""

from __future__ import annotations

from pathlib import Path

import torch

from gigabatch.trainer.checkpoints.format import write_checkpoint
from gigabatch.trainer.checkpoints.remote import RemoteRun
from gigabatch.trainer.checkpoints.upload import copy_checkpoint
from gigabatch.trainer.config import CheckpointSettings
from gigabatch.trainer.run.folder import RunFolder

KEEP_NINE = CheckpointSettings(keep=9)


def make_run(folder: Path, started: int = 1, attempts: int = 1) -> RunFolder:
    (folder / "attempts").mkdir(parents=True)
    run = RunFolder(folder)
    for number in range(1, attempts + 1):
        run.attempt_file(number).write_text(f"{folder}, attempt {number}")
    run.environment.write_text(f"started: {started}")
    for name in ("config.yaml", "tokenizer.json", "data.digest"):
        (folder / name).write_text(f"{name} of {started}")
    return run


def save(
    run: RunFolder, step: int, attempt: int = 1, settings: CheckpointSettings = KEEP_NINE,
    busy: frozenset[int] = frozenset(),
) -> None:  # fmt: skip
    towers = {"w": torch.full((100,), float(step))}
    files = {"towers": towers, "moments": towers}
    write_checkpoint(run, attempt, step, files, {"step": step, "by": attempt}, settings, busy)


def copy(remote: RemoteRun, run: RunFolder, step: int, attempt: int = 1) -> bool:
    save(run, step, attempt)
    remote.register_attempt(run, attempt)
    return copy_checkpoint(remote, run, step, attempt)
