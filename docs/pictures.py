"""Pictures of the docs, from a run:  python docs/pictures.py runs/quickstart-001

Writes docs/curves.png (loss and logit scale) and docs/retrieval.png (captions of `val-face`, a
typeface that was not in the training set, with the images that the model ranks first).
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot

from gigabatch.data.decode.fields import captions_for_tokenizer
from gigabatch.data.order.assignment import EvalPlans
from gigabatch.data.stream import open_stream
from gigabatch.trainer.inference import load_newest_towers
from gigabatch.trainer.inputs import eval_fields, open_eval
from gigabatch.trainer.monitoring.metrics import read_metrics
from gigabatch.trainer.run.create import open_run
from gigabatch.trainer.run.folder import RunFolder
from gigabatch.trainer.step import tower_inputs

FOLDER = Path(__file__).parent
QUERIES, SHOWN = 7, 6


def draw_curves(run: RunFolder) -> None:
    """Plot loss and logit scale over the steps."""
    lines = [line for line in read_metrics(run.metrics) if "train/loss" in line]
    steps = [line["step"] for line in lines]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
    left.plot(steps, [line["train/loss"] for line in lines])
    left.set(title="train/loss", xlabel="step")
    right.plot(steps, [line["train/logit_scale"] for line in lines], color="tab:orange")
    right.set(title="train/logit_scale", xlabel="step")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FOLDER / "curves.png", dpi=110)


@torch.no_grad()
def draw_retrieval(run: RunFolder) -> None:
    """Draw a row per caption: the top images, with a green frame around the correct one."""
    config = run.config()
    index = open_eval(config, "val-face")
    _, towers = load_newest_towers(run)
    stream = open_stream(
        [index], EvalPlans(len(index), 256, 1, 0), fields=eval_fields(config),
        tokenizer=run.tokenizer, seed=0, workers=0, prefetch=1,
    )  # fmt: skip
    batches = list(stream)
    outputs = [towers(tower_inputs(batch, config.data, None)) for batch in batches]
    image, text = (torch.cat([out[tap] for out in outputs]) for tap in ("image", "text"))
    pixels = torch.cat([batch.tensors["image"] for batch in batches])
    captions = list(captions_for_tokenizer([index], eval_fields(config), len(index)))
    queries = np.random.default_rng(7).choice(len(index), QUERIES, replace=False)
    figure, axes = pyplot.subplots(
        QUERIES, SHOWN + 1, figsize=(9, 0.72 * QUERIES), width_ratios=[4.5] + [1] * SHOWN,
        layout="constrained",
    )  # fmt: skip
    for row, query in zip(axes, queries, strict=True):
        for cell in row:
            cell.set_axis_off()
        row[0].text(1, 0.5, captions[query].lower(), ha="right", va="center", fontsize=8)
        top = (image @ text[query]).topk(SHOWN).indices.tolist()
        for cell, image_index in zip(row[1:], top, strict=True):
            cell.imshow(pixels[image_index, 0], cmap="gray", vmin=0, vmax=255)
            if image_index == query:
                cell.add_patch(pyplot.Rectangle((0, 0), 31, 31, fill=False, ec="tab:green", lw=3))
    figure.savefig(FOLDER / "retrieval.png", dpi=110)


if __name__ == "__main__":
    matplotlib.use("agg")
    chosen_run = open_run(sys.argv[1])
    draw_curves(chosen_run)
    draw_retrieval(chosen_run)
