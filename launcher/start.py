"""Start and resume of runs; every check that can fail is made before a worker starts."""

from __future__ import annotations

import logging
import os
import shutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from gigabatch.data.errors import GigabatchError
from gigabatch.data.failures import as_failure
from gigabatch.data.text.tokenizer import load_tokenizer
from gigabatch.launcher.console import Console
from gigabatch.launcher.output import write, write_stderr
from gigabatch.launcher.preflight.data import check_data
from gigabatch.launcher.preflight.doctor import check_machine
from gigabatch.launcher.preflight.rehearsal import rehearse, rehearse_evaluations
from gigabatch.launcher.preflight.remote_checkpoints import (
    check_copy_name_is_free,
    claim_copies,
    is_copied_name,
    writable_remote_run,
)
from gigabatch.launcher.progress import progress_bar
from gigabatch.launcher.signals import (
    INTERRUPTED,
    StopRequest,
    abort_on_interrupt,
    ctrl_c_received,
    interrupt_main,
    stop_on_signals,
)
from gigabatch.launcher.slurm import join_slurm_step
from gigabatch.launcher.torchrun import run_torchrun
from gigabatch.launcher.unplanned_ends import (
    exit_overdue,
    overdue_message,
    raise_with_resume,
    shown_path,
)
from gigabatch.trainer.checkpoints.download import (
    fetch_newer_checkpoint,
    fetch_run,
    open_remote_run,
    read_copied_config,
)
from gigabatch.trainer.checkpoints.format import latest_checkpoint
from gigabatch.trainer.checkpoints.remote import remote_run
from gigabatch.trainer.config import Config
from gigabatch.trainer.config.load import (
    differences,
    load_config,
    parse_run_config,
    read_config,
    resolve,
)
from gigabatch.trainer.distributed import exit_now, join_world
from gigabatch.trainer.init_from import pin_init_from, warn_of_other_pixels
from gigabatch.trainer.inputs import make_tokenizer
from gigabatch.trainer.loop import run_training
from gigabatch.trainer.run.create import check_name_is_free, create_run, resolve_epochs
from gigabatch.trainer.run.folder import RunFolder
from gigabatch.trainer.towers.pretrained import adopt_pretrained

log = logging.getLogger(__name__)
OpenRun = Callable[[], AbstractContextManager[RunFolder]]
"""Function whose context prepares a run folder and holds its lock."""

RESUMABLE_KEYS = (
    "cluster.", "checkpoint.", "monitor.", "eval.", "data.workers", "data.prefetch", "data.root",
    "data.cache_gib", "data.max_damaged",
    "run.dir", "train.zero_stage", "train.max_bad_steps", "train.on_bad_steps", "train.max_rewinds",
    "train.hang_timeout_s", "train.rehearse",
)  # fmt: skip
"""Prefixes of keys that may change on resume without `--allow`, because they do not affect
training."""


