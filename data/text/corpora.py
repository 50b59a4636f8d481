"""Text corpora: pairs and triples in JSONL, and judged collections in the BEIR layout.

A line of pairs: `{"anchor": TEXT, "positive": TEXT or [TEXT, ...], "negatives": [TEXT, ...]}`, the
last one optional (`negative` for a single one). A BEIR folder holds `corpus.jsonl` (`_id`, `title`,
`text`), `queries.jsonl` (`_id`, `text`) and `qrels/SPLIT.tsv` (query-id, corpus-id, score; tabs).
Every error names the file and the line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gigabatch.data.errors import GigabatchError


@dataclass(frozen=True)
class Tuple:
    """An anchor with its right answers, at least one, and its wrong ones."""

    anchor: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Collection:
    """Queries judged against documents.

    `judged`: (row of a query, row of a document, grade), each pair once; what is not judged is
    wrong, as is a grade of 0 or less. `same`: for each query the document that is the query
    itself and left out of its list; -1 for none. `orders`: for each query the rows of its right
    document and of its wrong ones, where pairs came with negatives.
    """

    name: str
    queries: tuple[str, ...]
    documents: tuple[str, ...]
    judged: tuple[tuple[int, int, float], ...]
    same: tuple[int, ...]
    orders: tuple[tuple[int, int, tuple[int, ...]], ...] = ()


def read_tuples(path: Path) -> Iterator[Tuple]:
    """The lines of a JSONL file of pairs or triples; empty lines are passed over."""
    for where, line in _lines(path):
        record = _record(where, line)
        positives = _texts(where, record, "positive", "positives")
        if not positives:
            raise _bad(where, "has no `positive`. Give a text, or a list of texts")
        negatives = _texts(where, record, "negative", "negatives")
        yield Tuple(_text(where, record, "anchor"), positives, negatives)


def open_collection(source: Path, split: str = "test") -> Collection:
    """A BEIR folder, or a JSONL file of pairs or triples. Raises GigabatchError."""
    if source.is_dir():
        return read_beir(source, split)
    if not source.exists():
        raise GigabatchError(
            f"{source}: is not there. Name a JSONL file of pairs, or a folder with corpus.jsonl, "
            "queries.jsonl and qrels/."
        )
    return collection_of(source)


def collection_of(path: Path) -> Collection:
    """Pairs and triples as a collection: equal anchors are one query, equal texts one document,
    and the documents of all lines are the corpus."""
    queries: dict[str, int] = {}
    documents: dict[str, int] = {}
    judged: dict[tuple[int, int], float] = {}
    orders = []

    def row(of: dict[str, int], text: str) -> int:
        return of.setdefault(text, len(of))

    for each in read_tuples(path):
        query = row(queries, each.anchor)
        right = [row(documents, text) for text in each.positives]
        wrong = tuple(row(documents, text) for text in each.negatives)
        judged |= {(query, document): 1.0 for document in right}
        if wrong:
            orders += [(query, document, wrong) for document in right]
    if not queries:
        raise GigabatchError(f"{path}: holds no pair. Write a line of JSON for each.")
    pairs = tuple((query, document, grade) for (query, document), grade in judged.items())
    same = (-1,) * len(queries)
    return Collection(path.stem, tuple(queries), tuple(documents), pairs, same, tuple(orders))


def read_beir(folder: Path, split: str = "test") -> Collection:
    """A folder in the BEIR layout. Of the queries those that `qrels/SPLIT.tsv` judges are kept; a
    document is its title and its text; one with the query's own id is left out of its list."""
    judged_in = folder / "qrels" / f"{split}.tsv"
    if not judged_in.exists():
        found = sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))
        raise GigabatchError(
            f"{judged_in}: is not there; splits found: {', '.join(found) or 'none'}. Name one "
            "with --split, or bring the folder into the BEIR layout."
        )
    document_ids, documents = _texts_by_id(folder / "corpus.jsonl", title=True)
    query_ids, queries = _texts_by_id(folder / "queries.jsonl", title=False)
    judged: dict[tuple[str, int], float] = {}
    used: dict[str, int] = {}
    for where, query, document, grade in _qrels(judged_in):
        if query not in query_ids:
            raise _bad(where, f"judges query {query!r}, which {folder / 'queries.jsonl'} lacks")
        if document not in document_ids:
            raise _bad(where, f"judges {document!r}, which {folder / 'corpus.jsonl'} lacks")
        if (query, document_ids[document]) in judged:
            raise _bad(where, f"judges {document!r} for query {query!r} a second time")
        judged[query, document_ids[document]] = grade
        used.setdefault(query, len(used))
    if not judged:
        raise GigabatchError(f"{judged_in}: holds no judgement.")
    return Collection(
        folder.resolve().name,
        tuple(queries[query_ids[query]] for query in used),
        tuple(documents),
        tuple((used[query], document, grade) for (query, document), grade in judged.items()),
        tuple(document_ids.get(query, -1) for query in used),
    )


