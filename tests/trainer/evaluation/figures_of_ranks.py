"""Every sharded figure of a small random case, of which a rank holds a slice: what the tests
compare with dense references in one process, and between numbers of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.classify import nearest_neighbours, zero_shot
from gigabatch.trainer.evaluation.embedding import Embedded
from gigabatch.trainer.evaluation.geometry import geometry
from gigabatch.trainer.evaluation.probe import linear_probe
from gigabatch.trainer.evaluation.regression import regression_probe
from gigabatch.trainer.evaluation.retrieval import joint_figures, retrieval_figures

ROWS = 60
EDGES = {1: [0, 60], 2: [0, 43, 60], 4: [0, 20, 41, 60, 60]}  # the last of four holds none


def case() -> dict[str, torch.Tensor]:
    random = np.random.default_rng(0)
    labels = random.integers(0, 5, ROWS)
    image = random.normal(0, 1, (ROWS, 6)) + np.eye(6)[labels] * 2
    text = random.normal(0.3, 1, (ROWS, 6)) + np.eye(6)[labels] * 2
    image[10:20], text[30:40] = image[:10], text[20:30]  # ties
    return {
        "image": torch.from_numpy(image).float(),
        "text": torch.from_numpy(text).float(),
        "label": torch.from_numpy(labels),
    }


def tokens(rows: dict[str, torch.Tensor]) -> Embedded:
    """Each row as tokens: three of two numbers, or two of them where the first is negative."""
    cut = {name: rows[name].view(-1, 3, 2) for name in ("image", "text")}
    third = {name: torch.arange(3) < 2 + (each[:, :1, 0] > 0).long() for name, each in cut.items()}
    return Embedded(cut, {"label": rows["label"]}, third)


def figures(world: World) -> dict[str, Any]:
    all_rows = case()
    edges = EDGES[world.size]
    mine = {
        name: rows[edges[world.rank] : edges[world.rank + 1]] for name, rows in all_rows.items()
    }
    image, text, labels = mine["image"], mine["text"], mine["label"]
    found = Embedded({"image": image, "text": text}, {"label": labels})
    probed, l2 = linear_probe((image, labels), (text, labels), world, seed=1)
    numbers = text.double().sum(1)
    regressed, ridge_l2 = regression_probe((image, numbers), (text, numbers), world, seed=1)
    per_row = {
        "retrieval": retrieval_figures(found, "label", world),
        "tokens": retrieval_figures(tokens(mine), "label", world),
        **{
            score: joint_figures(found, ["image", "text"], "image", score, "label", world)
            for score in ("product", "sum")
        },
        "zero_shot": zero_shot(image, labels, all_rows["text"][:5], world),
        "knn": nearest_neighbours(text, labels, image, labels, world, 7, 0.1),
        "knn_left_out": nearest_neighbours(image, labels, image, labels, world, 7, 0.1, True),
        "probe": probed,
        "regression": regressed,
    }
    told: dict[str, Any] = {
        f"{task}/{name}": values.tolist()
        for task, figures in per_row.items()
        for name, values in figures.items()
    }
    shape = geometry({"image": image, "text": text}, labels, world, seed=1)
    return (
        told
        | {"l2": l2, "ridge_l2": ridge_l2}
        | {f"geometry/{name}": value for name, value in shape.items()}
    )
