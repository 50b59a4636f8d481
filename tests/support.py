"""Small shards, a small config, and commands started as users start them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import webdataset as wds
from PIL import Image

from gigabatch.data.shards.index import Index
from gigabatch.launcher.cli import app as cli
from gigabatch.trainer.monitoring.metrics import read_metrics

SIDE = 16
TINY = """
data:
  root: {root}
  workers: 1
  image: {{size: 16, channels: 3}}
  text: {{vocab_size: 300, length: 12}}
  augment: {{rotate: 10, zoom: 0.1, flip: 0.5, contrast: 0.3, hue: 20, noise: 0.05}}
batch: {{global_size: 32, micro_size: 8}}
towers:
  width: 16
  image: {{kind: conv, widths: [8, 8], depths: [1, 1], dropout: 0.1}}
  text: {{kind: conv, width: 16, dropout: 0.1}}
objective: {{positives: concept}}
train: {{steps: 12}}
optimizer: {{lr: 5.0e-4}}
checkpoint: {{every_steps: 3}}
monitor: {{every_steps: 1}}
eval: {{sets: [val]}}
cluster: {{launcher: inline, workers: 1, threads: 1}}
"""


def write_samples(
    folder: Path, count: int, per_shard: int, seed: int, *, flags: bool = False
) -> None:
    """Write samples of noisy colored images, each with a caption and one of 50 concepts.

    With `flags`, every second sample of a concept has `changed: true`, and the others `false`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for shard, first in enumerate(range(0, count, per_shard)):
        with wds.TarWriter(str(folder / f"{folder.name}-{shard:03d}.tar"), mtime=0) as writer:
            for number in range(first, min(first + per_shard, count)):
                concept = number % 50
                shade = np.random.default_rng(concept).integers(0, 255, 3)
                pixels = np.clip(shade + random.normal(0, 40, (SIDE, SIDE, 3)), 0, 255)
                png = BytesIO()
                Image.fromarray(pixels.astype(np.uint8)).save(png, "png")
                fields: dict[str, Any] = {"concept": concept, "colour": f"shade {concept}"}
                if flags:
                    fields["changed"] = bool(number // 50 % 2)
                writer.write(
                    {
                        "__key__": f"s{number:05d}",
                        "png": png.getvalue(),
                        "txt": unicodedata.name(chr(0x3B1 + concept), f"COLOUR {concept}").lower(),
                        "json": fields,
                    }
                )


def write_rich(folder: Path, count: int, seed: int) -> None:
    """Write samples in three languages with 0 to 4 captions, every fifth without an image."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for shard, first in enumerate(range(0, count, 40)):
        with wds.TarWriter(str(folder / f"{folder.name}-{shard:03d}.tar"), mtime=0) as writer:
            for number in range(first, min(first + 40, count)):
                lang = ("en", "de", "fr")[number % 3]
                names = [f"{lang} thing {number} {i}" for i in range(random.integers(0, 5))]
                fields = {"concept": number % 50, "lang": lang, "names": names}
                sample: dict[str, Any] = {"__key__": f"r{number:05d}", "json": fields}
                if number % 5:
                    pixels = random.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
                    png = BytesIO()
                    Image.fromarray(pixels).save(png, "png")
                    sample["png"] = png.getvalue()
                writer.write(sample)


def write_modalities(
    folder: Path, count: int, seed: int, *, images: bool = True, incomplete: bool = False
) -> None:
    """Write samples of twenty concepts in several modalities.

    Text, six numbers (npy), a path of one to five points (json), a tone (wav) and images. With
    `incomplete`, some samples have only some of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for shard, first in enumerate(range(0, count, 40)):
        with wds.TarWriter(str(folder / f"{folder.name}-{shard:03d}.tar"), mtime=0) as writer:
            for number in range(first, min(first + 40, count)):
                concept = number % 20
                concept_random = np.random.default_rng(concept)
                numbers = concept_random.normal(0, 1, 6)
                points = concept_random.normal(0, 1, (5, 2))
                png, wav = BytesIO(), BytesIO()
                shade = concept_random.integers(0, 256, 3) * np.ones((SIDE, SIDE, 1))
                Image.fromarray(shade.astype(np.uint8)).save(png, "png")
                tone = np.sin(np.arange(800) * (0.1 + 0.1 * concept)) * random.uniform(0.2, 0.9)
                soundfile.write(wav, tone[: random.integers(300, 800)], 8000, format="WAV")
                path = points[: random.integers(1, 6)].tolist()
                fields = {
                    "concept": concept,
                    "path": path,
                    "age": 20 + 3 * concept,
                    "old": bool(concept % 2),
                }
                sample: dict[str, Any] = {
                    "__key__": f"m{number:05d}", "json": fields, "wav": wav.getvalue(),
                    "npy": numbers + random.normal(0, 0.1, 6), "txt": f"this is thing {concept}",
                }  # fmt: skip
                if images:
                    sample["png"] = png.getvalue()
                for kind, every in {"npy": 4, "txt": 5, "wav": 6, "png": 7}.items():
                    if incomplete and number % every == 1:
                        sample.pop(kind, None)
                if incomplete and number % 3 == 2:
                    fields["path"] = None
                writer.write(sample)


def spoil(index: Index, sample: int, member: str = "png", at: int = 60) -> Path:
    """Flip a bit of a member; keep the file's size and modification time."""
    path = Path(index.shards[index.shard_of(sample)].name)
    before = path.stat()
    position = index.member_span(sample, member)[0] + at
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return path


def outcome(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """Run a command in this process; returns (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["gigabatch", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capsys.readouterr()
    code = end.value.code
    return (0 if code is None else int(code)), printed.out, printed.err


class Command:
    """A process of `gigabatch` or of another `command`."""

    def __init__(
        self,
        arguments: Sequence[str | Path],
        command: Sequence[str] = (sys.executable, "-m", "gigabatch.launcher"),
        **options: Any,
    ) -> None:
        self.process = subprocess.Popen(
            [*command, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            **options,
        )

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Wait for the process; on a timeout, kill it and its descendants, and fail."""
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            out, err = self.process.communicate()
            pytest.fail(f"took more than {timeout} s:\n{out}\n{err}")
        return subprocess.CompletedProcess(self.process.args, self.process.returncode, out, err)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """Send SIGKILL to the process and everything in its session."""
        os.killpg(self.process.pid, signal.SIGKILL)


def losses(run: Path) -> dict[int, float]:
    """Return step -> train/loss of the valid lines."""
    lines = read_metrics(run / "metrics.jsonl")
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def wait_for_step(run: Path, step: int, command: Command) -> None:
    """Wait until metrics.jsonl contains `step`."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and max(losses(run), default=0) >= step:
            return
        if command.process.poll() is not None:
            out, err = command.process.communicate()
            pytest.fail(f"ended before step {step}:\n{out}\n{err}")
        time.sleep(0.02)
    pytest.fail(f"did not reach step {step}")


def run_ranks(script: Path, world_size: int, *arguments: str | Path, timeout: float = 240) -> Any:
    """Run `script` on torchrun ranks; returns the last line of output as JSON."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={world_size}", str(script), *map(str, arguments),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])