def _qrels(path: Path) -> Iterator[tuple[str, str, str, float]]:
    for number, (where, line) in enumerate(_lines(path)):
        parts = line.rstrip("\r\n").split("\t")
        if number == 0 and parts[:1] == ["query-id"]:
            continue
        if len(parts) != 3:
            raise _bad(where, f"has {len(parts)} fields between tabs; query-id, corpus-id, score")
        try:
            grade = float(parts[2])
        except ValueError:
            raise _bad(where, f"has the score {parts[2]!r}, which is no number") from None
        if grade != grade:
            raise _bad(where, "has the score NaN")
        yield where, parts[0], parts[1], grade


def _texts_by_id(path: Path, title: bool) -> tuple[dict[str, int], list[str]]:
    """id -> row, and the texts."""
    rows: dict[str, int] = {}
    texts: list[str] = []
    for where, line in _lines(path):
        record = _record(where, line)
        name = record.get("_id")
        if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
            raise _bad(where, f"has the `_id` {name!r}; it must be a text")
        if rows.setdefault(str(name), len(texts)) != len(texts):
            raise _bad(where, f"has the `_id` {str(name)!r} of an earlier line")
        heading = record.get("title") or "" if title else ""
        if not isinstance(heading, str):
            raise _bad(where, f"has the `title` {heading!r:.60}; it must be a text")
        texts.append(f"{heading} {_text(where, record, 'text', empty=title)}".strip())
    if not texts:
        raise GigabatchError(f"{path}: holds no line of JSON.")
    return rows, texts


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(FILE, line N; its text) of each line that is not empty."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}, line {number}", line
    except UnicodeDecodeError as error:
        raise GigabatchError(
            f"{path}: is not UTF-8 text: {error}. Write it again as such."
        ) from None
    except OSError as error:
        raise GigabatchError(f"{path}: cannot be read: {error.strerror}.") from error


def _record(where: str, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise _bad(where, f"is not JSON ({error})") from None
    if not isinstance(record, dict):
        raise _bad(where, "is not a JSON object, {...}")
    return record


def _text(where: str, record: dict[str, Any], name: str, empty: bool = False) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not (value.strip() or empty):
        known = ", ".join(record) or "nothing"
        raise _bad(where, f"has no text in `{name}`; it has {known}")
    return value.strip()


def _texts(where: str, record: dict[str, Any], *names: str) -> tuple[str, ...]:
    """The texts of a field that may hold one or several, under either name."""
    name = next((each for each in names if record.get(each) is not None), None)
    if name is None:
        return ()
    found = record[name] if isinstance(record[name], list) else [record[name]]
    if not all(isinstance(each, str) and each.strip() for each in found):
        raise _bad(where, f"has something else than texts in `{name}`")
    return tuple(each.strip() for each in found)


def _bad(where: str, what: str) -> GigabatchError:
    return GigabatchError(f"{where}: {what}.")
