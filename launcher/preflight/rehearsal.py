"""Rehearsal of a new run: a few samples pass through all its parts before a worker starts.

It runs in this process, on the CPU, in float32 and without DeepSpeed. Nothing that it builds is
kept, and the random number generators are restored, so it does not change the run.
"""

from __future__ import annotations

import logging
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.data.order.assignment import MicroBatchPlan
from gigabatch.data.order.mixture import batch_sample_numbers, to_sample_number
from gigabatch.data.shards.index import Index
from gigabatch.data.shards.sources import Sources
from gigabatch.data.stream import MicroBatch
from gigabatch.trainer.config import Config, positives_of
from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.in_training import check_best, evaluate_retrieval
from gigabatch.trainer.init_from import check_init_weights
from gigabatch.trainer.inputs import TrainData, fields_message, open_eval, train_stream
from gigabatch.trainer.objective_state import ObjectiveState
from gigabatch.trainer.objectives import Context, Loss, Objective, build_objective
from gigabatch.trainer.run.folder import RunFolder
from gigabatch.trainer.step import tower_inputs
from gigabatch.trainer.taps import TEACHER, bases_in_view, count_views, parse_tap, with_view
from gigabatch.trainer.towers import Towers, build_towers
from gigabatch.trainer.towers.base import reason
from gigabatch.trainer.towers.checks import check_output, check_text_model

log = logging.getLogger(__name__)
SAMPLES = 2
"""Samples of each set that are read."""
ALONE = World(0, 1, torch.device("cpu"), None)
"""This process; the process group of a rank is not used."""
OFF = "train.rehearse=false skips this rehearsal, which runs on the CPU in float32."


def rehearse(config: Config, data: TrainData, tokenizer: Tokenizer) -> None:
    """Pass two samples of the training data and of every evaluation set through the run's parts.

    The training samples are decoded and collated, with the user's stages, and go through towers,
    heads and objective; those of `eval.sets` through towers and metrics. The encoders' outputs and
    the text models' conventions are compared with the config.

    Args:
        config: Resolved config of the run.
        data: Opened training data.
        tokenizer: The run's tokenizer.

    Raises:
        GigabatchError: if anything fails.
    """
    log.info("rehearsing with two samples of each set, on this machine's CPU")
    with _rehearsed_run(config, tokenizer) as (towers, config, run):
        began = time.monotonic()
        check_init_weights(towers, config)
        _check_text_models(towers, config, tokenizer)
        _rehearse_step(towers.train(), config, replace(data, config=config), run.tokenizer)
        _rehearse_evaluations(towers.eval(), config, run)
        seconds = time.monotonic() - began
        log.info("rehearsal passed: %.1f s beyond building the towers", seconds)


def rehearse_evaluations(config: Config, tokenizer: Tokenizer, sets: Sequence[str]) -> None:
    """Pass two samples of some evaluation sets through towers and metrics.

    Args:
        config: Resolved config of a run that is resumed.
        tokenizer: The run's tokenizer.
        sets: Those of `eval.sets` that the run has not had before.

    Raises:
        GigabatchError: if anything fails.
    """
    checked = config.eval.model_copy(update={"sets": tuple(sets)})
    best = config.checkpoint.model_copy(update={"best": None})  # it may name a set of before
    config = config.model_copy(update={"eval": checked, "checkpoint": best})
    with _rehearsed_run(config, tokenizer) as (towers, config, run):
        _rehearse_evaluations(towers.eval(), config, run)


@contextmanager
def _rehearsed_run(
    config: Config, tokenizer: Tokenizer
) -> Iterator[tuple[Towers, Config, RunFolder]]:
    """Yield towers, config and folder of a run that is removed at the end.

    The global random number generators are restored.
    """
    with _global_state_kept(), tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        tokenizer.save(str(run.tokenizer))
        towers = build_towers(config, tokenizer.get_vocab_size())
        towers.autocast = None  # CPUs lack some operators in bf16
        data = config.data.model_copy(update={"workers": 0})
        yield towers, config.model_copy(update={"data": data}), run


