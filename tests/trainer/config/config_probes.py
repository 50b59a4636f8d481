"""What of a run can be seen of its config, by name of a probe: config, folder -> anything."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import soundfile
import torch
import webdataset as wds
from PIL import Image
from support import spoil

from gigabatch.data.text.captions import ExtraText, read_captions
from gigabatch.data.text.tokenizer import load_tokenizer
from gigabatch.launcher.cluster.workers import scaling, start_settings, worker_settings
from gigabatch.launcher.start import overdue_message
from gigabatch.trainer.checkpoints.format import write_checkpoint
from gigabatch.trainer.checkpoints.remote import RemoteRun
from gigabatch.trainer.checkpoints.saver import Saver
from gigabatch.trainer.config import Config
from gigabatch.trainer.distributed import World
from gigabatch.trainer.engine import deepspeed_config
from gigabatch.trainer.init_from import load_init_weights
from gigabatch.trainer.inputs import (
    cache_of,
    make_tokenizer,
    open_train,
    plans_of,
    train_stream,
)
from gigabatch.trainer.loop import run_training
from gigabatch.trainer.monitoring.metrics import read_metrics
from gigabatch.trainer.objectives import build_objective
from gigabatch.trainer.optim import adamw, lr_factor, tower_groups
from gigabatch.trainer.run.create import create_run, resolve_epochs
from gigabatch.trainer.run.folder import RunFolder
from gigabatch.trainer.step import tower_inputs
from gigabatch.trainer.towers import build_towers

ALONE = World(0, 1, torch.device("cpu"), None)


def digest(*tensors: torch.Tensor) -> str:
    joined = b"".join(t.detach().double().numpy().tobytes() for t in tensors)
    return hashlib.sha256(joined).hexdigest()


def micro_batches(config: Config, folder: Path) -> Any:
    data = open_train(config)
    make_tokenizer(config, data).save(str(folder / "tokenizer.json"))
    needs, plans = build_objective(config.objective).needs, plans_of(data, 1, 0, 1, 1)
    tokenizer = folder / "tokenizer.json"
    return train_stream(data, plans, tokenizer, needs.columns, vectors=needs.vectors)


def see_batch(config: Config, folder: Path) -> Any:
    return [
        [m.number, list(m.keys), digest(*m.tensors.values())] for m in micro_batches(config, folder)
    ]


def see_inputs(config: Config, folder: Path) -> Any:
    micro = next(iter(micro_batches(config, folder)))
    return digest(*tower_inputs(micro, config.data, rng_key=7)["image"])


def see_loaders(config: Config, folder: Path) -> Any:
    stream = micro_batches(config, folder)
    workers = len(psutil.Process().children())
    iterator = iter(stream)
    next(iterator)
    workers = len(psutil.Process().children()) - workers
    ahead = stream.pipeline[0].prefetch_factor if workers else None
    # Prefetching means something only with a loader process: read both with one.
    if not workers:
        one = config.data.model_copy(update={"workers": 1})
        return see_loaders(config.model_copy(update={"data": one}), folder)
    return [workers, ahead]


def embed(config: Config, folder: Path) -> tuple[Any, Any]:
    micro = next(iter(micro_batches(config, folder)))
    vocab = load_tokenizer(folder / "tokenizer.json").get_vocab_size()
    towers = build_towers(config, vocab)
    return towers, towers(tower_inputs(micro, config.data, rng_key=7), 7)


def see_towers(config: Config, folder: Path) -> Any:
    towers, outputs = embed(config, folder)
    trained = [name for name, p in towers.named_parameters() if p.requires_grad]
    return [trained, digest(*towers.state_dict().values()), digest(*outputs.values())]


def see_others(config: Config, folder: Path) -> Any:
    """The towers, on samples with a tone and pairs of numbers."""
    write_others(folder / "train")
    data = config.data.model_copy(update={"root": str(folder)})
    return see_towers(config.model_copy(update={"data": data}), folder)


def write_others(folder: Path) -> None:
    folder.mkdir()
    tone, png = BytesIO(), BytesIO()
    soundfile.write(tone, np.sin(np.arange(250) ** 1.2), 2000, format="WAV")
    Image.new("RGB", (16, 16), "teal").save(png, "png")
    with wds.TarWriter(str(folder / "a.tar"), mtime=0) as writer:
        for number in range(8):
            pairs = {"pair": [[0.1, number], [0.5, -1], [2, 2]]}
            sample = {"json": pairs, "wav": tone.getvalue(), "png": png.getvalue()}
            writer.write({"__key__": f"o{number}", **sample})


def see_saved(config: Config, folder: Path) -> Any:
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        embed(config, folder)
    return sum(kept)


def see_objective(config: Config, folder: Path) -> Any:
    """The parameters of the objective."""
    objective = build_objective(config.objective, width=4)
    return {name: digest(p) for name, p in objective.named_parameters()}


def see_optimizer(config: Config, folder: Path) -> Any:
    towers, _ = embed(config, folder)
    made = adamw(
        tower_groups(towers.named_parameters(), config.optimizer.weight_decay), config.optimizer
    )
    return [{k: v for k, v in group.items() if k != "params"} for group in made.param_groups]


def see_schedule(config: Config, folder: Path) -> Any:
    return [lr_factor(step, 400, config.schedule) for step in (1, 50, 300, 395)]


def see_run(config: Config, folder: Path) -> Any:
    index = open_train(config)
    tokenizer = make_tokenizer(config, index)
    run = create_run(config, "run")
    tokenizer.save(str(run.tokenizer))
    threads = torch.get_num_threads()
    try:
        run_training(run)
        return leavings(run)
    finally:
        torch.set_num_threads(threads)


def see_length(config: Config, folder: Path) -> Any:
    """Return the number of steps of the run that would be created."""
    return resolve_epochs(config, len(open_train(config))).train.steps


def see_initial(config: Config, folder: Path) -> Any:
    """Towers that begin, where `train.init_from` is set, from a checkpoint of another seed."""
    train = config.train.model_copy(update={"init_from": None})
    plain = config.model_copy(update={"train": train})
    other = config.run.model_copy(update={"seed": 5})
    source, _ = embed(plain.model_copy(update={"run": other}), folder)
    averaged = {name: tensor / 2 for name, tensor in source.state_dict().items()}
    files = {"towers": source.state_dict(), "ema": averaged}
    write_checkpoint(RunFolder(folder), 1, 1, files, {"step": 1}, config.checkpoint)
    towers, _ = embed(plain, folder)
    if config.train.init_from:
        place = folder / "checkpoints" / "step-00000001"
        train = config.train.model_copy(update={"init_from": place})
        load_init_weights(towers, config.model_copy(update={"train": train}), ALONE)
    return digest(*towers.state_dict().values())


def see_threads(config: Config, folder: Path) -> Any:
    """Which kind of save the step waits for: one of 200 MB is over when it returns, or is not."""
    run = create_run(config, "run")
    attempt = run.take_attempt()
    with Saver(run, ALONE, attempt, config.checkpoint, lambda step, tags: None) as saver:
        saver.save(1, lambda: ({"towers": {"w": torch.zeros(50_000_000)}}, {"step": 1}))
        return run.steps_saved()


def see_copies(config: Config, folder: Path) -> Any:
    """Which steps lie where checkpoints are copied to."""
    settings, to = config.checkpoint, f"file://{folder}/far"
    if settings.copy_to:
        settings = settings.model_copy(update={"copy_to": to})
    run = create_run(config, "run")
    for path in (run.tokenizer, run.path / "data.digest"):
        path.touch()
    with Saver(run, ALONE, run.take_attempt(), settings, lambda step, tags: None) as saver:
        saver.save(1, lambda: ({"towers": {"w": torch.zeros(10)}}, {"step": 1}))
        saver.finish_write()
        saver.await_copies(1, lambda: None)
    return [RemoteRun(f"{to}/{run.path.name}").steps(), saver.metrics().keys()]


def see_grace(config: Config, folder: Path) -> Any:
    """What is said where the time is over."""
    run = create_run(config, "run")
    return overdue_message(run).splitlines()[0]


def see_ray(config: Config, folder: Path) -> Any:
    """The settings that Ray receives."""
    cluster = config.cluster
    return [str(scaling(cluster)), worker_settings(cluster), start_settings(cluster)]


def see_damage(config: Config, folder: Path) -> Any:
    """A run over a set of which a sample has gone bad since it was indexed."""
    bad = folder / "bad"
    shutil.copytree(Path(config.data.root) / "train", bad / "train")
    moved = config.model_copy(update={"data": config.data.model_copy(update={"root": str(bad)})})
    (index,) = open_train(moved).indexes
    spoil(index, 30)
    steps = moved.train.model_copy(update={"steps": 8})
    return see_run(moved.model_copy(update={"train": steps}), folder)


def see_weights(config: Config, folder: Path) -> Any:
    drawn = open_train(config).mixture
    return [drawn.samples_before(position).tolist() for position in (5000, 15_000, 25_000)]


def see_lines(config: Config, folder: Path) -> Any:
    others = [tower for tower in config.towers.more.values() if isinstance(tower, ExtraText)]
    places = [config.data.captions, *others]
    return [read_captions(b"one\ntwo", place, "here") for place in places]


def leavings(run: RunFolder) -> Any:
    lines = read_metrics(run.metrics)
    tags = ("train/loss", "train/logit_scale", "step")
    starts = [line[22:] for line in run.log.read_text().splitlines() if "attempt" in line]
    return [
        run.path.name, run.steps_saved(), sorted(p.name for p in run.path.rglob("step-*.json")),
        [{tag: line.get(tag) for tag in tags} for line in lines], starts, run.samples.exists(),
        sorted({p.name for p in run.path.rglob("*.safetensors")}),
    ]  # fmt: skip


PROBES: dict[str, Callable[[Config, Path], Any]] = {
    "batch": see_batch,
    "inputs": see_inputs,
    "loaders": see_loaders,
    "towers": see_towers,
    "others": see_others,
    "saved": see_saved,
    "objective": see_objective,
    "optimizer": see_optimizer,
    "schedule": see_schedule,
    "run": see_run,
    "length": see_length,
    "threads": see_threads,
    "copies": see_copies,
    "initial": see_initial,
    "deepspeed": lambda config, folder: json.dumps(deepspeed_config(config)),
    "paths": lambda config, folder: [str(config.run.dir), open_train(config).indexes[0].source],
    "damage": see_damage,
    "grace": see_grace,
    "ray": see_ray,
    "weights": see_weights,
    "lines": see_lines,
    "cache": lambda config, folder: cache_of(config).limit_bytes,
}
