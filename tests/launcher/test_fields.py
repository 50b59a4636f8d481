"""Runs and evaluations on fields that lack values, and lists whose first text is the positive."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from support import losses, outcome
from tarfiles import write_tar

from gigabatch.launcher.start import resumed_config
from gigabatch.trainer.config.load import dump_config, parse_config
from gigabatch.trainer.inputs import eval_fields, fields_of
from gigabatch.trainer.run.folder import RunFolder

CONFIG = """
data:
  root: {root}
  train: .
  workers: 0
  image: {{size: 8, channels: 3}}
  text: {{tokenizer: bpe, vocab_size: 300, length: 8}}
batch: {{global_size: 16, micro_size: 16}}
towers:
  width: 8
  image: {{kind: conv, widths: [8], depths: [1]}}
  text: {{kind: conv, width: 8, layers: 1}}
train: {{steps: 1}}
checkpoint: {{every_steps: 10}}
monitor: {{every_steps: 1}}
eval: {{sets: []}}
cluster: {{launcher: inline, workers: 1, threads: 1}}
run: {{dir: {root}/runs, name: r}}
"""
NAN = float("nan")
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A function that runs a command; `train` reads the config above."""
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG.format(root=tmp_path))

    def command(verb: str, *arguments: object) -> tuple[int, str]:
        first = [path] if verb == "train" else []
        code, out, err = outcome(monkeypatch, capsys, verb, *first, *arguments)
        return code, out + err

    return command


def write_records(folder: Path, records: Sequence[dict[str, Any]], empty: int = 0) -> None:
    """Write one sample per record; the first `empty` have no caption."""
    members: dict[str, bytes] = {}
    for row, record in enumerate(records):
        png = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), row % 256, np.uint8)).save(png, "png")
        members[f"{row:03d}.png"] = png.getvalue()
        members[f"{row:03d}.txt"] = f"text {row}".encode() if row >= empty else b" "
        members[f"{row:03d}.json"] = json.dumps(record).encode()
    write_tar(folder / "a.tar", members)


def products(missing: Any) -> list[dict[str, Any]]:
    return [{"product": row if row % 4 == 0 else missing, "n": row} for row in range(32)]


@pytest.mark.parametrize("is_indexed", [False, True])
@pytest.mark.parametrize(
    ("missing", "override", "key"),
    [
        (None, "objective.positives=product", "objective.positives"),
        (NAN, "objective.positives=product", "objective.positives"),
        ("", "objective.within=product", "objective.within"),
        ([], "objective={name: siglip, positives: product}", "objective.positives"),
        (None, "objective={name: label_distance, label: product}", "objective.label"),
        (NAN, "data.group=product", "data.group"),
        (
            NAN,
            "objective={name: sum, terms: [{name: infonce}, {name: supcon, positives: product}]}",
            "objective.terms.1.positives",
        ),
        (
            "no",
            "objective={name: hard_negatives, pair: n, changed: product}",
            "objective.changed",
        ),
    ],
)
def test_field_without_values_is_refused_with_a_count(
    is_indexed: bool, missing: Any, override: str, key: str, run: Run, tmp_path: Path
) -> None:
    write_records(tmp_path, products(missing))
    if is_indexed:
        assert run("data", "index", tmp_path, "--columns", "product")[0] == 0
    code, message = run("train", override)
    assert code == 2
    count = 32 - 2 if "changed" in override else 24  # of the values, only 0 is a flag
    count = 31 if "changed" in override else count
    assert f"{key}: {count} of 32 samples of {tmp_path}" in message
    assert "json field 'product'" in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("override", ["objective.positives=product", "data.group=product"])
def test_unknown_ids_equal_only_themselves_if_a_key_says_so(
    override: str, run: Run, tmp_path: Path
) -> None:
    results = []
    for number, (missing, is_indexed) in enumerate([(None, False), (None, True), (NAN, True)]):
        folder = tmp_path / str(number)
        records = products(missing)
        for record in records[:16]:
            record["product"] = 0  # a group of one sample is compared with nothing
        write_records(folder, records)
        if is_indexed:
            assert run("data", "index", folder, "--columns", "product")[0] == 0
        settings = [f"data.root={folder}", f"run.name=r{number}", "data.missing_ids=unique"]
        assert run("train", override, *settings)[0] == 0
        results.append(losses(tmp_path / "runs" / f"r{number}")[1])
    assert results[0] == results[1] == results[2]


