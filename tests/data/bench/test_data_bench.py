from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tarfiles import overwrite
from torch import Tensor

from gigabatch.data.augment import Augmentation
from gigabatch.data.bench import plain
from gigabatch.data.bench.report import bottleneck
from gigabatch.data.bench.run import bench, run
from gigabatch.data.bench.setup import Setup
from gigabatch.data.bench.shards import synthesise
from gigabatch.data.bench.work import micro_batches
from gigabatch.data.decode.fields import Fields, Sample, captions_for_tokenizer
from gigabatch.data.decode.members import ImageSettings
from gigabatch.data.errors import GigabatchError
from gigabatch.data.order.assignment import EvalPlans, MicroBatchPlan
from gigabatch.data.shards.indexing import open_index
from gigabatch.data.text.captions import CaptionSettings
from gigabatch.data.text.tokenizer import TextSettings, train_bpe

FIELDS = Fields(ImageSettings(size=16), CaptionSettings(), columns=("concept", "source"))
BATCH = 8


@pytest.fixture
def setup(shards: Path, tmp_path: Path) -> Setup:
    return setup_of(shards / "train", tmp_path)


def setup_of(folder: Path, tmp_path: Path, fields: Fields = FIELDS) -> Setup:
    index = open_index(folder, columns=["concept"])
    tokenizer = tmp_path / "tokenizer.json"
    captions = captions_for_tokenizer([index], fields, 1000)
    train_bpe(captions, TextSettings(vocab_size=300, length=12)).save(str(tokenizer))
    return Setup(
        indexes=[index], plans=EvalPlans(len(index), BATCH, 1, 0), fields=fields,
        tokenizer=tokenizer, seed=3, workers=(0,), prefetch=2, device=torch.device("cpu"),
        augmentation=Augmentation(rotate=10, contrast=0.2),
    )  # fmt: skip


def ours(setup: Setup, workers: int = 0) -> dict[str, dict[str, Tensor]]:
    """Each sample by its key."""
    found = {}
    for batch in micro_batches(setup, workers):
        for row, name in enumerate(batch.keys):
            found[name] = {what: tensor[row] for what, tensor in batch.tensors.items()}
    return found


