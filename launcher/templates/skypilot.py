"""A SkyPilot task: torchrun on every node, which SkyPilot places and starts again."""

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

_CONFIG = "/tmp/gigabatch-config.yaml"
# `start.sh` is what each of torchrun's processes runs: it begins the run, or goes on with it.
_RUN = """\
cat > /tmp/gigabatch-start.sh <<'GIGABATCH'
{start}GIGABATCH
torchrun --nnodes="$SKYPILOT_NUM_NODES" --nproc-per-node={count} \\
  --node-rank="$SKYPILOT_NODE_RANK" --master-port=29500 \\
  --master-addr="$(echo "$SKYPILOT_NODE_IPS" | head -n 1)" \\
  --no-python bash /tmp/gigabatch-start.sh
"""


def skypilot(plan: Plan) -> str:
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
    head = commented(f"""
sky jobs launch FILE --secret HF_TOKEN     (from your environment; leave it out of `secrets:` below
where the run needs none). Needs the volume {VOLUME}, which all nodes mount{
        f", and {DATA_VOLUME} with the data" if plan.data else ""
    } (`sky volumes apply`).
The image must hold this version of gigabatch. Name your own kind of accelerator. No port is
opened: torchrun's processes speak among themselves, and there is no Ray cluster to protect.""")
    return head + to_yaml(task)
