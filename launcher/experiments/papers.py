"""The surveyed papers, and the features of gigabatch for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["study", "offered", "in part", "not yet", "outside"]

STATUS_TEXT: dict[Status, str] = {
    "study": "measured",
    "offered": "available, not measured",
    "in part": "partly available, not measured",
    "not yet": "not available yet",
    "outside": "out of scope",
}


@dataclass(frozen=True)
class Paper:
    """A paper. `alias` is a number that the command line accepts in place of a study's name."""

    alias: int
    title: str
    status: Status
    offers: str
    """Features of gigabatch for the paper's topic."""

    @property
    def status_text(self) -> str:
        return STATUS_TEXT[self.status]


_ROWS: tuple[tuple[int, str, Status, str], ...] = (
    (1, "PC2, noisy correspondence", "study", "objective `noisy`; no pseudo-captions"),
    (2, "Cold-start recommendation", "in part",
     "`vector` towers, positives by a field; no popularity bias"),
    (3, "Rethinking positive pairs (Hydra)", "not yet",
     "the engine has the gated cosine and the PAIR loss term"),
    (4, "Contrastive diffusion", "outside", "encoders"),
    (5, "Behaviour of contrastive loss", "study",
     "`eval --task geometry`; no keys above a quantile"),
    (6, "CoCoSoDa", "study", "objective `queue`"),
    (7, "Hierarchical contrast for corruption", "outside",
     "the engine has the CIRCLE loss term"),
    (8, "CACE-Net", "not yet", "the engine has the LSE+ loss term, stable at any temperature"),
    (9, "Bi-level backdoor triggers", "in part", "`eval --task trigger`; no attack"),
    (10, "CLoRA", "outside", "nothing"),
    (11, "Whitening sentence embeddings", "not yet",
     "isotropy and uniformity of any tower output"),
    (12, "UniCon-HA, anomaly detection", "not yet", "augmented views, any tower output"),
    (13, "X-Former", "outside", "frozen towers"),
    (14, "iSogCLR", "study", "objective `sogclr`; `eval --task batch-bias`"),
    (15, "USCD", "outside", "nothing"),
    (16, "Attention-weighted experts", "in part",
     "a loss on any tower output; no masking of sequences"),
    (17, "Joint image-volume", "not yet", "set towers with attention pooling"),
    (18, "Projection head", "study", "heads of any depth; probes at any tower output"),
    (19, "Diffusion segmentation", "outside", "frozen features"),
    (20, "Practical unlearning", "outside", "embeddings of any layer"),
    (21, "ProteinRPN", "in part", "your own towers, positives by a field; no overlaps"),
    (22, "B-PROP", "outside", "mined pairs train as any other data set"),
    (23, "RITUAL", "outside", "nothing"),
    (24, "Unify, align and refine", "outside", "the engine has the HINGE loss term"),
    (25, "FILIP", "study", "objective `late_interaction`"),
    (26, "Survey of vision models", "outside", "zero-shot and retrieval evaluation"),
    (27, "Robust motion forecasting", "not yet", "`supcon` on any field; no group penalties"),
    (28, "SepCLR", "not yet", "the engine has the KDE loss term"),
    (29, "DebCSE", "not yet", "sources with weights; no propensities"),
    (30, "Contrastive search", "offered", "isotropy in `eval --task geometry`"),
    (31, "MCLRec", "not yet", "sums of objectives on views; no learned augmenters"),
    (32, "No images (CLOSE)", "study", "the modality gap in `eval --task geometry`"),
    (33, "DoCo", "not yet", "`within` a document's field compares inside it"),
    (34, "Symile", "study", "objective `symile`"),
    (35, "ReVersion", "outside", "the engine has the LSE+ loss term"),
    (36, "TeminAL", "study", "objective `hard_negatives`, replay by `data.train`"),
    (37, "Visualness of text", "in part",
     "`positives` gives all texts without a picture one shared value; no visualness score"),
    (38, "Query intent", "outside", "encoders"),
    (39, "MultiCSR", "study",
     "false negatives excluded by a field (`same_id: exclude`) or a `teacher`"),
    (40, "Improved baselines", "in part",
     "views after a second head (`image.projection`), label smoothing, `barlow`, `byol`, "
     "`swav`, sums; its ablation was not run"),
    (41, "Mixture of experts embeddings", "in part",
     "`within` and `data.group`; no routed blocks"),
    (42, "SupReMix", "study", "objective `label_distance`, with mixtures"),
    (43, "Curved contrastive", "not yet", "sequences with positions"),
    (44, "DefSent+", "not yet", "frozen towers"),
    (45, "1-to-K", "study", "`data.captions.choose: all`; `eval --task languages`"),
    (46, "CCP, multilingual retrieval", "study", "`within` and `data.group`"),
    (47, "Binding precedents", "outside", "a TF-IDF baseline beside every text retrieval"),
    (48, "Low-rank attention", "outside", "attention pooling of sets and sequences"),
    (49, "COCONUT", "not yet", "a momentum tower; no snapshot of an earlier task"),
    (50, "AdaCAD", "outside", "nothing"),
    (51, "HEADLINES", "study", "positives by a field (`positives`)"),
    (52, "Lower layer matters", "outside", "nothing"),
    (53, "CLSR", "in part", "sums of objectives between and inside modalities"),
    (54, "SPACE-2", "not yet", "positives by a field; no soft overlaps"),
    (55, "Thought-path", "outside", "several positives over vectors of your own"),
)  # fmt: skip
PAPERS = tuple(Paper(*row) for row in _ROWS)
