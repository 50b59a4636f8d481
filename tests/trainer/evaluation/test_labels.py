from __future__ import annotations

import json
from pathlib import Path

import pytest

from gigabatch.data.errors import GigabatchError
from gigabatch.data.shards.indexing import open_index
from gigabatch.trainer.evaluation.labels import codes_of, field_values, named_classes
from gigabatch.trainer.evaluation.settings import TASKS, task_settings


def test_values_are_those_of_the_samples_in_order(shards: Path) -> None:
    index = open_index(shards / "val")
    assert field_values(index, "concept") == [number % 50 for number in range(60)]
    with pytest.raises(GigabatchError, match=r"s00000.*has no 'lang'; it has colour, concept"):
        field_values(index, "lang")
    assert field_values(index, "lang", required=False) == [None] * 60


def test_codes_are_equal_where_values_are() -> None:
    codes = codes_of([3, "3", True, "cat", "cat", 3]).tolist()
    assert codes[0] == codes[5] == 3
    assert codes[3] == codes[4]
    assert len(set(codes)) == 4


def test_classes_are_named_by_themselves_a_list_or_a_map(tmp_path: Path) -> None:
    assert named_classes(["b", "a", "b"], None, "kind")[0] == ["a", "b"]
    assert named_classes(["b", "a", "b"], None, "kind")[1].tolist() == [1, 0, 1]
    lines = tmp_path / "names.txt"
    lines.write_text("cat\ndog\n")
    names, classes = named_classes([1, 0, 1], lines, "kind")
    assert (names, classes.tolist()) == (["cat", "dog"], [1, 0, 1])
    table = tmp_path / "names.json"
    table.write_text(json.dumps({"7": "seven", "x": "ex"}))
    names, classes = named_classes(["x", 7], table, "kind")
    assert (names, classes.tolist()) == (["seven", "ex"], [1, 0])
    with pytest.raises(GigabatchError, match=r"names.json: names no class for kind = 8"):
        named_classes([7, 8], table, "kind")
    table.write_text("{}")
    with pytest.raises(GigabatchError, match="holds no classes"):
        named_classes([7], table, "kind")
    with pytest.raises(GigabatchError, match="cannot be read"):
        named_classes([7], tmp_path / "none.txt", "kind")


@pytest.mark.parametrize(
    ("task", "given", "words"),
    [
        ("knnn", [], "there is no such task; take retrieval, zero-shot, knn"),
        ("knn", [], "knn: label: must be given. The json field that holds the class."),
        ("knn", ["label=a", "kk=3"], "kk: knn has no such key; did you mean k"),
        ("knn", ["label"], "say key=value"),
        ("knn", ["label=a", "k=0"], "knn: k: Input should be greater than or equal to 1"),
        ("languages", ["captions=names.en"], "languages: captions: .* at least 2 items"),
        ("history", ["x=1"], "x: history has no such key; keys: none"),
    ],
)
def test_a_task_teaches_what_it_takes(task: str, given: list[str], words: str) -> None:
    with pytest.raises(GigabatchError, match=words):
        task_settings(task, given)


def test_a_text_is_taken_as_it_stands() -> None:
    given = ["query_prefix=query: ", "document_prefix=[D] ", "split=7"]
    found = task_settings("text-retrieval", given).model_dump(exclude_unset=True)
    assert found == {"query_prefix": "query: ", "document_prefix": "[D] ", "split": "7"}


def test_help_names_every_task_and_key() -> None:
    from gigabatch.launcher.cli.eval import evaluate

    lines: dict[str, str] = {}
    task = ""
    for line in (evaluate.__doc__ or "").splitlines():
        task = line.split()[0] if line.strip() and line[4:5] != " " else task
        lines[task] = lines.get(task, "") + line  # what is indented goes on with the task
    for task, model in TASKS.items():
        for key in model.model_fields:
            assert f" {key}=" in lines[task]
