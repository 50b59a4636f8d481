"""Overrides `key=value`: kinds, renamed keys, steps and epochs, suggested names."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.config.load import dump_config, parse_config
from gigabatch.trainer.config.names import suggest_objective
from gigabatch.trainer.objectives import OBJECTIVES

FILE = """
towers: {image: {kind: conv, widths: [8], depths: [1], freeze: true}}
objective: {name: infonce, taps: [image, text], init_logit_scale: 14.3, positives: concept,
            label_smoothing: 0.1}
train: {steps: 400}
"""


def test_kind_override_drops_the_keys_of_the_old_kind(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = parse_config(
            FILE, "my.yaml", ["towers.image.kind=huggingface", "towers.image.name=org/model"]
        )
    assert config.towers.image.kind == "huggingface"
    assert config.towers.image.freeze  # both kinds have it
    dropped = "dropped towers.image.widths, towers.image.depths, set for conv"
    assert f"towers.image.kind=huggingface: {dropped}" in caplog.text


def test_objective_override_keeps_only_keys_of_the_same_meaning() -> None:
    before = parse_config(FILE, "my.yaml").objective
    after = parse_config(FILE, "my.yaml", ["objective.name=siglip"]).objective
    assert after.name == "siglip"
    assert (after.taps, after.positives) == (before.taps, before.positives)
    # Its default differs between the two, so the file's value was meant for InfoNCE.
    assert after.init_logit_scale == 10.0


def test_objective_override_replaces_taps_of_another_form() -> None:
    objective = parse_config(FILE, "my.yaml", ["objective.name=late_interaction"]).objective
    assert objective.taps == ("image.tokens", "text.tokens")


def test_kind_override_with_the_same_kind_drops_nothing() -> None:
    config = parse_config(FILE, "my.yaml", ["towers.image.kind=conv", "objective.name=infonce"])
    assert config == parse_config(FILE, "my.yaml")


def test_kind_override_does_not_drop_keys_of_earlier_overrides() -> None:
    with pytest.raises(GigabatchError, match=r"objective\.label_smoothing: not a key of siglip"):
        parse_config(FILE, "my.yaml", ["objective.label_smoothing=0.2", "objective.name=siglip"])


def test_kind_override_still_rejects_misspelled_keys_of_the_file() -> None:
    with pytest.raises(GigabatchError, match=r"unknown key towers\.image\.widht"):
        parse_config(
            "towers: {image: {widht: 3}}", "my.yaml",
            ["towers.image.kind=huggingface", "towers.image.name=x"],
        )  # fmt: skip


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("towers.image.kind=module", "towers.image.module: is missing; towers.image.kind=module"),
        ("towers.image.kind=huggingface", "with towers.image.kind=huggingface, set either `name`"),
        ("objective.name=symile", "objective.taps: is missing; objective.name=symile needs it: "),
        ("objective.name=sum", "objective.terms: is missing; objective.name=sum needs it: "),
        ("objective.name=clip", "no objective 'clip'. Did you mean infonce (CLIP's symmetric"),
        ("objective.name=SimCLR", "Did you mean supcon ("),
        ("objective.name=moco", "Did you mean queue ("),
        ("objective.name=colbert", "Did you mean late_interaction ("),
        ("objective.name=triplet", "Did you mean hard_negatives ("),
        ("objective.name=infonse", "Did you mean infonce ("),
        ("objective.name=zzz", "Choose one of infonce, barlow, "),
        (
            "objective={name: sum, terms: [{name: siglip}, {name: clip}]}",
            "objective.terms.1.name: there is no objective 'clip'. Did you mean infonce (",
        ),
        (
            "towers.image.kind=hf",
            "there is no kind 'hf'. Did you mean huggingface?",
        ),
        ("towers.more={sound: {}}", "towers.more.sound: `kind` is missing"),
        ("towers.more={sound: {kind: vector, size: 2, rate: 3}}", "not a key of towers.more.sound"),
    ],
)
def test_wrong_kind_or_missing_key_raises_with_the_fix(override: str, message: str) -> None:
    with pytest.raises(GigabatchError, match=re.escape(message)):
        parse_config(FILE, "my.yaml", [override])


def test_invalid_list_item_is_reported_once() -> None:
    with pytest.raises(GigabatchError) as error:
        parse_config("", "c", ["objective={name: sum, terms: [{name: clip}]}"])
    assert str(error.value).count("\n") == 0


@pytest.mark.parametrize("alias", [a for kind in OBJECTIVES.values() for a in kind.card.aliases])
def test_alias_of_an_objective_suggests_it(alias: str) -> None:
    assert alias not in OBJECTIVES
    name = next(name for name, kind in OBJECTIVES.items() if alias in kind.card.aliases)
    assert suggest_objective(alias).startswith(f"Did you mean {name} (")


def test_objective_name_override_replaces_user_objective() -> None:
    text = "objective: {module: 'my.mod:Loss', args: {a: 1}}"
    assert parse_config(text, "c", ["objective.name=siglip"]).objective.name == "siglip"


@pytest.fixture
def dcl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the path of the tutorial's objective in a module of the user."""
    source = Path(__file__).parents[3] / "docs" / "tutorials" / "dcl.py"
    (tmp_path / "override_losses.py").write_text(source.read_text().replace("@register\n", ""))
    monkeypatch.syspath_prepend(tmp_path)
    return "override_losses:DCL"


