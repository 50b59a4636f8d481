"""The command line."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gigabatch.data.errors import GigabatchError
from gigabatch.data.processes import ctrl_c_deferred
from gigabatch.launcher.cli.bench import bench
from gigabatch.launcher.cli.data import data
from gigabatch.launcher.cli.eval import EvalCommand, evaluate
from gigabatch.launcher.cli.jobs import jobs, submit
from gigabatch.launcher.cli.objectives import objectives
from gigabatch.launcher.cli.reproduce import reproduce
from gigabatch.launcher.cli.template import template
from gigabatch.launcher.output import complain
from gigabatch.launcher.signals import INTERRUPTED


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # Typer itself would leave without a word
            print("gigabatch: aborted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Group,
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

    Ctrl-C (or SIGTERM, SIGUSR1, SIGUSR2) ends after the current step with a checkpoint;
    `gigabatch resume` goes on from it. Exit codes: 0 finished, 2 something to put right, 75 stopped
    by one of those signals (start it again), 130 stopped by Ctrl-C.
    """
    with (
        ctrl_c_deferred()
    ):  # an import cut off is swallowed by some libraries, leaves others broken
        from gigabatch.launcher.start import start_run

    return start_run(config, overrides or [])


@app.command()
def resume(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="A run folder, its name in runs/, or the URL of its copies."
        ),
    ],
    overrides: Overrides = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Accept a change of this key, or of the `data`."),
    ] = None,
) -> int:
    """Go on with a run from its newest sound checkpoint, exactly where it was.

    The number of workers, the launcher, and what is saved, shown and evaluated may change freely.
    From the URL of its copies (checkpoint.copy_to/NAME) a run whose folder is gone, or has lost its
    newest checkpoints, is fetched into run.dir first.
    """
    with ctrl_c_deferred():
        from gigabatch.launcher.start import resume_copy, resume_run
        from gigabatch.trainer.checkpoints.download import is_copy
        from gigabatch.trainer.run.create import open_run

    if is_copy(run):
        return resume_copy(run, overrides or [], allow or [])
    return resume_run(open_run(run), overrides or [], allow or [])


@app.command()
def config(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the whole resolved configuration: every key, with its value for this machine."""
    from gigabatch.trainer.config.load import dump_config, load_config

    print(dump_config(load_config(config, overrides or [])), end="")


app.command("eval", cls=EvalCommand)(evaluate)


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="A run that is to be started here.")
    ] = None,
    overrides: Overrides = None,
) -> int:
    """Look for what a run would fail of on this machine, and say how to mend it.

    Packages, GPUs, shared memory, open files, disks, clocks, this host's name, the bandwidth
    between workers, and, with a CONFIG, its data. Exit codes: 0 fit, 2 a run could not start.
    """
    from gigabatch.launcher.preflight.data import examine_data
    from gigabatch.launcher.preflight.doctor import doctor as examine
    from gigabatch.trainer.config.load import load_config

    described = load_config(config, overrides or []) if config else None
    return examine(described, examine_data, say=lambda line: print(line, flush=True))


@app.command()
def board(
    run: RunName,
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 6006,
    host: Annotated[str, typer.Option(help="0.0.0.0 shows it to the network.")] = "127.0.0.1",
) -> None:
    """Show a run in TensorBoard, until Ctrl-C."""
    from gigabatch.trainer.run.create import open_run

    logs = open_run(run).tensorboard
    command = ["-m", "tensorboard.main", "--logdir", str(logs), "--port", str(port)]
    os.execv(sys.executable, [sys.executable, *command, "--host", host])


app.command()(submit)
app.command()(template)
app.command()(objectives)
app.command()(reproduce)
app.add_typer(jobs, name="jobs")
app.add_typer(data, name="data")
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point: user errors are one message and exit code 2, never a traceback."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("gigabatch").setLevel(logging.INFO)
    try:
        code = app(standalone_mode=False)
    except GigabatchError as error:
        complain(f"gigabatch: {error}")
        code = 2
    except (KeyboardInterrupt, typer.Abort, typer.Exit) as end:
        code = getattr(end, "exit_code", INTERRUPTED)
        if code == INTERRUPTED:
            complain("gigabatch: aborted")
    except Exception as error:
        if not hasattr(error, "format_message"):  # a usage error of the command line itself
            raise
        complain(f"gigabatch: {error.format_message()}")
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()
