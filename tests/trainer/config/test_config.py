from __future__ import annotations

import re
from pathlib import Path

import pytest

import gigabatch.configs
from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.config.load import (
    differences,
    dump_config,
    load_config,
    parse_config,
    resolve,
)
from gigabatch.trainer.config.strict_yaml import load_yaml


def test_overrides_win_over_the_file_which_wins_over_defaults() -> None:
    config = parse_config("train: {steps: 5}\noptimizer: {lr: 0.5}", "c", ["train.steps=7"])
    assert (config.train.steps, config.optimizer.lr, config.train.zero_stage) == (7, 0.5, 0)


@pytest.mark.parametrize(
    "override",
    ["towers.text={kind: huggingface, name: x}", "cluster.workers=[1,3]", "cluster.env={A: 1}"],
)
def test_dumped_config_reads_back_the_same(override: str) -> None:
    config = resolve(parse_config("", "c", [override]))
    assert parse_config(dump_config(config), "again") == config


def test_tokenizer_environment_variable_is_not_a_secret() -> None:
    config = parse_config("", "c", ["cluster.env={TOKENIZERS_PARALLELISM: 0}"])
    assert config.cluster.env == {"TOKENIZERS_PARALLELISM": "0"}


def test_range_of_workers_divides_cores_by_its_maximum() -> None:
    config = parse_config("", "c", ["cluster.workers=[1,1000000]"])
    assert (config.cluster.min_workers, config.cluster.max_workers) == (1, 1_000_000)
    assert resolve(config).cluster.threads == 1
    assert parse_config("", "c", ["cluster.workers=[3,3]"]).cluster.workers == 3


def test_resolved_config_has_absolute_folders_and_a_thread_count(tmp_path: Path) -> None:
    config = resolve(parse_config("data: {root: some/where}", "c", ["cluster.workers=1"]))
    assert Path(config.data.root).is_absolute()
    assert config.run.dir.is_absolute()
    assert config.cluster.threads >= 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stpes=3", "unknown key train.stpes. Did you mean train.steps?"),
        ("steps=3", "unknown key steps. Did you mean train.steps?"),
        ("train.steps=many", "train.steps: "),
        ("train.steps=0", "train.steps: "),
        ("train.steps=true", "train.steps: "),
        ("train.zero_stage=4", "train.zero_stage: "),
        ("train=3", "train: "),
        ("train.steps.more=3", "unknown key train.steps.more"),
        ("train.steps", "key=value"),
        ("=3", "key=value"),
        ("batch.micro_size=100", "the nearest size that divides it is 64"),
        ("run.name=../up", "run.name: "),
        ("run.name='a; rm -rf b'", "run.name: "),
        ("optimizer.lr=.nan", "optimizer.lr: "),
        ("towers.image.kind=vision", "towers.image"),
        ("towers.image={kind: huggingface}", "set either `name`"),
        ("towers.image={kind: module, module: nonsense}", "towers.image.module: "),
        ("objective={name: hard_negatives}", "samples have no hard negatives"),
        ("cluster.launcher=inline", "cluster.workers=1"),
        (
            "cluster.workers=many",
            "a number of workers of at least 1, or a range [minimum, maximum]",
        ),
        ("cluster.workers=true", "a number of workers of at least 1"),
        ("cluster.workers=0", "a number of workers of at least 1"),
        ("cluster.workers=[0, 2]", "a number of workers of at least 1"),
        ("cluster.workers=[1, 2, 3]", "a number of workers of at least 1"),
        ("cluster.workers=[3, 2]", "3 is more than 2"),
        ("cluster={workers: [1, 2], launcher: torchrun}", "set cluster.workers=2, or"),
        ("cluster.env={HF_TOKEN: x}", "looks like a secret"),
        ("cluster.env={RANK: 1}", "the launcher sets RANK itself"),
        ("cluster.env={'a b': 1}", "not a valid name of a variable"),
        ("eval.sets=[a/val, b/val]", "share a folder name"),
        ("objective.init_logit_scale=200", "scale_max"),
        (
            "checkpoint.copy_to=/some/folder",
            "checkpoint: copy_to: /some/folder: cannot be written to",
        ),
        (
            "checkpoint.copy_to=https://host/x",
            "Name a URL with one of s3://, gs://, gcs://, az://, file://",
        ),
        ("checkpoint.copy_to=s3::file://x/y", "cannot be written to"),
        ("checkpoint.copy_to=s3://", "not a folder. Write it as s3://BUCKET/FOLDER"),
        ("checkpoint.copy_to=file://some/folder", "not a folder. Write it as file:///FOLDER"),
        ("checkpoint.copy_to='s3://bucket/a*'", "without patterns"),
        ("checkpoint.copy_to=s3://bucket/../a", "without patterns, empty parts"),
        ("towers.image.widths=[8]", "give one depth per width"),
        ("data: {", "the value"),
        ("train.steps=!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_invalid_value_raises_with_its_key(override: str, message: str) -> None:
    with pytest.raises(GigabatchError) as error:
        parse_config("batch: {global_size: 256, micro_size: 64}", "my.yaml", [override])
    if message == "the value":
        assert "key=value" in str(error.value)
    else:
        assert message in str(error.value)


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", "run: !!python/object:os.system {}"])
def test_invalid_file_raises_with_its_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(GigabatchError, match=r"bad\.yaml"):
        load_config(path)


def test_binary_file_raises_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "shard.tar").write_bytes(bytes(range(256)))
    with pytest.raises(GigabatchError, match=r"shard\.tar: not a config"):
        load_config(tmp_path / "shard.tar")