@contextmanager
def _global_state_kept() -> Iterator[None]:
    """Restore the global random number generators at the end."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def _check_text_models(towers: Towers, config: Config, tokenizer: Tokenizer) -> None:
    for name in config.texts:
        length_set = getattr(config.towers.more.get(name), "length", None) is not None
        check_text_model(
            towers.encoders[towers.owner(name)], config.tower(name), config.tower_key(name),
            tokenizer, config.text_length(name),
            f"towers.more.{name}.length" if length_set else "data.text.length",
        )  # fmt: skip


def _rehearse_step(towers: Towers, config: Config, data: TrainData, tokenizer: Path) -> None:
    """Read the samples; run one micro-batch through towers and objective."""
    objective = build_objective(
        config.objective.for_any_device(), "cpu", config.data.group, config.towers.width
    )
    needs = objective.needs
    plans = _plans(config, data)
    stream = train_stream(
        data, plans, tokenizer, needs.columns, numbers=needs.numeric_columns, vectors=needs.vectors
    )  # fmt: skip
    batches = iter(_read(stream, data.indexes, "data.train"))
    micro = next(batches)
    for _ in batches:
        pass  # reading the other sources is their check
    outputs = _embed(towers, config, micro, needs.taps)
    with torch.no_grad():
        teacher = _embed_as_teacher(towers, config, micro, needs.teacher)
    tower_tensors = {"image", "text", *micro.more}
    meta = {name: t for name, t in micro.tensors.items() if name not in tower_tensors}
    rehearse_objective(objective, {tap: outputs[tap] for tap in needs.taps}, teacher, meta)


def rehearse_objective(
    objective: Objective[Any],
    outputs: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    meta: Mapping[str, Tensor],
) -> None:
    """Run an objective forward and backward, and commit its updates to a separate state.

    Args:
        objective: The objective; its buffers change.
        outputs: The taps that it reads.
        teacher: `teacher.TAP` -> outputs of the momentum tower.
        meta: As in `Objective.forward`, without tables.

    Raises:
        GigabatchError: if it raises anything, or its loss is not a scalar with a gradient.
    """
    rows = {tap: vectors.detach().requires_grad_() for tap, vectors in outputs.items()}
    # The tables get rows for these samples only: those of all samples may take gigabytes.
    local = torch.arange(len(meta["sample"]))
    state = ObjectiveState(objective, [len(local)], None, ALONE)
    name = type(objective).__name__
    try:
        loss = objective({**rows, **teacher}, {**meta, **state.read(local)}, Context(None, 1, 0, 0))
        _check_loss(loss, name)
        loss.value.backward()
        state.commit(loss.updates(), local)
    except GigabatchError:
        raise
    except Exception as error:
        raise GigabatchError(
            f"objective: {name}.forward failed on {len(local)} samples: {reason(error)}. Fix it, "
            f"or the keys of `objective`. {OFF}"
        ) from error


def _check_loss(loss: Any, name: str) -> None:
    value = loss.value if isinstance(loss, Loss) else loss
    if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
        raise GigabatchError(
            f"objective: {name}.forward must return a Loss whose value is "
            "0-dimensional and has a gradient in the towers' outputs, or nothing would be trained."
        )


def _plans(config: Config, data: TrainData) -> list[MicroBatchPlan]:
    """Return a micro-batch of the run's first samples, then one for each source without any."""
    numbers = batch_sample_numbers(data.mixture, 1, config.batch.global_size)[:SAMPLES].tolist()
    groups = [numbers]
    read = {Sources.source_and_row(number)[0] for number in numbers}
    for source, index in enumerate(data.indexes):
        if source not in read:
            rows = np.arange(min(SAMPLES, len(index)))
            groups.append(to_sample_number(np.full(len(rows), source), rows).tolist())
    return [MicroBatchPlan(1, n, True, tuple(group)) for n, group in enumerate(groups)]


def _read(stream: Any, indexes: Sequence[Index], key: str) -> Iterator[MicroBatch]:
    """Yield the micro-batches of a stream; an error names the json fields that exist."""
    try:
        yield from stream
    except GigabatchError as error:
        raise GigabatchError(f"{key}: {_with_fields(error, indexes)}") from error
    except Exception as error:
        raise GigabatchError(
            f"{key}: reading {SAMPLES} samples failed: {reason(error)}. Fix the stage of "
            f"data.stages, or the shards. {OFF}"
        ) from error


def _with_fields(error: GigabatchError, indexes: Sequence[Index]) -> str:
    """Add the json fields that exist to an error about one that does not."""
    text = str(error)
    is_of_a_field = any(word in text for word in ("json", "caption", "field"))
    lacks_a_list = is_of_a_field and "json fields are" not in text
    return text + (fields_message(indexes) if lacks_a_list else "")


