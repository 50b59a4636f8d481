"""Workers under Ray Train, which places them, sets their ranks and starts them again.

Ray stores no checkpoint and gets no report; the run folder holds everything. What is known of
Ray's ways is in this file: its `fit` answers a signal by leaving at once, and workers cannot
handle signals, so `fit` runs in a thread and a stop travels through the run folder.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.cluster.connection import in_ray_job
from gigabatch.launcher.cluster.preemption import Drains
from gigabatch.launcher.output import write
from gigabatch.launcher.preflight.shared_folder import check_shared
from gigabatch.launcher.restarts import retry_while_progressing
from gigabatch.launcher.signals import STOPPING
from gigabatch.trainer.config import ClusterSettings
from gigabatch.trainer.distributed import TIMEOUT
from gigabatch.trainer.run.folder import RunFolder

log = logging.getLogger(__name__)
_PLACEMENT = {
    "pack": "PACK", "spread": "SPREAD", "one_per_node": "STRICT_SPREAD", "one_node": "STRICT_PACK",
}  # fmt: skip


def run_ray(run: RunFolder) -> None:
    """Train with `cluster.workers` Ray workers: of the cluster, where this process is a job's
    driver, and otherwise on this machine. What goes wrong is left in the run folder."""
    cluster = run.config().cluster
    for name, value in start_settings(cluster).items():
        os.environ.setdefault(name, value)
    import ray

    handlers = {n: signal.getsignal(n) for n in STOPPING}
    _join() if in_ray_job() else _start_here(cluster)
    for number, handler in handlers.items():  # ray.init puts its own in their place
        signal.signal(number, handler)
    try:
        if in_ray_job():
            _check_cluster(run, cluster)
        retry_while_progressing(run, cluster.max_restarts, lambda: _fit(run, cluster))
    except GigabatchError as error:
        run.record_failure(str(error))
    finally:
        ray.shutdown()
        shutil.rmtree(run.path / ".ray", ignore_errors=True)


def start_settings(cluster: ClusterSettings) -> dict[str, str]:
    """Environment variables that Ray reads when it is imported. A failed worker is noticed within
    a second or so."""
    return {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(cluster.start_timeout_s),
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _start_here(cluster: ClusterSettings) -> None:
    import ray

    ray.init(
        # Never one that a crashed session left written down in /tmp/ray.
        address="local",
        num_cpus=math.ceil(cluster.most * cluster.cpus_per_worker),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=100 * 1024 * 1024,  # nothing large passes through it
    )


def _join() -> None:
    import ray

    ray.init(os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level=logging.ERROR)


def _check_cluster(run: RunFolder, cluster: ClusterSettings) -> None:
    import ray

    check_shared(run.path)
    each = _per_worker(cluster)
    room = min(int(ray.cluster_resources().get(kind, 0) // n) for kind, n in each.items() if n)
    nodes = sum(node["Alive"] for node in ray.nodes())
    needs = " and ".join(f"{n:g} {kind}{'s' * (n != 1)}" for kind, n in each.items() if n)
    write(
        f"the cluster has room for {room} workers, of {needs} each, on {nodes} "
        f"node{'' if nodes == 1 else 's'}\n"
    )
    if room < cluster.least:
        write(f"cluster.workers={cluster.least} are wanted: waiting for the cluster to grow\n")


def _per_worker(cluster: ClusterSettings) -> dict[str, float]:
    gpus = cluster.gpus_per_worker
    return {"CPU": cluster.cpus_per_worker, "GPU": float(_any_gpu() if gpus is None else gpus)}


def _any_gpu() -> bool:
    """Of a cluster, all nodes count: its head, where the driver runs, often has no GPU."""
    import ray
    import torch

    return "GPU" in ray.cluster_resources() if in_ray_job() else torch.cuda.is_available()


def _fit(run: RunFolder, cluster: ClusterSettings) -> None:
    def fit() -> None:
        try:
            while _finds_no_room(run, cluster):
                log.warning("the cluster has no room for %d workers: waiting", cluster.least)
        except Exception as error:
            # A worker's own fault stands in the run folder already; this one is Ray's.
            run.record_crash(f"{type(error).__name__}: {error}")

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    thread = threading.Thread(target=fit, name="ray-fit", daemon=True)
    thread.start()
    drains = Drains(run)
    while thread.is_alive():
        thread.join(0.2)  # in slices, so that signals are handled
        drains.look()


def _finds_no_room(run: RunFolder, cluster: ClusterSettings) -> bool:
    """Train to the end, or until workers find no place: no fault of theirs, so not one of
    `cluster.max_restarts`, unless a stop is asked for."""
    from ray.train import ControllerError

    try:
        _trainer(run, cluster).fit()
    except ControllerError as error:
        timed_out = type(error.controller_failure).__name__ == "WorkerGroupStartupTimeoutError"
        if not timed_out:
            raise
        if run.stop_requested():
            run.record_stop()  # there is no worker to do it; the last checkpoint stands
        return not run.stop_requested()
    return False


def _trainer(run: RunFolder, cluster: ClusterSettings) -> Any:
    from ray.train import FailureConfig, RunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    first = run.attempts()
    return TorchTrainer(
        _work,
        train_loop_config={"run": str(run.path), "first": first},
        torch_config=TorchConfig(timeout_s=int(TIMEOUT / timedelta(seconds=1))),
        scaling_config=scaling(cluster),
        run_config=RunConfig(
            name=f"start-{first:06d}",
            storage_path=str(run.path / ".ray"),
            worker_runtime_env={"env_vars": worker_settings(cluster)},
            failure_config=FailureConfig(
                max_failures=cluster.max_restarts,
                controller_failure_limit=cluster.max_restarts,
            ),
        ),
    )


def scaling(cluster: ClusterSettings) -> Any:
    """How many workers, where, and what each takes up: a `ray.train.ScalingConfig`."""
    from ray.train import ScalingConfig

    each = _per_worker(cluster)
    return ScalingConfig(
        num_workers=cluster.workers,
        use_gpu=bool(each["GPU"]),
        resources_per_worker={kind: n for kind, n in each.items() if n},
        placement_strategy=_PLACEMENT[cluster.placement],
        elastic_resize_monitor_interval_s=cluster.resize_every_s,
    )


def worker_settings(cluster: ClusterSettings) -> dict[str, str]:
    """Environment variables of each worker."""
    hidden = {} if _per_worker(cluster)["GPU"] else {"CUDA_VISIBLE_DEVICES": ""}
    return {**hidden, **cluster.worker_env}


def _work(settings: dict[str, Any]) -> None:
    from gigabatch.launcher.worker import work

    work(RunFolder(Path(settings["run"])), settings["first"])
