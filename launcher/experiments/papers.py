"""The 55 papers, and what gigabatch has of each: measured by a study, offered, not yet, or outside
its purpose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Standing = Literal["study", "offered", "in part", "not yet", "outside"]

TOLD = {
    "study": "measured",
    "offered": "offered, not measured",
    "in part": "offered in part, not measured",
    "not yet": "not yet offered",
    "outside": "outside the purpose",
}


@dataclass(frozen=True)
class Paper:
    number: int
    title: str
    standing: Standing
    gives: str
    """What the system has of it, or gives it."""

    @property
    def verdict(self) -> str:
        return TOLD[self.standing]


def _paper(number: int, title: str, standing: Standing, gives: str) -> Paper:
    return Paper(number, title, standing, gives)


PAPERS = tuple(
    _paper(*each)
    for each in (
        (1, "PC2, noisy correspondence", "study", "objective `noisy`; no pseudo-captions"),
        (2, "Cold-start recommendation", "in part",
         "`vector` towers, right answers by a field; no popularity bias"),
        (3, "Rethinking positive pairs (Hydra)", "not yet",
         "the engine has the gated cosine and the PAIR head"),
        (4, "Contrastive diffusion", "outside", "encoders"),
        (5, "Behaviour of contrastive loss", "study",
         "`eval --task geometry`; no keys above a quantile"),
        (6, "CoCoSoDa", "study", "objective `queue`"),
        (7, "Hierarchical contrast for corruption", "outside", "the engine has the CIRCLE head"),
        (8, "CACE-Net", "not yet", "the engine has the LSE+ head, safe at any temperature"),
        (9, "Bi-level backdoor triggers", "in part", "`eval --task trigger`; no attack"),
        (10, "CLoRA", "outside", "nothing"),
        (11, "Whitening sentence embeddings", "not yet", "isotropy and uniformity of any tap"),
        (12, "UniCon-HA, anomaly detection", "not yet", "augmented views, any tap"),
        (13, "X-Former", "outside", "frozen towers"),
        (14, "iSogCLR", "study", "objective `sogclr`; `eval --task batch-bias`"),
        (15, "USCD", "outside", "nothing"),
        (16, "Attention-weighted experts", "in part",
         "a loss on any named tap; no masking of sequences"),
        (17, "Joint image-volume", "not yet", "set towers with attention pooling"),
        (18, "Projection head", "study", "heads of any depth; probes at any tap"),
        (19, "Diffusion segmentation", "outside", "frozen features"),
        (20, "Practical unlearning", "outside", "embeddings of any layer"),
        (21, "ProteinRPN", "in part", "your own towers, right answers by a field; no overlaps"),
        (22, "B-PROP", "outside", "a set of mined pairs is a set like any other"),
        (23, "RITUAL", "outside", "nothing"),
        (24, "Unify, align and refine", "outside", "the engine has the HINGE head"),
        (25, "FILIP", "study", "objective `late_interaction`"),
        (26, "Survey of vision models", "outside", "zero-shot and retrieval evaluation"),
        (27, "Robust motion forecasting", "not yet", "`supcon` on any field; no group penalties"),
        (28, "SepCLR", "not yet", "the engine has the KDE head"),
        (29, "DebCSE", "not yet", "sources with weights; no propensities"),
        (30, "Contrastive search", "offered", "isotropy in `eval --task geometry`"),
        (31, "MCLRec", "not yet", "sums of objectives on views; no learnt augmenters"),
        (32, "No images (CLOSE)", "study", "the modality gap in `eval --task geometry`"),
        (33, "DoCo", "not yet", "`within` a document's field compares inside it"),
        (34, "Symile", "study", "objective `symile`"),
        (35, "ReVersion", "outside", "the engine has the LSE+ head"),
        (36, "TeminAL", "study", "objective `hard_negatives`, replay by `data.train`"),
        (37, "Visualness of text", "in part",
         "`positives` gives all texts without a picture one shared one; no score of visualness"),
        (38, "Query intent", "outside", "encoders"),
        (39, "MultiCSR", "study",
         "false negatives left out by a field (`same_id: exclude`) or a `teacher`"),
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
        (51, "HEADLINES", "study", "right answers by a field (`positives`)"),
        (52, "Lower layer matters", "outside", "nothing"),
        (53, "CLSR", "in part", "sums of objectives between and inside modalities"),
        (54, "SPACE-2", "not yet", "right answers by a field; no soft overlaps"),
        (55, "Thought-path", "outside", "several right answers over vectors of your own"),
    )
)  # fmt: skip
