"""A Slurm batch script: a rank for each task, told of the end of its time, requeued by its code."""

from __future__ import annotations

import shlex

from gigabatch.launcher.signals import REQUEUE
from gigabatch.launcher.templates.plan import Plan, commented, start_script

_RANKS = """\
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
"""


def slurm(plan: Plan) -> str:
    gpus = f"#SBATCH --gpus-per-node={plan.workers_per_node}\n" if plan.gpus_per_node else ""
    inside = f" --container-image={shlex.quote(plan.image)}" if plan.image else ""
    rank = _RANKS + start_script(plan, str(plan.path), *plan.overrides)
    restarts = plan.config.cluster.max_restarts
    head = commented(f"""
sbatch FILE. Every node must see {plan.config.run.dir} at this path, and `python` must be one that
has gigabatch: activate its environment where the script says so. Secrets such as HF_TOKEN come
from the environment in which sbatch is called; none is written here.
Two minutes before its time is over (and on preemption) each rank saves a checkpoint and leaves
with code {REQUEUE}; the job then queues anew under its old number and goes on with the run.
Ranks that fail are started again, up to {restarts} times, from the last checkpoint.""")
    return f"""\
#!/bin/bash
#SBATCH --job-name={plan.label}
#SBATCH --nodes={plan.nodes}
#SBATCH --ntasks-per-node={plan.workers_per_node}
{gpus}#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output={plan.label}-%j.log
{head}
set -u
# source /path/to/venv/bin/activate

MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))"
export MASTER_ADDR MASTER_PORT

# Slurm tells this shell; this tells the ranks (and not this shell again).
told=0
stop() {{ told=1; scancel --signal=TERM "$SLURM_JOB_ID"; }}
trap stop USR1 TERM

ranks() {{
  srun --kill-on-bad-exit=0{inside} bash -c {shlex.quote(rank)} &
  step=$!
  code=0
  wait "$step" || code=$?
  while kill -0 "$step" 2>/dev/null; do  # a signal ended the wait, not the ranks
    code=0
    wait "$step" || code=$?
  done
}}
ranks
for ((again = 0; again < {restarts}; again++)); do
  case "$told $code" in "1 "* | "0 0" | "0 2" | "0 {REQUEUE}") break ;; esac
  sleep "$((2 ** (again < 6 ? again : 6)))"
  ranks
done
# (Told before it trains, while it still indexes, a rank dies of the signal.)
case "$told $code" in
  "1 0" | "1 2") ;;
  "1 "* | "0 {REQUEUE}") scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit "$code"
"""
