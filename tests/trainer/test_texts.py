"""Runs with two texts per sample, in a shared tower or in two towers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset as wds
from support import losses, run_ranks

from gigabatch.data.errors import GigabatchError
from gigabatch.data.text.tokenizer import encode, load_tokenizer, with_length
from gigabatch.trainer.checkpoints.format import latest_checkpoint
from gigabatch.trainer.config import Config
from gigabatch.trainer.config.load import dump_config, load_config, parse_config
from gigabatch.trainer.inference import load_newest_towers
from gigabatch.trainer.inputs import make_tokenizer, open_train, plans_of, train_stream
from gigabatch.trainer.loop import run_training
from gigabatch.trainer.run.create import create_run
from gigabatch.trainer.run.folder import RunFolder

PAIRS = """
data:
  root: {root}
  workers: 0
  captions: {{field: passages, choose: all, most: 3, prefix: "passage: "}}
  text: {{vocab_size: 300, length: 20}}
batch: {{global_size: 16, micro_size: 4}}
train: {{steps: 8}}
optimizer: {{lr: 1.0e-2}}
schedule: {{warmup_steps: 2}}
checkpoint: {{every_steps: 0}}
monitor: {{every_steps: 1}}
run: {{dir: {root}/runs}}
cluster: {{launcher: inline, workers: 1, threads: 1}}
towers:
  width: 16
  text: {{width: 16, dropout: 0.1}}
  more: {{query: {{kind: text, share: text, field: ask.first, prefix: "query: ", length: 12}}}}
objective: {{name: hard_negatives, taps: [query, text]}}
"""
TWO_TOWERS = [
    "towers.more={left: {kind: text, tower: {width: 16}, field: passages}, right: {kind: text, "
    "tower: {width: 8, head: {layers: 2}}, field: ask.first, length: 5}}",
    "objective={taps: [left, right]}",
]
TOKENS = (
    "objective={name: sum, terms: [{name: late_interaction, taps: [query.tokens, text.tokens], "
    "symmetric: false}, {taps: [query, text@1]}]}"
)
PROBE = Path(__file__).with_name("modalities_probe.py")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Write sets `train` and `val` of a query and one to three passages, and a config file."""
    for name, count in (("train", 40), ("val", 16)):
        (tmp_path / name).mkdir()
        with wds.TarWriter(str(tmp_path / name / "a.tar"), mtime=0) as writer:
            for number in range(count):
                writer.write({"__key__": f"q{number:03d}", "json": json.dumps(record(number))})
    path = tmp_path / "c.yaml"
    path.write_text(PAIRS.format(root=tmp_path))
    return path


def record(number: int) -> dict[str, Any]:
    """Return the json of a sample."""
    passages = [f"here is {number}, and more of it", f"not {number}", f"nor {number}"]
    return {"ask": {"first": f"where is {number}?"}, "passages": passages[: 1 + number % 3]}


def new_run(config: Config, name: str) -> RunFolder:
    settings = config.run.model_copy(update={"name": name})
    run = create_run(config.model_copy(update={"run": settings}), name)
    make_tokenizer(config, open_train(config)).save(str(run.tokenizer))
    return run


def first_batch(config: Config, tokenizer: Path) -> dict[str, torch.Tensor]:
    data = open_train(config)
    make_tokenizer(config, data).save(str(tokenizer))
    (micro, *_) = train_stream(data, plans_of(data, 1, 0, 1, 1), tokenizer, [])
    return micro.tensors