def theirs(setup: Setup, workers: int, batches: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for batch in islice(plain.batches(setup, workers), batches):
        keys = batch.pop("keys")
        assert len(keys) == BATCH
        for row, name in enumerate(keys):
            yield name, {what: tensor[row] for what, tensor in batch.items()}


def far(a: Tensor, b: Tensor) -> Tensor:
    assert a.dtype == b.dtype == torch.uint8
    return (a.float() - b.float()).abs()


@pytest.mark.parametrize("workers", [0, 2])
def test_both_contenders_make_the_same_of_a_sample(workers: int, setup: Setup) -> None:
    mine, seen = ours(setup), set()
    for name, sample in theirs(setup, workers, batches=20):
        seen.add(name)
        assert sample.keys() == mine[name].keys() - {"sample"}
        for what, tensor in sample.items():
            assert tensor.dtype == mine[name][what].dtype
            assert torch.equal(tensor, mine[name][what]), what
    assert len(seen) > 50


@pytest.mark.parametrize(("kind", "size"), [("8k", 224), ("200k", 224), ("8k", 32)])
def test_both_make_nearly_the_same_of_a_resized_photograph(
    kind: str, size: int, tmp_path: Path
) -> None:
    synthesise(tmp_path / kind, kind, samples=16)
    setup = setup_of(tmp_path / kind, tmp_path, replace(FIELDS, image=ImageSettings(size=size)))
    mine = ours(setup)
    for name, sample in theirs(setup, 0, batches=2):
        assert torch.equal(sample["text"], mine[name]["text"])
        # A JPEG decoded at half its scale differs a little; a pixel's shift would be 10 and more.
        assert far(sample["image"], mine[name]["image"]).mean() < 3
        assert far(sample["image"].roll(2, -1), mine[name]["image"]).mean() > 4


def brighter(samples: Iterator[Sample]) -> Iterator[Sample]:
    for sample in samples:
        yield sample | {"image": sample["image"] // 2 + 128}


def test_the_users_own_stages_are_in_both(setup: Setup) -> None:
    staged = replace(setup, stages=[brighter])
    mine, before = ours(staged), ours(setup)
    for name, sample in theirs(staged, 0, batches=2):
        assert torch.equal(sample["image"], before[name]["image"] // 2 + 128)
        assert torch.equal(sample["image"], mine[name]["image"])


ALONE = ["reading", "decoding", "your own stages", "tokenising", "collating", "augmenting",
         "indexing by headers", "indexing, verified"]  # fmt: skip


def test_every_stage_is_measured_and_reported(setup: Setup, tmp_path: Path) -> None:
    said: list[str] = []
    setup = replace(setup, workers=(0, 1), stages=[brighter])
    code = run(setup, minutes=5, out=tmp_path / "out", say=said.append, repeats=2, longest_s=0.02,
               machine={"device": "a machine"}, command="gigabatch bench data x.yaml")  # fmt: skip
    assert code == 0
    found = json.loads((tmp_path / "out" / "data.json").read_text())
    streams = [f"{what}, {workers}" for workers in ("0 workers", "1 worker")
               for what in ("together", "with transfer and augmenting")]  # fmt: skip
    assert [record["stage"] for record in found["stages"]] == ALONE + streams
    assert found["left_out"] == []
    assert found["stopped"] is None
    for record in found["stages"]:
        assert record["arms"][0]["name"] == "gigabatch"
        for arm in record["arms"]:
            assert len(arm["each"]) == 2, arm
            assert arm["samples_per_s"] > 0
            assert arm["bytes_per_s"] > arm["samples_per_s"]
    ratios = {record["stage"]: record["ratio"] for record in found["stages"] if "ratio" in record}
    assert list(ratios) == ["reading", "together, 0 workers", "together, 1 worker"]

    report = (tmp_path / "out" / "data.md").read_text()
    assert "\n".join(said).count(report.strip()) == 1
    for words in ("a machine", "gigabatch bench data x.yaml", "WebDataset(resampled=True)",
                  "| together, 1 worker | webdataset |", "bottleneck: "):  # fmt: skip
        assert words in report
    assert [line.split(":")[0] for line in said[: len(ALONE)]] == ALONE


def test_bytes_are_those_of_the_members_read(setup: Setup) -> None:
    index = setup.indexes[0]
    every = np.arange(len(index))
    wanted = [index.take(f"{member}.size", every).sum() for member in ("png", "txt", "json")]
    found = bench(setup, 5, say=lambda line: None, repeats=1, longest_s=0.05)
    reading = {arm["name"]: arm for arm in found["stages"][0]["arms"]}
    for name, members in (("gigabatch", 2), ("gigabatch, unverified", 2), ("webdataset", 3)):
        mean = reading[name]["bytes_per_s"] / reading[name]["samples_per_s"]
        assert mean == pytest.approx(sum(wanted[:members]) / len(index), rel=0.05), name


def test_ctrl_c_keeps_what_was_found(setup: Setup, tmp_path: Path) -> None:
    def interrupt(line: str) -> None:
        if line.startswith("tokenising"):
            signal.raise_signal(signal.SIGINT)

    code = run(setup, minutes=5, out=tmp_path, say=interrupt, repeats=1, longest_s=0.01)
    assert code == 130
    found = json.loads((tmp_path / "data.json").read_text())
    assert [record["stage"] for record in found["stages"]] == ["reading", "decoding", "tokenising"]
    assert found["stopped"] == "interrupted"
    assert found["bottleneck"].startswith("bottleneck: ")
    assert "stopped early: interrupted" in (tmp_path / "data.md").read_text()


def test_what_there_is_no_time_for_is_named(setup: Setup) -> None:
    found = bench(setup, 1e-9, say=lambda line: None)
    assert found["stages"] == []
    alone = [stage for stage in ALONE if stage != "your own stages"]
    streams = ["together, 0 workers", "with transfer and augmenting, 0 workers"]
    assert found["left_out"] == alone + streams
    assert found["bottleneck"] == ""


def test_what_fails_in_plain_webdataset_ends_that_contender_alone(
    shards: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    shard = folder / "a.tar"
    shard.write_bytes(next((shards / "train").glob("*.tar")).read_bytes())
    offset = open_index(shards / "train").member_span(7, "png")[0]
    overwrite(shard, offset + 40, bytes(64))  # before it is indexed: its checksum is right
    found = bench(setup_of(folder, tmp_path), 30, lambda line: None, repeats=1, longest_s=0.5)
    stream = next(r for r in found["stages"] if r["stage"] == "together, 0 workers")
    mine, plains = stream["arms"]
    assert mine["samples_per_s"] > 0
    assert "samples_per_s" not in plains
    assert plains["failed"]
    assert "ratio" not in stream


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        (replace(FIELDS, allow_missing=True), "every sample has"),
        (replace(FIELDS, text=CaptionSettings(choose="all")), "one caption a sample"),
    ],
)
def test_the_report_says_what_plain_webdataset_is_not_put_together_for(
    fields: Fields, why: str, shards: Path, tmp_path: Path
) -> None:
    found = bench(
        setup_of(shards / "train", tmp_path, fields), 5, lambda line: None, repeats=1,
        longest_s=0.01,
    )  # fmt: skip
    assert why in found["contenders"]["webdataset"]
    stream = next(r for r in found["stages"] if r["stage"] == "together, 0 workers")
    assert [arm["name"] for arm in stream["arms"]] == ["gigabatch"]
    assert {"gigabatch", "webdataset"} <= {arm["name"] for arm in found["stages"][0]["arms"]}


RATES = {"reading": 100_000, "decoding": 5_000, "tokenising": 50_000, "collating": 200_000}


@pytest.mark.parametrize(
    ("rates", "workers", "cores", "says"),
    [
        (RATES, 0, 8, "bottleneck: decoding (5,000 samples/s; the process's other stages keep up "
                      "at 28,571)"),
        (RATES, 4, 4, "bottleneck: decoding (5,000 samples/s a worker; a worker's other stages "
                      "keep up at 28,571)"),
        (RATES, 2, 4, "bottleneck: decoding (5,000 samples/s a worker; a worker's other stages "
                      "keep up at 28,571). More data.workers would help: there are 4 cores"),
        # Eight workers on two cores are worth two: 8,511 samples/s against 9,000.
        (RATES | {"augmenting": 9_000}, 8, 2,
         "bottleneck: decoding (5,000 samples/s a worker; a worker's other stages keep up at "
         "28,571, the training process at 9,000)"),
        (RATES | {"augmenting": 9_000, "transfer": 90_000}, 4, 4,
         "bottleneck: augmenting (9,000 samples/s; the process's other stages keep up at 90,000, "
         "the 4 loaders at 17,021)"),
        # One after another in one process, the slowest of all is the one to name.
        (RATES | {"augmenting": 4_000}, 0, 4,
         "bottleneck: augmenting (4,000 samples/s; the process's other stages keep up at 4,255)"),
        ({"reading": 700}, 1, 1, "bottleneck: reading (700 samples/s a worker)"),
    ],
)  # fmt: skip
def test_the_bottleneck_is_the_slowest_stage_of_the_slower_side(
    rates: dict[str, float], workers: int, cores: int, says: str
) -> None:
    assert bottleneck(rates, workers, cores) == says


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"workers": ()}, "workers are []: name numbers of loader processes"),
        ({"workers": (2, -1)}, "workers are [2, -1]"),
        ({"tokenizer": None}, "no tokeniser"),
        ({"fields": Fields()}, "nothing of the samples is to be read"),
        ({"plans": [MicroBatchPlan(1, 0, True, ())]}, "no micro-batch to be read"),
        ({"fields": replace(FIELDS, arrays=("npy",))}, "no sample has a .npy member"),
    ],
)
def test_what_cannot_be_measured_is_refused(change: dict[str, Any], why: str, setup: Setup) -> None:
    with pytest.raises(GigabatchError) as caught:
        replace(setup, **change)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("minutes", "out", "why"),
    [(0.0, "out", "--minutes is 0"), (1.0, "file/out", "--out .*file/out cannot be written")],
)
def test_options_that_do_not_fit_are_refused(
    minutes: float, out: str, why: str, setup: Setup, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(GigabatchError, match=why):
        run(setup, minutes=minutes, out=tmp_path / out, say=print)


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("8k", 7_000, 10_000), ("200k", 180_000, 220_000)]
)
def test_made_up_photographs_have_the_size_they_are_named_for(
    kind: str, low: int, high: int, tmp_path: Path
) -> None:
    synthesise(tmp_path / "a", kind, samples=9)
    synthesise(tmp_path / "b", kind, samples=9)
    index = open_index(tmp_path / "a")
    assert len(index) == 9
    assert index.members == ("jpg", "json", "txt")
    assert low < index.take("jpg.size", np.arange(9)).mean() < high
    assert index.digest == open_index(tmp_path / "b").digest


@pytest.mark.parametrize(
    ("kind", "samples", "why"),
    [("9k", 1, "choose 8k or 200k"), ("8k", 0, "0 samples make no shard")],
)
def test_photographs_of_no_kind_or_number_are_refused(
    kind: str, samples: int, why: str, tmp_path: Path
) -> None:
    with pytest.raises(GigabatchError, match=why):
        synthesise(tmp_path, kind, samples)
    assert os.listdir(tmp_path) == []
