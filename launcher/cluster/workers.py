"""Training under Ray Train, which places workers, assigns their ranks and restarts them.

Checkpoints and metrics are stored in the run folder, not by Ray. Ray's `fit` exits at once on a
signal, and its workers cannot handle signals. Therefore `fit` runs in a thread, and stop requests
reach the workers through the run folder.
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
from gigabatch.launcher.cluster.preemption import PreemptionWatcher
from gigabatch.launcher.cluster.shared_folder import check_shared
from gigabatch.launcher.environment import in_ray_job
from gigabatch.launcher.output import write
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
    """Train with `cluster.workers` Ray workers, and record failures in the run folder.

    The workers run on the cluster if this process is a job's driver, else on this machine.
    """
    cluster = run.config().cluster
    for name, value in start_settings(cluster).items():
        os.environ.setdefault(name, value)
    import ray

    handlers = {n: signal.getsignal(n) for n in STOPPING}
    _join_cluster() if in_ray_job() else _start_local_ray(cluster)
    for number, handler in handlers.items():  # ray.init has replaced them.
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
    """Return the environment variables to set before importing Ray.

    The health-check interval detects a failed worker within about a second.
    """
    return {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(cluster.start_timeout_s),
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _start_local_ray(cluster: ClusterSettings) -> None:
    import ray

    ray.init(
        # By default, Ray may use the address that a crashed session left in /tmp/ray.
        address="local",
        num_cpus=math.ceil(cluster.max_workers * cluster.cpus_per_worker),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=100 * 1024 * 1024,  # No large objects are shared.
    )


def _join_cluster() -> None:
    import ray

    ray.init(os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level=logging.ERROR)


def _check_cluster(run: RunFolder, cluster: ClusterSettings) -> None:
    import ray

    check_shared(run.path)
    needs = {kind: n for kind, n in _per_worker(cluster).items() if n}
    capacity = min(int(ray.cluster_resources().get(kind, 0) // n) for kind, n in needs.items())
    nodes = sum(node["Alive"] for node in ray.nodes())
    resources = " and ".join(f"{n:g} {kind}{'s' * (n != 1)}" for kind, n in needs.items())
    write(
        f"cluster capacity: {capacity} workers with {resources} each, on {nodes} "
        f"node{'' if nodes == 1 else 's'}\n"
    )
    if capacity < cluster.min_workers:
        write(
            f"cluster.workers={cluster.min_workers} is required; waiting for the cluster to grow\n"
        )


def _per_worker(cluster: ClusterSettings) -> dict[str, float]:
    gpus = cluster.gpus_per_worker
    return {"CPU": cluster.cpus_per_worker, "GPU": float(_any_gpu() if gpus is None else gpus)}


def _any_gpu() -> bool:
    """Return whether any node has a GPU; the head node, where the driver runs, often has none."""
    import ray
    import torch

    return "GPU" in ray.cluster_resources() if in_ray_job() else torch.cuda.is_available()


def _fit(run: RunFolder, cluster: ClusterSettings) -> None:
    def fit() -> None:
        try:
            while _lacks_capacity(run, cluster):
                log.warning(
                    "the cluster has no capacity for %d workers; waiting", cluster.min_workers
                )
        except Exception as error:
            # Workers record their errors in the run folder themselves; this error is Ray's.
            run.record_crash(f"{type(error).__name__}: {error}")

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    thread = threading.Thread(target=fit, name="ray-fit", daemon=True)
    thread.start()
    watcher = PreemptionWatcher(run)
    while thread.is_alive():
        thread.join(0.2)  # Waits in short intervals, so that signals are handled.
        watcher.poll()


def _lacks_capacity(run: RunFolder, cluster: ClusterSettings) -> bool:
    """Train to the end, or until the cluster has no capacity for the workers.

    Returns True if the cluster lacks capacity and no stop was requested. Waiting for capacity does
    not count towards `cluster.max_restarts`.
    """
    from ray.train import ControllerError

    try:
        _trainer(run, cluster).fit()
    except ControllerError as error:
        timed_out = type(error.controller_failure).__name__ == "WorkerGroupStartupTimeoutError"
        if not timed_out:
            raise
        if run.stop_requested():
            run.record_stop()  # No worker exists to record it; the last checkpoint is valid.
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
    """Return the number, placement and resources of workers as a `ray.train.ScalingConfig`."""
    from ray.train import ScalingConfig

    resources = _per_worker(cluster)
    return ScalingConfig(
        num_workers=cluster.workers,
        use_gpu=bool(resources["GPU"]),
        resources_per_worker={kind: n for kind, n in resources.items() if n},
        placement_strategy=_PLACEMENT[cluster.placement],
        elastic_resize_monitor_interval_s=cluster.resize_every_s,
    )


def worker_settings(cluster: ClusterSettings) -> dict[str, str]:
    """Return the environment variables of each worker."""
    hidden = {} if _per_worker(cluster)["GPU"] else {"CUDA_VISIBLE_DEVICES": ""}
    return {**hidden, **cluster.worker_env}


def _work(settings: dict[str, Any]) -> None:
    from gigabatch.launcher.worker import work

    work(RunFolder(Path(settings["run"])), settings["first"])
