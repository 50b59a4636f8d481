"""Task `retrieval`: two modalities retrieve each other, or several together retrieve one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from gigabatch.trainer.evaluation.registry import register
from gigabatch.trainer.evaluation.task import SetTask, Texts

if TYPE_CHECKING:
    from torch import Tensor

    from gigabatch.trainer.evaluation.context import EvalContext
    from gigabatch.trainer.evaluation.embedding import Embedded
    from gigabatch.trainer.evaluation.result import TaskResult


@register
class Retrieval(SetTask):
    """Retrieval between two modalities in both directions, or of one modality by several."""

    name = "retrieval"
    summary = "two modalities retrieve each other; with given= find=, several retrieve one"

    between: tuple[str, str] | None = None
    """Two of the run's modalities, such as [audio, text]. Default: those that its first objective
    compares; with symile, each modality is retrieved by all others."""
    tap: Literal["head", "tokens"] | None = None
    """head: one vector per sample; tokens: late interaction. Default: tokens if the objective reads
    the tokens of both modalities, but not the vectors of both."""
    given: Annotated[Texts, Field(min_length=1)] | None = None
    """Modalities that form the query together, such as [image, labs]. Requires `find`."""
    find: str | None = None
    """Modality to retrieve. Requires `given`."""
    score: Literal["product", "sum"] | None = None
    """Score with `given`. product: sum_d of the product of all vectors; sum: sum of dot products.
    Default: product if a symile objective reads all of these modalities, else sum."""
    positives: str | None = None
    """JSON field that relevant items share; `none` for pairs only. Default: the run's."""
    captions: str | None = None
    """Location of the captions: txt, or a JSON field such as names.de. Default: as in the run."""
    width: int | None = Field(None, ge=1)
    """Number of leading coordinates to keep (Matryoshka). Default: all."""

    @model_validator(mode="after")
    def _keys_fit(self) -> Self:
        if (self.given is None) != (self.find is None):
            raise ValueError("given and find go together, as in given=[image,labs] find=text")
        if self.given is None:
            if self.score:
                raise ValueError("score needs given=[A,B] find=C; between uses dot products")
            if self.between and len(set(self.between)) < 2:
                raise ValueError(f"between needs two modalities, not {self.between[0]} twice")
            return self
        for key in ("between", "tap"):
            if getattr(self, key):
                raise ValueError(
                    f"{key} is for two modalities, given and find are for several; remove one"
                )
        modalities = [*self.given, str(self.find)]
        if len(set(modalities)) < len(modalities):
            raise ValueError(f"given and find name a modality twice: {', '.join(modalities)}")
        return self

    @classmethod
    def metric_prefix(cls, set_name: str) -> str:
        """Return the prefix of retrieval metrics, which is that of training."""
        return f"eval/{set_name}/"

    def headline(self, result: TaskResult) -> str:
        """Describe the recall of all directions."""
        from gigabatch.trainer.evaluation.metrics.retrieval import describe_retrieval

        return describe_retrieval(result.set_name, result.metrics())

    def measure(self, context: EvalContext) -> TaskResult:
        """Rank the samples for every query."""
        from gigabatch.trainer.evaluation.metrics.retrieval import summarize_retrieval
        from gigabatch.trainer.evaluation.result import TaskResult

        positives = context.positives_field(self.positives)
        if self.given and self.find:
            embedded, values = self._measure_joint(context, positives)
        else:
            embedded, values = self._measure_comparison(context, positives)
        candidates = len(context.index)

        def summarize(values: Mapping[str, Tensor]) -> dict[str, float]:
            return summarize_retrieval(values, candidates)

        indices = context.sample_indices(embedded)
        return TaskResult(context.set_name, values, summarize, sample_indices=indices)

    def _measure_joint(
        self, context: EvalContext, positives: str | None
    ) -> tuple[Embedded, dict[str, Tensor]]:
        """Retrieve `find` by all of `given`."""
        from gigabatch.trainer.evaluation.comparisons import joint_score
        from gigabatch.trainer.evaluation.metrics.retrieval import joint_retrieval_values

        assert self.given is not None
        assert self.find is not None
        modalities, columns = (*self.given, self.find), [positives] if positives else []
        embedded = context.embed_for_comparison(
            modalities, "head", columns, self.captions, self.width
        )
        score = self.score or joint_score(context.config, modalities)
        values = joint_retrieval_values(
            embedded, self.given, self.find, score, positives, context.world
        )
        return embedded, values

    def _measure_comparison(
        self, context: EvalContext, positives: str | None
    ) -> tuple[Embedded, dict[str, Tensor]]:
        """Retrieve between two modalities in both directions, or as the objective compares them."""
        from gigabatch.data.errors import GigabatchError
        from gigabatch.trainer.evaluation.comparisons import choose_output, comparisons
        from gigabatch.trainer.evaluation.metrics.retrieval import comparison_values

        modalities = self.between or comparisons(context.config)[0]
        if len(modalities) < 2:
            raise GigabatchError(
                f"retrieval needs two modalities, and the run has only {modalities[0]}. Use "
                "--task knn or probe."
            )
        output = choose_output(context.config, modalities, self.tap)
        columns = [positives] if positives else []
        embedded = context.embed_for_comparison(
            modalities, output, columns, self.captions, self.width
        )
        return embedded, comparison_values(embedded, positives, context.world)
