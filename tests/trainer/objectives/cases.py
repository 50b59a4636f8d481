"""What the objectives are tried on: a few steps of a small batch, the same in each process."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor

from gigabatch.data.order.mixture import SAMPLE_BITS
from gigabatch.trainer.config import Single, SumSettings
from gigabatch.trainer.config.objective import AnyObjective

SIZES = (13, 7)
"""Samples of the two sources of the data set."""
ROWS, WIDTH, TOKENS = 12, 6, 4


@dataclass(frozen=True)
class Case:
    """An objective. `formula`: the name of its formula in formulas.py, with `how` to call it;
    `missing`: some rows lack a modality; `captions`: of each sample."""

    settings: dict[str, Any]
    formula: str
    how: dict[str, Any] = field(default_factory=dict)
    missing: bool = False
    steps: int = 3
    captions: int = 1


TRIPLE = ("image", "text", "image@1")
CASES: dict[str, Case] = {
    "infonce": Case({"name": "infonce"}, "infonce"),
    "infonce, smoothed, of labels": Case(
        {"name": "infonce", "positives": "concept", "label_smoothing": 0.1}, "infonce",
        {"label": "concept", "smoothing": 0.1},
    ),
    "infonce, within a language": Case(
        {"name": "infonce", "within": "lang"}, "infonce", {"within": "lang"}
    ),
    "infonce, a teacher": Case(
        {"name": "infonce", "teacher": {"member": "npy", "size": 3, "threshold": 0.4}}, "infonce",
        {"phi": 0.4}, captions=2,
    ),
    "infonce, a teacher, a language, labels": Case(
        {"name": "infonce", "teacher": {"member": "npy", "size": 3, "threshold": -0.2},
         "within": "lang", "positives": "concept"},
        "infonce", {"phi": -0.2, "within": "lang", "label": "concept"},
    ),
    "infonce, other taps": Case(
        {"name": "infonce", "taps": ["image.encoder", "image@1"]}, "infonce",
        {"taps": ("image.encoder", "image@1")},
    ),
    "infonce, nested": Case(
        {"name": "infonce", "positives": "concept", "widths": [2, 4, 6]}, "nested",
        {"inner": "infonce", "widths": (2, 4, 6), "label": "concept"},
    ),
    "siglip, nested, rows missing": Case(
        {"name": "siglip", "bias": -2.0, "widths": [3, 6]}, "nested",
        {"inner": "siglip", "widths": (3, 6)}, missing=True,
    ),
    "supcon, nested": Case(
        {"name": "supcon", "widths": [1, 6]}, "nested",
        {"inner": "supcon", "widths": (1, 6), "taps": ("image", "image@1")},
    ),
    "label distance, nested": Case(
        {"name": "label_distance", "label": "age", "distance": 2.0, "widths": [3, 6]}, "nested",
        {"inner": "distance", "widths": (3, 6), "factor": 2.0},
    ),
    "filip, nested": Case(
        {"name": "late_interaction", "widths": [3, 6]}, "nested",
        {"inner": "late", "widths": (3, 6), "symmetric": True},
    ),
    "hard captions, nested": Case(
        {"name": "hard_negatives", "own_weight": 2.0, "other_weight": 0.5, "widths": [3, 6]},
        "nested",
        {"inner": "hard", "widths": (3, 6), "own": 2.0, "other": 0.5, "beta": 1.0}, captions=3,
    ),
    "siglip": Case({"name": "siglip", "bias": -2.0}, "siglip"),
    "siglip, ids left out": Case(
        {"name": "siglip", "bias": -2.0, "positives": "concept"}, "siglip", {"label": "concept"},
        missing=True,
    ),
    "supcon": Case(
        {"name": "supcon", "taps": ["image"], "positives": "concept"}, "supcon",
        {"taps": ("image",), "label": "concept"},
    ),
    "simclr": Case({"name": "supcon"}, "supcon", {"taps": ("image", "image@1")}),
    "sogclr": Case({"name": "sogclr", "gamma": 0.6}, "sogclr", {"gamma": 0.6}),
    "sogclr, falling gamma, labels": Case(
        {"name": "sogclr", "gamma": 0.3, "gamma_epochs": 2, "positives": "concept"}, "sogclr",
        {"gamma": 0.3, "gamma_epochs": 2, "label": "concept"}, missing=True,
    ),
    "fastclip v3": Case(
        {"name": "sogclr", "gamma": 0.5, "temperatures": "shared", "rho": 2.0}, "sogclr",
        {"gamma": 0.5, "kind": "shared", "rho": 2.0},
    ),
    "isogclr": Case(
        {"name": "sogclr", "gamma": 0.5, "temperatures": "individual", "rho": 2.0,
         "temperature_lr": 0.002, "temperature": 0.05},
        "sogclr", {"gamma": 0.5, "kind": "individual", "rho": 2.0, "lr": 0.002, "tau": 0.05},
    ),
    "isogclr, rows missing": Case(
        {"name": "sogclr", "temperatures": "individual", "temperature_lr": 0.05}, "sogclr",
        {"gamma": 0.9, "kind": "individual", "rho": 6.5, "lr": 0.05}, missing=True,
    ),
    "sogclr, two views": Case(
        {"name": "sogclr", "taps": ["image", "image@1"], "gamma": 0.6}, "sogclr_views",
        {"gamma": 0.6}, missing=True,
    ),
    "isogclr, two views, labels": Case(
        {"name": "sogclr", "taps": ["image", "image@1"], "gamma": 0.5, "rho": 0.3,
         "temperatures": "individual", "temperature": 0.1, "temperature_min": 0.05,
         "temperature_max": 0.7, "positives": "concept"},
        "sogclr_views",
        {"gamma": 0.5, "rho": 0.3, "tau": 0.1, "lr": 0.01, "low": 0.05, "high": 0.7,
         "label": "concept"},
    ),
    "filip": Case({"name": "late_interaction"}, "late", {"symmetric": True}),
    "colbert": Case(
        {"name": "late_interaction", "taps": ["text.tokens", "image.tokens"], "symmetric": False},
        "late", {"taps": ("text.tokens", "image.tokens"), "symmetric": False},
    ),
    "queue": Case({"name": "queue", "size": 15}, "queue", {"size": 15}),
    "queue, of labels, a language each": Case(
        {"name": "queue", "size": 40, "positives": "concept", "within": "lang"}, "queue",
        {"size": 40, "label": "concept", "within": "lang"}, missing=True,
    ),
    "noisy": Case({"name": "noisy"}, "noisy"),
    "noisy, hinge": Case(
        {"name": "noisy", "head": "hinge"}, "noisy", {"hinge": True}, missing=True
    ),
    **{
        f"symile, {keys}": Case(
            {"name": "symile", "taps": TRIPLE, "keys": keys, "init_logit_scale": 5.0}, "symile",
            {"taps": TRIPLE, "keys": keys}, missing=keys == "shuffled",
        )
        for keys in ("paired", "shuffled", "all")
    },
    "hard captions": Case(
        {"name": "hard_negatives", "own_weight": 2.0, "other_weight": 0.5}, "hard",
        {"own": 2.0, "other": 0.5, "beta": 1.0}, captions=3,
    ),
    "hard pairs": Case(
        {"name": "hard_negatives", "pair": "concept", "changed": "lang", "own_weight": 3.0,
         "other_weight": 0.0, "changed_weight": 0.4},
        "hard", {"pair": "concept", "changed": "lang", "own": 3.0, "other": 0.0, "beta": 0.4},
    ),
    "label distance": Case(
        {"name": "label_distance", "label": "age", "distance": 2.0}, "distance", {"factor": 2.0}
    ),
    "label distance, mixed negatives": Case(
        {"name": "label_distance", "label": "age", "distance": 2.0, "mixed_negatives": True},
        "distance", {"factor": 2.0, "negatives": True}, missing=True,
    ),
    "label distance, mixed positives": Case(
        {"name": "label_distance", "label": "age", "mixed_positives": 3, "window": 0.8},
        "distance", {"factor": 1.0, "positives": 3, "window": 0.8},
    ),
    "label distance, all mixtures": Case(
        {"name": "label_distance", "label": "age", "mixed_negatives": True,
         "mixed_positives": 2, "taps": ["image"]},
        "distance",
        {"factor": 1.0, "negatives": True, "positives": 2, "taps": ("image",)}, missing=True,
    ),
    "barlow": Case({"name": "barlow"}, "barlow", {"weight": 0.005}, missing=True),
    "byol": Case({"name": "byol", "hidden": 5}, "byol"),
    "swav": Case(
        {"name": "swav", "prototypes": 5}, "swav", {"tau": 0.1, "epsilon": 0.05, "rounds": 3},
        missing=True,
    ),
    "swav among texts": Case(
        {"name": "swav", "taps": ["image", "image@1", "text"]}, "swav",
        {"taps": ("image", "image@1", "text"), "tau": 0.1, "epsilon": 0.05, "rounds": 3},
        missing=True,
    ),
    "swav of two modalities": Case(
        {"name": "swav", "prototypes": 3, "taps": ["image", "text"], "temperature": 0.3,
         "epsilon": 0.2, "iterations": 1},
        "swav", {"taps": ("image", "text"), "tau": 0.3, "epsilon": 0.2, "rounds": 1},
    ),
    "sum": Case(
        {"name": "sum", "weights": [1.0, 0.3],
         "terms": [{"name": "infonce"}, {"name": "sogclr", "gamma": 0.6}]},
        "both", {"weights": (1.0, 0.3)},
    ),
}  # fmt: skip


def settings_of(case: Case) -> Single | SumSettings:
    return TypeAdapter(AnyObjective).validate_python(case.settings)


@dataclass(frozen=True)
class Batch:
    """A global batch, float32. `outputs`: by tap; `meta`: as an objective gets it."""

    outputs: dict[str, Tensor]
    meta: dict[str, Tensor]

    def rows(self, part: slice) -> Batch:
        """Of some samples; captions may come several a sample."""
        per = {name: len(rows) // ROWS for name, rows in self.outputs.items()}
        return Batch(
            {n: r[part.start * per[n] : part.stop * per[n]] for n, r in self.outputs.items()},
            {name: column[part] for name, column in self.meta.items()},
        )


def batch(case: Case, step: int) -> Batch:
    """The global batch of a step. A sample may come twice in it, and comes again in others."""
    g = torch.Generator().manual_seed(100 + step)

    def vectors(*shape: int) -> Tensor:
        return F.normalize(torch.randn(ROWS, *shape, WIDTH, generator=g), dim=-1)

    places = torch.randint(0, sum(SIZES), (ROWS,), generator=g)
    source = (places >= SIZES[0]).long()
    meta = {
        "sample": source << SAMPLE_BITS | (places - SIZES[0] * source),
        "concept": places % 5,
        "lang": places % 2,
        "age": (places % 9) / 4,
        "text_mask": torch.rand(ROWS, TOKENS, generator=g) < 0.6,
    }
    meta["text_mask"][:, 0] = True
    if case.missing:
        meta["image_present"] = places % 6 != 0
        meta["text_present"] = places % 7 != 0
    plain = ("image", "text", "image@1", "text@1", "image.encoder", "teacher.image", "teacher.text")
    outputs = {name: vectors() for name in plain}
    outputs |= {"image.tokens": vectors(TOKENS + 1), "text.tokens": vectors(TOKENS)}
    meta["teacher: npy"] = torch.randn(ROWS, 3, generator=g)
    if case.captions > 1:
        more = torch.randn(ROWS * case.captions, WIDTH, generator=g)
        outputs["text"] = F.normalize(more, dim=1)
    return Batch(outputs, meta)


def shares(world_size: int) -> list[slice]:
    """The rows of each rank: unlike, and of four ranks one has none."""
    ends = {1: (0, 12), 2: (0, 5, 12), 4: (0, 4, 4, 9, 12)}[world_size]
    return [slice(a, b) for a, b in pairwise(ends)]