def _embed(
    towers: Towers, config: Config, micro: MicroBatch, taps: Sequence[str]
) -> dict[str, Tensor]:
    """Embed a micro-batch as the first step does, in all its views."""
    outputs: dict[str, Tensor] = {}
    for view in range(count_views(taps)):
        inputs = tower_inputs(micro, config.data, rng_key=1 + view)
        bases = bases_in_view(taps, view)
        read = {parse_tap(base).modality for base in bases} if view else inputs.keys()
        for name in (name for name in inputs if name in read):
            taps_read = [base for base in bases if parse_tap(base).modality == name]
            embedded = call_tower(towers, config, name, inputs[name], taps_read)
            outputs |= {with_view(base, view): rows for base, rows in embedded.items()}
    return outputs


def _embed_as_teacher(
    towers: Towers, config: Config, micro: MicroBatch, taps: Sequence[str]
) -> dict[str, Tensor]:
    """Return the outputs of the momentum tower, which begins as a copy of the towers."""
    inputs = tower_inputs(micro, config.data, rng_key=1) if taps else {}
    outputs = towers(inputs, None, taps) if taps else {}
    return {TEACHER + tap: outputs[tap] for tap in taps}


def call_tower(
    towers: Towers, config: Config, name: str, arguments: tuple[Tensor, ...], taps: Sequence[str]
) -> dict[str, Tensor]:
    """Run one tower and check its encoder's output.

    Raises:
        GigabatchError: with the class, the call and the key, whatever the tower raised.
    """
    encoder, key = towers.encoders[towers.owner(name)], config.tower_key(name)

    def check(_module: Any, _arguments: Any, output: Any) -> None:
        check_output(encoder, key, arguments, output)

    hook = encoder.register_forward_hook(check)
    try:
        outputs: dict[str, Tensor] = towers({name: arguments}, 1, taps)
    except GigabatchError:
        raise
    except Exception as error:
        shapes = ", ".join(
            f"{str(a.dtype).removeprefix('torch.')} {list(a.shape)}" for a in arguments
        )
        raise GigabatchError(
            f"{key}: calling {type(encoder).__name__}.forward({shapes}) failed: {reason(error)}. "
            f"Fix the encoder, or the keys of {key} and the data that it reads. {OFF}"
        ) from error
    finally:
        hook.remove()
    return outputs


def _rehearse_evaluations(towers: Towers, config: Config, run: RunFolder) -> None:
    """Measure retrieval on the first samples of every evaluation set."""
    metrics: dict[str, float] = {}
    if len(config.modalities) < 2:
        return
    embed = _OneRowTowers(towers, config)
    for name in config.eval.sets:
        index = open_eval(config, name)
        try:
            positives, never = positives_of(config.objective), lambda: False
            of_set = evaluate_retrieval(
                embed, index, config, run, ALONE, positives, never, limit=SAMPLES
            )
        except GigabatchError as error:
            raise GigabatchError(f"eval.sets: {name}: {_with_fields(error, [index])}") from error
        except Exception as error:
            raise GigabatchError(
                f"eval.sets: evaluating {SAMPLES} samples of {name} failed: {reason(error)}. Fix "
                f"the set, or remove it from eval.sets. {OFF}"
            ) from error
        metrics |= {f"eval/{index.name}/{key}": value for key, value in (of_set or {}).items()}
    if config.eval.sets:
        check_best(config, metrics)


class _OneRowTowers:
    """Towers in evaluation mode that embed the first row of each shape once, and repeat it.

    The towers are the costly part of a rehearsal, and further sets would tell nothing new of them.
    A single row is also what the last micro-batch of a set may have.
    """

    def __init__(self, towers: Towers, config: Config) -> None:
        self.towers, self.config = towers, config
        self.known: dict[object, dict[str, Tensor]] = {}

    def __call__(
        self,
        inputs: Mapping[str, tuple[Tensor, ...]],
        rng_key: int | None = None,
        taps: Sequence[str] = (),
    ) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        for name, arguments in inputs.items():
            taps_read = [tap for tap in taps if parse_tap(tap).modality == name]
            shapes = (name, *taps_read, *((a.shape[1:], a.dtype) for a in arguments))
            if shapes not in self.known:
                first = tuple(argument[:1] for argument in arguments)
                self.known[shapes] = call_tower(self.towers, self.config, name, first, taps_read)
            rows = len(arguments[0])
            outputs |= {tap: v.repeat_interleave(rows, 0) for tap, v in self.known[shapes].items()}
        return outputs