def test_each_text_has_its_prefix_and_length(pairs: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    batch = first_batch(load_config(pairs), file)
    tokenizer = load_tokenizer(file)
    records = [record(number) for number in batch["sample"].tolist()]
    first_passages = [f"passage: {record['passages'][0]}" for record in records]
    assert torch.equal(batch["text"][::3], encode(tokenizer, first_passages)[0])
    queries = [f"query: {record['ask']['first']}" for record in records]
    tokens, mask = encode(with_length(tokenizer, 12), queries)
    assert torch.equal(batch["query"], tokens)
    assert torch.equal(batch["query_mask"], mask)
    assert tokens.shape == (4, 12)
    # A prefix without a passage does not count as present.
    present = batch["text_present"].view(4, 3).sum(1).tolist()
    assert present == [len(record["passages"]) for record in records]


def test_tokenizer_is_trained_on_all_texts(pairs: Path, tmp_path: Path) -> None:
    batch = first_batch(
        load_config(pairs, [*TWO_TOWERS, "data.text.vocab_size=400"]), tmp_path / "t.json"
    )
    assert batch["left"].shape == (4, 20)
    assert batch["right"].shape == (4, 5)
    vocabulary = load_tokenizer(tmp_path / "t.json").get_vocab()
    assert {"Ġwhere", "Ġhere"} <= vocabulary.keys()


@pytest.mark.slow
def test_shared_tower_is_saved_once_and_resumes(pairs: Path) -> None:
    config = load_config(pairs, ["eval.sets=[val]", "eval.every_steps=4"])
    full, resumed = (new_run(config, name) for name in ("full", "resumed"))
    assert run_training(full)
    calls = iter(range(100))
    assert not run_training(resumed, lambda: next(calls) == 9)
    assert run_training(resumed)
    assert losses(resumed.path) == losses(full.path)
    assert losses(full.path)[8] < losses(full.path)[1]
    assert full.evaluation(8)["eval/val/query2text_recall@10"] > 0
    checkpoint = latest_checkpoint(full)
    assert checkpoint is not None
    assert {name.split(".")[1] for name in checkpoint.tensors("towers")} == {"text"}
    _, towers = load_newest_towers(full)
    tokens = encode(load_tokenizer(full.tokenizer), ["query: where is 3?", "passage: here"])
    with torch.no_grad():
        outputs = towers({"query": tokens, "text": tokens})
    assert torch.equal(outputs["query"], outputs["text"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "zero"),
    [([], 3), ([TOKENS, "data.captions.choose=first"], 0)],
)
def test_exact_step_with_two_texts_equals_one_graph(
    settings: Sequence[str], zero: int, pairs: Path, tmp_path: Path
) -> None:
    config = load_config(pairs, settings)
    tokenizer = tmp_path / "tokenizer.json"
    make_tokenizer(config, open_train(config)).save(str(tokenizer))
    report = run_ranks(PROBE, 2, pairs, tokenizer, *settings, f"train.zero_stage={zero}")
    assert report["gap"] < 1e-5, report


def test_invalid_extra_texts_raise(pairs: Path) -> None:
    more = "towers.more={query: {kind: text, %s}}"
    for settings, message in (
        ([more % "field: a"], "set either `share: text`"),
        ([more % "share: text, tower: {kind: conv}"], "set either `share: text`"),
        ([more % "share: image"], "towers.more.query.share"),
        ([more % "tower: {kind: conv, widht: 3}"], "towers.more.query.tower.widht"),
        (["towers.more.query.length=21"], "at most data.text.length=20 tokens"),
        (["objective={name: supcon, taps: [query, query@1]}"], "the text tower must exist"),
        (["train.init_from=x", "train.init_parts=[query]"], "no such tower; it has text"),
    ):
        with pytest.raises(GigabatchError) as error:
            load_config(pairs, settings)
        assert message in str(error.value)
    for settings in ([], TWO_TOWERS):
        config = load_config(pairs, settings)
        assert parse_config(dump_config(config), "again") == config


def test_second_head_of_a_shared_tower_is_shared(pairs: Path) -> None:
    one = "data.captions.choose=random"
    views = "{name: barlow, taps: [query.projection, text.projection]}"
    load_config(pairs, [one, f"objective={{name: sum, terms: [{{taps: [image, text]}}, {views}]}}"])
    with pytest.raises(GigabatchError, match=r"text\.projection is after a second head"):
        load_config(pairs, [one, "objective={taps: [image, query.projection]}"])
