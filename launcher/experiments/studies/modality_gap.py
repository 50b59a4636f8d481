"""The modality gap (CLOSE): at a low temperature, the modalities' embeddings separate."""

from __future__ import annotations

from gigabatch.launcher.experiments.studies.blocks import pairs_of_views, two_vector_towers
from gigabatch.launcher.experiments.study import Check, Metric, Study, Variant


def _variant(temperature: float) -> Variant:
    scale = {"init_logit_scale": 1 / temperature, "learn_scale": False}
    objective = {"name": "infonce", "taps": ["view", "caption"], **scale}
    return Variant(f"t-{temperature:g}", {"objective": objective})


STUDY = Study(
    name="modality-gap",
    papers=("No images (CLOSE)",),
    claim="The embeddings of two modalities separate, the more the lower the temperature.",
    setting="Pairs of vectors; the gap is the distance between the two modalities' mean "
    "embeddings.",
    write=pairs_of_views(("image.npy", "text.npy"), latent=16, size=64, train=4096, test=1000),
    config={
        **two_vector_towers("view", "image.npy", "caption", "text.npy", size=64, layers=2),
        "batch": {"global_size": 128, "micro_size": 128},
        "train.steps": 300,
        "optimizer": {"lr": 1e-3},
    },
    variants=(_variant(0.02), _variant(0.07)),
    metrics=(
        Metric("gap", "geometry", "test", "geometry/modality_gap"),
        Metric("domain AUC", "geometry", "test", "geometry/domain_auc"),
    ),
    checks=(
        Check(
            "t-0.02 - t-0.07, gap",
            lambda mean: mean("t-0.02", "gap") - mean("t-0.07", "gap"), 0.3,
        ),
    ),
)  # fmt: skip
