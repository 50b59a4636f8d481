"""Import of a user's objects: one message for whatever the module does."""

from __future__ import annotations

from pathlib import Path

import pytest

from gigabatch.data.errors import GigabatchError
from gigabatch.data.imports import import_object
from gigabatch.data.stream import load_stage
from gigabatch.trainer.config.load import parse_config
from gigabatch.trainer.evaluation.registry import find_task
from gigabatch.trainer.towers.external import ModuleTower, module_encoder

MODULES = {
    "syntax": ("def broken(:", "SyntaxError: "),
    "name": ("undefined", "NameError: name 'undefined' is not defined. Fix the module."),
    "exits": ("import sys; sys.exit(3)", "SystemExit(3). Fix the module."),
    "zero": ("1 / 0", "ZeroDivisionError: "),
    "lazy": ("def __getattr__(name): raise KeyError(name)", "KeyError: 'A'"),
    "empty": ("", "module 'user_empty' has no attribute 'A'. Name it as package.mod:name"),
    "absent": (None, "No module named 'user_absent'. Name it as package.mod:name"),
}


@pytest.fixture(params=MODULES)
def module(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, str]:
    """Return the path of a class that cannot be imported, and a part of the message."""
    text, message = MODULES[request.param]
    if text is not None:
        (tmp_path / f"user_{request.param}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return f"user_{request.param}:A", message


def test_every_user_module_that_cannot_be_imported_raises_with_its_key(
    module: tuple[str, str],
) -> None:
    path, message = module
    tower = ModuleTower(kind="module", module=path)
    attempts = {
        "data.stages": lambda: load_stage(path),
        "--task": lambda: find_task(path),
        "towers.image.module": lambda: module_encoder(tower, "towers.image.module"),
        "c: objective.module": lambda: parse_config(f"objective: {{module: '{path}'}}", "c"),
        "c: objective.terms.0.module": lambda: parse_config(
            f"objective: {{name: sum, terms: [{{module: '{path}'}}]}}", "c"
        ),
    }
    for key, attempt in attempts.items():
        with pytest.raises(GigabatchError) as error:
            attempt()
        text = str(error.value)
        assert text.startswith(f"{key}: '{path}' cannot be imported: "), text
        assert message in text + ".", text  # a config's message has no period at its end
        assert "\n" not in text


@pytest.mark.parametrize("path", [".x:A", "x", "x:", ":A", "a..b:A", "json.:loads"])
def test_path_without_a_module_raises(path: str) -> None:
    with pytest.raises(GigabatchError, match="cannot be imported"):
        import_object(path)
    for config in (f"objective: {{module: '{path}'}}", f"towers: {{image: {{module: '{path}'}}}}"):
        kind = config.replace("image: {", "image: {kind: module, ")
        with pytest.raises(GigabatchError, match=r"module: is not of the form package\.mod:Class"):
            parse_config(kind, "c")


def test_object_is_imported() -> None:
    assert import_object("os.path:join") is __import__("os").path.join
