"""CoCoSoDa: a queue of negatives for small batches."""

from __future__ import annotations

from gigabatch.launcher.experiments.studies.blocks import pairs_of_views, two_vector_towers
from gigabatch.launcher.experiments.study import Check, Metric, Study, Variant

TAPS = ["code", "comment"]


def _queue(size: int) -> dict[str, object]:
    return {"objective": {"name": "queue", "taps": TAPS, "size": size, "momentum": 0.999}}


STUDY = Study(
    name="queue",
    papers=("CoCoSoDa",),
    claim="A queue of earlier samples, embedded by a momentum tower, makes up for small batches.",
    setting="Pairs of vectors, eight per batch; R@1 among 1,000.",
    write=pairs_of_views(("code.npy", "comment.npy"), 32, 64, train=8000, test=1000, noise=0.6),
    config={
        **two_vector_towers("code", "code.npy", "comment", "comment.npy", size=64),
        "batch": {"global_size": 8, "micro_size": 8},
        "train.steps": 1500,
        "optimizer": {"lr": 1e-3},
    },
    variants=(
        Variant("batch-8", {"objective": {"name": "infonce", "taps": TAPS}}),
        Variant("queue-512", _queue(512)),
    ),
    metrics=(Metric("R@1", "retrieval", "test", "code2comment_recall@1"),),
    checks=(
        Check(
            "queue-512 - batch-8, R@1",
            lambda mean: mean("queue-512", "R@1") - mean("batch-8", "R@1"), 0.05,
        ),
        Check("batch-8, R@1", lambda mean: mean("batch-8", "R@1"), 0.48, baseline=True),
    ),
)  # fmt: skip
