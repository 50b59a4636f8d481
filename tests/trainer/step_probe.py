"""Gradients of an exact step against those of one graph, at each ZeRO stage, on torchrun ranks.

Also counts the reductions of a step. Prints JSON on rank 0.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gigabatch.data.rng import key
from gigabatch.data.stream import MicroBatch, group_by_step
from gigabatch.data.text.tokenizer import load_tokenizer
from gigabatch.trainer.config import Config
from gigabatch.trainer.config.load import load_config
from gigabatch.trainer.distributed import World, exit_now, join_world
from gigabatch.trainer.engine import Engine
from gigabatch.trainer.inputs import open_train, plans_of, train_stream
from gigabatch.trainer.objectives import Context, Objective, build_objective
from gigabatch.trainer.step import ExactStep, tower_inputs
from gigabatch.trainer.taps import bases_in_view, count_views, with_view
from gigabatch.trainer.towers import build_towers


class RecordingEngine(Engine):
    """Records the averaged gradients of each step in `gradients`."""

    def step(self, lr: float) -> tuple[bool, float]:
        from deepspeed.utils import safe_get_full_grad

        if self.stage > 0:
            self.gradients = {n: safe_get_full_grad(p).clone() for n, p in self.trained.items()}
            return super().step(lr)
        hook = self.adamw.register_step_pre_hook(lambda *_: self._record())
        # Engine's clipping hook runs before this one; this probe disables clipping.
        result = super().step(lr)
        hook.remove()
        return result

    def _record(self) -> None:
        self.gradients = {name: p.grad.clone() for name, p in self.trained.items()}


def objective_of(config: Config) -> Objective:
    return build_objective(config.objective, group=config.data.group)


def batch(config: Config, tokenizer: Path, world_size: int, rank: int) -> list[MicroBatch]:
    data = open_train(config)
    plans = plans_of(data, world_size, rank, 1, 1)
    stream = train_stream(data, plans, tokenizer, objective_of(config).needs.columns)
    return next(group_by_step(stream, plans.per_step))


def one_graph(config: Config, tokenizer: Path, vocab: int) -> dict[str, Tensor]:
    """Return the global batch's gradients by one graph in this process."""
    towers, objective = build_towers(config, vocab), objective_of(config)
    outputs: dict[str, list[Tensor]] = {}
    taps = objective.needs.taps
    meta: dict[str, list[Tensor]] = {}
    for micro in batch(config, tokenizer, 1, 0):
        first_key = key(config.run.seed, "micro-batch", micro.step, micro.number)
        for view in range(count_views(taps)):
            rng_key = key(first_key, "view", view) if view else first_key
            inputs = tower_inputs(micro, config.data, rng_key)
            for tap, vectors in towers(inputs, rng_key, bases_in_view(taps, view)).items():
                outputs.setdefault(with_view(tap, view), []).append(vectors)
        for name, column in micro.tensors.items():
            meta.setdefault(name, []).append(column)
    rows = {tap: torch.cat(parts) for tap, parts in outputs.items()}
    columns = {name: torch.cat(parts) for name, parts in meta.items()}
    loss = objective(rows, columns, Context(None, 1))
    loss.value.backward()
    grads = {name: p.grad for name, p in towers.named_parameters() if p.grad is not None}
    objective_grads = {f"objective {name}": p.grad for name, p in objective.named_parameters()}
    return grads | objective_grads | {"loss": loss.value.detach()}


def exact_step(config: Config, tokenizer: Path, vocab: int, world: World) -> dict[str, Tensor]:
    towers, objective = build_towers(config, vocab), objective_of(config)
    engine = RecordingEngine(towers, config, world)
    step = ExactStep(engine, objective, config, world)
    objective_grads: dict[str, Tensor] = {}

    def record_gradients(*_: Any) -> None:
        for name, parameter in objective.named_parameters():
            objective_grads[f"objective {name}"] = parameter.grad.clone()

    step.optimizer.register_step_pre_hook(record_gradients)
    result = step(1, batch(config, tokenizer, world.size, world.rank), lr=1e-3)
    assert result.applied
    return engine.gradients | objective_grads | {"loss": torch.tensor(result.loss)}


class CountReductions:
    """Counts calls of torch.distributed that reduce over ranks."""

    NAMES = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "_all_reduce")

    def __enter__(self) -> CountReductions:
        self.calls = 0
        self.originals = {n: getattr(dist, n) for n in self.NAMES if hasattr(dist, n)}
        for name, function in self.originals.items():
            setattr(dist, name, self._counting(function))
        return self

    def _counting(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return function(*args, **kwargs)

        return call

    def __exit__(self, *_: object) -> None:
        for name, function in self.originals.items():
            setattr(dist, name, function)


def largest_gap(exact: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    assert exact.keys() == expected.keys(), exact.keys() ^ expected.keys()
    gaps = {
        name: float((exact[name] - value).norm() / value.norm()) for name, value in expected.items()
    }
    name = max(gaps, key=lambda n: gaps[n])
    return gaps[name], name


def main(config_path: Path, tokenizer: Path) -> None:
    vocab = load_tokenizer(tokenizer).get_vocab_size()
    report: dict[str, Any] = {}
    with join_world(1) as world:
        expected = one_graph(load_config(config_path, ["train.max_grad_norm=0"]), tokenizer, vocab)
        for zero in (0, 1, 2, 3):
            counts = []
            for micro in (16, 4):
                config = load_config(
                    config_path,
                    [
                        f"train.zero_stage={zero}",
                        "train.max_grad_norm=0",
                        f"batch.micro_size={micro}",
                    ],
                )
                with CountReductions() as counter:
                    exact_step(config, tokenizer, vocab, world)
                counts.append(counter.calls)
            config = load_config(config_path, [f"train.zero_stage={zero}", "train.max_grad_norm=0"])
            gap, name = largest_gap(exact_step(config, tokenizer, vocab, world), expected)
            report[str(zero)] = {"gap": gap, "name": name, "reductions": counts}
        if world.is_main:
            print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    exit_now(0)
