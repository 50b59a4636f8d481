"""Templates: valid for their systems, quoting, secrets, Slurm signals and restarts."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml
from support import Command, losses, outcome, wait_for_step

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher import templates
from gigabatch.launcher.templates import registry
from gigabatch.launcher.templates.registry import all_templates
from gigabatch.launcher.templates.render import render
from gigabatch.trainer.config.load import parse_config

SECRET = "hf_do_not_write_me_down"
RAY = ("cluster.launcher=ray", "cluster.workers=4")
AWKWARD = "objective.positives=a 'quoted' $(touch pwned) \"field\""


@pytest.fixture(autouse=True)
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)


@pytest.fixture
def awkward(tiny: Path) -> Path:
    return tiny.rename(tiny.with_name("it's my; run.yaml"))


def render_template(kind: str, path: Path, *overrides: str, gpus: int = 2) -> str:
    return render(kind, path, [*RAY, *overrides], "registry/gigabatch:1", gpus)


def check_bash_syntax(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


NEW = """
from gigabatch.launcher.templates.plan import Plan
from gigabatch.launcher.templates.registry import template


@template("new-system", needs_image=False)
def new_system(plan: Plan) -> str:
    return f"job {plan.label} on {plan.nodes} nodes"
"""


def test_new_file_is_a_new_template(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new_system.py").write_text(NEW)
    before = all_templates()
    monkeypatch.setattr(registry, "_TEMPLATES", dict(before))
    monkeypatch.setattr(templates, "__path__", [*templates.__path__, str(tmp_path)])
    assert render("new-system", tiny, ["run.name=a"], None, 0) == "job a on 1 nodes"
    assert list(all_templates()) == sorted([*before, "new-system"])


def test_built_in_templates_are_registered() -> None:
    assert all_templates().keys() >= {"kuberay", "ray-cluster", "skypilot", "slurm"}


def test_second_template_of_a_name_is_rejected() -> None:
    all_templates()
    with pytest.raises(ValueError, match="name 'slurm' is taken"):
        registry.template("slurm")(lambda plan: "")


@pytest.mark.parametrize("kind", all_templates())
def test_templates_contain_no_secrets(kind: str, tiny: Path) -> None:
    assert SECRET not in render_template(kind, tiny)


def test_kuberay_job_has_token_retries_and_deadline(awkward: Path) -> None:
    config_map, job = yaml.safe_load_all(render_template("kuberay", awkward, AWKWARD))
    spec = job["spec"]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert spec["backoffLimit"] == 3
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    (group,) = cluster["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 2
    for template in (cluster["headGroupSpec"]["template"], group["template"]):
        (container,) = template["spec"]["containers"]
        assert container["image"] == "registry/gigabatch:1"
        assert container["envFrom"] == [
            {"secretRef": {"name": "gigabatch-secrets", "optional": True}}
        ]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in template["spec"]["volumes"]}
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"
    config = parse_config(config_map["data"]["config.yaml"], "the map")
    assert config.cluster.workers == 4
    assert config.objective.positives == AWKWARD.partition("=")[2]
    assert config.cluster.threads == 1
    check_bash_syntax(config_map["data"]["start.sh"])
    assert all(len(resource["metadata"]["name"]) < 64 for resource in (config_map, job))


def test_kuberay_replica_limits_follow_elastic_workers(awkward: Path) -> None:
    _, job = yaml.safe_load_all(render_template("kuberay", awkward, "cluster.workers=[3,8]"))
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [group[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [4, 2, 4]


def test_run_name_becomes_valid_kubernetes_label(awkward: Path) -> None:
    name = "A.Run_with-CAPITALS." + "x" * 70
    _, job = yaml.safe_load_all(render_template("kuberay", awkward, f"run.name={name}"))
    label = job["metadata"]["name"]
    assert len(label) <= 40
    assert label.replace("-", "").isalnum()
    assert label == label.lower().strip("-")


def test_ray_cluster_passes_ray_schema(awkward: Path) -> None:
    from ray.autoscaler._private.util import prepare_config

    text = render_template("ray-cluster", awkward, AWKWARD)
    cluster = yaml.safe_load(text)
    schema = Path(ray.autoscaler.__file__).with_name("ray-schema.json")
    jsonschema.validate(cluster, json.loads(schema.read_text()))
    prepared_config = prepare_config(cluster)
    assert prepared_config["max_workers"] == 1
    commands = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in line for line in commands if "ray start" in line)
    assert "--dashboard-host=127.0.0.1" in text
    (line,) = [line for line in text.splitlines() if "gigabatch submit" in line]
    assert AWKWARD in shlex.split(line.removeprefix("#"))


def test_slurm_script_has_requeue_options_and_quotes_arguments(awkward: Path) -> None:
    script = render_template("slurm", awkward, AWKWARD)
    check_bash_syntax(script)
    lines = script.splitlines()
    for option in (
        "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--requeue",
        "--signal=B:USR1@120", "--open-mode=append",
    ):  # fmt: skip
        assert f"#SBATCH {option}" in lines
    rank = shlex.split(script.partition("srun")[2].partition(" &\n")[0])[-1]
    check_bash_syntax(rank)
    (train,) = [line for line in rank.splitlines() if "launcher train" in line]
    assert AWKWARD in shlex.split(train)
    assert str(awkward) in shlex.split(train)


def test_skypilot_starts_torchrun_on_each_node(awkward: Path) -> None:
    task = yaml.safe_load(render_template("skypilot", awkward, AWKWARD))
    assert task["num_nodes"] == 2
    assert task["resources"]["accelerators"] == "H100:2"
    assert task["resources"]["image_id"] == "docker:registry/gigabatch:1"
    assert task["secrets"] == {"HF_TOKEN": None}
    assert task["file_mounts"] == {"/tmp/gigabatch-config.yaml": str(awkward)}
    check_bash_syntax(task["run"])
    assert "--nproc-per-node=2" in shlex.split(task["run"])


def test_invalid_template_options_are_rejected(tiny: Path) -> None:
    with pytest.raises(GigabatchError, match=f"choose {', '.join(all_templates())}"):
        render_template("no-such-system", tiny)
    with pytest.raises(GigabatchError, match="--image"):
        render("kuberay", tiny, RAY, None, 2)
    with pytest.raises(GigabatchError, match=r"cluster\.launcher=ray"):
        render("kuberay", tiny, [], "image", 2)
    with pytest.raises(GigabatchError, match="--gpus-per-node"):
        render_template("slurm", tiny, gpus=3)


def test_existing_output_file_is_kept(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "job.sbatch"
    command = ("template", "slurm", tiny, "--out", out)
    assert outcome(monkeypatch, capsys, *command)[0] == 0
    before = out.read_text()
    code, _, stderr = outcome(monkeypatch, capsys, *command, "run.name=other")
    assert code == 2
    assert "exists" in stderr
    assert out.read_text() == before


# Replacements for the Slurm commands that the script uses: two tasks on this machine.
SLURM = {
    "srun": """
