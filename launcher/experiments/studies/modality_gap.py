"""The modality gap (32): at a low temperature the two modalities lie apart."""

from __future__ import annotations

from gigabatch.launcher.experiments.studies.blocks import pair_of_vectors, pairs_of_views
from gigabatch.launcher.experiments.study import Arm, Bar, Measure, Study


def _arm(temperature: float) -> Arm:
    fixed = {"init_logit_scale": 1 / temperature, "learn_scale": False}
    objective = {"name": "infonce", "taps": ["view", "caption"], **fixed}
    return Arm(f"t-{temperature:g}", {"objective": objective})


STUDY = Study(
    name="modality-gap",
    papers=(32,),
    claim="Embeddings of two modalities lie apart, the more so the lower the temperature.",
    setting="Pairs of vectors; the gap is the distance between the two modalities' means.",
    write=pairs_of_views(("image.npy", "text.npy"), latent=16, size=64, train=4096, test=1000),
    config={
        **pair_of_vectors("view", "image.npy", "caption", "text.npy", size=64, layers=2),
        "batch": {"global_size": 128, "micro_size": 128},
        "train.steps": 300,
        "optimizer": {"lr": 1e-3},
    },
    arms=(_arm(0.02), _arm(0.07)),
    measures=(
        Measure("gap", "geometry", "test", "geometry/modality_gap"),
        Measure("domain AUC", "geometry", "test", "geometry/domain_auc"),
    ),
    bars=(
        Bar(
            "gap at temperature 0.02 less at 0.07",
            lambda mean: mean("t-0.02", "gap") - mean("t-0.07", "gap"), 0.3,
        ),
    ),
)  # fmt: skip
