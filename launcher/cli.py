"""The command line."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.signals import INTERRUPTED

app = typer.Typer(
    help="Pre-train encoders by contrast, at any batch size, on one laptop or many nodes.\n\n"
    "Start with:  gigabatch train configs/quickstart.yaml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, see configs/.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or its name in runs/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Set keys, such as train.steps=100."),
]


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> int:
    """Train a new run, described by CONFIG.

    Ctrl-C (or SIGTERM) ends after the current step with a checkpoint; `gigabatch resume` goes on
    from it. Exit codes: 0 finished, 2 something to put right, 75 stopped by SIGTERM, 130 stopped
    by Ctrl-C.
    """
    from gigabatch.launcher.start import start_run

    return start_run(config, overrides or [])


@app.command()
def resume(
    run: RunName,
    overrides: Overrides = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Accept a change of this key, or of the `data`."),
    ] = None,
) -> int:
    """Go on with a run from its newest sound checkpoint, exactly where it was.

    The number of workers, the launcher, and what is saved, shown and evaluated may change freely.
    """
    from gigabatch.launcher.start import resume_run
    from gigabatch.trainer.runfolder import open_run

    return resume_run(open_run(run), overrides or [], allow or [])


@app.command()
def config(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the whole resolved configuration: every key, with its value for this machine."""
    from gigabatch.trainer.config import dump_config, load_config

    print(dump_config(load_config(config, overrides or [])), end="")


@app.command("eval")
def evaluate(
    run: RunName,
    on: Annotated[
        str,
        typer.Option(metavar="DIR", help="A folder of shards; it is indexed on first use."),
    ],
    positives: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD",
            help="The json field that right answers share; `none` for pairs alone. "
            "Default: the run's objective.positives.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure retrieval of a run's newest checkpoint on a set of image-text pairs."""
    from gigabatch.launcher.evaluate import evaluate_run
    from gigabatch.trainer.runfolder import open_run

    evaluate_run(open_run(run), on, positives, as_json=json)


@app.command()
def board(
    run: RunName,
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 6006,
    host: Annotated[str, typer.Option(help="0.0.0.0 shows it to the network.")] = "127.0.0.1",
) -> None:
    """Show a run in TensorBoard, until Ctrl-C."""
    from gigabatch.trainer.runfolder import open_run

    logs = open_run(run).tensorboard
    command = ["-m", "tensorboard.main", "--logdir", str(logs), "--port", str(port)]
    os.execv(sys.executable, [sys.executable, *command, "--host", host])


bench = typer.Typer(help="Measure this machine.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench, name="bench")


@bench.command()
def memory(
    problem: Annotated[str, typer.Argument(help="What to measure; `list` shows them.")] = (
        "contrastive"
    ),
    n: Annotated[int, typer.Option(help="Rows: the global batch.", min=1)] = 32768,
    d: Annotated[int, typer.Option(help="Width of the embeddings.", min=1)] = 256,
) -> None:
    """Peak memory of one loss, forward and backward, above its inputs and their gradients."""
    from gigabatch.kernels.bench.memory import NAMES, measure_afresh

    if problem not in NAMES:
        print("\n".join(NAMES))
        if problem != "list":
            raise GigabatchError(f"there is no problem {problem!r}; choose one of those above")
        return
    found = measure_afresh(problem, n, d)
    print(
        f"{problem}: n {n:,}  d {d}  float32, forward and backward: {found['peak_mib']:.0f} MiB "
        f"above inputs and gradients, {found['seconds']:.1f} s"
    )


@bench.command()
def engine(
    n: Annotated[int, typer.Option(help="Rows of the timed comparison.", min=256)] = 16384,
    d: Annotated[int, typer.Option(help="Width of the embeddings.", min=1)] = 512,
    sizes: Annotated[str, typer.Option(help="Batches over which memory is fitted.")] = (
        "8192,16384,32768,65536"
    ),
    out: Annotated[Path | None, typer.Option(help="Write all figures to this JSON file.")] = None,
) -> None:
    """The engine beside plain torch on this CPU: time, share of the GEMM rate, memory."""
    from gigabatch.kernels.bench.engine import bench as run

    try:
        batches = [int(size) for size in sizes.split(",")]
    except ValueError:
        raise GigabatchError(f"--sizes is {sizes!r}; give numbers between commas") from None
    found = run(n, d, batches, say=lambda line: print(line, flush=True))
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")


@bench.command()
def kernels(
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; default: cuda if there is one.")
    ] = None,
    peers: Annotated[bool, typer.Option("--peers", help="Other packages too.")] = False,
    n: Annotated[str | None, typer.Option(help="Batches, such as 1024,2048.")] = None,
    d: Annotated[str | None, typer.Option(help="Widths, such as 256,512.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16 or fp32; default: bf16, on a CPU fp32.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Begin nothing after these.")] = 8,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A contender; may be repeated.")
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Let Triton time its list of blocks first.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for kernels.json, kernels.md and kernels.png.")
    ] = None,
) -> int:
    """The losses beside plain torch and other packages, on a GPU or this CPU: time and memory.

    Ctrl-C ends it early, with what was found so far.
    """
    from gigabatch.kernels.bench.kernels import choose, run

    try:
        options = choose(device, n, d, dtype, peers, minutes, only or [], tune, out)
    except ValueError as error:
        raise GigabatchError(str(error)) from None
    return run(options, say=lambda line: print(line, flush=True))


def main() -> None:
    """Entry point: user errors are one message and exit code 2, never a traceback."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("gigabatch").setLevel(logging.INFO)
    try:
        code = app(standalone_mode=False)
    except GigabatchError as error:
        print(f"gigabatch: {error}", file=sys.stderr)
        code = 2
    except (KeyboardInterrupt, typer.Abort, typer.Exit) as end:
        # Typer turns a KeyboardInterrupt into one of the others, by version.
        code = getattr(end, "exit_code", INTERRUPTED)
        if code == INTERRUPTED:
            print("gigabatch: aborted", file=sys.stderr)
    except Exception as error:
        if not hasattr(error, "format_message"):  # a usage error of the command line itself
            raise
        print(f"gigabatch: {error.format_message()}", file=sys.stderr)
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()
