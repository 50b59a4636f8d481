"""On torchrun ranks, for each ZeRO stage: the gradients of one exact step, beside those of one
graph over the same micro-batches; and how many reductions a step takes. Prints JSON on rank 0."""

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
from gigabatch.trainer.distributed import World, join_world, leave
from gigabatch.trainer.engine import Engine
from gigabatch.trainer.inputs import open_train, plans_of, train_stream
from gigabatch.trainer.objectives import Context, Objective, build_objective
from gigabatch.trainer.step import ExactStep, tower_inputs
from gigabatch.trainer.taps import in_view, plain_of, views_of
from gigabatch.trainer.towers import build_towers


class ListeningEngine(Engine):
    """Keeps the averaged gradients that a step is about to apply."""

    def step(self, lr: float) -> tuple[bool, float]:
        from deepspeed.utils import safe_get_full_grad

        if self.stage > 0:
            self.seen = {n: safe_get_full_grad(p).clone() for n, p in self.trained.items()}
            return super().step(lr)
        hook = self.adamw.register_step_pre_hook(lambda *_: self._keep())
        # Before clipping, which is a hook of its own, added first: clipping is off in this probe.
        result = super().step(lr)
        hook.remove()
        return result

    def _keep(self) -> None:
        self.seen = {name: p.grad.clone() for name, p in self.trained.items()}


def objective_of(config: Config) -> Objective:
    return build_objective(config.objective, group=config.data.group)


def batch(config: Config, tokenizer: Path, world_size: int, rank: int) -> list[MicroBatch]:
    data = open_train(config)
    plans = plans_of(data, world_size, rank, 1, 1)
    stream = train_stream(data, plans, tokenizer, objective_of(config).needs.columns)
    return next(group_by_step(stream, plans.per_step))


def one_graph(config: Config, tokenizer: Path, vocab: int) -> dict[str, Tensor]:
    """Gradients of the whole global batch in one autograd graph, in this process alone."""
    towers, objective = build_towers(config, vocab), objective_of(config)
    outputs: dict[str, list[Tensor]] = {}
    taps = objective.needs.taps
    meta: dict[str, list[Tensor]] = {}
    for micro in batch(config, tokenizer, 1, 0):
        first = key(config.run.seed, "micro-batch", micro.step, micro.number)
        for view in range(views_of(taps)):
            stream = key(first, "view", view) if view else first
            inputs = tower_inputs(micro, config.data, stream)
            for tap, vectors in towers(inputs, stream, plain_of(taps, view)).items():
                outputs.setdefault(in_view(tap, view), []).append(vectors)
        for name, column in micro.tensors.items():
            meta.setdefault(name, []).append(column)
    rows = {tap: torch.cat(parts) for tap, parts in outputs.items()}
    columns = {name: torch.cat(parts) for name, parts in meta.items()}
    loss = objective(rows, columns, Context(None, 1))
    loss.value.backward()
    grads = {name: p.grad for name, p in towers.named_parameters() if p.grad is not None}
    own = {f"objective {name}": p.grad for name, p in objective.named_parameters()}
    return grads | own | {"loss": loss.value.detach()}


def exact_step(config: Config, tokenizer: Path, vocab: int, world: World) -> dict[str, Tensor]:
    towers, objective = build_towers(config, vocab), objective_of(config)
    engine = ListeningEngine(towers, config, world)
    step = ExactStep(engine, objective, config, world)
    own: dict[str, Tensor] = {}

    def keep_own(*_: Any) -> None:
        for name, parameter in objective.named_parameters():
            own[f"objective {name}"] = parameter.grad.clone()

    step.optimizer.register_step_pre_hook(keep_own)
    result = step(1, batch(config, tokenizer, world.size, world.rank), lr=1e-3)
    assert result.applied
    return engine.seen | own | {"loss": torch.tensor(result.loss)}


class CountReductions:
    """Counts calls that reduce over ranks, by listening at torch.distributed."""

    NAMES = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "_all_reduce")

    def __enter__(self) -> CountReductions:
        self.calls, self.kept = 0, {n: getattr(dist, n) for n in self.NAMES if hasattr(dist, n)}
        for name, function in self.kept.items():
            setattr(dist, name, self._counting(function))
        return self

    def _counting(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return function(*args, **kwargs)

        return call

    def __exit__(self, *_: object) -> None:
        for name, function in self.kept.items():
            setattr(dist, name, function)


def worst(exact: dict[str, Tensor], whole: dict[str, Tensor]) -> tuple[float, str]:
    assert exact.keys() == whole.keys(), exact.keys() ^ whole.keys()
    gaps = {
        name: float((exact[name] - value).norm() / value.norm()) for name, value in whole.items()
    }
    name = max(gaps, key=lambda n: gaps[n])
    return gaps[name], name


def main(config_path: Path, tokenizer: Path) -> None:
    vocab = load_tokenizer(tokenizer).get_vocab_size()
    report: dict[str, Any] = {}
    with join_world(1) as world:
        whole = one_graph(load_config(config_path, ["train.max_grad_norm=0"]), tokenizer, vocab)
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
            gap, name = worst(exact_step(config, tokenizer, vocab, world), whole)
            report[str(zero)] = {"gap": gap, "name": name, "reductions": counts}
        if world.is_main:
            print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave(0)
