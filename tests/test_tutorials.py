"""The tutorial `own-data.md`: all commands, run as printed on a small folder of images."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

PAGE = (Path(__file__).parent.parent / "docs" / "tutorials" / "own-data.md").read_text()
COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220)}
SHAPES = ("circle", "square")


def _write_table(folder: Path, name: str, count: int) -> None:
    """Draw images and write the table of files, captions and products that step 1 describes."""
    random = np.random.default_rng(0)
    with open(folder / f"{name}.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "caption", "product"])
        for i in range(count):
            color, shape = list(COLORS)[i % 3], SHAPES[i // 3 % 2]
            image = Image.new("RGB", (80, 64), (235, 235, 235))
            draw = ImageDraw.Draw(image)
            x, y, size = random.integers((4, 4, 16), (30, 30, 30)).tolist()
            paint = draw.ellipse if shape == "circle" else draw.rectangle
            paint((x, y, x + size, y + size), fill=COLORS[color])
            path = f"images/{name}-{i:04d}.png"
            image.save(folder / path)
            table.writerow([path, f"a {color} {shape}", f"{color}-{shape}"])


def _block(language: str, title: str) -> str:
    match = re.search(rf'```{language} title="{title}"\n(.*?)```', PAGE, re.DOTALL)
    assert match is not None
    return match[1]


@pytest.mark.slow
def test_own_data_tutorial_runs_as_printed(tmp_path: Path) -> None:
    (tmp_path / "photos" / "images").mkdir(parents=True)
    _write_table(tmp_path / "photos", "train", 96)
    _write_table(tmp_path / "photos", "val", 24)
    header = _block("text", "photos/train.csv").splitlines()[0]
    assert (tmp_path / "photos" / "train.csv").read_text().splitlines()[0] == header
    config = _block("yaml", "photos.yaml")
    for printed, small in (("steps: 500", "steps: 4"), ("[24, 48, 96]", "[8, 8, 8]")):
        assert printed in config
        config = config.replace(printed, small)
    (tmp_path / "photos.yaml").write_text(config)
    commands = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL))
    assert commands.count("gigabatch ") == 7
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-euxc", commands], cwd=tmp_path, env={**os.environ, "PATH": path}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=570,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert (tmp_path / "sheet.png").exists()
    (file,) = (tmp_path / "runs" / "photos" / "eval").glob("val-retrieval-step-*.json")
    metrics = json.loads(file.read_text())
    assert metrics["eval/val/candidates"] == 24
    assert 0 <= metrics["eval/val/t2i_recall@1/low"] <= metrics["eval/val/t2i_recall@1/high"] <= 1
