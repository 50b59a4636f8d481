"""InfoNCE between two taps (van den Oord et al. 2018; CLIP, Radford et al. 2021), with several
positives per row where samples share an id (SupCon's average, Khosla et al. 2020, eq. 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from gigabatch.data.decode.vectors import VectorSettings
from gigabatch.kernels import contrastive_loss
from gigabatch.trainer.fields import Pair
from gigabatch.trainer.objectives.base import Card, Context, Loss, Needs
from gigabatch.trainer.objectives.common import Scaled, over_widths, valid_rows
from gigabatch.trainer.objectives.reference import Benchmark, Example, ReferenceBatch, Value
from gigabatch.trainer.objectives.registry import register
from gigabatch.trainer.objectives.settings import (
    CachedSettings,
    ScaledSettings,
    TeacherSettings,
    WidthsSettings,
    named_fields,
)

if TYPE_CHECKING:
    from gigabatch.trainer.config import Config


class InfoNCESettings(ScaledSettings, CachedSettings, WidthsSettings):
    takes_groups = True
    takes_several_captions = True

    name: Literal["infonce"] = "infonce"
    """CLIP's symmetric InfoNCE, with any number of positives."""
    taps: Pair = ("image", "text")
    """The two tower outputs to compare."""
    positives: str | None = None
    """A json field; samples with equal values are positives of each other. Unset: the only positive
    of a caption is its own image."""
    same_id: Literal["positive", "exclude"] = "positive"
    """Role of other samples with the same `positives` value. positive: further positives. exclude:
    left out of the loss, neither positive nor negative."""
    within: str | None = None
    """A json field; only samples with equal values are compared, so that the loss cannot be lowered
    by telling languages or domains apart. Unset: `data.group`."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread evenly over all candidates."""
    teacher: TeacherSettings | None = None
    """A frozen model's vectors of the samples; pairs that are too similar are not negatives.
    `{fields: [embedding], size: 384, threshold: 0.95}` reads the vectors from the json,
    `member: teacher.npy` from a file. With data.missing=mask, a sample without a vector is a
    negative of all others."""

    def columns(self) -> tuple[str, ...]:
        return named_fields(self.positives, self.within)

    def positives_field(self) -> str | None:
        return self.positives

    def vectors(self) -> dict[str, VectorSettings]:
        return {self.teacher.name: self.teacher} if self.teacher else {}

    @model_validator(mode="after")
    def _check_smoothing(self) -> Self:
        if self.teacher and self.label_smoothing:
            raise ValueError(
                "label_smoothing spreads the target over all candidates of the batch, some of which"
                " `teacher` leaves out; unset one of them"
            )
        return self

    def check(self, config: Config) -> None:
        super().check(config)
        if (self.within or config.data.group) and self.label_smoothing:
            raise ValueError(
                "objective.label_smoothing spreads the target over all candidates of the batch, "
                "which data.group or objective.within divides; unset one of them"
            )
        several = config.data.captions.choose == "all"
        if self.same_id == "exclude" and (several or config.data.missing == "mask"):
            raise ValueError(
                "objective.same_id=exclude pairs each image with one caption; it does not work with"
                " data.captions.choose=all or data.missing=mask"
            )


