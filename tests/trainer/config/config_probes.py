"""Probes of config keys: functions of a config and a folder that return a comparable value.

A key has an effect if a probe's value differs.
"""

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
from PIL import ExifTags, Image
from support import spoil

from gigabatch.data.decode.images import decode_image
from gigabatch.data.errors import BadSample
from gigabatch.data.text.captions import ExtraText, read_captions
from gigabatch.data.text.tokenizer import load_tokenizer
from gigabatch.launcher.cluster.workers import scaling, start_settings, worker_settings
from gigabatch.launcher.start import prepare_run
from gigabatch.launcher.unplanned_ends import overdue_message
from gigabatch.trainer.checkpoints.format import write_checkpoint
from gigabatch.trainer.checkpoints.remote import RemoteRun
from gigabatch.trainer.checkpoints.saver import Saver
from gigabatch.trainer.config import Config
from gigabatch.trainer.distributed import World
from gigabatch.trainer.engine import deepspeed_config
from gigabatch.trainer.init_from import load_init_weights
from gigabatch.trainer.inputs import (
    cache_of,
    fields_of,
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

SINGLE = World(0, 1, torch.device("cpu"), None)


def digest(*tensors: torch.Tensor) -> str:
    """Return the SHA-256 of the tensors' values."""
    joined = b"".join(t.detach().double().numpy().tobytes() for t in tensors)
    return hashlib.sha256(joined).hexdigest()


def micro_batches(config: Config, folder: Path) -> Any:
    """Return the stream of the first step."""
    data = open_train(config)
    make_tokenizer(config, data).save(str(folder / "tokenizer.json"))
    needs, plans = build_objective(config.objective).needs, plans_of(data, 1, 0, 1, 1)
    tokenizer = folder / "tokenizer.json"
    return train_stream(data, plans, tokenizer, needs.columns, vectors=needs.vectors)


def probe_batch(config: Config, folder: Path) -> Any:
    return [
        [m.number, list(m.keys), digest(*m.tensors.values())] for m in micro_batches(config, folder)
    ]


def probe_inputs(config: Config, folder: Path) -> Any:
    micro = next(iter(micro_batches(config, folder)))
    return digest(*tower_inputs(micro, config.data, rng_key=7)["image"])


def probe_prepared(config: Config, folder: Path) -> Any:
    return prepare_run(config, "run").path.name


def probe_pixels(config: Config, folder: Path) -> Any:
    """Decode a JPEG whose EXIF data turns it upside down."""
    pixels = np.random.default_rng(0).integers(0, 256, (41, 61, 3), np.uint8)
    exif, file = Image.Exif(), BytesIO()
    exif[ExifTags.Base.Orientation] = 3
    Image.fromarray(pixels).save(file, "jpeg", exif=exif)
    return digest(decode_image(file.getvalue(), config.data.image, "sample"))


def probe_loaders(config: Config, folder: Path) -> Any:
    stream = micro_batches(config, folder)
    workers = len(psutil.Process().children())
    iterator = iter(stream)
    next(iterator)
    workers = len(psutil.Process().children()) - workers
    prefetch = stream.pipeline[0].prefetch_factor if workers else None
    # Nothing is prefetched without a loader process, so add one.
    if not workers:
        data = config.data.model_copy(update={"workers": 1})
        return probe_loaders(config.model_copy(update={"data": data}), folder)
    return [workers, prefetch]


def embed(config: Config, folder: Path) -> tuple[Any, Any]:
    """Return the initial towers and their outputs on the first micro-batch."""
    micro = next(iter(micro_batches(config, folder)))
    vocab = load_tokenizer(folder / "tokenizer.json").get_vocab_size()
    towers = build_towers(config, vocab)
    return towers, towers(tower_inputs(micro, config.data, rng_key=7), 7)


def probe_towers(config: Config, folder: Path) -> Any:
    towers, outputs = embed(config, folder)
    trained = [name for name, p in towers.named_parameters() if p.requires_grad]
    return [trained, digest(*towers.state_dict().values()), digest(*outputs.values())]


def probe_sensors(config: Config, folder: Path) -> Any:
    """Probe the towers on samples with a tone and pairs of numbers."""
    write_sensor_samples(folder / "train")
    data = config.data.model_copy(update={"root": str(folder)})
    return probe_towers(config.model_copy(update={"data": data}), folder)


def write_sensor_samples(folder: Path) -> None:
    folder.mkdir()
    tone, png = BytesIO(), BytesIO()
    soundfile.write(tone, np.sin(np.arange(250) ** 1.2), 2000, format="WAV")
    Image.new("RGB", (16, 16), "teal").save(png, "png")
    with wds.TarWriter(str(folder / "a.tar"), mtime=0) as writer:
        for number in range(8):
            pairs = {"pair": [[0.1, number], [0.5, -1], [2, 2]]}
            sample = {"json": pairs, "wav": tone.getvalue(), "png": png.getvalue()}
            writer.write({"__key__": f"o{number}", **sample})


def probe_activations(config: Config, folder: Path) -> Any:
    """Count the elements that autograd saves for the backward pass."""
    sizes: list[int] = []

    def record_size(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record_size, lambda tensor: tensor):
        embed(config, folder)
    return sum(sizes)


def probe_objective(config: Config, folder: Path) -> Any:
    """Return digests of the objective's parameters, by name."""
    objective = build_objective(config.objective, width=4)
    return {name: digest(p) for name, p in objective.named_parameters()}


def probe_optimizer(config: Config, folder: Path) -> Any:
    towers, _ = embed(config, folder)
    optimizer = adamw(
        tower_groups(towers.named_parameters(), config.optimizer.weight_decay), config.optimizer
    )
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def probe_schedule(config: Config, folder: Path) -> Any:
    return [lr_factor(step, 400, config.schedule) for step in (1, 50, 300, 395)]


def probe_run(config: Config, folder: Path) -> Any:
    index = open_train(config)
    tokenizer = make_tokenizer(config, index)
    run = create_run(config, "run")
    tokenizer.save(str(run.tokenizer))
    threads = torch.get_num_threads()
    try:
        run_training(run)
        return summarize_run(run)
    finally:
        torch.set_num_threads(threads)


def probe_length(config: Config, folder: Path) -> Any:
    """Return the number of steps of a new run."""
    return resolve_epochs(config, len(open_train(config))).train.steps


def probe_initial(config: Config, folder: Path) -> Any:
    """Digest the initial towers; `train.init_from`, if set, becomes a checkpoint of seed 5."""
    train = config.train.model_copy(update={"init_from": None})
    without_init = config.model_copy(update={"train": train})
    source_run = config.run.model_copy(update={"seed": 5})
    source, _ = embed(without_init.model_copy(update={"run": source_run}), folder)
    averaged = {name: tensor / 2 for name, tensor in source.state_dict().items()}
    files = {"towers": source.state_dict(), "ema": averaged}
    write_checkpoint(RunFolder(folder), 1, 1, files, {"step": 1}, config.checkpoint)
    towers, _ = embed(without_init, folder)
    if config.train.init_from:
        checkpoint = folder / "checkpoints" / "step-00000001"
        train = config.train.model_copy(update={"init_from": checkpoint})
        load_init_weights(towers, config.model_copy(update={"train": train}), SINGLE)
    return digest(*towers.state_dict().values())


def probe_saver(config: Config, folder: Path) -> Any:
    """Return the saved steps right after `save`; a background write of 200 MB is unfinished."""
    run = create_run(config, "run")
    attempt = run.take_attempt()
    with Saver(run, SINGLE, attempt, config.checkpoint, lambda step, tags: None) as saver:
        saver.save(1, lambda: ({"towers": {"w": torch.zeros(50_000_000)}}, {"step": 1}))
        return run.steps_saved()


def probe_copies(config: Config, folder: Path) -> Any:
    """Return the steps at the copy URL and the tags of the saver's metrics."""
    settings, url = config.checkpoint, f"file://{folder}/copies"
    if settings.copy_to:
        settings = settings.model_copy(update={"copy_to": url})
    run = create_run(config, "run")
    for path in (run.tokenizer, run.path / "data.digest"):
        path.touch()
    with Saver(run, SINGLE, run.take_attempt(), settings, lambda step, tags: None) as saver:
        saver.save(1, lambda: ({"towers": {"w": torch.zeros(10)}}, {"step": 1}))
        saver.finish_write()
        saver.await_copies(1, lambda: None)
    return [RemoteRun(f"{url}/{run.path.name}").steps(), saver.metrics().keys()]


def probe_grace(config: Config, folder: Path) -> Any:
    """Return the message of a stop that exceeds the grace time."""
    run = create_run(config, "run")
    return overdue_message(run).splitlines()[0]


def probe_ray(config: Config, folder: Path) -> Any:
    """Return the settings that Ray receives."""
    cluster = config.cluster
    return [str(scaling(cluster)), worker_settings(cluster), start_settings(cluster)]


def probe_damage(config: Config, folder: Path) -> Any:
    """Train on a set with one sample that was damaged after indexing."""
    root = folder / "damaged"
    shutil.copytree(Path(config.data.root) / "train", root / "train")
    data = config.data.model_copy(update={"root": str(root)})
    train = config.train.model_copy(update={"steps": 8})
    config = config.model_copy(update={"data": data, "train": train})
    (index,) = open_train(config).indexes
    spoil(index, 30)
    return probe_run(config, folder)


def probe_mixture(config: Config, folder: Path) -> Any:
    """Count the samples of each source before some positions."""
    mixture = open_train(config).mixture
    return [mixture.samples_before(position).tolist() for position in (5000, 15_000, 25_000)]


def probe_ids(config: Config, folder: Path) -> Any:
    """Return the codes or errors of a number and of a missing value."""
    fields, index = fields_of(config, ["x"]), open_train(config).indexes[0]
    codes: list[Any] = []
    for record in (b'{"x": 7.0}', b'{"x": null}'):
        try:
            codes.append(fields.column_values(0, index, 0, {"json": record}, "here"))
        except BadSample as error:
            codes.append(str(error))
    return codes


def probe_lines(config: Config, folder: Path) -> Any:
    """Read a member of two lines with the settings of every text."""
    texts = [tower for tower in config.towers.more.values() if isinstance(tower, ExtraText)]
    return [read_captions(b"one\ntwo", text, "here") for text in (config.data.captions, *texts)]


def summarize_run(run: RunFolder) -> Any:
    """Return the name, steps, files, metrics and attempts of a run."""
    lines = read_metrics(run.metrics)
    tags = ("train/loss", "train/logit_scale", "step")
    attempts = [line[22:] for line in run.log.read_text().splitlines() if "attempt" in line]
    return [
        run.path.name, run.steps_saved(), sorted(p.name for p in run.path.rglob("step-*.json")),
        [{tag: line.get(tag) for tag in tags} for line in lines], attempts, run.samples.exists(),
        sorted({p.name for p in run.path.rglob("*.safetensors")}),
    ]  # fmt: skip


PROBES: dict[str, Callable[[Config, Path], Any]] = {
    "batch": probe_batch,
    "inputs": probe_inputs,
    "prepared": probe_prepared,
    "pixels": probe_pixels,
    "loaders": probe_loaders,
    "towers": probe_towers,
    "sensors": probe_sensors,
    "activations": probe_activations,
    "objective": probe_objective,
    "optimizer": probe_optimizer,
    "schedule": probe_schedule,
    "run": probe_run,
    "length": probe_length,
    "saver": probe_saver,
    "copies": probe_copies,
    "initial": probe_initial,
    "deepspeed": lambda config, folder: json.dumps(deepspeed_config(config)),
    "paths": lambda config, folder: [str(config.run.dir), open_train(config).indexes[0].source],
    "damage": probe_damage,
    "grace": probe_grace,
    "ray": probe_ray,
    "mixture": probe_mixture,
    "lines": probe_lines,
    "ids": probe_ids,
    "cache": lambda config, folder: cache_of(config).limit_bytes,
}
