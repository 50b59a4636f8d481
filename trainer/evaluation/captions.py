"""Embeddings of captions from a chosen field, and of the modality that they describe."""

from __future__ import annotations

from collections.abc import Sequence

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.evaluation.comparisons import choose_output
from gigabatch.trainer.evaluation.context import EvalContext
from gigabatch.trainer.evaluation.embedding import SAMPLE_COLUMN, Embedded, require_modalities


def captioned_modality(context: EvalContext, requested: str | None) -> str:
    """Return the modality that captions describe: the requested one, or the first except text.

    Raises:
        GigabatchError: if it is text, or the run lacks it or text.
    """
    others = [name for name in context.config.modalities if name != "text"]
    if requested == "text" or not others:
        raise GigabatchError(
            "modality: captions are compared with a modality other than text; the run has "
            f"{', '.join(others) or 'only text'}."
        )
    require_modalities(context.config, [requested or others[0], "text"])
    return requested or others[0]


def embed_captions(
    context: EvalContext,
    modality: str,
    field: str | None,
    columns: Sequence[str] = (),
    base: Embedded | None = None,
) -> Embedded:
    """Embed the captions of one field, and the modality that they describe.

    Args:
        context: The run and the set.
        modality: The modality that captions describe.
        field: JSON field of the captions; None reads the run's captions.
        columns: JSON fields to read as codes.
        base: An earlier result, whose rows of `modality` are reused; None embeds the modality.

    Raises:
        GigabatchError: if the samples with a caption differ from those of `base`.
    """
    names = ["text"] if base else [modality, "text"]
    output = choose_output(context.config, [modality, "text"])
    embedded = context.embed_for_comparison(names, output, columns, captions=field)
    base = base or embedded
    expected, actual = (rows.columns[SAMPLE_COLUMN] for rows in (base, embedded))
    # A different sample replaces one without a caption, so its index differs.
    if different := (expected != actual).nonzero().flatten().tolist():
        raise GigabatchError(
            f"{context.index.where(int(expected[different[0]]))} has no caption in {field}, or has "
            f"one that another field lacks ({len(different)} of {len(actual)} samples on this "
            "rank). Keep samples with all captions: make a view with `gigabatch data filter`."
        )
    outputs = {modality: base.outputs[modality], "text": embedded.outputs["text"]}
    return Embedded(outputs, embedded.columns, {**base.masks, **embedded.masks})
