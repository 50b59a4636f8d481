"""What can be wrong with a run's data and devices: found before a worker starts."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from gigabatch.data.decode.members import decode_column
from gigabatch.data.decode.vectors import VectorSettings, read_vectors
from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote.cache import ShardCache
from gigabatch.data.shards.index import Index
from gigabatch.data.shards.reader import Reader
from gigabatch.data.stream import load_stage
from gigabatch.launcher.environment import in_ray_job
from gigabatch.launcher.progress import progress_bar
from gigabatch.trainer.config import Config, columns_of, positives_of, vectors_of
from gigabatch.trainer.inputs import (
    TrainData,
    cache_of,
    eval_fields,
    fields_of,
    open_eval,
    open_train,
)


def examine_data(config: Config) -> str:
    """Open a run's data as its start would; what there is. Raises GigabatchError."""
    with progress_bar("indexing shards") as progress:
        data = check_data(config, progress)
    return f"{len(data):,} samples in {', '.join(index.source for index in data.indexes)}"


def check_data(config: Config, progress: Callable[[int, int], None]) -> TrainData:
    """The training data, opened. Raises GigabatchError for too few GPUs, a stage that is not there,
    shards that are damaged or missing, and fields that samples lack."""
    devices = torch.cuda.device_count()
    ray = config.cluster.launcher == "ray"
    elsewhere = "RANK" in os.environ or (
        ray and (in_ray_job() or config.cluster.gpus_per_worker == 0)
    )
    if not elsewhere and 0 < devices < config.cluster.least:
        raise GigabatchError(
            f"cluster.workers: {config.cluster.least} workers need as many GPUs, and this "
            f"machine has {devices}. Set cluster.workers={devices}."
        )
    for path in config.data.stages:
        load_stage(path)
    data = open_train(config, progress)
    data.mixture.samples_before(0)  # raises where weights or groups do not fit
    sets = [open_eval(config, name, progress) for name in config.eval.sets]
    vectors = vectors_of(config.objective)
    fields_of(config, vectors=vectors).members(data.indexes)
    eval_fields(config).members(sets)
    shared = positives_of(config.objective)
    read = [(index, column) for index in data.indexes for column in columns_of(config.objective)]
    for index, column in read + [(index, shared) for index in sets if shared]:
        _check_column(index, column, cache_of(config))
    for index in () if config.data.missing == "mask" else data.indexes:
        for found in vectors.values():
            _check_vector(index, found, cache_of(config))
    return data


def _check_vector(index: Index, settings: VectorSettings, cache: ShardCache) -> None:
    """Whether the first sample's vector is what the objective says."""
    with Reader(index, cache) as reader:
        read_vectors(reader.read(0, settings.extension), settings, index.where(0))


def _check_column(index: Index, column: str, cache: ShardCache) -> None:
    """Whether the first sample has the field: a misspelt one is found before workers start."""
    if column in index.columns:
        return
    index.require_members("json")
    with Reader(index, cache) as reader:
        decode_column(reader.read(0, "json"), column, index.where(0))
