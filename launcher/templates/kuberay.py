"""Template `kuberay`: a KubeRay `RayJob`, whose Ray cluster has a token and ends with the run."""

from __future__ import annotations

import math
from importlib.metadata import version
from typing import Any

from gigabatch.launcher.templates.plan import (
    DATA_VOLUME,
    SECRETS,
    VOLUME,
    Plan,
    commented,
    start_script,
    to_yaml,
)
from gigabatch.launcher.templates.registry import template

_FOLDER = "/etc/gigabatch"
_WEEK = 7 * 24 * 3600


@template("kuberay", starts_ray=True)
def kuberay(plan: Plan) -> str:
    """Return a ConfigMap and a RayJob as YAML."""
    from gigabatch.trainer.config.load import dump_config

    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{plan.label}-config"},
        "data": {
            "config.yaml": dump_config(plan.config),
            "start.sh": start_script(plan, f"{_FOLDER}/config.yaml"),
        },
    }
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": plan.label},
        "spec": {
            "entrypoint": f"bash {_FOLDER}/start.sh",
            "backoffLimit": 3,
            "activeDeadlineSeconds": _WEEK,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": {
                "rayVersion": version("ray"),
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    # No resources: the head node runs only the driver.
                    "rayStartParams": {"num-cpus": "0", "num-gpus": "0"},
                    "template": _pod(plan, {"cpu": "4", "memory": "16Gi"}),
                },
                "workerGroupSpecs": [_workers(plan)],
            },
        },
    }
    header = commented(f"""
Submit with: kubectl apply -f FILE
Requirements:
- KubeRay 1.5 or later, for token authentication
- persistent volume claims that all nodes mount: {VOLUME} (ReadWriteMany) for runs
  {f"and {DATA_VOLUME} for the data" if plan.data else ""}
- optionally a secret {SECRETS} with the run's secrets, such as HF_TOKEN:
  kubectl create secret generic {SECRETS} --from-env-file=secrets.env
- an image that contains this version of gigabatch
Adapt the CPUs and memory to your nodes. After activeDeadlineSeconds (one week), Kubernetes ends the
job permanently: set it above the duration of the run.""")
    return header + to_yaml(config_map, job)


def _workers(plan: Plan) -> dict[str, Any]:
    count = plan.workers_per_node
    resources = {"cpu": str(8 * count), "memory": f"{32 * count}Gi"}
    if plan.gpus_per_node:
        resources["nvidia.com/gpu"] = str(count)
    return {
        "groupName": "workers",
        "replicas": plan.nodes,
        "minReplicas": plan.min_nodes,
        "maxReplicas": plan.nodes,
        "rayStartParams": {},
        "template": _pod(plan, resources),
    }


def _pod(plan: Plan, resources: dict[str, str]) -> dict[str, Any]:
    mounts = [
        {"name": "config", "mountPath": _FOLDER, "readOnly": True},
        {"name": "runs", "mountPath": str(plan.config.run.dir)},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    volumes: list[dict[str, Any]] = [
        {"name": "config", "configMap": {"name": f"{plan.label}-config"}},
        {"name": "runs", "persistentVolumeClaim": {"claimName": VOLUME}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    if plan.data:
        mounts.append({"name": "data", "mountPath": plan.data})
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": DATA_VOLUME}})
    container = {
        "name": "ray",
        "image": plan.image,
        "resources": {"requests": resources, "limits": resources},
        "envFrom": [{"secretRef": {"name": SECRETS, "optional": True}}],
        "volumeMounts": mounts,
    }
    # Leave a removed pod enough time for a checkpoint.
    grace = math.ceil(plan.config.cluster.grace_s) + 30
    return {
        "spec": {
            "terminationGracePeriodSeconds": grace,
            "containers": [container],
            "volumes": volumes,
        }
    }
