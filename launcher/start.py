"""Starting and resuming runs: everything that can be wrong is found before a worker starts."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.console import Console
from gigabatch.launcher.output import complain, write
from gigabatch.launcher.preflight.data import check_data
from gigabatch.launcher.preflight.doctor import refuse_unfit
from gigabatch.launcher.preflight.remote_checkpoints import (
    copies_of,
    is_taken,
    refuse_taken,
    take_over,
)
from gigabatch.launcher.progress import progress_bar
from gigabatch.launcher.signals import (
    StopRequest,
    abort_on_interrupt,
    interrupt_main,
    stop_on_signals,
)
from gigabatch.launcher.slurm import join_slurm_step
from gigabatch.launcher.torchrun import run_torchrun
from gigabatch.trainer.checkpoints.download import copied_config, fetch_newer, fetch_run, open_copy
from gigabatch.trainer.checkpoints.format import latest_checkpoint
from gigabatch.trainer.checkpoints.remote import remote_run
from gigabatch.trainer.config import Config
from gigabatch.trainer.config.load import (
    differences,
    load_config,
    parse_config,
    read_config,
    resolve,
)
from gigabatch.trainer.distributed import join_world, leave
from gigabatch.trainer.init_from import pin_init_from
from gigabatch.trainer.inputs import (
    make_tokenizer,
)
from gigabatch.trainer.loop import run_training
from gigabatch.trainer.run.create import create_run, refuse_taken_name
from gigabatch.trainer.run.folder import RunFolder

log = logging.getLogger(__name__)
Opened = Callable[[], AbstractContextManager[RunFolder]]
"""Prepares a run and holds it."""

FREE_ON_RESUME = (
    "cluster.", "checkpoint.", "monitor.", "eval.", "data.workers", "data.prefetch", "data.root",
    "data.cache_gib", "data.max_damaged",
    "run.dir", "train.zero_stage", "train.max_bad_steps", "train.on_bad_steps", "train.max_rewinds",
    "train.hang_timeout_s",
)  # fmt: skip
"""Keys that may change on resume without `--allow`: they leave the training itself as it was."""


def start_run(config_path: Path, overrides: Sequence[str]) -> int:
    """Train a new run; the exit code. Under torchrun, called on every rank."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        raise GigabatchError(
            "torchrun started `train` again, which would begin another run. Use `torchrun ... "
            "-m gigabatch.launcher resume RUN`, or let cluster.launcher=torchrun restart it."
        )
    config = load_config(config_path, [*overrides, *_own_world()])

    @contextmanager
    def new_run() -> Iterator[RunFolder]:
        run = prepare_run(config, config_path.stem)
        with run.lock():
            yield run

    return _start(new_run, config)


def resume_run(run: RunFolder, overrides: Sequence[str], allow: Sequence[str]) -> int:
    """Go on with a run from its newest sound checkpoint; the exit code. Under torchrun, called
    on every rank."""
    config = resumed_config(run, [*overrides, *_own_world()], allow)

    @contextmanager
    def old_run() -> Iterator[RunFolder]:
        with run.lock():  # first of all: nothing of a run that is being trained may be touched
            reopen_run(run, config, allow)
            yield run

    return _start(old_run, config)


def resume_copy(url: str, overrides: Sequence[str], allow: Sequence[str]) -> int:
    """Go on with a run from its copies at `url`: its folder in `run.dir` is fetched where it is
    gone, and given the newest checkpoint where that is not as new. The exit code."""
    place = open_copy(url)
    old = place.url + "/config.yaml"
    config = _resumed(copied_config(place), old, [*overrides, *_own_world()], allow)
    run = RunFolder(config.run.dir / place.url.rpartition("/")[2])

    @contextmanager
    def copied_run() -> Iterator[RunFolder]:
        is_here = (run.path / "config.yaml").exists()
        if not is_here:
            fetch_run(place, run)
        with run.lock():
            if is_here:
                fetch_newer(place, run)
            reopen_run(run, config, allow)
            yield run

    return _start(copied_run, config)


def _own_world() -> list[str]:
    """Where the user called torchrun or srun, its world is the run's, whatever the config says."""
    join_slurm_step()
    if "RANK" not in os.environ:
        return []
    return ["cluster.launcher=torchrun", f"cluster.workers={os.environ['WORLD_SIZE']}"]


def _start(opened: Opened, config: Config) -> int:
    if "RANK" in os.environ:
        _as_rank(opened, config)
    with ExitStack() as stack:
        with abort_on_interrupt():
            run = stack.enter_context(opened())
        return _launch(run)


def resumed_config(run: RunFolder, overrides: Sequence[str], allow: Sequence[str]) -> Config:
    """The run's config with overrides. Raises GigabatchError, with a diff, where they would
    change the training and `allow` does not name the key."""
    path = run.path / "config.yaml"
    return _resumed(read_config(path), str(path), overrides, allow)


def _resumed(text: str, where: str, overrides: Sequence[str], allow: Sequence[str]) -> Config:
    old = parse_config(text, where)
    new = resolve(parse_config(text, where, overrides))
    changed = differences(old, new)
    refused = {
        key: values
        for key, values in changed.items()
        if not key.startswith(FREE_ON_RESUME) and key not in allow
    }
    if refused:
        diff = "\n".join(f"  {key}: {a!r} -> {b!r}" for key, (a, b) in refused.items())
        allows = " ".join(f"--allow {key}" for key in refused)
        raise GigabatchError(
            f"{where}: resuming with a changed config would make it another run:\n{diff}\n"
            f"Leave these as they were, start a new run, or say {allows}."
        )
    return new


