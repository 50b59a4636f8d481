"""InfoNCE between images and captions (van den Oord et al. 2018; CLIP, Radford et al. 2021), with
several positives a row where samples share an id (SupCon's average, Khosla et al. 2020, eq. 2)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gigabatch.kernels import contrastive_loss
from gigabatch.trainer.config import InfoNCESettings
from gigabatch.trainer.objectives.base import About, Context, Loss, Needs
from gigabatch.trainer.objectives.common import Scaled, over_widths, present


class InfoNCE(Scaled):
    """`group`: the column whose values are compared each with itself alone (`data.group`)."""

    about = About(
        "CLIP's symmetric InfoNCE, with any number of positives",
        "van den Oord et al. 2018; CLIP, Radford et al. 2021; several positives: SupCon, Khosla et "
        "al. 2020; 1-to-K, 45; clusters, 51; masked duplicates, 39; same-language and same-domain "
        "negatives, 46 and 41; a teacher's mask, 39; `widths`: Matryoshka, Kusupati et al. 2022",
        "mean_i [log sum_j exp(l_ij) - sum_j P_ij l_ij], both ways, halved; "
        "l_ij = scale <q_i, k_j>",
        "4; with a teacher of E numbers 4 + 2 E / D",
        "paired data of any kind: the default. Duplicates, translations, several captions: set "
        "`positives`. Several languages or domains: set `within`, or `data.group`. Near-duplicates "
        "that no field tells: set `teacher`",
    )

    def __init__(self, settings: InfoNCESettings, group: str | None, width: int) -> None:
        super().__init__(settings)
        self.settings = settings
        # By sample number, a sample that an epoch's edge brings twice is its own positive.
        self.columns = {"ids": settings.positives or "sample"}
        if within := settings.within or group:
            self.columns["groups"] = within
        asked = dict.fromkeys(name for name in self.columns.values() if name != "sample")
        teacher = settings.teacher
        self.needs = Needs(
            settings.taps, tuple(asked), vectors={teacher.name: teacher} if teacher else {}
        )
        if teacher:
            self.columns["teacher"] = teacher.name

    def passes(self, outputs: Mapping[str, Tensor]) -> float:
        teacher, width = self.settings.teacher, outputs[self.settings.taps[0]].shape[1]
        return 4 + (2 * teacher.size / width if teacher else 0)

    @over_widths
    def forward(
        self, outputs: Mapping[str, Tensor], meta: Mapping[str, Tensor], ctx: Context
    ) -> Loss:
        scale, settings = self.scale(), self.settings
        q, of_q = present(outputs, meta, settings.taps[0], settings, self.columns)
        k, of_k = present(outputs, meta, settings.taps[1], settings, self.columns)
        value = contrastive_loss(
            q, k, scale, ids_q=of_q["ids"], ids_k=of_k["ids"], groups_q=of_q.get("groups"),
            groups_k=of_k.get("groups"), group=ctx.group, same_id=settings.same_id,
            teacher_q=of_q.get("teacher"), teacher_k=of_k.get("teacher"),
            threshold=settings.teacher.threshold if settings.teacher else 1.0,
            label_smoothing=settings.label_smoothing, gather_mode=settings.gather_mode,
            backend=settings.backend, cache_bytes=2**20 * settings.cache_mib,
        )  # fmt: skip
        return Loss(value, {"logit_scale": scale.detach()})
