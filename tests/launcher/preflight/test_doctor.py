"""`gigabatch doctor` and the checks before a start, on this machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.preflight.data import check_data
from gigabatch.launcher.preflight.doctor import check_machine, quick_checks
from gigabatch.trainer.config.load import load_config

SCRIPT = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from gigabatch.launcher.preflight.doctor import quick_checks
print(*quick_checks(None), sep="\\n")
"""


def test_quick_checks_on_this_machine_find_no_error(tiny: Path) -> None:
    findings = list(quick_checks(load_config(tiny)))
    assert [str(finding) for finding in findings if finding.level == "error"] == []
    subjects = {finding.subject for finding in findings}
    assert subjects >= {"packages", "shared memory", "open files", "cache"}


def test_low_open_file_limit_is_reported_with_its_fix() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    (line,) = [line for line in done.stdout.splitlines() if "open files" in line]
    assert "WARNING at most 256 per process. ulimit -n 256" in line


def test_insufficient_shared_memory_raises_before_the_start(tiny: Path) -> None:
    large = ["data.image.size=8192", "batch.micro_size=65536", "batch.global_size=65536"]
    with pytest.raises(GigabatchError, match=r"shared memory: .* Enlarge it"):
        check_machine(load_config(tiny, large), print)


def test_shared_memory_check_counts_only_local_ranks(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage("/dev/shm").free
    ranks = free // (3 * 8 * (3 * 16**2 + 16 * 12)) + 1  # they need about all of it
    many = load_config(tiny, ["cluster.launcher=ray", f"cluster.workers=[1,{4 * ranks}]"])
    with pytest.raises(GigabatchError, match="shared memory"):
        check_machine(many, print)
    with monkeypatch.context() as torchrun:
        torchrun.setenv("LOCAL_WORLD_SIZE", "8")
        check_machine(many, print)
    # As in the driver of a Ray job, whose workers may run on other nodes.
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    check_machine(many, print)


def test_more_workers_than_gpus_raises_unless_workers_use_no_gpu(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    settings = ["cluster.launcher=ray", "cluster.workers=[2,4]"]
    with pytest.raises(GigabatchError, match=r"Set cluster\.workers=1"):
        check_data(load_config(tiny, settings), lambda done, total: None)
    check_data(
        load_config(tiny, [*settings, "cluster.gpus_per_worker=0"]), lambda done, total: None
    )


@pytest.mark.slow
def test_doctor_with_config_checks_data_and_bandwidth(
    tiny: Path, tmp_path: Path, gigabatch: Any
) -> None:
    done = gigabatch("doctor", tiny, "cluster.launcher=torchrun", "cluster.workers=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "200 samples in" in done.stdout
    assert "2 workers over " in done.stdout
    assert done.stdout.endswith("ready for a run\n")
    done = gigabatch("doctor", tiny, f"data.root={tmp_path / 'missing'}")
    assert done.returncode == 2
    assert "missing is not a folder" in done.stdout
    assert "1 error: a run would fail" in done.stdout
