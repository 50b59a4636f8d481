"""Gradients of an exact step with extra modalities against those of one graph, on torchrun ranks.

Prints JSON on rank 0.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from step_probe import RecordingEngine, batch, largest_gap
from torch import Tensor

from gigabatch.data.rng import key
from gigabatch.data.text.tokenizer import load_tokenizer
from gigabatch.trainer.config import Config
from gigabatch.trainer.config.load import load_config
from gigabatch.trainer.distributed import exit_now, join_world
from gigabatch.trainer.objectives import Context, build_objective
from gigabatch.trainer.step import ExactStep, tower_inputs
from gigabatch.trainer.taps import bases_in_view, count_views, with_view
from gigabatch.trainer.towers import build_towers


def one_graph(config: Config, tokenizer: Path, vocab: int) -> tuple[dict[str, Tensor], int]:
    """Return the global batch's gradients by one graph in this process, and its missing rows."""
    towers = build_towers(config, vocab)
    objective = build_objective(config.objective, width=config.towers.width)
    outputs: dict[str, list[Tensor]] = {}
    meta: dict[str, list[Tensor]] = {}
    for micro in batch(config, tokenizer, 1, 0):
        first_key = key(config.run.seed, "micro-batch", micro.step, micro.number)
        for view in range(count_views(objective.needs.taps)):
            rng_key = key(first_key, "view", view) if view else first_key
            inputs = tower_inputs(micro, config.data, rng_key)
            taps = bases_in_view(objective.needs.taps, view)
            for tap, vectors in towers(inputs, rng_key, taps).items():
                outputs.setdefault(with_view(tap, view), []).append(vectors)
        for name, column in micro.tensors.items():
            meta.setdefault(name, []).append(column)
    columns = {name: torch.cat(parts) for name, parts in meta.items()}
    rows = {tap: torch.cat(parts) for tap, parts in outputs.items()}
    loss = objective(rows, columns, Context(None, 1, 0, config.run.seed))
    loss.value.backward()
    missing = sum(int((~c).sum()) for name, c in columns.items() if name.endswith("_present"))
    return {n: p.grad for n, p in towers.named_parameters() if p.grad is not None}, missing


def main(path: Path, tokenizer: Path, settings: list[str]) -> None:
    vocab = load_tokenizer(tokenizer).get_vocab_size()
    config = load_config(path, [*settings, "train.max_grad_norm=0"])
    with join_world(1) as world:
        expected, missing = one_graph(config, tokenizer, vocab)
        engine = RecordingEngine(build_towers(config, vocab), config, world)
        objective = build_objective(config.objective, width=config.towers.width)
        step = ExactStep(engine, objective, config, world)
        assert step(1, batch(config, tokenizer, world.size, world.rank), lr=1e-3).applied
        gradients = engine.gradients
        # A head that no objective reads takes part in collectives, with a gradient of zero.
        unread = [name for name in gradients if name not in expected]
        assert not any(gradients.pop(name).any() for name in unread), unread
        gap, name = largest_gap(gradients, expected)
        if world.is_main:
            print(json.dumps({"gap": gap, "name": name, "rows": missing}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    exit_now(0)
