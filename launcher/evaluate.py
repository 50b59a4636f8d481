"""`gigabatch eval`: a finished or running run's newest checkpoint on any set, without DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path

from gigabatch.data.indexing import open_index
from gigabatch.trainer.config import positives_of
from gigabatch.trainer.distributed import World, device_of_this_process
from gigabatch.trainer.evaluation.retrieval import describe, evaluate_retrieval
from gigabatch.trainer.inference import load_newest_towers
from gigabatch.trainer.inputs import open_eval
from gigabatch.trainer.runfolder import RunFolder


def evaluate_run(run: RunFolder, on: str, positives: str | None, as_json: bool) -> None:
    """Print the retrieval of `run` on the set `on`. Raises GigabatchError."""
    config = run.config()
    # A folder as the user sees it; else the name of one of the run's own sets.
    index = open_index(on) if Path(on).is_dir() else open_eval(config, on)
    step, towers = load_newest_towers(run)
    field = positives_of(config.objective) if positives is None else positives
    world = World(0, 1, device_of_this_process(), None)
    metrics = evaluate_retrieval(
        towers.to(world.device),
        index,
        config,
        run,
        world,
        None if field == "none" else field,
    )
    assert metrics is not None  # nobody asked it to stop
    name = Path(on).resolve().name if Path(on).is_dir() else index.name
    if as_json:
        print(json.dumps({f"eval/{name}/{key}": value for key, value in metrics.items()}))
    else:
        print(f"step {step}, {describe(name, metrics)}")
