"""Template `slurm`: a batch script with one rank per task that requeues itself."""

from __future__ import annotations

import shlex

from gigabatch.launcher.signals import REQUEUE
from gigabatch.launcher.templates.plan import Plan, commented, start_script
from gigabatch.launcher.templates.registry import template

_RANKS = """\
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
"""


@template("slurm", needs_image=False)
def slurm(plan: Plan) -> str:
    """Return a batch script for sbatch."""
    gpus = f"#SBATCH --gpus-per-node={plan.workers_per_node}\n" if plan.gpus_per_node else ""
    container = f" --container-image={shlex.quote(plan.image)}" if plan.image else ""
    rank = _RANKS + start_script(plan, str(plan.path), *plan.overrides)
    restarts = plan.config.cluster.max_restarts
    header = commented(f"""
Submit with: sbatch FILE
Requirements:
- every node mounts {plan.config.run.dir} at this path
- `python` has gigabatch: activate its environment below
Secrets such as HF_TOKEN come from the environment of sbatch; this file contains none.
Two minutes before the time limit, and on preemption, each rank saves a checkpoint and exits with
code {REQUEUE}; the job is then requeued with the same job id and resumes the run.
Failed ranks are restarted up to {restarts} times from the last checkpoint.""")
    return f"""\
#!/bin/bash
#SBATCH --job-name={plan.label}
#SBATCH --nodes={plan.nodes}
#SBATCH --ntasks-per-node={plan.workers_per_node}
{gpus}#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output={plan.label}-%j.log
{header}
set -u
# source /path/to/venv/bin/activate

MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))"
export MASTER_ADDR MASTER_PORT

# Slurm signals only this shell. scancel forwards the signal to the ranks, and not to this shell.
stopping=0
stop() {{ stopping=1; scancel --signal=TERM "$SLURM_JOB_ID"; }}
trap stop USR1 TERM

ranks() {{
  srun --kill-on-bad-exit=0{container} bash -c {shlex.quote(rank)} &
  step=$!
  code=0
  wait "$step" || code=$?
  while kill -0 "$step" 2>/dev/null; do  # A signal interrupts wait while the ranks still run.
    code=0
    wait "$step" || code=$?
  done
}}
ranks
for ((restart = 0; restart < {restarts}; restart++)); do
  case "$stopping $code" in "1 "* | "0 0" | "0 2" | "0 {REQUEUE}") break ;; esac
  sleep "$((2 ** (restart < 6 ? restart : 6)))"
  ranks
done
# The signal kills a rank that is still indexing data; requeue in that case too.
case "$stopping $code" in
  "1 0" | "1 2") ;;
  "1 "* | "0 {REQUEUE}") scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit "$code"
"""
