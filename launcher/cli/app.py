"""The command `gigabatch`: its subcommands, options and exit codes.

Modules that import torch are imported inside the subcommands, after the paths are checked.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gigabatch.data.errors import GigabatchError
from gigabatch.data.failures import as_failure, raise_open_file_limit
from gigabatch.data.processes import ctrl_c_deferred
from gigabatch.launcher.cli.arguments import (
    ConfigPath,
    OptionalConfigPath,
    Overrides,
    RunPath,
    RunPathOrURL,
    check_data_root,
)
from gigabatch.launcher.cli.bench import bench
from gigabatch.launcher.cli.config import config
from gigabatch.launcher.cli.data import data
from gigabatch.launcher.cli.eval import EvalCommand, evaluate
from gigabatch.launcher.cli.jobs import jobs, submit
from gigabatch.launcher.cli.objectives import objectives
from gigabatch.launcher.cli.reproduce import reproduce
from gigabatch.launcher.cli.template import TemplateCommand, template
from gigabatch.launcher.output import write, write_stderr
from gigabatch.launcher.signals import INTERRUPTED, ctrl_c_received, remember_ctrl_c


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and ctrl_c_received():
                # Typer would exit without a message.
                print("gigabatch: aborted", file=sys.stderr)
                raise typer.Exit(INTERRUPTED) from None
            failure = as_failure(error)  # click would take an EOFError for an abort
            if failure is error:
                raise
            raise failure from error


app = typer.Typer(
    cls=_Group,
    help="Contrastive pre-training of encoders, on one laptop or many nodes.\n\n"
    "Start with `gigabatch train quickstart`. `gigabatch COMMAND -h` explains a command.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        write(f"gigabatch {version('gigabatch')}\n")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Handle the options that precede the command."""


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> int:
    """Start a new training run.

    The run gets a folder in run.dir (default: runs/), named after CONFIG. Ctrl-C, SIGTERM, SIGUSR1
    and SIGUSR2 stop it after the current step, with a checkpoint; `gigabatch resume` continues it.

    Exit codes: 0 finished; 2 user error, explained by the message; 75 stopped by SIGTERM, SIGUSR1
    or SIGUSR2 (start it again); 130 stopped by Ctrl-C; 1 defect.

    \b
    Examples:
      gigabatch train quickstart
      gigabatch train my.yaml train.steps=1000 cluster.workers=8
      gigabatch train clip data.root=/data/pairs train.epochs=3
    """
    check_data_root(config, overrides or [])
    # Ctrl-C is deferred during the imports: some libraries catch it, others stay broken after it.
    with ctrl_c_deferred():
        from gigabatch.launcher.start import start_run

    return start_run(config, overrides or [])


@app.command()
def resume(
    run: RunPathOrURL,
    overrides: Overrides = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Accept a changed value of this key, or changed shards (`data`). Repeatable.",
        ),
    ] = None,
) -> int:
    """Continue a run from its newest valid checkpoint.

    The continued run equals one that never stopped. Workers, launcher, checkpoints, metrics and
    evaluations may change freely; other changes need --allow. Given the URL of its copied
    checkpoints (checkpoint.copy_to/NAME), a lost run folder is downloaded into run.dir first.

    \b
    Examples:
      gigabatch resume quickstart-001
      gigabatch resume quickstart-001 train.steps=800 --allow train.steps
      gigabatch resume s3://bucket/copies/clip-001 run.dir=/scratch/runs
    """
    with ctrl_c_deferred():
        from gigabatch.launcher.start import resume_copy, resume_run
        from gigabatch.trainer.run.create import open_run

    if "://" in run:
        return resume_copy(run, overrides or [], allow or [])
    return resume_run(open_run(run), overrides or [], allow or [])


app.command()(config)
app.command("eval", cls=EvalCommand)(evaluate)


@app.command()
def doctor(config: OptionalConfigPath = None, overrides: Overrides = None) -> int:
    """Check this machine; every problem comes with a fix.

    Checks packages, GPUs, shared memory, open files, disks, clocks, the host name and the bandwidth
    between workers; with CONFIG also its data and the URL for copied checkpoints. Exit codes: 0 a
    run can start; 2 a run would fail.
    """
    from gigabatch.launcher.preflight.data import examine_data
    from gigabatch.launcher.preflight.doctor import doctor as examine
    from gigabatch.trainer.config.load import load_config

    loaded = load_config(config, overrides or []) if config else None
    return examine(loaded, examine_data, say=lambda line: print(line, flush=True))


@app.command()
def board(
    run: RunPath,
    port: Annotated[int, typer.Option(help="TCP port; 0 takes a free one.")] = 6006,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 opens it to the network.")
    ] = "127.0.0.1",
) -> None:
    """Show a run in TensorBoard until Ctrl-C."""
    from gigabatch.trainer.run.create import open_run

    logs = str(open_run(run).tensorboard)
    command = ["-m", "tensorboard.main", "--logdir", logs, "--port", str(port), "--host", host]
    os.execv(sys.executable, [sys.executable, *command])


app.command()(submit)
app.command(cls=TemplateCommand)(template)
app.command()(objectives)
app.command()(reproduce)
app.add_typer(jobs, name="jobs")
app.add_typer(data, name="data")
app.add_typer(bench, name="bench")


def main() -> None:
    """Run the command line; a user error prints one message and exits with code 2."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("gigabatch").setLevel(logging.INFO)
    raise_open_file_limit()
    try:
        with remember_ctrl_c():
            code = app(standalone_mode=False)
    except GigabatchError as error:
        write_stderr(f"gigabatch: {error}")
        code = 2
    except (KeyboardInterrupt, typer.Abort, typer.Exit) as end:
        code = getattr(end, "exit_code", INTERRUPTED)
        if code == INTERRUPTED:
            write_stderr("gigabatch: aborted")
    except Exception as error:
        if not hasattr(error, "format_message"):  # only errors of the command line have it
            raise
        message = error.format_message()
        # Without a command, the message is the help text.
        write_stderr(message if message.startswith("Usage:") else f"gigabatch: {message}")
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()
