"""Templates are what their systems read, and quote whatever a config says."""

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
from support import Command, losses, wait_for_step
from test_misuse import outcome

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.templates import TEMPLATES, render
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


def made(kind: str, path: Path, *overrides: str, gpus: int = 2) -> str:
    return render(kind, path, [*RAY, *overrides], "registry/gigabatch:1", gpus)


def syntax(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", TEMPLATES)
def test_no_secret_is_written_down(kind: str, tiny: Path) -> None:
    assert SECRET not in made(kind, tiny)


def test_kuberay_is_a_job_with_a_token_that_ends_and_is_retried(awkward: Path) -> None:
    config_map, job = yaml.safe_load_all(made("kuberay", awkward, AWKWARD))
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
        mounted = {each["name"] for each in container["volumeMounts"]}
        assert mounted == {each["name"] for each in template["spec"]["volumes"]}
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"
    config = parse_config(config_map["data"]["config.yaml"], "the map")
    assert config.cluster.workers == 4
    assert config.objective.positives == AWKWARD.partition("=")[2]
    assert config.cluster.threads == 1
    syntax(config_map["data"]["start.sh"])
    assert all(len(each["metadata"]["name"]) < 64 for each in (config_map, job))


def test_kuberay_may_take_nodes_of_an_elastic_run_away(awkward: Path) -> None:
    _, job = yaml.safe_load_all(made("kuberay", awkward, "cluster.workers=[3,8]"))
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [group[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [4, 2, 4]


def test_names_that_kubernetes_refuses_are_made_fit(awkward: Path) -> None:
    name = "A.Run_with-CAPITALS." + "x" * 70
    _, job = yaml.safe_load_all(made("kuberay", awkward, f"run.name={name}"))
    told = job["metadata"]["name"]
    assert len(told) <= 40
    assert told.replace("-", "").isalnum()
    assert told == told.lower().strip("-")


def test_ray_cluster_passes_rays_own_schema(awkward: Path) -> None:
    from ray.autoscaler._private.util import prepare_config

    text = made("ray-cluster", awkward, AWKWARD)
    cluster = yaml.safe_load(text)
    schema = Path(ray.autoscaler.__file__).with_name("ray-schema.json")
    jsonschema.validate(cluster, json.loads(schema.read_text()))
    prepared = prepare_config(cluster)
    assert prepared["max_workers"] == 1
    starts = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in each for each in starts if "ray start" in each)
    assert "--dashboard-host=127.0.0.1" in text
    (line,) = [line for line in text.splitlines() if "gigabatch submit" in line]
    assert AWKWARD in shlex.split(line.removeprefix("#"))


def test_slurm_is_a_shell_script_that_queues_itself_again(awkward: Path) -> None:
    script = made("slurm", awkward, AWKWARD)
    syntax(script)
    lines = script.splitlines()
    for told in (
        "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--requeue",
        "--signal=B:USR1@120", "--open-mode=append",
    ):  # fmt: skip
        assert f"#SBATCH {told}" in lines
    rank = shlex.split(script.partition("srun")[2].partition(" &\n")[0])[-1]
    syntax(rank)
    (train,) = [line for line in rank.splitlines() if "launcher train" in line]
    assert AWKWARD in shlex.split(train)
    assert str(awkward) in shlex.split(train)


def test_skypilot_starts_torchrun_on_each_node(awkward: Path) -> None:
    task = yaml.safe_load(made("skypilot", awkward, AWKWARD))
    assert task["num_nodes"] == 2
    assert task["resources"]["accelerators"] == "H100:2"
    assert task["resources"]["image_id"] == "docker:registry/gigabatch:1"
    assert task["secrets"] == {"HF_TOKEN": None}
    assert task["file_mounts"] == {"/tmp/gigabatch-config.yaml": str(awkward)}
    syntax(task["run"])
    assert "--nproc-per-node=2" in shlex.split(task["run"])


def test_what_no_template_can_express_is_refused(tiny: Path) -> None:
    with pytest.raises(GigabatchError, match="choose kuberay, slurm, ray-cluster, skypilot"):
        made("nomad", tiny)
    with pytest.raises(GigabatchError, match="--image"):
        render("kuberay", tiny, RAY, None, 2)
    with pytest.raises(GigabatchError, match=r"cluster\.launcher=ray"):
        render("kuberay", tiny, [], "image", 2)
    with pytest.raises(GigabatchError, match="--gpus-per-node"):
        made("slurm", tiny, gpus=3)


def test_a_file_that_exists_is_left_as_it_is(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "job.sbatch"
    command = ("template", "slurm", tiny, "--out", out)
    assert outcome(monkeypatch, capsys, *command)[0] == 0
    before = out.read_text()
    code, _, said = outcome(monkeypatch, capsys, *command, "run.name=other")
    assert code == 2
    assert "exists" in said
    assert out.read_text() == before


# Stand-ins for Slurm's commands, as far as the script uses them: two tasks on this machine.
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
    "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$STATE/asked"; fi',
}


@pytest.mark.parametrize(("code", "asked"), [(143, True), (2, False), (0, False)])
def test_a_slurm_job_that_is_told_before_it_could_listen_queues_again(
    code: int, asked: bool, tiny: Path, tmp_path: Path
) -> None:
    early = 'trap "exit CODE" TERM; echo $$ > $STATE/pids; while :; do sleep 0.1; done'
    for name, body in (SLURM | {"srun": early.replace("CODE", str(code))}).items():
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
    assert (tmp_path / "asked").exists() == asked


def test_ranks_that_fail_in_a_slurm_job_are_started_again(tiny: Path, tmp_path: Path) -> None:
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

    def outcome(restarts: int) -> tuple[int, int]:
        (tmp_path / "starts").unlink(missing_ok=True)
        script = render("slurm", tiny, [f"cluster.max_restarts={restarts}"], None, 0)
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True)
        return done.returncode, len((tmp_path / "starts").read_text().splitlines())

    assert outcome(3) == (0, 3)
    assert outcome(1) == (1, 2)
    assert not (tmp_path / "asked").exists()


@pytest.mark.slow
def test_a_slurm_job_saves_before_its_time_is_over_and_goes_on_when_requeued(
    tiny: Path, tmp_path: Path
) -> None:
    tools, hurry, runs = tmp_path / "bin", tmp_path / "hurry", tmp_path / "runs"
    tools.mkdir()
    for name, body in SLURM.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    tower = f"{{kind: module, module: 'support_towers:Slow', args: {{hurry: {hurry}}}}}"
    overrides = ["train.steps=30", f"towers.image={tower}", "run.name=job"]
    script = tmp_path / "job.sbatch"
    script.write_text(render("slurm", tiny, [*overrides, "cluster.launcher=torchrun",
                                             "cluster.workers=2"], None, 0))  # fmt: skip
    places = [str(tools), str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = os.environ | {
        "STATE": str(tmp_path), "PATH": os.pathsep.join(places), "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "here",
    }  # fmt: skip

    def sbatch() -> Command:
        return Command([], command=["bash", str(script)], env=environment)

    first = sbatch()
    try:
        wait_for_step(runs / "job", 2, first)
        first.signal(signal.SIGUSR1)  # to the batch shell alone, as Slurm does
        done = first.wait(300)
        assert done.returncode == 75, done.stdout + done.stderr
        assert (tmp_path / "asked").read_text() == "requeue 4711\n"
        assert len(losses(runs / "job")) < 30
        hurry.touch()
        first = sbatch()
        done = first.wait(300)
    finally:
        if first.process.poll() is None:
            first.kill()
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(losses(runs / "job")) == list(range(1, 31))