def test_number_as_run_name_and_single_set_without_list_are_accepted() -> None:
    config = parse_config("", "c", ["run.name=2024", "eval.sets=val"])
    assert (config.run.name, config.eval.sets) == ("2024", ("val",))


def test_missing_file_raises_with_its_name(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    "secret", ["s3://key:HUSH@bucket/a", "s3://bucket/a?signature=HUSH", "file://u:HUSH@/folder"]
)
def test_url_with_a_secret_raises_without_repeating_it(secret: str) -> None:
    with pytest.raises(GigabatchError, match="which would be written to configs and logs") as error:
        parse_config("", "c", [f"checkpoint.copy_to={secret}"])
    assert "HUSH" not in str(error.value)


@pytest.mark.parametrize(("override", "message"), [
    ("objective={name: siglip, scale_mx: 3}", "objective.scale_mx"),
    ("objective={name: late_interaction, positives: concept}", "gigabatch objectives late_inter"),
    ("objective={name: supcon, taps: [audio]}", "there is no tower 'audio'"),
    ("objective={name: supcon, taps: [image.middle]}", "objective.taps"),
    ("objective={name: supcon, taps: [image.projection]}", "would never be trained"),
    ("objective={name: sogclr, temperature: 2}", "temperature_max"),
    ("objective={name: sum, terms: [{}, {name: siglip}], weights: [1]}", "1 weights for 2 terms"),
    (
        "objective={name: swav, taps: [image, image@1, text], prototypes: 8}",
        "prototypes: with three taps they are the batch's vectors of text",
    ),
    ("objective={name: sum, terms: [{name: siglip, within: lang}]}", "not a key of siglip"),
    ("objective={name: sum, terms: [{name: queue}, {name: byol}]}", "one momentum tower"),
    ("objective={name: hard_negatives, pair: a}", "both `pair` and `changed`"),
])  # fmt: skip
def test_invalid_objective_raises(override: str, message: str) -> None:
    with pytest.raises(GigabatchError, match=re.escape(message)):
        parse_config("", "c", [override])


def test_data_group_raises_for_objective_without_groups() -> None:
    with pytest.raises(GigabatchError, match="such as infonce or queue"):
        parse_config("", "c", ["data.group=lang", "objective={name: siglip}"])
    parse_config("", "c", ["data.group=lang", "objective={name: queue}"])


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (
            "train: {steps: 3}\ndata: {}\ntrain: {epochs: 1}\n", [],
            "c: line 3: the key train is already set on line 1; keep one of them.",
        ),
        ("train:\n  steps: 3\n  'steps': 4\n", [], "c: line 3: the key steps is already set on"),
        ("objective: {name: sum, terms: [{name: siglip, name: x}]}", [], "line 1: the key name"),
        ("", ["train={steps: 3, steps: 4}"], "'train={steps: 3, steps: 4}': line 1: the key steps"),
    ],
)  # fmt: skip
def test_key_that_is_set_twice_is_rejected(text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(GigabatchError) as error:
        parse_config(text, "c", overrides)
    assert message in str(error.value)


def test_merged_mapping_may_be_overridden() -> None:
    tree = load_yaml(
        "run: {in: &base {name: a, seed: 1}, deep: {in: &more {<<: *base, seed: 3}}}\n"
        "other: {<<: *base, seed: 2}\nthird: {<<: *more}"
    )
    assert tree["third"] == {"name": "a", "seed": 3}
    assert tree["other"] == {"name": "a", "seed": 2}
