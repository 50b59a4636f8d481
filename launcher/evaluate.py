"""`gigabatch eval`: a finished or running run's newest checkpoint on any set, without DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path

from gigabatch.data.errors import GigabatchError
from gigabatch.data.tokenizer import load_tokenizer
from gigabatch.trainer.checkpoint import latest_checkpoint
from gigabatch.trainer.distributed import World, device_of_this_process
from gigabatch.trainer.evaluation.retrieval import evaluate_retrieval
from gigabatch.trainer.inputs import open_eval
from gigabatch.trainer.loop import describe
from gigabatch.trainer.runfolder import RunFolder
from gigabatch.trainer.towers import build_towers


def evaluate_run(run: RunFolder, on: str, positives: str | None, as_json: bool) -> None:
    """Print the retrieval of `run` on the set `on`. Raises GigabatchError."""
    config = run.config()
    index = open_eval(config, on)
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        raise GigabatchError(f"{run.path}: there is no checkpoint yet; train first.")
    field = config.objective.positives if positives is None else positives
    towers = build_towers(config, load_tokenizer(run.tokenizer).get_vocab_size())
    towers.load_state_dict(checkpoint.tensors("towers"), strict=True)
    world = World(0, 1, device_of_this_process(), None)
    metrics = evaluate_retrieval(
        towers.to(world.device).eval(),
        index,
        config,
        run,
        world,
        None if field == "none" else field,
    )
    name = Path(on).name
    if as_json:
        print(json.dumps({f"eval/{name}/{key}": value for key, value in metrics.items()}))
    else:
        print(f"step {checkpoint.step}, {describe(name, metrics)}")
