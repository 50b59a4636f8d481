from __future__ import annotations

import json
from pathlib import Path

import pytest

from gigabatch.data.errors import GigabatchError
from gigabatch.data.text.corpora import TextTuple, open_collection, read_text_tuples


def write_lines(path: Path, *records: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_beir(folder: Path) -> Path:
    write_lines(
        folder / "corpus.jsonl",
        {"_id": "d1", "title": "Cats", "text": "sleep all day"},
        {"_id": "d2", "title": "", "text": "dogs bark"},
        {"_id": "q2", "text": "do birds sing"},
    )
    write_lines(
        folder / "queries.jsonl",
        {"_id": "q1", "text": "what do cats do"},
        {"_id": "q2", "text": "do birds sing"},
        {"_id": "unused", "text": "nobody judged this"},
    )
    qrels = ["query-id\tcorpus-id\tscore", "q1\td1\t2", "q1\td2\t0", "q2\td2\t1"]
    write_lines(folder / "qrels" / "test.tsv", *qrels)
    return folder


def test_beir_folder_is_read(tmp_path: Path) -> None:
    collection = open_collection(write_beir(tmp_path / "animals"))
    assert collection.name == "animals"
    assert collection.queries == ("what do cats do", "do birds sing")
    assert collection.documents == ("Cats sleep all day", "dogs bark", "do birds sing")
    assert collection.judgments == ((0, 0, 2.0), (0, 1, 0.0), (1, 1, 1.0))
    assert collection.own_documents == (-1, 2)


def test_pairs_and_triples_are_read(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "pairs.jsonl",
        {"anchor": "a", "positive": "A"},
        "",
        {"anchor": "b", "positives": ["B", "β"], "negatives": ["A", "C"]},
        {"anchor": " a ", "positive": "ä", "negative": "C"},
    )
    assert list(read_text_tuples(path))[1] == TextTuple("b", ("B", "β"), ("A", "C"))
    collection = open_collection(path)
    assert (collection.name, collection.queries) == ("pairs", ("a", "b"))
    assert collection.documents == ("A", "B", "β", "C", "ä")
    assert collection.judgments == ((0, 0, 1.0), (1, 1, 1.0), (1, 2, 1.0), (0, 4, 1.0))
    assert collection.triples == ((1, 1, (0, 3)), (1, 2, (0, 3)), (0, 4, (3,)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: not a JSON object"),
        ({"positive": "A"}, "line 2: no text in `anchor`; the fields are: positive"),
        ({"anchor": " ", "positive": "A"}, "line 2: no text in `anchor`"),
        ({"anchor": "a", "text": "A"}, "line 2: no text in `positive`"),
        ({"anchor": "a", "positive": []}, "line 2: no text in `positive`"),
        ({"anchor": "a", "positive": ["A", 3]}, "line 2: an item of `positive` is not a text"),
        (
            {"anchor": "a", "positive": "A", "negatives": [""]},
            "line 2: an item of `negatives` .* or is empty",
        ),
    ],
)
def test_invalid_line_of_pairs_raises_with_line_number(
    tmp_path: Path, line: object, message: str
) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", {"anchor": "a", "positive": "A"}, line)
    with pytest.raises(GigabatchError, match=message) as error:
        open_collection(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("file", "lines", "message"),
    [
        ("qrels/test.tsv", ["q1\td1"], "line 1: 2 fields separated by tabs"),
        ("qrels/test.tsv", ["q1\td1\tgood"], "line 1: the score 'good' is not a number"),
        ("qrels/test.tsv", ["q1\td1\tnan"], "line 1: the score is NaN"),
        ("qrels/test.tsv", ["q1\td1\t1", "q1\td1\t2"], "line 2: .* 'd1' occur twice"),
        ("qrels/test.tsv", ["q9\td1\t1"], "line 1: query 'q9' is not in .*queries.jsonl"),
        ("qrels/test.tsv", ["q1\td9\t1"], "line 1: document 'd9' is not in .*corpus.jsonl"),
        ("qrels/test.tsv", ["query-id\tcorpus-id\tscore"], "contains no judgments"),
        (
            "corpus.jsonl",
            [{"_id": "d1", "text": "a"}] * 2,
            "line 2: the `_id` 'd1' occurs on an earlier",
        ),
        ("corpus.jsonl", [{"text": "a"}], "line 1: the `_id` is None"),
        ("corpus.jsonl", [{"_id": "d1", "title": 3, "text": "a"}], "line 1: the `title` is 3"),
        ("queries.jsonl", [{"_id": "q1"}], "line 1: no text in `text`"),
        ("queries.jsonl", [""], "contains no JSON object"),
    ],
)
def test_invalid_beir_folder_raises_with_file_and_line(
    tmp_path: Path, file: str, lines: list[object], message: str
) -> None:
    folder = write_beir(tmp_path / "set")
    write_lines(folder / file, *lines)
    with pytest.raises(GigabatchError, match=message) as error:
        open_collection(folder)
    assert str(folder / file) in str(error.value)


def test_missing_files_raise_with_their_path(tmp_path: Path) -> None:
    with pytest.raises(GigabatchError, match=r"none.jsonl: does not exist. Name a JSONL file"):
        open_collection(tmp_path / "none.jsonl")
    folder = write_beir(tmp_path / "set")
    with pytest.raises(GigabatchError, match=r"dev.tsv: does not exist; the splits are: test"):
        open_collection(folder, "dev")
    (folder / "corpus.jsonl").unlink()
    with pytest.raises(GigabatchError, match=r"corpus.jsonl: cannot be read: No such file"):
        open_collection(folder)
    (folder / "corpus.jsonl").write_bytes(b"\xff\xfe{")
    with pytest.raises(GigabatchError, match="not UTF-8"):
        open_collection(folder)