def start_run(config_path: Path, overrides: Sequence[str]) -> int:
    """Train a new run. Under torchrun, every rank must call it.

    Args:
        config_path: YAML file; its name is the prefix of the run folder's name.
        overrides: Strings `key=value`.

    Returns:
        Exit code: 0 finished, 75 or 130 stopped by a signal.

    Raises:
        GigabatchError: for a user error, or if the workers failed.
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        raise GigabatchError(
            "torchrun restarted `train`, which would start a second run. Use `torchrun ... "
            "-m gigabatch.launcher resume RUN`, or let cluster.launcher=torchrun restart it."
        )
    config = load_config(config_path, [*overrides, *_world_overrides()])

    @contextmanager
    def new_run() -> Iterator[RunFolder]:
        run = prepare_run(config, config_path.stem)
        with run.lock():
            yield run

    return _start(new_run, config)


def resume_run(run: RunFolder, overrides: Sequence[str], allow: Sequence[str]) -> int:
    """Continue a run from its newest valid checkpoint. Under torchrun, every rank must call it.

    Args:
        run: Run folder.
        overrides: Strings `key=value`.
        allow: Keys that may change although they change the training; `data` for the shards.

    Returns:
        Exit code; see `start_run`.

    Raises:
        GigabatchError: for a user error, or if the workers failed.
    """
    config = resumed_config(run, [*overrides, *_world_overrides()], allow)

    @contextmanager
    def old_run() -> Iterator[RunFolder]:
        with run.lock():  # before anything else, so that a run that trains now is not changed
            reopen_run(run, config, allow)
            yield run

    return _start(old_run, config)


def resume_copy(url: str, overrides: Sequence[str], allow: Sequence[str]) -> int:
    """Continue a run from the copies of its checkpoints.

    Downloads the run folder into `run.dir` if it is missing, or the newest checkpoint if the folder
    has only older ones.

    Args:
        url: URL of the copies, `checkpoint.copy_to`/NAME.
        overrides: Strings `key=value`.
        allow: Keys that may change although they change the training; `data` for the shards.

    Returns:
        Exit code; see `start_run`.

    Raises:
        GigabatchError: for a user error, or if the workers failed.
    """
    remote = open_remote_run(url)
    name = remote.url + "/config.yaml"
    overrides = [*overrides, *_world_overrides()]
    config = _resumed(read_copied_config(remote), name, overrides, allow)
    run = RunFolder(config.run.dir / remote.url.rpartition("/")[2])

    @contextmanager
    def copied_run() -> Iterator[RunFolder]:
        is_here = (run.path / "config.yaml").exists()
        if not is_here:
            fetch_run(remote, run)
        with run.lock():
            if is_here:
                fetch_newer_checkpoint(remote, run)
            reopen_run(run, config, allow)
            yield run

    return _start(copied_run, config)


def _world_overrides() -> list[str]:
    """Return the overrides that adopt the launcher and world size of the user's own torchrun or
    srun; none otherwise."""
    join_slurm_step()
    if "RANK" not in os.environ:
        return []
    return ["cluster.launcher=torchrun", f"cluster.workers={os.environ['WORLD_SIZE']}"]


def _start(open_run: OpenRun, config: Config) -> int:
    if "RANK" in os.environ:
        _exit_as_rank(open_run, config)
    with ExitStack() as stack:
        with abort_on_interrupt():
            run = stack.enter_context(open_run())
        return _launch(run)


def resumed_config(run: RunFolder, overrides: Sequence[str], allow: Sequence[str]) -> Config:
    """Return the run's config with overrides.

    Raises:
        GigabatchError: if they would change the training and `allow` does not name the key; the
            message contains a diff.
    """
    path = run.path / "config.yaml"
    return _resumed(read_config(path), str(path), overrides, allow)


def _resumed(text: str, where: str, overrides: Sequence[str], allow: Sequence[str]) -> Config:
    old = parse_run_config(text, where)
    new = resolve(parse_run_config(text, where, overrides))
    if new.train.epochs is not None:
        raise GigabatchError(
            f"{where}: train.epochs sets the length of a new run. To change the length of this one "
            f"({old.train.steps} steps), set train.steps=N --allow train.steps."
        )
    changed = differences(old, new)
    refused = {
        key: values
        for key, values in changed.items()
        if not key.startswith(RESUMABLE_KEYS) and key not in allow
    }
    if refused:
        diff = "\n".join(f"  {key}: {a!r} -> {b!r}" for key, (a, b) in refused.items())
        allows = " ".join(f"--allow {key}" for key in refused)
        raise GigabatchError(
            f"{where}: these changes would make it a different run:\n{diff}\n"
            f"Keep the old values, start a new run, or add {allows}."
        )
    return new


def prepare_run(config: Config, stem: str) -> RunFolder:
    """Create the folder of a new run, with everything that its workers need.

    Args:
        config: Resolved config.
        stem: Prefix of the run's name if `run.name` is unset.

    Raises:
        GigabatchError: if a check fails.
    """
    check_name_is_free(config)
    check_machine(config, log.warning)
    check_copy_name_is_free(config)
    config = adopt_pretrained(pin_init_from(config))
    warn_of_other_pixels(config)
    with progress_bar("indexing shards") as progress:
        data = check_data(config, progress)
    config = resolve_epochs(config, len(data))
    data = replace(data, config=config)  # with the length that `resolve_epochs` filled in
    tokenizer = make_tokenizer(config, data)
    if config.train.rehearse:
        rehearse(config, data, tokenizer)
    run = create_run(config, stem, partial(is_copied_name, config.checkpoint))
    try:
        tokenizer.save(str(run.tokenizer))
        run.write_data_digest(data.digest)
        if remote := remote_run(config.checkpoint, run.path.name):
            remote.claim(run)
    except BaseException:  # a refusal or Ctrl-C leaves no run folder behind
        shutil.rmtree(run.path, ignore_errors=True)
        raise
    return run


def reopen_run(run: RunFolder, config: Config, allow: Sequence[str]) -> None:
    """Prepare an existing run folder, whose lock is held, for more training.

    Raises:
        GigabatchError: if the run is finished, or cannot be resumed with this config or data.
    """
    newest = latest_checkpoint(run)
    last = config.train.steps
    if newest and newest.step > last:
        raise GigabatchError(
            f"{run.path}: train.steps={last} is less than the {newest.step} steps already trained."
        )
    remote = writable_remote_run(run, config.checkpoint)
    is_copied = remote is None or newest is None or newest.step in remote.steps()
    is_evaluated = run.evaluated(last) or not config.eval.sets
    if newest and newest.step == last and is_evaluated and is_copied:
        raise GigabatchError(
            f"{run.path}: the run is finished ({last} steps). To train longer: train.steps=N "
            "--allow train.steps. To evaluate a different set: gigabatch eval."
        )
    with progress_bar("indexing shards") as progress:
        data = check_data(config, progress)
    if newest and "data" not in allow and newest.state["data"] != data.digest:
        raise GigabatchError(
            f"{run.path}: the shards of {', '.join(i.source for i in data.indexes)} are not those "
            "that the run was trained on (their names, sizes, members or checksums differ). "
            "Restore them, or add --allow data."
        )
    new_sets = set(config.eval.sets) - set(run.config().eval.sets)
    if new_sets and run.tokenizer.exists() and config.train.rehearse:
        rehearse_evaluations(config, load_tokenizer(run.tokenizer), sorted(new_sets))
    if not run.tokenizer.exists():
        if newest:
            raise GigabatchError(f"{run.tokenizer} is missing; restore it from a copy of the run.")
        make_tokenizer(config, data).save(
            str(run.tokenizer)
        )  # the run's first start was interrupted
    if remote:
        claim_copies(remote, run, newest.step if newest else 0)
    run.clear_requests()
    run.write_data_digest(data.digest)
    run.write_config(config)


def _launch(run: RunFolder) -> int:
    """Run the workers, print their log, and return the exit code."""
    config = run.config()
    is_inline = config.cluster.launcher == "inline"
    on_overdue = partial(exit_overdue, run) if is_inline else interrupt_main
    with (
        Console(run.log) as console,
        stop_on_signals(config.cluster.grace_s, on_overdue, run.request_stop) as stop,
    ):
        console.say(f"run {shown_path(run.path)}")
        try:
            _run_workers(run, config, stop, console)
        except KeyboardInterrupt as error:
            if ctrl_c_received() and not stop.overdue:
                raise
            if not stop.overdue:
                raise_with_resume(run, error)
        except GigabatchError:
            raise
        except BaseException as error:
            raise_with_resume(run, error)
    if failure := run.failure():
        raise GigabatchError(failure)
    if run.is_finished():
        return 0
    if run.stopped() and not stop.overdue:
        write(f"to continue: gigabatch resume {shown_path(run.path)}\n")
        return stop.exit_code
    if stop.overdue:
        write_stderr(overdue_message(run))
        return stop.exit_code
    crash = run.crash() or "a worker was killed, or ended without an error message"
    raise GigabatchError(
        f"{run.path}: the workers failed:\n{crash.rstrip()}\n"
        f"`gigabatch resume {run.path}` continues from the last checkpoint."
    )


def _run_workers(run: RunFolder, config: Config, stop: StopRequest, console: Console) -> None:
    match config.cluster.launcher:
        case "inline":
            os.environ.update(config.cluster.env)
            run_training(run, stop)
        case "torchrun":
            run_torchrun(run)
        case "ray":
            from gigabatch.launcher.cluster.workers import run_ray

            console.say(f"starting Ray with {_worker_range(config)}")
            run_ray(run)


def _worker_range(config: Config) -> str:
    low, high = config.cluster.min_workers, config.cluster.max_workers
    return f"{high} worker{'s' * (high > 1)}" if low == high else f"{low} to {high} workers"


def _exit_as_rank(open_run: OpenRun, config: Config) -> NoReturn:
    """Train in this process, which is a rank of the user's own torchrun or srun; then exit."""
    try:
        code = _train_as_rank(open_run, config)
    except BaseException as error:  # SystemExit(0) too, which would count as success
        failure = as_failure(error)
        if isinstance(failure, GigabatchError):
            write_stderr(f"gigabatch: {failure}")
            code = 2
        elif isinstance(error, KeyboardInterrupt) and ctrl_c_received():
            code = INTERRUPTED
        else:
            note = f"\n{failure}" if failure is not error else ""
            write_stderr("".join(traceback.format_exception(error)).rstrip() + note)
            code = 1
    exit_now(code)  # after an error too, because an abort during teardown would hide the exit code


def _train_as_rank(open_run: OpenRun, config: Config) -> int:
    """Prepare the run on rank 0 for all ranks, train, and return the exit code."""
    os.environ.update(config.cluster.env)
    with join_world(config.cluster.threads) as world, ExitStack() as stack:
        outcome: tuple[str, str] | None = None
        if world.is_main:
            try:
                outcome = ("run", str(stack.enter_context(open_run()).path))
            except GigabatchError as error:
                outcome = ("error", str(error))
        kind, text = world.broadcast(outcome)
        if kind == "error":
            raise GigabatchError(text)
        run = RunFolder(Path(text))
        if world.is_main:
            console = stack.enter_context(Console(run.log))
            console.say(f"run {shown_path(run.path)}")
        grace = run.config().cluster.grace_s
        stop = stack.enter_context(stop_on_signals(grace, partial(exit_overdue, run)))
        try:
            return 0 if run_training(run, stop) else stop.exit_code
        except GigabatchError:
            raise
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and ctrl_c_received():
                raise
            raise_with_resume(run, error)
