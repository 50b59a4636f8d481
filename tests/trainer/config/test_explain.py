"""Explanations of config keys, and the reference page generated from them."""

from __future__ import annotations

import re

from gigabatch.trainer.config import Config
from gigabatch.trainer.config.explain import explain_keys
from gigabatch.trainer.config.keys import known_keys
from gigabatch.trainer.config.load import parse_config
from gigabatch.trainer.config.reference import config_reference


def test_every_key_has_a_meaning_and_a_type() -> None:
    entries = explain_keys(None)
    assert [entry.key for entry in entries if not entry.meaning] == []
    assert [entry.key for entry in entries if "any value" in entry.type] == []


def test_every_known_key_is_explained() -> None:
    explained = {entry.key for entry in explain_keys(None)}
    terms = {key for key in known_keys(Config) if key.startswith("objective.terms.")}
    assert set(known_keys(Config)) - terms <= explained


def test_value_and_default_are_yaml_of_the_config() -> None:
    config = parse_config("optimizer: {lr: 0.5}\neval: {sets: [val, a/b]}", "c")
    entries = {entry.key: entry for entry in explain_keys(config)}
    assert (entries["optimizer.lr"].value, entries["optimizer.lr"].default) == ("0.5", "0.001")
    assert entries["eval.sets"].value == "[val, a/b]"
    assert entries["run.name"].value == "null"


def test_types_are_described_in_words() -> None:
    types = {entry.key: entry.type for entry in explain_keys(None)}
    assert types["train.steps"] == "integer >= 1"
    assert types["objective.label_smoothing"] == "number >= 0, < 1"
    assert types["train.precision"] == "one of fp32, bf16"
    assert types["train.init_from"] == "path or null"
    assert types["cluster.workers"] == "integer or [integer, integer]"
    assert types["data.curriculum.weights"] == "list of number >= 0"


def test_keys_of_a_users_tower_contain_its_name() -> None:
    text = "towers: {more: {gps: {kind: vector, size: 2, fields: [gps]}}}"
    config = parse_config(f"{text}\nobjective: {{taps: [image, gps]}}", "c")
    (entry,) = explain_keys(config, ["towers.more.gps.size"])
    assert (entry.key, entry.value) == ("towers.more.gps.size", "2")
    (entry,) = explain_keys(config, ["towers.more.other.rate"])
    assert (entry.key, entry.choice) == ("towers.more.NAME.rate", "towers.more.NAME.kind=audio")


def test_reference_lists_every_key_once_per_meaning() -> None:
    text = config_reference()
    rows = re.findall(r"^\| `([a-zA-Z._0-9]+)` \|", text, re.MULTILINE)
    entries = explain_keys(None)
    selectors = {entry.choice.partition("=")[0] for entry in entries if entry.choice}
    expected = {(e.key, e.meaning, e.type, e.default) for e in entries if e.key not in selectors}
    assert sorted(rows) == sorted(key for key, *_ in expected)
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        f"## {name}" for name in Config.model_fields
    ]


def test_reference_tables_have_the_same_number_of_cells_in_every_row() -> None:
    for table in re.findall(r"(?:^\|.*\n)+", config_reference(), re.MULTILINE):
        cells = {len(re.split(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(cells) == 1, table[:200]
