"""Benchmark of data loading: equal pipelines, reports, bottleneck, synthetic images."""

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
from gigabatch.data.bench import baseline
from gigabatch.data.bench.report import bottleneck
from gigabatch.data.bench.run import bench, run
from gigabatch.data.bench.setup import Setup
from gigabatch.data.bench.shards import synthesize
from gigabatch.data.bench.workloads import micro_batches
from gigabatch.data.decode.fields import Fields, Sample, captions_for_tokenizer
from gigabatch.data.decode.images import ImageSettings
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


def gigabatch_samples(setup: Setup, workers: int = 0) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of every sample by its key."""
    samples = {}
    for batch in micro_batches(setup, workers):
        for row, key in enumerate(batch.keys):
            samples[key] = {name: tensor[row] for name, tensor in batch.tensors.items()}
    return samples


def baseline_samples(
    setup: Setup, workers: int, batches: int
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (key, tensors) of the samples in the first `batches` batches."""
    for batch in islice(baseline.batches(setup, workers), batches):
        keys = batch.pop("keys")
        assert len(keys) == BATCH
        for row, key in enumerate(keys):
            yield key, {name: tensor[row] for name, tensor in batch.items()}


def pixel_difference(a: Tensor, b: Tensor) -> Tensor:
    """Return the absolute difference of two uint8 images as float32."""
    assert a.dtype == b.dtype == torch.uint8
    return (a.float() - b.float()).abs()


@pytest.mark.parametrize("workers", [0, 2])
def test_baseline_samples_equal_gigabatch_samples(workers: int, setup: Setup) -> None:
    expected, keys = gigabatch_samples(setup), set()
    for key, sample in baseline_samples(setup, workers, batches=20):
        keys.add(key)
        assert sample.keys() == expected[key].keys() - {"sample"}
        for name, tensor in sample.items():
            assert tensor.dtype == expected[key][name].dtype
            assert torch.equal(tensor, expected[key][name]), name
    assert len(keys) > 50


@pytest.mark.parametrize(("kind", "size"), [("8k", 224), ("200k", 224), ("8k", 32)])
def test_resized_photographs_of_baseline_and_gigabatch_are_close(
    kind: str, size: int, tmp_path: Path
) -> None:
    synthesize(tmp_path / kind, kind, samples=16)
    setup = setup_of(tmp_path / kind, tmp_path, replace(FIELDS, image=ImageSettings(size=size)))
    samples = gigabatch_samples(setup)
    for key, sample in baseline_samples(setup, 0, batches=2):
        assert torch.equal(sample["text"], samples[key]["text"])
        # A JPEG decoded at half scale differs a little; an image shifted by two pixels, by more.
        image = samples[key]["image"]
        assert pixel_difference(sample["image"], image).mean() < 3
        assert pixel_difference(sample["image"].roll(2, -1), image).mean() > 4


