"""Command `gigabatch bench data`: measure the loading of a run's data or of synthetic images."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from gigabatch.data.bench.run import run
from gigabatch.data.bench.setup import Setup
from gigabatch.data.bench.shards import synthesize
from gigabatch.data.errors import GigabatchError
from gigabatch.data.stream import load_stage
from gigabatch.kernels.bench.machine import processor
from gigabatch.launcher.progress import progress_bar
from gigabatch.trainer.config import Config
from gigabatch.trainer.config.load import load_config
from gigabatch.trainer.inputs import cache_of, fields_of, make_tokenizer, open_train, plans_of

STEPS = 1000
"""Number of steps whose batches are read; after the last, reading starts over."""


def bench_data(
    path: Path,
    overrides: Sequence[str],
    synthetic: str | None,
    workers: str,
    minutes: float,
    out: Path | None,
) -> int:
    """Run the benchmark.

    Args:
        path: Config of a run.
        overrides: Config settings as `key=value`.
        synthetic: Kind of synthetic images to read; None reads the run's data.
        workers: Numbers of loader processes, comma-separated.
        minutes: Approximate duration.
        out: Folder for results; None writes no files.

    Returns:
        Exit code.

    Raises:
        GigabatchError: if the config, the options or the data are invalid.
    """
    with ExitStack() as cleanup:
        if synthetic:
            folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="gigabatch-bench-"))
            print(f"generating synthetic images of kind {synthetic}", flush=True)
            synthesize(Path(folder), synthetic)
            overrides = [*overrides, f"data.root={folder}", "data.train=."]
        work = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
        setup = _setup(load_config(path, overrides), workers, work)
        return run(
            setup,
            minutes=minutes,
            out=out,
            say=lambda line: print(line, flush=True),
            machine={"processor": processor()},
            command=shlex.join(["gigabatch", *sys.argv[1:]]),
        )


def _setup(config: Config, workers: str, work: Path) -> Setup:
    try:
        counts = [int(count) for count in workers.split(",")]
    except ValueError:
        raise GigabatchError(f"--workers is {workers!r}; specify numbers, such as 0,2.") from None
    with progress_bar("indexing shards") as progress:
        data = open_train(config, progress)
    tokenizer = work / "tokenizer.json"
    make_tokenizer(config, data).save(str(tokenizer))
    return Setup(
        indexes=data.indexes,
        plans=plans_of(data, 1, 0, 1, STEPS),
        fields=fields_of(config),
        tokenizer=tokenizer,
        seed=config.run.seed,
        workers=counts,
        prefetch=config.data.prefetch,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        augmentation=config.data.augment,
        stages=[load_stage(stage) for stage in config.data.stages],
        cache=cache_of(config),
    )