def prepare_run(config: Config, stem: str) -> RunFolder:
    """The folder of a new run, with all that its workers need; `stem` begins the name where
    `run.name` is unset. Raises GigabatchError for whatever would make the run fail."""
    refuse_taken_name(config)
    refuse_unfit(config, log.warning)
    refuse_taken(config)
    config = pin_init_from(config)
    with progress_bar("indexing shards") as progress:
        data = check_data(config, progress)
    tokenizer = make_tokenizer(config, data)
    run = create_run(config, stem, partial(is_taken, config.checkpoint))
    tokenizer.save(str(run.tokenizer))
    run.write_data_digest(data.digest)
    if place := remote_run(config.checkpoint, run.path.name):
        place.claim(run)
    return run


def reopen_run(run: RunFolder, config: Config, allow: Sequence[str]) -> None:
    """Make the folder of a run that is held ready to go on. Raises GigabatchError."""
    newest = latest_checkpoint(run)
    last = config.train.steps
    if newest and newest.step > last:
        raise GigabatchError(
            f"{run.path}: train.steps={last} is less than the {newest.step} steps already done."
        )
    place = copies_of(run, config.checkpoint)
    uncopied = place is not None and newest is not None and newest.step not in place.steps()
    evaluated = run.evaluated(last) or not config.eval.sets
    if newest and newest.step == last and evaluated and not uncopied:
        raise GigabatchError(
            f"{run.path}: the run is finished ({last} steps). To train longer: train.steps=N "
            "--allow train.steps. To measure another set: gigabatch eval."
        )
    with progress_bar("indexing shards") as progress:
        data = check_data(config, progress)
    if newest and "data" not in allow and newest.state["data"] != data.digest:
        raise GigabatchError(
            f"{run.path}: the shards of {', '.join(i.source for i in data.indexes)} are not those "
            "that the run was trained on "
            "(their names, sizes, members or checksums differ). Restore them, or say --allow data."
        )
    if not run.tokenizer.exists():
        if newest:
            raise GigabatchError(f"{run.tokenizer} is missing; restore it from a copy of the run.")
        make_tokenizer(config, data).save(str(run.tokenizer))  # its making was cut off
    if place:
        take_over(place, run, newest.step if newest else 0)
    run.clear_requests()
    run.write_data_digest(data.digest)
    run.write_config(config)


def _launch(run: RunFolder) -> int:
    config = run.config()
    inline = config.cluster.launcher == "inline"
    late = partial(_leave_now, run) if inline else interrupt_main
    with (
        Console(run.log) as console,
        stop_on_signals(config.cluster.grace_s, late, run.request_stop) as stop,
    ):
        console.say(f"run {_shown(run.path)}")
        try:
            _workers(run, config, stop, console)
        except KeyboardInterrupt:
            if not stop.overdue:
                raise
    if failure := run.failure():
        raise GigabatchError(failure)
    if run.is_finished():
        return 0
    if run.stopped() and not stop.overdue:
        write(f"to go on: gigabatch resume {_shown(run.path)}\n")
        return stop.exit_code
    if stop.overdue:
        complain(too_late(run))
        return stop.exit_code
    crash = run.crash() or "a worker was killed, or ended without a word"
    raise GigabatchError(
        f"{run.path}: the workers failed:\n{crash.rstrip()}\n"
        f"`gigabatch resume {run.path}` goes on from the last checkpoint."
    )


def _leave_now(run: RunFolder, stop: StopRequest) -> None:
    complain(too_late(run))
    leave(stop.exit_code)


def too_late(run: RunFolder) -> str:
    """What to say where the time for a clean end is over."""
    saved = run.steps_saved()
    last = f"the checkpoint of step {saved[-1]}" if saved else "no checkpoint"
    late = "its copy was" if run.stopped() else "the step in progress and its checkpoint were"
    return (
        f"gigabatch: {late} not done within "
        f"cluster.grace_s={run.config().cluster.grace_s:g} s; left with {last}.\n"
        f"to go on: gigabatch resume {_shown(run.path)}"
    )


def _workers(run: RunFolder, config: Config, stop: StopRequest, console: Console) -> None:
    match config.cluster.launcher:
        case "inline":
            os.environ.update(config.cluster.env)
            run_training(run, stop)
        case "torchrun":
            run_torchrun(run)
        case "ray":
            from gigabatch.launcher.cluster.workers import run_ray

            console.say(f"starting Ray with {_how_many(config)}")
            run_ray(run)


def _how_many(config: Config) -> str:
    least, most = config.cluster.least, config.cluster.most
    return f"{most} worker{'s' * (most > 1)}" if least == most else f"{least} to {most} workers"


def _shown(path: Path) -> Path:
    """A path as the user would type it: relative where it lies below the working directory."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _as_rank(opened: Opened, config: Config) -> NoReturn:
    """This process is a rank already, of the user's torchrun or srun."""
    try:
        code = _train_as_rank(opened, config)
    except GigabatchError as error:
        complain(f"gigabatch: {error}")
        code = 2
    leave(code)  # also after an error, whose code a teardown that aborts would hide


def _train_as_rank(opened: Opened, config: Config) -> int:
    """Rank 0 prepares for all; the exit code."""
    os.environ.update(config.cluster.env)
    with join_world(config.cluster.threads) as world, ExitStack() as stack:
        made: tuple[str, str] | None = None
        if world.is_main:
            try:
                made = ("run", str(stack.enter_context(opened()).path))
            except GigabatchError as error:
                made = ("error", str(error))
        kind, text = world.share(made)
        if kind == "error":
            raise GigabatchError(text)
        run = RunFolder(Path(text))
        if world.is_main:
            console = stack.enter_context(Console(run.log))
            console.say(f"run {_shown(run.path)}")
        grace = run.config().cluster.grace_s
        stop = stack.enter_context(stop_on_signals(grace, partial(_leave_now, run)))
        return 0 if run_training(run, stop) else stop.exit_code
