from __future__ import annotations

import json
from pathlib import Path

import pytest

from gigabatch.data.errors import GigabatchError
from gigabatch.data.text.corpora import TextTuple, open_collection, read_text_tuples


def write_lines(path: Path, *records: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [each if isinstance(each, str) else json.dumps(each) for each in records]
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


def test_a_beir_folder(tmp_path: Path) -> None:
    found = open_collection(write_beir(tmp_path / "animals"))
    assert found.name == "animals"
    assert found.queries == ("what do cats do", "do birds sing")
    assert found.documents == ("Cats sleep all day", "dogs bark", "do birds sing")
    assert found.judgments == ((0, 0, 2.0), (0, 1, 0.0), (1, 1, 1.0))
    assert found.own_documents == (-1, 2)


def test_pairs_and_triples(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "pairs.jsonl",
        {"anchor": "a", "positive": "A"},
        "",
        {"anchor": "b", "positives": ["B", "β"], "negatives": ["A", "C"]},
        {"anchor": " a ", "positive": "ä", "negative": "C"},
    )
    assert list(read_text_tuples(path))[1] == TextTuple("b", ("B", "β"), ("A", "C"))
    found = open_collection(path)
    assert (found.name, found.queries) == ("pairs", ("a", "b"))
    assert found.documents == ("A", "B", "β", "C", "ä")
    assert found.judgments == ((0, 0, 1.0), (1, 1, 1.0), (1, 2, 1.0), (0, 4, 1.0))
    assert found.triples == ((1, 1, (0, 3)), (1, 2, (0, 3)), (0, 4, (3,)))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: is not JSON"),
        ("[1]", "line 2: is not a JSON object"),
        ({"positive": "A"}, "line 2: has no text in `anchor`; it has positive"),
        ({"anchor": " ", "positive": "A"}, "line 2: has no text in `anchor`"),
        ({"anchor": "a", "text": "A"}, "line 2: has no `positive`"),
        ({"anchor": "a", "positive": []}, "line 2: has no `positive`"),
        ({"anchor": "a", "positive": ["A", 3]}, "line 2: has something else than texts in `posi"),
        ({"anchor": "a", "positive": "A", "negatives": [""]}, "line 2: .* in `negatives`"),
    ],
)
def test_a_bad_line_of_pairs_is_named(tmp_path: Path, line: object, words: str) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", {"anchor": "a", "positive": "A"}, line)
    with pytest.raises(GigabatchError, match=words) as caught:
        open_collection(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("file", "lines", "words"),
    [
        ("qrels/test.tsv", ["q1\td1"], "line 1: has 2 fields"),
        ("qrels/test.tsv", ["q1\td1\tgood"], "line 1: has the score 'good'"),
        ("qrels/test.tsv", ["q1\td1\tnan"], "line 1: has the score NaN"),
        ("qrels/test.tsv", ["q1\td1\t1", "q1\td1\t2"], "line 2: judges 'd1' .* a second time"),
        ("qrels/test.tsv", ["q9\td1\t1"], "line 1: judges query 'q9', which .*queries.jsonl lacks"),
        ("qrels/test.tsv", ["q1\td9\t1"], "line 1: judges 'd9', which .*corpus.jsonl lacks"),
        ("qrels/test.tsv", ["query-id\tcorpus-id\tscore"], "holds no judgement"),
        ("corpus.jsonl", [{"_id": "d1", "text": "a"}] * 2, "line 2: has the `_id` 'd1' of an earl"),
        ("corpus.jsonl", [{"text": "a"}], "line 1: has the `_id` None"),
        ("corpus.jsonl", [{"_id": "d1", "title": 3, "text": "a"}], "line 1: has the `title` 3"),
        ("queries.jsonl", [{"_id": "q1"}], "line 1: has no text in `text`"),
        ("queries.jsonl", [""], "holds no line of JSON"),
    ],
)
def test_what_is_wrong_in_a_beir_folder_is_named(
    tmp_path: Path, file: str, lines: list[object], words: str
) -> None:
    folder = write_beir(tmp_path / "set")
    write_lines(folder / file, *lines)
    with pytest.raises(GigabatchError, match=words) as caught:
        open_collection(folder)
    assert str(folder / file) in str(caught.value)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(GigabatchError, match=r"none.jsonl: is not there. Name a JSONL file"):
        open_collection(tmp_path / "none.jsonl")
    folder = write_beir(tmp_path / "set")
    with pytest.raises(GigabatchError, match=r"dev.tsv: is not there; splits found: test"):
        open_collection(folder, "dev")
    (folder / "corpus.jsonl").unlink()
    with pytest.raises(GigabatchError, match=r"corpus.jsonl: cannot be read: No such file"):
        open_collection(folder)
    (folder / "corpus.jsonl").write_bytes(b"\xff\xfe{")
    with pytest.raises(GigabatchError, match="not UTF-8"):
        open_collection(folder)
