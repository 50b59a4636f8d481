"""Template `ray-cluster`: a cluster on your hosts for `ray up`, with a token."""

from __future__ import annotations

import shlex
from typing import Any

from gigabatch.launcher.templates.plan import Plan, commented, to_yaml
from gigabatch.launcher.templates.registry import template

_TOKEN = "~/.ray/auth_token"
_AUTH = "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token"


@template("ray-cluster", starts_ray=True)
def ray_cluster(plan: Plan) -> str:
    """Return a cluster config as YAML; its header explains how to submit the run."""
    nodes = plan.nodes
    gpus = ["--gpus all"] if plan.gpus_per_node else []
    volumes = [f"-v {shlex.quote(f'{folder}:{folder}')}" for folder in _folders(plan)]
    cluster: dict[str, Any] = {
        "cluster_name": plan.label,
        "max_workers": nodes - 1,
        "docker": {
            "image": plan.image,
            "container_name": "ray",
            "run_options": ["--network=host", "--ipc=host", *gpus, *volumes],
        },
        "provider": {
            "type": "local",
            "head_ip": "NODE-1",
            "worker_ips": [f"NODE-{number}" for number in range(2, nodes + 1)],
        },
        "auth": {"ssh_user": "ubuntu"},
        "file_mounts": {_TOKEN: _TOKEN},
        "head_start_ray_commands": [
            "ray stop",
            f"{_AUTH}; ray start --head --port=6379 --dashboard-host=127.0.0.1 "
            "--autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [
            "ray stop",
            f"{_AUTH}; ray start --address=$RAY_HEAD_IP:6379",
        ],
    }
    config = shlex.join([str(plan.path), *plan.overrides])
    header = commented(f"""
Replace NODE-1 to NODE-{nodes} by your hosts, and set your ssh user. The image must contain
gigabatch's dependencies. The token is the file {_TOKEN} on this machine; `ray up` copies it
to each node.
  ray get-auth-token --generate        create the token
  ray up FILE                          start the cluster
  ray dashboard FILE                   in another terminal: tunnel to http://127.0.0.1:8265
  RAY_AUTH_MODE=token gigabatch submit {config} --address http://127.0.0.1:8265""")
    return header + to_yaml(cluster)


def _folders(plan: Plan) -> list[str]:
    return [str(plan.config.run.dir), *([plan.data] if plan.data else [])]
