from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.cli.app import app
from gigabatch.trainer.evaluation import registry, tasks
from gigabatch.trainer.evaluation.context import EvalContext
from gigabatch.trainer.evaluation.registry import all_tasks, find_task, parse_task, register
from gigabatch.trainer.evaluation.tags import metric_tags
from gigabatch.trainer.evaluation.task import RunTask, SetTask

DOCS = Path(__file__).parents[3] / "docs" / "evaluation.md"
DOCUMENTED = {
    row.split("`")[1]: row for row in DOCS.read_text().splitlines() if row.startswith("| [`")
}
"""Rows of the table of tasks by name. A new task needs none: `gigabatch eval --help` lists it."""
EXAMPLE = re.search(r"## A task of your own.*?```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
RUN_TASK = '''
from gigabatch.trainer.evaluation.task import RunTask


class CountSteps(RunTask):
    """Number of evaluated steps."""

    name = "count-steps"
    summary = "number of evaluated steps"

    scale: float = 1.0
    """Factor of the number."""

    def read(self, run):
        return {"steps": self.scale * len(run.steps_evaluated())}
'''


@pytest.fixture
def restored_registry() -> Iterator[None]:
    """Remove the tasks and modules that a test adds."""
    all_tasks()
    before, modules = dict(registry.TASKS), set(sys.modules)
    yield
    registry.TASKS.clear()
    registry.TASKS.update(before)
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.mark.usefixtures("restored_registry")
def test_new_task_file_needs_nothing_else(
    tmp_path: Path, untrained: EvalContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Add the example of docs/evaluation.md to the package."""
    assert EXAMPLE is not None
    folder = tmp_path / "more_tasks"
    folder.mkdir()
    (folder / "norm_spread.py").write_text(EXAMPLE[1])
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(folder)])
    help_text = " ".join(CliRunner().invoke(app, ["eval", "--help"]).stdout.split())
    assert "norm-spread standard deviation of the norms of encoder outputs. tap=" in help_text
    with pytest.raises(GigabatchError, match="tapp: unknown key of norm-spread; did you mean tap"):
        parse_task("norm-spread", ["tapp=head"])
    task = parse_task("norm-spread", ["tap=encoder.stem"])
    assert isinstance(task, SetTask)
    with pytest.raises(GigabatchError, match="the text tower has no such module"):
        task.measure(untrained)
    task = parse_task("norm-spread", [])
    assert isinstance(task, SetTask)
    tags = metric_tags(task, task.measure(untrained), seed=None)
    prefix = "eval/val/norm-spread/"
    assert tags.keys() == {f"{prefix}image_norm_std", f"{prefix}text_norm_std"}
    assert min(tags.values()) > 0


def test_user_task_is_loaded_by_module_and_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_tasks.py").write_text(RUN_TASK)
    (tmp_path / "config.yaml").write_text("{}")  # makes the folder count as a run
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ["eval", str(tmp_path), "--task", "my_tasks:CountSteps", "scale=2", "--json"]
    assert CliRunner().invoke(app, arguments).stdout == '{"steps": 0.0}\n'
    assert "count-steps" not in all_tasks()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:Task", "cannot be imported: No module named 'no_such_module'"),
        ("json:NoSuchClass", "cannot be imported: .*NoSuchClass"),
        ("json:JSONDecoder", "not a task. Derive the class from SetTask or RunTask"),
        (f"{RunTask.__module__}:RunTask", "needs a class attribute 'name'"),
    ],
)
def test_invalid_user_task_raises(path: str, message: str) -> None:
    with pytest.raises(GigabatchError, match=message):
        find_task(path)


@pytest.mark.usefixtures("restored_registry")
def test_task_names_are_unique() -> None:
    with pytest.raises(ValueError, match=r"'knn' is taken by .*\.tasks\.knn"):

        @register
        class Duplicate(RunTask):
            name = "knn"
            summary = "a duplicate"


def test_alias_finds_the_task_but_is_not_listed() -> None:
    assert find_task("table") is find_task("sample-state")
    assert "table" not in all_tasks()


def test_table_of_tasks_is_complete() -> None:
    built_in = {
        "batch-bias", "geometry", "history", "knn", "languages", "order", "probe", "retrieval",
        "sample-state", "text-retrieval", "trigger", "zero-shot",
    }  # fmt: skip
    assert DOCUMENTED.keys() >= built_in


@pytest.mark.parametrize("name", DOCUMENTED)
def test_row_of_the_table_names_every_key_of_its_task(name: str) -> None:
    assert name in all_tasks(), "docs/evaluation.md: remove the row"
    keys = re.findall(r"`(\w+)=`", DOCUMENTED[name].split("|")[3])
    assert set(keys) == set(all_tasks()[name].model_fields)


@pytest.mark.parametrize("name", sorted(all_tasks()))
def test_every_task_and_key_has_help_text(name: str) -> None:
    task = all_tasks()[name]
    assert task.__doc__
    assert task.summary
    assert not task.summary.endswith(".")
    for key, field in task.model_fields.items():
        assert field.description, key


def test_listing_tasks_does_not_import_torch() -> None:
    code = (
        "import sys; from gigabatch.trainer.evaluation.registry import all_tasks; "
        "print(len(all_tasks()), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(all_tasks())), "False"]


@pytest.mark.parametrize(
    ("task", "assignments", "message"),
    [
        ("knnn", [], f"unknown task. Did you mean knn. Tasks: {', '.join(all_tasks())}, or"),
        ("knn", [], "knn: label: required. JSON field of the class."),
        ("knn", ["label=a", "kk=3"], "kk: unknown key of knn; did you mean k"),
        ("knn", ["label=a", "zzz=3"], "zzz: unknown key of knn; its keys: label, train"),
        ("knn", ["label"], "'label': write key=value. Keys of knn: label, train"),
        ("knn", ["label=a", "k=0"], "knn: k: Input should be greater than or equal to 1"),
        ("languages", ["captions=names.en"], "languages: captions: .* at least 2 items"),
        ("history", ["x=1"], "x: unknown key of history; its keys: none"),
        ("retrieval", ["score=sum"], "retrieval: score needs given=.A,B. find=C"),
    ],
)
def test_invalid_settings_raise_with_the_key_and_its_help(
    task: str, assignments: list[str], message: str
) -> None:
    with pytest.raises(GigabatchError, match=message):
        parse_task(task, assignments)


def test_text_settings_keep_their_characters() -> None:
    assignments = ["query_prefix=query: ", "document_prefix=[D] ", "split=7"]
    values = parse_task("text-retrieval", assignments).model_dump(exclude_unset=True)
    assert values == {"query_prefix": "query: ", "document_prefix": "[D] ", "split": "7"}


def test_single_text_needs_no_brackets() -> None:
    assert parse_task("order", ["against=wrong"]).model_dump()["against"] == ("wrong",)
