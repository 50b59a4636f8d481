"""`gigabatch eval`: what a run's towers can do, on any set."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from gigabatch.launcher.cli.arguments import RunPath, check_set


class Weights(StrEnum):
    ema = "ema"
    last = "last"


def evaluate(
    run: RunPath,
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the task, see above."),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            metavar="SET",
            callback=check_set,
            help="A folder of shards (it is indexed on first use), or the name of one of the "
            "run's sets; for text-retrieval a .jsonl file or a BEIR folder.",
        ),
    ] = None,
    task: Annotated[
        str, typer.Option(metavar="NAME", help="What is measured, see above.")
    ] = "retrieval",
    positives: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD",
            help="The json field that right answers share; `none` for pairs alone. "
            "Default: the run's objective.positives.",
        ),
    ] = None,
    sliced: Annotated[
        list[str] | None,
        typer.Option(
            "--slice", metavar="FIELD", help="Also for each value of this json field; repeatable."
        ),
    ] = None,
    weights: Annotated[
        Weights | None,
        typer.Option(
            help="The last step's, or their average over steps (train.ema). Default: the average, "
            "where the run has one."
        ),
    ] = None,
    intervals: Annotated[
        bool, typer.Option("--intervals", help="Add 95 % bootstrap intervals, /low and /high.")
    ] = False,
    resampled: Annotated[
        str | None,
        typer.Option(
            "--intervals-by",
            metavar="FIELD",
            help="Intervals that draw all queries of one value of this json field together, where "
            "they are not independent.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a run's newest checkpoint on a set; the figures are also kept in RUN/eval/.

    Tasks, with the settings that each takes (docs/evaluation.md defines every figure):

    \b
    retrieval       images and texts, both ways       between= tap= positives= captions=
                                                      width=
                    one modality by several           given= find= score= positives= captions=
    zero-shot       classes named by prompts          label= classes= templates= modality=
    knn             classes by nearest neighbours     label= train= k= temperature= tap= modality=
                                                      width=
    probe           linear, of classes or numbers     label= kind= train= tap= modality= width=
    geometry        uniformity, rank, modality gap    label= tap=
    text-retrieval  documents, beside TF-IDF          split= query_prefix= document_prefix= tap=
    languages       each language, and MRV            captions= modality= positives=
    order           right captions against changed    against= captions= modality=
    table           what is kept of each sample       label= auc=
    batch-bias      is the batch large enough?        batch= gamma= temperature= samples= rounds=
                                                      between= positives=
    trigger         backdoors, as knn                 target= triggered= label= train= k= tap=
                                                      temperature= modality= width=
    history         best against last step

    \b
    gigabatch eval RUN --on val --intervals-by concept --slice lang
    gigabatch eval RUN --on val --task probe label=concept tap=encoder
    gigabatch eval RUN --on val --task zero-shot label=group templates='["a photo of {}.", "{}"]'
    gigabatch eval RUN --on val 'given=[image, labs]' find=text
    torchrun --nproc-per-node 8 -m gigabatch.launcher eval RUN --on val
    """
    from gigabatch.trainer.evaluation.command import Question, evaluate_run

    given = [*(settings or []), *([f"positives={positives}"] if positives else [])]
    asked = Question(task, on, given, sliced or [], intervals, weights and weights.value, resampled)
    evaluate_run(run, asked, as_json=json)
