"""Workers under Ray Train, which places them, sets their ranks and starts them again.

Ray stores no checkpoint and gets no report; the run folder holds everything. What is known of
Ray's ways is in this file: its `fit` answers a signal by leaving at once, and workers cannot
handle signals, so `fit` runs in a thread and a stop travels through the run folder.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.cluster import in_ray_job
from gigabatch.launcher.output import write
from gigabatch.launcher.shared import check_shared
from gigabatch.launcher.signals import STOPPING
from gigabatch.trainer.config import Config
from gigabatch.trainer.distributed import TIMEOUT
from gigabatch.trainer.runfolder import RunFolder

_SETTINGS = {
    # Read when Ray is imported. A failed worker is noticed within a second or so.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def run_ray(run: RunFolder) -> None:
    """Train with `cluster.workers` Ray workers: of the cluster, where this process is a job's
    driver, and otherwise on this machine. What goes wrong is left in the run folder."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    config = run.config()
    handlers = {n: signal.getsignal(n) for n in STOPPING}
    _join() if in_ray_job() else _start_here(config)
    for number, handler in handlers.items():  # ray.init puts its own in their place
        signal.signal(number, handler)
    try:
        if in_ray_job():
            _check_cluster(run, config)
        _fit(run, config)
    except GigabatchError as error:
        run.record_failure(str(error))
    finally:
        ray.shutdown()
        shutil.rmtree(run.path / ".ray", ignore_errors=True)


def _start_here(config: Config) -> None:
    import ray

    ray.init(
        # Never one that a crashed session left written down in /tmp/ray.
        address="local",
        num_cpus=config.cluster.workers,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=100 * 1024 * 1024,  # nothing large passes through it
    )


def _join() -> None:
    import ray

    ray.init(os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level=logging.ERROR)


def _check_cluster(run: RunFolder, config: Config) -> None:
    import ray

    check_shared(run.path)
    kind = "GPU" if _use_gpu() else "CPU"
    there = int(ray.cluster_resources().get(kind, 0))
    nodes = sum(node["Alive"] for node in ray.nodes())
    write(f"the cluster has {there} {kind}s on {nodes} node{'' if nodes == 1 else 's'}\n")
    if there < config.cluster.workers:
        write(
            f"cluster.workers={config.cluster.workers} need one {kind} each: waiting for the "
            "cluster to grow\n"
        )


def _use_gpu() -> bool:
    """Of a cluster, all nodes count: its head, where the driver runs, often has no GPU."""
    import ray
    import torch

    return "GPU" in ray.cluster_resources() if in_ray_job() else torch.cuda.is_available()


def _fit(run: RunFolder, config: Config) -> None:
    def fit() -> None:
        try:
            _trainer(run, config).fit()
        except Exception as error:
            # A worker's own fault stands in the run folder already; this one is Ray's.
            run.record_crash(f"{type(error).__name__}: {error}")

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    thread = threading.Thread(target=fit, name="ray-fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)  # in slices, so that signals are handled


def _trainer(run: RunFolder, config: Config) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    attempt = len(list((run.path / "attempts").glob("*.json")))
    return TorchTrainer(
        _work,
        train_loop_config={"run": str(run.path)},
        torch_config=TorchConfig(timeout_s=int(TIMEOUT / timedelta(seconds=1))),
        scaling_config=ScalingConfig(num_workers=config.cluster.workers, use_gpu=_use_gpu()),
        run_config=RunConfig(
            name=f"start-{attempt:06d}",
            storage_path=str(run.path / ".ray"),
            failure_config=FailureConfig(
                max_failures=config.cluster.max_restarts,
                controller_failure_limit=config.cluster.max_restarts,
            ),
        ),
    )


def _work(settings: dict[str, str]) -> None:
    from gigabatch.launcher.worker import work

    work(RunFolder(Path(settings["run"])))
