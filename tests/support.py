"""Small real shards, a small config, and ways to start the product as its users do."""

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


def write_samples(folder: Path, count: int, per_shard: int, seed: int) -> None:
    """`count` samples of noisy coloured images, each with a caption and a concept (of 50)."""
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
                writer.write(
                    {
                        "__key__": f"s{number:05d}",
                        "png": png.getvalue(),
                        "txt": unicodedata.name(chr(0x3B1 + concept), f"COLOUR {concept}").lower(),
                        "json": {"concept": concept, "colour": f"shade {concept}"},
                    }
                )


def write_rich(folder: Path, count: int, seed: int) -> None:
    """Samples in three languages with none to four captions each, every fifth without an image."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for shard, first in enumerate(range(0, count, 40)):
        with wds.TarWriter(str(folder / f"{folder.name}-{shard:03d}.tar"), mtime=0) as writer:
            for number in range(first, min(first + 40, count)):
                lang = ("en", "de", "fr")[number % 3]
                names = [f"{lang} thing {number} {i}" for i in range(random.integers(0, 5))]
                told = {"concept": number % 50, "lang": lang, "names": names}
                sample: dict[str, Any] = {"__key__": f"r{number:05d}", "json": told}
                if number % 5:
                    pixels = random.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
                    png = BytesIO()
                    Image.fromarray(pixels).save(png, "png")
                    sample["png"] = png.getvalue()
                writer.write(sample)


def write_modalities(
    folder: Path, count: int, seed: int, *, images: bool = True, lacking: bool = False
) -> None:
    """Samples of twenty concepts as text, as six numbers (npy), as a path of one to five points
    (json), as a tone (wav), and as images; `lacking`: some have no text,
    no numbers, no path, no tone or no image."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for shard, first in enumerate(range(0, count, 40)):
        with wds.TarWriter(str(folder / f"{folder.name}-{shard:03d}.tar"), mtime=0) as writer:
            for number in range(first, min(first + 40, count)):
                concept = number % 20
                own = np.random.default_rng(concept)
                numbers, points = own.normal(0, 1, 6), own.normal(0, 1, (5, 2))
                png, wav = BytesIO(), BytesIO()
                shade = own.integers(0, 256, 3) * np.ones((SIDE, SIDE, 1))
                Image.fromarray(shade.astype(np.uint8)).save(png, "png")
                tone = np.sin(np.arange(800) * (0.1 + 0.1 * concept)) * random.uniform(0.2, 0.9)
                soundfile.write(wav, tone[: random.integers(300, 800)], 8000, format="WAV")
                path = points[: random.integers(1, 6)].tolist()
                told = {
                    "concept": concept,
                    "path": path,
                    "age": 20 + 3 * concept,
                    "old": bool(concept % 2),
                }
                sample: dict[str, Any] = {
                    "__key__": f"m{number:05d}", "json": told, "wav": wav.getvalue(),
                    "npy": numbers + random.normal(0, 0.1, 6), "txt": f"this is thing {concept}",
                }  # fmt: skip
                if images:
                    sample["png"] = png.getvalue()
                for kind, every in {"npy": 4, "txt": 5, "wav": 6, "png": 7}.items():
                    if lacking and number % every == 1:
                        sample.pop(kind, None)
                if lacking and number % 3 == 2:
                    told["path"] = None
                writer.write(sample)


def spoil(index: Index, sample: int, member: str = "png", at: int = 60) -> Path:
    """Change a byte of a member, as a bad disk would: sizes and times stay."""
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
    """(exit code, stdout, stderr) of a command, in this process."""
    monkeypatch.setattr(sys, "argv", ["gigabatch", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capsys.readouterr()
    code = end.value.code
    return (0 if code is None else int(code)), printed.out, printed.err


class Command:
    """A `gigabatch` process, or another `command`."""

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
        """Its outcome. Everything it started is killed if it takes too long."""
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
        """SIGKILL to the process and everything in its session."""
        os.killpg(self.process.pid, signal.SIGKILL)


def losses(run: Path) -> dict[int, float]:
    """step -> train/loss of the lines that count."""
    lines = read_metrics(run / "metrics.jsonl")
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def wait_for_step(run: Path, step: int, command: Command) -> None:
    """Until `step` stands in metrics.jsonl."""
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
    """Run `script` on `world_size` torchrun ranks; what rank 0 printed last, as JSON."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={world_size}", str(script), *map(str, arguments),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])
