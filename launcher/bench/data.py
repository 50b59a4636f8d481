"""`gigabatch bench data`: a run's data, or images made for it, measured on this machine."""

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
from gigabatch.data.bench.shards import synthesise
from gigabatch.data.errors import GigabatchError
from gigabatch.data.stream import load_stage
from gigabatch.kernels.bench.machine import processor
from gigabatch.launcher.progress import progress_bar
from gigabatch.trainer.config import Config
from gigabatch.trainer.config.load import load_config
from gigabatch.trainer.inputs import cache_of, fields_of, make_tokenizer, open_train, plans_of

STEPS = 1000
"""Steps of the run whose batches are read, again and again."""


def bench_data(
    path: Path,
    overrides: Sequence[str],
    synthetic: str | None,
    workers: str,
    minutes: float,
    out: Path | None,
) -> int:
    """Measure; the exit code. Raises GigabatchError."""
    with ExitStack() as cleanup:
        if synthetic:
            folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="gigabatch-bench-"))
            print(f"making images of kind {synthetic}", flush=True)
            synthesise(Path(folder), synthetic)
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
        raise GigabatchError(f"--workers is {workers!r}; give numbers, such as 0,2.") from None
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
        stages=[load_stage(each) for each in config.data.stages],
        cache=cache_of(config),
    )
