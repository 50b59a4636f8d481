from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gigabatch.data.text.tokenizer import load_tokenizer
from gigabatch.trainer.config.load import load_config
from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.context import EvalContext
from gigabatch.trainer.inputs import make_tokenizer, open_train
from gigabatch.trainer.run.create import create_run
from gigabatch.trainer.towers import build_towers


@pytest.fixture
def untrained(tiny: Path) -> EvalContext:
    """A late-interaction run before its first step, with its set `val`."""
    config = load_config(tiny, ["objective={name: late_interaction}", "data.workers=0"])
    run = create_run(config, "r")
    make_tokenizer(config, open_train(config)).save(str(run.tokenizer))
    towers = build_towers(config, load_tokenizer(run.tokenizer).get_vocab_size()).eval()
    world = World(0, 1, torch.device("cpu"), None)
    return EvalContext(run, config, towers, world, "val", 0)
