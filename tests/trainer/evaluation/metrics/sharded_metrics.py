"""Every sharded metric of a small random case, computed from this rank's slice."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.embedding import Embedded
from gigabatch.trainer.evaluation.metrics.classification import nearest_neighbors, zero_shot
from gigabatch.trainer.evaluation.metrics.geometry import geometry_metrics
from gigabatch.trainer.evaluation.metrics.linear_probe import linear_probe
from gigabatch.trainer.evaluation.metrics.retrieval import joint_retrieval_values, retrieval_values
from gigabatch.trainer.evaluation.metrics.ridge_probe import regression_probe

ROWS = 60
EDGES = {1: [0, 60], 2: [0, 43, 60], 4: [0, 20, 41, 60, 60]}  # the last of four ranks has no rows


def case() -> dict[str, torch.Tensor]:
    """Return vectors of 60 images and texts in five classes; some are equal, so scores tie."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 5, ROWS)
    image = random.normal(0, 1, (ROWS, 6)) + np.eye(6)[labels] * 2
    text = random.normal(0.3, 1, (ROWS, 6)) + np.eye(6)[labels] * 2
    image[10:20], text[30:40] = image[:10], text[20:30]
    return {
        "image": torch.from_numpy(image).float(),
        "text": torch.from_numpy(text).float(),
        "label": torch.from_numpy(labels),
    }


def tokens(rows: dict[str, torch.Tensor]) -> Embedded:
    """Split each row into three tokens of width 2; the last is masked if the first is negative."""
    split = {name: rows[name].view(-1, 3, 2) for name in ("image", "text")}
    masks = {
        name: torch.arange(3) < 2 + (values[:, :1, 0] > 0).long() for name, values in split.items()
    }
    return Embedded(split, {"label": rows["label"]}, masks)


def sharded_metrics(world: World) -> dict[str, Any]:
    """Compute all metrics and per-query values, by name, on every rank."""
    all_rows = case()
    edges = EDGES[world.size]
    local = slice(edges[world.rank], edges[world.rank + 1])
    rows = {name: values[local] for name, values in all_rows.items()}
    image, text, labels = rows["image"], rows["text"], rows["label"]
    embedded = Embedded({"image": image, "text": text}, {"label": labels})
    probe, l2 = linear_probe((image, labels), (text, labels), world, seed=1)
    targets = text.double().sum(1)
    regression, ridge_l2 = regression_probe((image, targets), (text, targets), world, seed=1)
    values = {
        "retrieval": retrieval_values(embedded, "label", world),
        "tokens": retrieval_values(tokens(rows), "label", world),
        **{
            score: joint_retrieval_values(
                embedded, ["image", "text"], "image", score, "label", world
            )
            for score in ("product", "sum")
        },
        "zero_shot": zero_shot(image, labels, all_rows["text"][:5], world),
        "knn": nearest_neighbors(text, labels, image, labels, world, 7, 0.1),
        "knn_left_out": nearest_neighbors(image, labels, image, labels, world, 7, 0.1, True),
        "probe": probe,
        "regression": regression,
    }
    metrics: dict[str, Any] = {
        f"{task}/{name}": column.tolist()
        for task, columns in values.items()
        for name, column in columns.items()
    }
    geometry = geometry_metrics({"image": image, "text": text}, labels, world, seed=1)
    metrics |= {"l2": l2, "ridge_l2": ridge_l2}
    return metrics | {f"geometry/{name}": value for name, value in geometry.items()}
