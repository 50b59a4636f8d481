"""A queue (6): negatives for small batches."""

from __future__ import annotations

from gigabatch.launcher.experiments.studies.blocks import pair_of_vectors, pairs_of_views
from gigabatch.launcher.experiments.study import Arm, Bar, Measure, Study

TAPS = ["code", "comment"]


def _queue(size: int) -> dict[str, object]:
    return {"objective": {"name": "queue", "taps": TAPS, "size": size, "momentum": 0.999}}


STUDY = Study(
    name="queue",
    papers=(6,),
    claim="A queue of earlier samples, as a momentum tower saw them, makes up for small batches.",
    setting="Pairs of vectors, eight a batch; R@1 among 1,000.",
    write=pairs_of_views(("code.npy", "comment.npy"), 32, 64, train=8000, test=1000, noise=0.6),
    config={
        **pair_of_vectors("code", "code.npy", "comment", "comment.npy", size=64),
        "batch": {"global_size": 8, "micro_size": 8},
        "train.steps": 1500,
        "optimizer": {"lr": 1e-3},
    },
    arms=(
        Arm("batch-8", {"objective": {"name": "infonce", "taps": TAPS}}),
        Arm("queue-512", _queue(512)),
    ),
    measures=(Measure("R@1", "retrieval", "test", "code2comment_recall@1"),),
    bars=(
        Bar(
            "with a queue of 512 less without, R@1",
            lambda mean: mean("queue-512", "R@1") - mean("batch-8", "R@1"), 0.05,
        ),
        Bar("batch of 8, R@1", lambda mean: mean("batch-8", "R@1"), 0.48, baseline=True),
    ),
)  # fmt: skip
