"""`gigabatch config`: recipes, resolved values, explanations."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import outcome

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.recipes import find_config, recipe_summary, recipes
from gigabatch.trainer.config.load import load_config, parse_config

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run `gigabatch config ...` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: outcome(monkeypatch, capsys, "config", *arguments)


def test_file_is_printed_with_every_key_resolved(run: Run, tiny: Path) -> None:
    code, out, _ = run(tiny, "train.steps=77")
    assert code == 0
    assert parse_config(out, "printed") == load_config(tiny, ["train.steps=77"])


def test_recipe_is_found_by_name_unless_a_file_has_that_name(run: Run, tmp_path: Path) -> None:
    recipe = load_config(recipes()["quickstart"])
    for name in ("quickstart", "quickstart.yaml"):
        assert parse_config(run(name)[1], "printed") == recipe
    (tmp_path / "quickstart").write_text("train: {steps: 3}")
    assert parse_config(run("quickstart")[1], "printed").train.steps == 3
    for text in ("", "# nothing\n", "{}"):
        (tmp_path / "quickstart").write_text(text)
        code, _, err = run("quickstart")
        assert (code, "empty and hides the recipe quickstart" in err) == (2, True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quickstrat", "Did you mean the recipe quickstart?"),
        ("configs/quickstart.yml", "Did you mean the recipe quickstart?"),
        ("mien.yaml", "Did you mean mine.yaml?"),
        ("zzz", "`gigabatch config --list` lists the recipes"),
        ("runs", "runs: is a folder"),
        ("z" * 5000, "z...: there is no such config file or recipe"),
        ("z" * 5000 + "/a.yaml", "there is no such config file or recipe"),
        ("runs/a", "`gigabatch resume runs/a` continues the run"),
    ],
)
def test_unknown_config_suggests_the_nearest_name(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "config.yaml").touch()
    with pytest.raises(GigabatchError) as error:
        find_config(name)
    assert message in str(error.value)


def test_list_names_every_recipe_with_its_summary(run: Run) -> None:
    code, out, _ = run("--list")
    assert code == 0
    lines = out.splitlines()
    for name, path in recipes().items():
        (line,) = [line for line in lines if line.split(" ")[0] == name]
        assert recipe_summary(path).startswith(line.removeprefix(name).strip())


def test_explain_prints_value_meaning_type_and_default(run: Run, tiny: Path) -> None:
    code, out, _ = run(tiny, "--explain", "train.max_bad_steps", "train.max_bad_steps=7")
    assert code == 0
    first, *meaning, type_and_default = out.splitlines()
    assert first == "train.max_bad_steps = 7"
    assert len(" ".join(meaning).split()) > 5
    assert type_and_default.strip() == "[integer >= 1; default 10]"


def test_explain_of_a_section_prints_the_keys_of_the_kinds_in_use(run: Run, tiny: Path) -> None:
    _, out, _ = run(tiny, "--explain", "towers.image")
    keys = [line.split(" = ")[0] for line in out.splitlines() if not line.startswith((" ", "\n"))]
    assert "towers.image.widths" in keys
    assert "towers.image.pool" not in keys
    assert "[one of conv, huggingface, module; default conv]" in out


def test_explain_of_a_key_of_another_kind_names_that_kind(run: Run, tiny: Path) -> None:
    code, out, _ = run(tiny, "--explain", "objective.gamma")
    assert code == 0
    assert out.startswith("objective.gamma\n")
    assert "only with objective.name=sogclr" in out


def test_explain_needs_no_config_and_suggests_keys(run: Run) -> None:
    assert run("--explain", "train.steps")[1].startswith("train.steps = 1000\n")
    assert len(run("--explain")[1].split("\n\n")) > 80
    code, _, err = run("--explain", "train.stpes")
    assert (code, "Did you mean train.steps?" in err) == (2, True)
    code, _, err = run("missing.yaml", "--explain")
    assert (code, "missing.yaml" in err) == (2, True)


def test_explain_is_bold_only_on_a_terminal_that_allows_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "\x1b" not in run("--explain", "train.steps")[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert run("--explain", "train.steps")[1].startswith("\x1b[1mtrain.steps\x1b[0m = ")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in run("--explain", "train.steps")[1]


def test_explain_takes_several_keys_without_a_config(run: Run) -> None:
    code, out, _ = run("--explain", "train.steps", "optimizer.lr")
    assert (code, out.count("train.steps = "), out.count("optimizer.lr = ")) == (0, 1, 1)
    assert run("--explain", "checkpoint", "optimizer")[0] == 0
    code, _, err = run("--explain", "train.stpes", "optimizer.lr")
    assert (code, "Did you mean train.steps?" in err) == (2, True)
    code, _, err = run("--explain", "quickstrat", "optimizer.lr")
    assert (code, "Did you mean the recipe quickstart?" in err) == (2, True)


def test_explain_of_a_renamed_key_explains_the_new_one(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    code, out, _ = run("--explain", "objective.scale")
    assert (code, out.startswith("objective.init_logit_scale = ")) == (0, True)
    assert "objective.scale is now called objective.init_logit_scale" in caplog.text
