from __future__ import annotations

import re
from pathlib import Path

import pytest

import gigabatch.configs
from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.configfile import (
    differences,
    dump_config,
    load_config,
    parse_config,
    resolve,
)


def test_overrides_win_over_the_file_which_wins_over_defaults() -> None:
    config = parse_config("train: {steps: 5}\noptimizer: {lr: 0.5}", "c", ["train.steps=7"])
    assert (config.train.steps, config.optimizer.lr, config.train.zero) == (7, 0.5, 0)


def test_dumped_config_reads_back_the_same() -> None:
    config = resolve(parse_config("", "c", ["towers.text={kind: huggingface, name: x}"]))
    assert parse_config(dump_config(config), "again") == config


def test_resolved_config_has_absolute_folders_and_a_thread_count(tmp_path: Path) -> None:
    config = resolve(parse_config("data: {root: some/where}", "c", ["cluster.workers=1"]))
    assert Path(config.data.root).is_absolute()
    assert config.run.dir.is_absolute()
    assert config.cluster.threads >= 1


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stpes=3", "unknown key train.stpes. Did you mean train.steps?"),
        ("steps=3", "unknown key steps. Did you mean train.steps?"),
        ("train.steps=many", "train.steps: "),
        ("train.steps=0", "train.steps: "),
        ("train.steps=true", "train.steps: "),
        ("train.zero=4", "train.zero: "),
        ("train=3", "train: "),
        ("train.steps.more=3", "unknown key train.steps.more"),
        ("train.steps", "key=value"),
        ("=3", "key=value"),
        ("batch.micro_size=100", "the nearest size that divides it is 64"),
        ("run.name=../up", "run.name: "),
        ("run.name='a; rm -rf b'", "run.name: "),
        ("optimizer.lr=.nan", "optimizer.lr: "),
        ("towers.image.kind=vision", "towers.image"),
        ("towers.image={kind: huggingface}", "give either `name`"),
        ("towers.image={kind: module, module: nonsense}", "towers.image.module: "),
        ("cluster.launcher=inline", "cluster.workers=1"),
        ("eval.sets=[a/val, b/val]", "share a folder name"),
        ("objective.scale=200", "scale_max"),
        ("towers.image.widths=[8]", "give as many"),
        ("data: {", "the value"),
        ("train.steps=!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_a_wrong_value_names_its_key(override: str, words: str) -> None:
    with pytest.raises(GigabatchError) as error:
        parse_config("batch: {global_size: 256, micro_size: 64}", "my.yaml", [override])
    if words == "the value":
        assert "key=value" in str(error.value)
    else:
        assert words in str(error.value)


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", "run: !!python/object:os.system {}"])
def test_a_file_that_is_no_config_is_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(GigabatchError, match=r"bad\.yaml"):
        load_config(path)


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "shard.tar").write_bytes(bytes(range(256)))
    with pytest.raises(GigabatchError, match=r"shard\.tar: not a config"):
        load_config(tmp_path / "shard.tar")


def test_a_number_may_name_a_run_and_one_set_needs_no_list() -> None:
    config = parse_config("", "c", ["run.name=2024", "eval.sets=val"])
    assert (config.run.name, config.eval.sets) == ("2024", ("val",))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(GigabatchError, match=r"none\.yaml: the config cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_differences_name_dotted_keys() -> None:
    old, new = parse_config("", "a"), parse_config("", "a", ["train.steps=5", "run.seed=3"])
    assert differences(old, new) == {"run.seed": (0, 3), "train.steps": (1000, 5)}


@pytest.mark.parametrize(
    "recipe", sorted(p.name for p in Path(gigabatch.configs.__file__).parent.glob("*.yaml"))
)
def test_every_recipe_is_valid(recipe: str) -> None:
    load_config(Path(gigabatch.configs.__file__).parent / recipe)


@pytest.mark.parametrize(("override", "words"), [
    ("objective={name: siglip, scale_mx: 3}", "objective.scale_mx"),
    ("objective={name: late_interaction, positives: concept}", "gigabatch objectives late_inter"),
    ("objective={name: supcon, taps: [audio]}", "there is no tower 'audio'"),
    ("objective={name: supcon, taps: [image.middle]}", "objective.taps"),
    ("objective={name: sogclr, temperature: 2}", "temperature_max"),
    ("objective={name: sum, terms: [{}, {name: siglip}], weights: [1]}", "1 weights for 2 terms"),
    ("objective={name: sum, terms: [{name: siglip, within: lang}]}", "not a key of siglip"),
    ("objective={name: sum, terms: [{name: queue}, {name: byol}]}", "one momentum tower"),
    ("objective={name: hard_negatives, pair: a}", "both `pair` and `changed`"),
])  # fmt: skip
def test_an_objective_that_cannot_be_is_refused(override: str, words: str) -> None:
    with pytest.raises(GigabatchError, match=re.escape(words)):
        parse_config("", "c", [override])


def test_objectives_that_do_not_keep_groups_apart_refuse_them() -> None:
    with pytest.raises(GigabatchError, match="keep groups apart"):
        parse_config("", "c", ["data.group=lang", "objective={name: siglip}"])
    parse_config("", "c", ["data.group=lang", "objective={name: queue}"])