@register
class InfoNCE(Scaled[InfoNCESettings]):
    Settings = InfoNCESettings
    card = Card(
        "CLIP's symmetric InfoNCE, with any number of positives",
        "van den Oord et al. 2018; CLIP, Radford et al. 2021; several positives: SupCon, Khosla et "
        "al. 2020, and 1-to-K; same-language and same-domain negatives; a teacher's mask; "
        "`widths`: Matryoshka, Kusupati et al. 2022",
        "mean_i [log sum_j exp(l_ij) - sum_j P_ij l_ij], averaged over both directions; "
        "l_ij = logit scale <q_i, k_j>",
        "4; with teacher vectors of size E, 4 + 2 E / D",
        "paired data of any kind: the default. For duplicates, translations or several captions, "
        "set `positives`; for several languages or domains, `within` or `data.group`; for "
        "near-duplicates without a common field, `teacher`",
        ("clip", "nt_xent_pairs", "mnrl", "multiple_negatives_ranking", "cliploss", "contrastive"),
    )
    examples = {
        "": Example(),
        "positives, label smoothing": Example({"positives": "concept", "label_smoothing": 0.1}),
        "same id excluded": Example({"positives": "concept", "same_id": "exclude"}),
        "within a language": Example({"within": "lang"}),
        "teacher": Example(
            {"teacher": {"member": "npy", "size": 3, "threshold": 0.4}}, captions=2
        ),
        "teacher, within, positives": Example(
            {"teacher": {"member": "npy", "size": 3, "threshold": -0.2},
             "within": "lang", "positives": "concept"}
        ),
        "other taps": Example({"taps": ["image.encoder", "image@1"]}),
        "widths": Example({"positives": "concept", "widths": [2, 4, 6]}),
    }  # fmt: skip
    benchmarks = {
        "": Benchmark(),
        "positives": Benchmark({"positives": "concept"}),
        "same_id=exclude": Benchmark({"positives": "concept", "same_id": "exclude"}),
        "within": Benchmark({"within": "lang"}),
        "teacher": Benchmark({"teacher": {"fields": ["embedding"], "size": 64, "threshold": 0.2}}),
        "label_smoothing": Benchmark({"label_smoothing": 0.1}),
    }

    def __init__(self, settings: InfoNCESettings, group: str | None = None) -> None:
        super().__init__(settings)
        # With sample numbers as ids, a sample that occurs twice in a batch, as it can at the end of
        # an epoch, is a positive of its copy.
        self.columns = {"ids": settings.positives or "sample"}
        if within := settings.within or group:
            self.columns["groups"] = within
        columns = dict.fromkeys(name for name in self.columns.values() if name != "sample")
        self.needs = Needs(settings.taps, tuple(columns), vectors=settings.vectors())
        if settings.teacher:
            self.columns["teacher"] = settings.teacher.name

    @classmethod
    def build(cls, settings: InfoNCESettings, *, group: str | None = None, width: int = 0) -> Self:
        return cls(settings, group)

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        teacher, width = self.settings.teacher, outputs[self.settings.taps[0]].shape[1]
        return 4 + (2 * teacher.size / width if teacher else 0)

    @over_widths
    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        scale, settings = self.scale(), self.settings
        q, columns_q = valid_rows(outputs, meta, settings.taps[0], settings, self.columns)
        k, columns_k = valid_rows(outputs, meta, settings.taps[1], settings, self.columns)
        value = contrastive_loss(
            q, k, scale, ids_q=columns_q["ids"], ids_k=columns_k["ids"],
            groups_q=columns_q.get("groups"), groups_k=columns_k.get("groups"), group=ctx.group,
            same_id=settings.same_id, teacher_q=columns_q.get("teacher"),
            teacher_k=columns_k.get("teacher"),
            threshold=settings.teacher.threshold if settings.teacher else 1.0,
            label_smoothing=settings.label_smoothing, gather_mode=settings.gather_mode,
            backend=settings.backend, cache_bytes=2**20 * settings.cache_mib,
        )  # fmt: skip
        return Loss(value, {"logit_scale": scale.detach()})

    @staticmethod
    def reference(settings: InfoNCESettings, batch: ReferenceBatch) -> Value:
        image, text = (batch.outputs[tap] for tap in settings.taps)
        meta, smoothing = batch.meta, settings.label_smoothing
        logits = batch.scale * image @ text.T
        sample_of_text = torch.arange(len(text)) // (len(text) // len(image))
        ids = meta[settings.positives or "sample"]
        same = ids[:, None] == ids[sample_of_text][None]
        allowed = torch.ones_like(same)
        if settings.same_id == "exclude":
            diagonal = torch.eye(len(image), dtype=torch.bool)
            same, allowed = diagonal, diagonal | ~same
        if settings.within:
            allowed = meta[settings.within][:, None] == meta[settings.within][sample_of_text][None]
            same = same & allowed
        if settings.teacher:
            vectors = meta[settings.teacher.name].double()
            cosine = F.cosine_similarity(vectors[:, None], vectors[sample_of_text][None], dim=2)
            allowed = allowed & ((cosine <= settings.teacher.threshold) | same)
        losses = []
        for x, positive, keep in ((logits, same, allowed), (logits.T, same.T, allowed.T)):
            target = positive.double() / positive.sum(1, keepdim=True)
            target = (1 - smoothing) * target + smoothing / target.shape[1]
            log_probability = x.masked_fill(~keep, -torch.inf).log_softmax(1)
            weighted = target * torch.where(target > 0, log_probability, 0)
            losses.append(-weighted.sum(1).mean())
        return (losses[0] + losses[1]) / 2, None