@pytest.mark.parametrize("text", [FILE, "", "objective: {label_smoothing: 0.1}"])
def test_module_override_implies_the_kind_and_drops_old_keys(text: str, dcl: str) -> None:
    config = parse_config(
        text, "c", [f"objective.module={dcl}", "objective.args={taps: [text, image]}"]
    )
    assert (
        config.objective
        == parse_config(
            f"objective: {{module: '{dcl}', args: {{taps: [text, image]}}}}", "c"
        ).objective
    )


def test_module_override_keeps_the_name_of_an_earlier_override(dcl: str) -> None:
    with pytest.raises(GigabatchError, match=r"objective\.module: not a key of siglip"):
        parse_config(FILE, "c", ["objective.name=siglip", f"objective.module={dcl}"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            "taps: [image, text]",
            "objective.taps: not a key of objective.name=module, which has module and args. A key "
            "of your own class goes into args: objective.args.taps",
        ),
        ("args: {init_logit_scal: 3}", "args.init_logit_scal: unknown key. Did you mean init_logi"),
        ("args: {zzzz: 3}", "args.zzzz: unknown key. Its keys: "),
        ("args: {init_logit_scale: many}", "args.init_logit_scale: Input should be a valid number"),
    ],
)
def test_wrong_key_of_a_user_objective_raises_with_the_fix(
    keys: str, message: str, dcl: str
) -> None:
    with pytest.raises(GigabatchError) as error:
        parse_config(f"objective: {{module: '{dcl}', {keys}}}", "c")
    assert message in str(error.value)
    assert "Extra inputs" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("objective.init_logit_scal=3", "objective.init_logit_scale"),
        ("objective.zzzz=3", None),
        ("objective.gama=3", None),  # gamma is a key of other objectives
        ("objective={name: sogclr, gama: 0.5}", "objective.gamma"),
        ("objective={name: sogclr, label_smoothin: 0.5}", None),
        ("towers.image.pol=cls", None),  # pool is a key of kind huggingface
        ("towers.image={kind: huggingface, name: x, pol: cls}", "towers.image.pool"),
        (
            "towers.more={gps: {kind: vector, size: 2, feilds: [a]}}",
            "towers.more.gps.fields",
        ),
        ("trian.stepz=3", "train.steps"),
        ("optimizer.steps=3", "train.steps"),
    ],
)
def test_suggestion_is_a_key_of_the_selected_kind(override: str, meant: str | None) -> None:
    with pytest.raises(GigabatchError, match="unknown key") as error:
        parse_config("", "c", [override])
    hint = f"Did you mean {meant}?" if meant else "`gigabatch config --explain` lists all."
    assert str(error.value).endswith(hint)


def test_override_of_a_renamed_key_replaces_the_files_value() -> None:
    for line in ("scale: 20", "init_logit_scale: 20"):
        config = parse_config(f"objective: {{{line}}}", "c", ["objective.scale=30"])
        assert config.objective.init_logit_scale == 30


def test_override_of_epochs_or_steps_replaces_the_other_in_the_file() -> None:
    config = parse_config(FILE, "my.yaml", ["train.epochs=2"])
    assert config.train.epochs == 2
    config = parse_config("train: {epochs: 2}", "my.yaml", ["train.steps=7"])
    assert (config.train.steps, config.train.epochs) == (7, None)


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("train: {steps: 4, epochs: 1}", []),
        ("", ["train.steps=4", "train.epochs=1"]),
        ("", ["train.epochs=1", "train.steps=4"]),
        ("", ["train={steps: 4, epochs: 1}"]),
    ],
)
def test_both_steps_and_epochs_are_rejected(text: str, overrides: list[str]) -> None:
    with pytest.raises(GigabatchError, match="either `steps` or `epochs`"):
        parse_config(text, "my.yaml", overrides)


@pytest.mark.parametrize("value", ["0", "-1", ".nan", "many"])
def test_invalid_epochs_are_rejected(value: str) -> None:
    with pytest.raises(GigabatchError, match=r"train\.epochs: "):
        parse_config("", "my.yaml", [f"train.epochs={value}"])


def test_dumped_config_with_epochs_reads_back_the_same() -> None:
    config = parse_config(FILE, "my.yaml", ["train.epochs=0.5"])
    assert "steps: 1000" not in dump_config(config)
    assert parse_config(dump_config(config), "again") == config
