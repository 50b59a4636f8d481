from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.config.load import parse_config
from gigabatch.trainer.distributed import World
from gigabatch.trainer.run.attempts import Worker, begin_attempt, unlike
from gigabatch.trainer.run.create import create_run
from gigabatch.trainer.run.folder import RunFolder, Superseded

ALONE = World(0, 1, torch.device("cpu"), None)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return create_run(parse_config(f"run: {{dir: {tmp_path}}}", "c"), "run")


def test_an_attempt_records_where_it_runs_and_with_what_but_no_secret(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    monkeypatch.setenv("HF_TOKEN", "very-secret")
    assert [begin_attempt(run, ALONE), begin_attempt(run, ALONE)] == [1, 2]
    text = (run.path / "attempts" / "000002.json").read_text()
    begun = json.loads(text)
    assert begun["environment"]["NCCL_SOCKET_IFNAME"] == "eth7"
    assert [(w["rank"], w["device"]) for w in begun["workers"]] == [(0, "cpu")]
    assert "very-secret" not in text


def test_workers_whose_settings_differ_are_told_of_once_a_setting() -> None:
    def worker(rank: int, **environment: str) -> Worker:
        return Worker(rank, f"h{rank}", "cuda", environment)

    alike = {"NCCL_DEBUG": "INFO"}
    zero = worker(0, **alike, CUDA_VISIBLE_DEVICES="0")
    assert unlike([zero, worker(1, **alike, CUDA_VISIBLE_DEVICES="1")]) == []
    (told,) = unlike([zero, worker(1), worker(2, NCCL_DEBUG="WARN"), worker(3, **alike)])
    assert "NCCL_DEBUG is unset for rank 1 on h1 (and 1 more ranks) and INFO for rank 0" in told


def test_what_an_attempt_meets_after_a_later_one_began_is_nobodys_concern(run: RunFolder) -> None:
    first = run.take_attempt()
    with pytest.raises(GigabatchError, match="the disk is full"), run.fenced(first):
        raise GigabatchError("the disk is full")
    run.take_attempt()
    with pytest.raises(Superseded, match="attempt 1 was cut off"), run.fenced(first):
        raise RuntimeError("the connection was closed by its peer")