def test_groups_of_one_sample_are_named_and_refused_if_there_are_no_others(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_records(tmp_path, [{"product": min(row, 20)} for row in range(32)])
    code, message = run("train", "data.group=product")
    assert code == 0
    assert "data.group: 20 of 32 samples" in caplog.text
    (tmp_path / "a.tar").unlink()
    write_records(tmp_path, [{"product": row} for row in range(32)])
    code, message = run("train", "data.group=product", "run.name=alone")
    assert code == 2
    assert "data.group: 32 of 32 samples" in message
    assert "Name a field that several samples share" in message
    assert not (tmp_path / "runs" / "alone").exists()


def passages(first: Any, every: int) -> list[dict[str, Any]]:
    """Return queries, of which every n-th has `first` where its positive should be."""
    return [
        {
            "query": f"what is {row}",
            "passages": [f"it is {row}" if row % every else first, f"wrong {row}", f"no {row}"],
        }
        for row in range(64)
    ]


HARD = [
    "data.captions={field: passages, choose: all, most: 3}",
    "towers.more={query: {kind: text, share: text, field: query}}",
    "objective={name: hard_negatives, taps: [query, text]}",
]


@pytest.mark.parametrize("first", [None, ""])
def test_empty_positive_is_a_bad_sample_and_not_a_negative(
    first: Any, run: Run, tmp_path: Path
) -> None:
    write_records(tmp_path, passages(first, 8))
    assert run("train", *HARD)[0] == 0
    records = (tmp_path / "runs" / "r" / "quarantine.jsonl").read_text().splitlines()
    assert {int(json.loads(record)["key"]) % 8 for record in records} == {0}
    code, message = run("train", *HARD, "data.max_damaged=0", "run.name=strict")
    assert code == 2
    assert "is empty at its first position, where the objective expects the positive" in message
    assert "Set data.missing=mask" in message
    assert run("train", *HARD, "data.missing=mask", "run.name=masked")[0] == 0


def test_empty_captions_name_the_key_that_masks_them(run: Run, tmp_path: Path) -> None:
    write_records(tmp_path, [{}] * 32, empty=16)
    code, message = run("train", "data.max_damaged=0")
    assert code == 2
    assert "its caption (txt) is empty. Set data.missing=mask" in message


def test_run_that_began_before_the_versions_keeps_its_meaning(run: Run, tmp_path: Path) -> None:
    write_records(tmp_path, products(None))
    assert run("data", "index", tmp_path, "--columns", "product")[0] == 0
    began = "data.fields_version=1"
    settings = ["objective.positives=product", "train.steps=2", "run.name=old", began]
    assert run("train", *settings)[0] == 0
    folder = RunFolder(tmp_path / "runs" / "old")
    path = folder.path / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    del (
        tree["data"]["fields_version"],
        tree["data"]["missing_ids"],
        tree["data"]["image"]["version"],
    )
    path.write_text(yaml.safe_dump(tree))
    for config in (folder.config(), resumed_config(folder, ["cluster.workers=1"], [])):
        assert (config.data.fields_version, config.data.image.version) == (1, 1)
        assert not fields_of(config).ordered
        assert eval_fields(config).missing_ids == "unique"  # an evaluation stops no old run
    first = losses(folder.path)
    assert run("resume", folder.path, "train.steps=3", "--allow", "train.steps")[0] == 0
    assert "fields_version: 1" in path.read_text()
    assert {step: losses(folder.path)[step] for step in first} == first
    new = parse_config(dump_config(folder.config()).replace("_version: 1", "_version: 2"), "new")
    assert new.data.fields_version == 2


def test_evaluation_refuses_missing_positives_and_warns_of_missing_slices(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [
        {"product": row if row % 8 else NAN, "n": (7, 7.0, "7", "", None)[row % 5], "s": "a"}
        for row in range(32)
    ]
    write_records(tmp_path / "set", records)
    assert run("train", f"data.root={tmp_path / 'set'}")[0] == 0
    evaluate = ["eval", tmp_path / "runs" / "r", "--on", tmp_path / "set", "--json"]
    code, message = run(*evaluate, "positives=product")
    assert code == 2
    assert "positives: 4 of 32 samples" in message
    assert "positives=none" in message
    code, message = run(*evaluate, "--intervals-by", "product")
    assert code == 2
    assert "4 of 32 samples have no field 'product'" in message
    code, printed = run(*evaluate, "--slice", "n")
    assert code == 0
    counts = {
        name.partition("/n=")[2].removesuffix("/count"): count
        for name, count in json.loads(printed.splitlines()[-1]).items()
        if name.endswith("/count")
    }
    assert counts == {"7": 14, '"7"': 6, "None": 12}
    assert "--slice n: 12 of 32 samples have no value" in caplog.text
