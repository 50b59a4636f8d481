"""Records of attempts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.config.load import parse_config
from gigabatch.trainer.distributed import World
from gigabatch.trainer.run.attempts import Worker, begin_attempt, environment_differences
from gigabatch.trainer.run.create import create_run
from gigabatch.trainer.run.folder import RunFolder, Superseded

SINGLE = World(0, 1, torch.device("cpu"), None)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return create_run(parse_config(f"run: {{dir: {tmp_path}}}", "c"), "run")


def test_attempt_records_workers_and_variables_without_secrets(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    monkeypatch.setenv("HF_TOKEN", "very-secret")
    assert [begin_attempt(run, SINGLE), begin_attempt(run, SINGLE)] == [1, 2]
    text = (run.path / "attempts" / "000002.json").read_text()
    record = json.loads(text)
    assert record["environment"]["NCCL_SOCKET_IFNAME"] == "eth7"
    assert [(w["rank"], w["device"]) for w in record["workers"]] == [(0, "cpu")]
    assert "very-secret" not in text


def test_differing_variables_give_one_warning_per_variable() -> None:
    def worker(rank: int, **environment: str) -> Worker:
        return Worker(rank, f"h{rank}", "cuda", environment)

    common = {"NCCL_DEBUG": "INFO"}
    zero = worker(0, **common, CUDA_VISIBLE_DEVICES="0")
    one = worker(1, **common, CUDA_VISIBLE_DEVICES="1")
    assert environment_differences([zero, one]) == []
    workers = [zero, worker(1), worker(2, NCCL_DEBUG="WARN"), worker(3, **common)]
    (warning,) = environment_differences(workers)
    assert "NCCL_DEBUG is unset for rank 1 on h1 (and 1 more ranks) but INFO for rank 0" in warning


def test_errors_of_a_superseded_attempt_become_superseded(run: RunFolder) -> None:
    first = run.take_attempt()
    with pytest.raises(GigabatchError, match="the disk is full"), run.fenced(first):
        raise GigabatchError("the disk is full")
    run.take_attempt()
    with pytest.raises(Superseded, match="attempt 1 was superseded"), run.fenced(first):
        raise RuntimeError("the connection was closed by its peer")
