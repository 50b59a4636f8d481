"""`gigabatch eval`: its options, and the list of tasks in its help."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.cli.arguments import RunPath, check_set


class Weights(StrEnum):
    ema = "ema"
    last = "last"


class EvalCommand(TyperCommand):
    """A command whose help ends with the registered tasks."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write each task with its summary and its keys."""
        from gigabatch.trainer.evaluation.registry import all_tasks

        rows = []
        for name, task in all_tasks().items():
            keys = " ".join(f"{key}=" for key in task.model_fields)
            rows.append((name, f"{task.summary}. {keys}".strip()))
        with formatter.section("Tasks, each with its KEY=VALUE settings"):
            formatter.write_dl(rows)


def evaluate(
    run: RunPath,
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the task, listed below."),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            metavar="SET",
            callback=check_set,
            help="Folder of shards, indexed on first use, or the name of one of the run's sets; "
            "for text-retrieval a .jsonl file or a BEIR folder.",
        ),
    ] = None,
    task: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Task, listed below, or package.mod:Class of your own task.",
        ),
    ] = "retrieval",
    positives: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD",
            help="JSON field that relevant items share; `none` for pairs only. Default: the run's "
            "objective.positives.",
        ),
    ] = None,
    slice_fields: Annotated[
        list[str] | None,
        typer.Option(
            "--slice",
            metavar="FIELD",
            help="Also report metrics for each value of this JSON field; repeatable.",
        ),
    ] = None,
    weights: Annotated[
        Weights | None,
        typer.Option(
            help="Weights of the last step, or their moving average (train.ema). Default: the "
            "average if the run has it."
        ),
    ] = None,
    intervals: Annotated[
        bool, typer.Option("--intervals", help="Add 95 % bootstrap intervals, /low and /high.")
    ] = False,
    intervals_by: Annotated[
        str | None,
        typer.Option(
            "--intervals-by",
            metavar="FIELD",
            help="Add intervals that resample the values of this JSON field, each with all its "
            "queries, because queries of one value are not independent.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a run's newest checkpoint on a set; metrics are also written to RUN/eval/.

    docs/evaluation.md defines every metric.

    \b
    gigabatch eval RUN --on val --intervals-by concept --slice lang
    gigabatch eval RUN --on val --task probe label=concept tap=encoder
    gigabatch eval RUN --on val --task zero-shot label=group templates='["a photo of {}.", "{}"]'
    gigabatch eval RUN --on val 'given=[image, labs]' find=text
    torchrun --nproc-per-node 8 -m gigabatch.launcher eval RUN --on val
    """
    # Invalid arguments are reported before the imports below load torch.
    from gigabatch.trainer.evaluation.registry import parse_task
    from gigabatch.trainer.evaluation.task import RunTask

    assignments = [*(settings or []), *([f"positives={positives}"] if positives else [])]
    parsed = parse_task(task, assignments)
    if on is None and not isinstance(parsed, RunTask):
        raise GigabatchError(
            f"--on: {task} needs a set: a folder of shards, or for text-retrieval a .jsonl file or "
            "a BEIR folder."
        )
    from gigabatch.trainer.run.create import open_run

    folder = open_run(run)
    from gigabatch.launcher.progress import progress_bars
    from gigabatch.trainer.evaluation.command import EvalRequest, evaluate_run

    chosen = weights and weights.value
    request = EvalRequest(
        parsed, on, assignments, slice_fields or [], intervals, chosen, intervals_by
    )
    with progress_bars() as show:
        evaluate_run(folder, request, as_json=json, show=show)