while [[ "$1" == --* ]]; do shift; done
for rank in 0 1; do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 "$@" & pids+=($!)
done
echo "${pids[@]}" > "$STATE/pids"
code=0
for pid in "${pids[@]}"; do
  wait "$pid"; ended=$?
  if [ "$ended" -gt "$code" ]; then code=$ended; fi
done
exit "$code"
""",
    "scancel": '[ "$1 $2" = "--signal=TERM 4711" ] && kill -TERM $(cat "$STATE/pids")',
    "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$STATE/requeued"; fi',
}


@pytest.mark.parametrize(("code", "requeued"), [(143, True), (2, False), (0, False)])
def test_slurm_job_signaled_before_training_requeues(
    code: int, requeued: bool, tiny: Path, tmp_path: Path
) -> None:
    untrained = 'trap "exit CODE" TERM; echo $$ > $STATE/pids; while :; do sleep 0.1; done'
    for name, body in (SLURM | {"srun": untrained.replace("CODE", str(code))}).items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    script = tmp_path / "job.sbatch"
    script.write_text(render("slurm", tiny, ["run.name=job"], None, 0))
    environment = os.environ | {
        "STATE": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "here",
    }  # fmt: skip
    job = Command([], command=["bash", str(script)], env=environment)
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "pids").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        job.signal(signal.SIGUSR1)
        assert job.wait(30).returncode == code
    finally:
        if job.process.poll() is None:
            job.kill()
    assert (tmp_path / "requeued").exists() == requeued


def test_slurm_job_restarts_failed_ranks(tiny: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    bodies = {
        "srun": 'echo . >> "$STATE/starts"; [ "$(wc -l < "$STATE/starts")" -gt 2 ]',
        "scontrol": SLURM["scontrol"],
        "sleep": "exit 0",
    }
    for name, body in bodies.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    environment = os.environ | {
        "STATE": str(tmp_path), "PATH": os.pathsep.join([str(tools), os.environ["PATH"]]),
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "here",
    }  # fmt: skip

    def run_job(restarts: int) -> tuple[int, int]:
        (tmp_path / "starts").unlink(missing_ok=True)
        script = render("slurm", tiny, [f"cluster.max_restarts={restarts}"], None, 0)
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True)
        return done.returncode, len((tmp_path / "starts").read_text().splitlines())

    assert run_job(3) == (0, 3)
    assert run_job(1) == (1, 2)
    assert not (tmp_path / "requeued").exists()


@pytest.mark.slow
def test_slurm_job_saves_before_time_limit_and_resumes_when_requeued(
    tiny: Path, tmp_path: Path
) -> None:
    tools, fast, runs = tmp_path / "bin", tmp_path / "fast", tmp_path / "runs"
    tools.mkdir()
    for name, body in SLURM.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    tower = f"{{kind: module, module: 'support_towers:Slow', args: {{fast: {fast}}}}}"
    overrides = ["train.steps=30", f"towers.image={tower}", "run.name=job"]
    script = tmp_path / "job.sbatch"
    script.write_text(render("slurm", tiny, [*overrides, "cluster.launcher=torchrun",
                                             "cluster.workers=2"], None, 0))  # fmt: skip
    folders = [str(tools), str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = os.environ | {
        "STATE": str(tmp_path), "PATH": os.pathsep.join(folders), "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "here",
    }  # fmt: skip

    def sbatch() -> Command:
        return Command([], command=["bash", str(script)], env=environment)

    job = sbatch()
    try:
        wait_for_step(runs / "job", 2, job)
        job.signal(signal.SIGUSR1)  # only to the batch shell, as Slurm does
        done = job.wait(300)
        assert done.returncode == 75, done.stdout + done.stderr
        assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
        assert len(losses(runs / "job")) < 30
        fast.touch()
        job = sbatch()
        done = job.wait(300)
    finally:
        if job.process.poll() is None:
            job.kill()
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(losses(runs / "job")) == list(range(1, 31))