def brighter(samples: Iterator[Sample]) -> Iterator[Sample]:
    for sample in samples:
        yield sample | {"image": sample["image"] // 2 + 128}


def test_user_stages_run_in_both_pipelines(setup: Setup) -> None:
    staged = replace(setup, stages=[brighter])
    after, before = gigabatch_samples(staged), gigabatch_samples(setup)
    for key, sample in baseline_samples(staged, 0, batches=2):
        assert torch.equal(sample["image"], before[key]["image"] // 2 + 128)
        assert torch.equal(sample["image"], after[key]["image"])


SEPARATE = ["reading", "decoding", "user stages", "tokenizing", "collating", "augmenting",
         "indexing by headers", "indexing, verified"]  # fmt: skip


def test_every_stage_is_measured_and_reported(setup: Setup, tmp_path: Path) -> None:
    lines: list[str] = []
    setup = replace(setup, workers=(0, 1), stages=[brighter])
    code = run(setup, minutes=5, out=tmp_path / "out", say=lines.append, repeats=2, max_turn_s=0.02,
               machine={"device": "a machine"}, command="gigabatch bench data x.yaml")  # fmt: skip
    assert code == 0
    results = json.loads((tmp_path / "out" / "data.json").read_text())
    streams = [f"{stage}, {workers}" for workers in ("0 workers", "1 worker")
               for stage in ("all loader stages", "with transfer and augmenting")]  # fmt: skip
    assert [record["stage"] for record in results["stages"]] == SEPARATE + streams
    assert results["left_out"] == []
    assert results["stopped"] is None
    for record in results["stages"]:
        assert record["arms"][0]["name"] == "gigabatch"
        for result in record["arms"]:
            assert len(result["each"]) == 2, result
            assert result["samples_per_s"] > 0
            assert result["bytes_per_s"] > result["samples_per_s"]
    ratios = {record["stage"]: record["ratio"] for record in results["stages"] if "ratio" in record}
    assert list(ratios) == [
        "reading",
        "all loader stages, 0 workers",
        "all loader stages, 1 worker",
    ]

    report = (tmp_path / "out" / "data.md").read_text()
    assert "\n".join(lines).count(report.strip()) == 1
    for text in ("a machine", "gigabatch bench data x.yaml", "WebDataset(resampled=True)",
                  "| all loader stages, 1 worker | webdataset |", "bottleneck: "):  # fmt: skip
        assert text in report
    assert [line.split(":")[0] for line in lines[: len(SEPARATE)]] == SEPARATE


def test_byte_counts_match_members_read(setup: Setup) -> None:
    index = setup.indexes[0]
    rows = np.arange(len(index))
    sizes = [index.take(f"{member}.size", rows).sum() for member in ("png", "txt", "json")]
    results = bench(setup, 5, say=lambda line: None, repeats=1, max_turn_s=0.05)
    reading = {result["name"]: result for result in results["stages"][0]["arms"]}
    for name, members in (("gigabatch", 2), ("gigabatch, unverified", 2), ("webdataset", 3)):
        mean = reading[name]["bytes_per_s"] / reading[name]["samples_per_s"]
        assert mean == pytest.approx(sum(sizes[:members]) / len(index), rel=0.05), name


def test_ctrl_c_keeps_finished_stages(setup: Setup, tmp_path: Path) -> None:
    def interrupt(line: str) -> None:
        if line.startswith("tokenizing"):
            signal.raise_signal(signal.SIGINT)

    code = run(setup, minutes=5, out=tmp_path, say=interrupt, repeats=1, max_turn_s=0.01)
    assert code == 130
    results = json.loads((tmp_path / "data.json").read_text())
    stages = [record["stage"] for record in results["stages"]]
    assert stages == ["reading", "decoding", "tokenizing"]
    assert results["stopped"] == "interrupted"
    assert results["bottleneck"].startswith("bottleneck: ")
    assert "stopped early: interrupted" in (tmp_path / "data.md").read_text()


def test_stages_skipped_for_lack_of_time_are_listed(setup: Setup) -> None:
    results = bench(setup, 1e-9, say=lambda line: None)
    assert results["stages"] == []
    separate = [stage for stage in SEPARATE if stage != "user stages"]
    streams = ["all loader stages, 0 workers", "with transfer and augmenting, 0 workers"]
    assert results["left_out"] == separate + streams
    assert results["bottleneck"] == ""


def test_webdataset_error_ends_only_its_measurement(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    shard = folder / "a.tar"
    shard.write_bytes(next((shards / "train").glob("*.tar")).read_bytes())
    offset = open_index(shards / "train").member_span(7, "png")[0]
    # Damaged before indexing, so the checksum matches and only decoding fails.
    overwrite(shard, offset + 40, bytes(64))
    results = bench(setup_of(folder, tmp_path), 30, lambda line: None, repeats=1, max_turn_s=0.5)
    stream = next(r for r in results["stages"] if r["stage"] == "all loader stages, 0 workers")
    gigabatch, webdataset = stream["arms"]
    assert gigabatch["samples_per_s"] > 0
    assert "samples_per_s" not in webdataset
    assert webdataset["failed"]
    assert "ratio" not in stream


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (replace(FIELDS, allow_missing=True), "every sample has"),
        (replace(FIELDS, text=CaptionSettings(choose="all")), "one caption per sample"),
    ],
)
def test_report_states_why_baseline_is_not_measured(
    fields: Fields, reason: str, shards: Path, tmp_path: Path
) -> None:
    setup = setup_of(shards / "train", tmp_path, fields)
    results = bench(setup, 5, lambda line: None, repeats=1, max_turn_s=0.01)
    assert reason in results["contenders"]["webdataset"]
    stream = next(r for r in results["stages"] if r["stage"] == "all loader stages, 0 workers")
    assert [result["name"] for result in stream["arms"]] == ["gigabatch"]
    reading = {result["name"] for result in results["stages"][0]["arms"]}
    assert {"gigabatch", "webdataset"} <= reading


RATES = {"reading": 100_000, "decoding": 5_000, "tokenizing": 50_000, "collating": 200_000}


@pytest.mark.parametrize(
    ("rates", "workers", "cores", "expected"),
    [
        (RATES, 0, 8, "bottleneck: decoding (5,000 samples/s; other stages of the training "
                      "process: 28,571)"),
        (RATES, 4, 4, "bottleneck: decoding (5,000 samples/s per worker; other stages of a "
                      "worker: 28,571)"),
        (RATES, 2, 4, "bottleneck: decoding (5,000 samples/s per worker; other stages of a "
                      "worker: 28,571). Increase data.workers: there are 4 cores"),
        # Eight workers on two cores are as fast as two: 8,511 samples/s, against 9,000.
        (RATES | {"augmenting": 9_000}, 8, 2,
         "bottleneck: decoding (5,000 samples/s per worker; other stages of a worker: 28,571; "
         "training process: 9,000)"),
        (RATES | {"augmenting": 9_000, "transfer": 90_000}, 4, 4,
         "bottleneck: augmenting (9,000 samples/s; other stages of the training process: 90,000; "
         "4 loaders: 17,021)"),
        # Without workers, all stages run in one process, and the slowest is the bottleneck.
        (RATES | {"augmenting": 4_000}, 0, 4,
         "bottleneck: augmenting (4,000 samples/s; other stages of the training process: 4,255)"),
        ({"reading": 700}, 1, 1, "bottleneck: reading (700 samples/s per worker)"),
    ],
)  # fmt: skip
def test_bottleneck_is_slowest_stage_of_slower_side(
    rates: dict[str, float], workers: int, cores: int, expected: str
) -> None:
    assert bottleneck(rates, workers, cores) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workers": ()}, "workers are []: specify numbers of loader processes"),
        ({"workers": (2, -1)}, "workers are [2, -1]"),
        ({"tokenizer": None}, "no tokenizer"),
        ({"fields": Fields()}, "there are no fields to read"),
        ({"plans": [MicroBatchPlan(1, 0, True, ())]}, "no micro-batches to read"),
        ({"fields": replace(FIELDS, arrays=("npy",))}, "no sample has a .npy member"),
    ],
)
def test_setup_with_nothing_to_measure_is_rejected(
    change: dict[str, Any], message: str, setup: Setup
) -> None:
    with pytest.raises(GigabatchError) as error:
        replace(setup, **change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("minutes", "out", "message"),
    [(0.0, "out", "--minutes is 0"), (1.0, "file/out", "--out .*file/out cannot be written")],
)
def test_invalid_options_are_rejected(
    minutes: float, out: str, message: str, setup: Setup, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(GigabatchError, match=message):
        run(setup, minutes=minutes, out=tmp_path / out, say=print)


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("8k", 7_000, 10_000), ("200k", 180_000, 220_000)]
)
def test_synthetic_photographs_have_nominal_size(
    kind: str, low: int, high: int, tmp_path: Path
) -> None:
    synthesize(tmp_path / "a", kind, samples=9)
    synthesize(tmp_path / "b", kind, samples=9)
    index = open_index(tmp_path / "a")
    assert len(index) == 9
    assert index.members == ("jpg", "json", "txt")
    assert low < index.take("jpg.size", np.arange(9)).mean() < high
    assert index.digest == open_index(tmp_path / "b").digest


@pytest.mark.parametrize(
    ("kind", "samples", "message"),
    [("9k", 1, "choose 8k or 200k"), ("8k", 0, "cannot write 0 samples")],
)
def test_unknown_kind_or_zero_samples_are_rejected(
    kind: str, samples: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(GigabatchError, match=message):
        synthesize(tmp_path, kind, samples)
    assert os.listdir(tmp_path) == []
