"""Template `skypilot`: torchrun on every node, placed and restarted by SkyPilot."""

from __future__ import annotations

from typing import Any

from gigabatch.launcher.templates.plan import (
    DATA_VOLUME,
    VOLUME,
    Plan,
    commented,
    start_script,
    to_yaml,
)
from gigabatch.launcher.templates.registry import template

_CONFIG = "/tmp/gigabatch-config.yaml"
# Each torchrun process runs the start script, which starts or resumes the run.
_RUN = """\
cat > /tmp/gigabatch-start.sh <<'GIGABATCH'
{start}GIGABATCH
torchrun --nnodes="$SKYPILOT_NUM_NODES" --nproc-per-node={count} \\
  --node-rank="$SKYPILOT_NODE_RANK" --master-port=29500 \\
  --master-addr="$(echo "$SKYPILOT_NODE_IPS" | head -n 1)" \\
  --no-python bash /tmp/gigabatch-start.sh
"""


@template("skypilot")
def skypilot(plan: Plan) -> str:
    """Return a task as YAML."""
    count = plan.workers_per_node
    resources: dict[str, Any] = {"image_id": f"docker:{plan.image}"}
    if plan.gpus_per_node:
        resources["accelerators"] = f"H100:{count}"
    resources["job_recovery"] = {"max_restarts_on_errors": 3}
    volumes = {str(plan.config.run.dir): VOLUME}
    if plan.data:
        volumes[plan.data] = DATA_VOLUME
    task = {
        "name": plan.label,
        "num_nodes": plan.nodes,
        "resources": resources,
        "volumes": volumes,
        "file_mounts": {_CONFIG: str(plan.path)},
        "secrets": {"HF_TOKEN": None},
        "run": _RUN.format(start=start_script(plan, _CONFIG, *plan.overrides), count=count),
    }
    header = commented(f"""
Submit with: sky jobs launch FILE --secret HF_TOKEN
HF_TOKEN comes from your environment; if the run does not need it, remove it from `secrets:` below.
Requirements:
- the volume {VOLUME}{
        f" and, with the data, {DATA_VOLUME}" if plan.data else ""
    }, mounted by all nodes (`sky volumes apply`)
- an image that contains this version of gigabatch
Set the accelerator to your type. No port is opened to the outside: the torchrun processes
communicate with each other, and no Ray cluster needs protection.""")
    return header + to_yaml(task)
