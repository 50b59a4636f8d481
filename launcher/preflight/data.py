"""Checks of a run's data and devices, made before a worker starts."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import numpy as np
import torch

from gigabatch.data.decode.vectors import VectorSettings, read_vectors
from gigabatch.data.errors import GigabatchError
from gigabatch.data.remote.cache import ShardCache
from gigabatch.data.shards.index import Index
from gigabatch.data.shards.reader import Reader
from gigabatch.data.shards.sources import SOURCE_COLUMN, indexed_codes
from gigabatch.data.stream import load_stage
from gigabatch.launcher.environment import in_ray_job
from gigabatch.launcher.progress import progress_bar
from gigabatch.trainer.config import Config, positives_of, vectors_of
from gigabatch.trainer.inputs import (
    TrainData,
    cache_of,
    eval_fields,
    fields_of,
    open_eval,
    open_train,
)
from gigabatch.trainer.required_fields import check_columns, check_eval_columns

log = logging.getLogger(__name__)


def examine_data(config: Config) -> str:
    """Open a run's data with the checks of its start; return a description.

    Raises:
        GigabatchError: if a check fails.
    """
    with progress_bar("indexing shards") as progress:
        data = check_data(config, progress)
    return f"{len(data):,} samples in {', '.join(index.source for index in data.indexes)}"


def check_data(config: Config, progress: Callable[[int, int], None]) -> TrainData:
    """Open the training data; check the data and devices that the run needs.

    Args:
        config: Resolved config.
        progress: Called with (shards indexed, shards in total).

    Raises:
        GigabatchError: if there are too few GPUs, a stage or shards are missing, shards are
            damaged, or samples lack a field or vector.
    """
    devices = torch.cuda.device_count()
    is_ray = config.cluster.launcher == "ray"
    needs_no_gpu_here = "RANK" in os.environ or (
        is_ray and (in_ray_job() or config.cluster.gpus_per_worker == 0)
    )
    workers = config.cluster.min_workers
    if not needs_no_gpu_here and 0 < devices < workers:
        raise GigabatchError(
            f"cluster.workers: {workers} workers need {workers} GPUs, and this machine has "
            f"{devices}. Set cluster.workers={devices}."
        )
    for path in config.data.stages:
        load_stage(path)
    data = open_train(config, progress)
    data.mixture.samples_before(0)  # raises if weights or groups are invalid
    _check_groups(data)
    sets = [open_eval(config, name, progress) for name in config.eval.sets]
    vectors = vectors_of(config.objective)
    fields_of(config, vectors=vectors).members(data.indexes)
    eval_fields(config).members(sets)
    check_columns(config, data.indexes)
    if positives := positives_of(config.objective):
        for index in sets:
            check_eval_columns(config, index, [positives])
    for index in () if config.data.missing == "mask" else data.indexes:
        for settings in vectors.values():
            _check_vector(index, settings, cache_of(config))
    return data


def _check_groups(data: TrainData) -> None:
    """Check that groups have several samples: a sample is compared within its group only.

    Raises:
        GigabatchError: if every group has one sample, unless the run began before this check.
    """
    name, version = data.config.data.group, data.config.data.fields_version
    if name is None or name == SOURCE_COLUMN:
        return
    for number, index in enumerate(data.indexes):
        _, sizes = np.unique(indexed_codes(index, name, number, version), return_counts=True)
        alone = int((sizes == 1).sum())
        problem = (
            f"data.group: {alone:,} of {len(index):,} samples of {index.source} are the only ones "
            f"with their value of {name!r}, so they are compared with no other sample."
        )
        if alone == len(index) and version > 1:
            raise GigabatchError(f"{problem} Name a field that several samples share.")
        if alone:
            log.warning("%s", problem)


def _check_vector(index: Index, settings: VectorSettings, cache: ShardCache) -> None:
    """Check the first sample's vector against the settings of the objective."""
    with Reader(index, cache) as reader:
        read_vectors(reader.read(0, settings.extension), settings, index.where(0))
