"""Task `languages`: retrieval in each language, and the variance of ranks over languages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from gigabatch.trainer.evaluation.registry import register
from gigabatch.trainer.evaluation.task import SetTask, Texts

if TYPE_CHECKING:
    from torch import Tensor

    from gigabatch.trainer.evaluation.context import EvalContext
    from gigabatch.trainer.evaluation.embedding import Embedded
    from gigabatch.trainer.evaluation.result import TaskResult

KS = (1, 10)


@register
class Languages(SetTask):
    """Consistency over languages: retrieval in each, and the mean rank variance (MRV)."""

    name = "languages"
    summary = "retrieval in each language, and the variance of ranks over languages (MRV)"

    captions: Annotated[Texts, Field(min_length=2)]
    """Caption fields, one per language, such as [names.en, names.de]."""
    modality: str | None = None
    """Modality that the captions describe. Default: the run's first that is not text."""
    positives: str | None = None
    """JSON field that relevant items share; `none` for pairs only. Default: the run's."""

    def measure(self, context: EvalContext) -> TaskResult:
        """Rank in each language, then compare the ranks of each sample."""
        from gigabatch.trainer.evaluation.captions import captioned_modality, embed_captions
        from gigabatch.trainer.evaluation.metrics.ranking import summarize
        from gigabatch.trainer.evaluation.metrics.retrieval import direction_names, retrieval_values
        from gigabatch.trainer.evaluation.result import TaskResult

        positives = context.positives_field(self.positives)
        modality = captioned_modality(context, self.modality)
        columns = [positives] if positives else []
        first: Embedded | None = None
        values: dict[str, Tensor] = {}
        ranks: dict[str, list[Tensor]] = {}
        for language in self.captions:
            embedded = embed_captions(context, modality, language, columns, first)
            first = first or embedded
            in_language = retrieval_values(embedded, positives, context.world)
            for direction in direction_names(modality, "text"):
                for k in KS:
                    values[f"{language}/{direction}_recall@{k}"] = in_language[
                        f"{direction}_recall@{k}"
                    ]
                ranks.setdefault(direction, []).append(in_language[f"{direction}_rank"])
        for direction, over_languages in ranks.items():
            values |= self._over_languages(direction, over_languages, values)
        assert first is not None
        metrics = {
            "languages": float(len(self.captions)), "candidates": float(len(context.index)),
        }  # fmt: skip
        indices = context.sample_indices(first)
        return TaskResult(context.set_name, values, summarize, metrics, indices)

    def _over_languages(
        self, direction: str, ranks: list[Tensor], values: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the variance of each sample's rank, and its mean recall."""
        import torch

        from gigabatch.trainer.evaluation.metrics.statistics import rank_variance

        variance = rank_variance(torch.stack(ranks))
        out = {
            f"{direction}_mrv": variance["rank_variance"],
            f"{direction}_mrv_std": variance["rank_std"],
        }
        for k in KS:
            recalls = [values[f"{language}/{direction}_recall@{k}"] for language in self.captions]
            out[f"{direction}_recall@{k}"] = torch.stack(recalls).mean(0)
        return out
