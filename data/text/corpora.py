"""Read text corpora for retrieval: pairs and triples in JSONL, and collections in the BEIR layout.

A line of pairs is `{"anchor": TEXT, "positive": TEXT or [TEXT, ...], "negatives": [TEXT, ...]}`;
negatives are optional, and a single one may be written as `negative`. A BEIR folder contains
`corpus.jsonl` (`_id`, `title`, `text`), `queries.jsonl` (`_id`, `text`) and `qrels/SPLIT.tsv`
(query-id, corpus-id and score, separated by tabs). Every error names the file and the line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gigabatch.data.errors import GigabatchError


@dataclass(frozen=True)
class TextTuple:
    """An anchor with one or more positives, and its negatives."""

    anchor: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class RetrievalCollection:
    """Queries, documents and relevance judgments.

    Attributes:
        name: The collection's name in metrics.
        queries: Texts of the queries.
        documents: Texts of the documents.
        judgments: (query row, document row, grade), each pair once. A document without a judgment
            is not relevant, nor is one with a grade of 0 or less.
        own_documents: For each query, the row of the document that is the query itself, which its
            ranking omits; -1 if there is none.
        triples: (query row, row of a relevant document, rows of its negatives), for pairs that
            have negatives.
    """

    name: str
    queries: tuple[str, ...]
    documents: tuple[str, ...]
    judgments: tuple[tuple[int, int, float], ...]
    own_documents: tuple[int, ...]
    triples: tuple[tuple[int, int, tuple[int, ...]], ...] = ()


def read_text_tuples(path: Path) -> Iterator[TextTuple]:
    """Yield the lines of a JSONL file of pairs or triples; empty lines are skipped.

    Raises:
        GigabatchError: if a line cannot be read; the message names it.
    """
    for where, line in _lines(path):
        record = _parse(where, line)
        positives = _text_list(where, record, "positive", "positives")
        if not positives:
            fields = ", ".join(record) or "none"
            raise _error(
                where,
                f"no text in `positive`; the fields are: {fields}. Write a text, or a list of "
                "texts, in a field of this name",
            )
        negatives = _text_list(where, record, "negative", "negatives")
        yield TextTuple(_text(where, record, "anchor"), positives, negatives)


def open_collection(source: Path, split: str = "test") -> RetrievalCollection:
    """Read a BEIR folder, or a JSONL file of pairs or triples.

    Args:
        source: The folder or file.
        split: Name of the file in `qrels` to use, without `.tsv`; ignored for JSONL.

    Raises:
        GigabatchError: if `source` does not exist or cannot be read.
    """
    if source.is_dir():
        return read_beir(source, split)
    if not source.exists():
        raise GigabatchError(
            f"{source}: does not exist. Name a JSONL file of pairs, or a folder with corpus.jsonl, "
            "queries.jsonl and qrels/."
        )
    return collection_from_tuples(source)


def collection_from_tuples(path: Path) -> RetrievalCollection:
    """Read the pairs and triples of a JSONL file as one collection.

    Equal anchors become one query, and equal texts one document.

    Raises:
        GigabatchError: if the file contains no pairs, or a line cannot be read.
    """
    queries: dict[str, int] = {}
    documents: dict[str, int] = {}
    judgments: dict[tuple[int, int], float] = {}
    triples = []

    def row(rows: dict[str, int], text: str) -> int:
        return rows.setdefault(text, len(rows))

    for item in read_text_tuples(path):
        query = row(queries, item.anchor)
        positives = [row(documents, text) for text in item.positives]
        negatives = tuple(row(documents, text) for text in item.negatives)
        judgments |= {(query, document): 1.0 for document in positives}
        if negatives:
            triples += [(query, document, negatives) for document in positives]
    if not queries:
        raise GigabatchError(f"{path}: contains no pairs. Write one JSON object per line.")
    return RetrievalCollection(
        path.stem,
        tuple(queries),
        tuple(documents),
        tuple((query, document, grade) for (query, document), grade in judgments.items()),
        (-1,) * len(queries),
        tuple(triples),
    )


def read_beir(folder: Path, split: str = "test") -> RetrievalCollection:
    """Read a folder in the BEIR layout.

    Only queries in `qrels/SPLIT.tsv` are kept. A document's text is its title followed by its
    text. A query's ranking omits the document with the id of the query.

    Raises:
        GigabatchError: if a file is missing, empty or cannot be read; the message names the line.
    """
    qrels = folder / "qrels" / f"{split}.tsv"
    if not qrels.exists():
        splits = sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))
        raise GigabatchError(
            f"{qrels}: does not exist; the splits are: {', '.join(splits) or 'none'}. Set split= "
            "to one of them, or change the folder to the BEIR layout."
        )
    document_rows, documents = _texts_by_id(folder / "corpus.jsonl", with_title=True)
    query_rows, queries = _texts_by_id(folder / "queries.jsonl", with_title=False)
    grades: dict[tuple[str, int], float] = {}
    used: dict[str, int] = {}  # query id -> row among the queries that are kept
    for where, query, document, grade in _qrels(qrels):
        if query not in query_rows:
            raise _error(where, f"query {query!r} is not in {folder / 'queries.jsonl'}")
        if document not in document_rows:
            raise _error(where, f"document {document!r} is not in {folder / 'corpus.jsonl'}")
        if (query, document_rows[document]) in grades:
            raise _error(where, f"query {query!r} and document {document!r} occur twice")
        grades[query, document_rows[document]] = grade
        used.setdefault(query, len(used))
    if not grades:
        raise GigabatchError(f"{qrels}: contains no judgments. Set split= to another split.")
    return RetrievalCollection(
        folder.resolve().name,
        tuple(queries[query_rows[query]] for query in used),
        tuple(documents),
        tuple((used[query], document, grade) for (query, document), grade in grades.items()),
        tuple(document_rows.get(query, -1) for query in used),
    )


def _qrels(path: Path) -> Iterator[tuple[str, str, str, float]]:
    """Yield (location, query id, document id, grade) of each line."""
    for number, (where, line) in enumerate(_lines(path)):
        parts = line.rstrip("\r\n").split("\t")
        if number == 0 and parts[:1] == ["query-id"]:
            continue
        if len(parts) != 3:
            expected = "query-id, corpus-id and score"
            raise _error(where, f"{len(parts)} fields separated by tabs, expected {expected}")
        try:
            grade = float(parts[2])
        except ValueError:
            raise _error(where, f"the score {parts[2]!r} is not a number") from None
        if grade != grade:
            raise _error(where, "the score is NaN")
        yield where, parts[0], parts[1], grade


def _texts_by_id(path: Path, with_title: bool) -> tuple[dict[str, int], list[str]]:
    """Return id -> row, and the texts by row."""
    rows: dict[str, int] = {}
    texts: list[str] = []
    for where, line in _lines(path):
        record = _parse(where, line)
        name = record.get("_id")
        if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
            raise _error(where, f"the `_id` is {name!r}; it must be a text")
        if rows.setdefault(str(name), len(texts)) != len(texts):
            raise _error(where, f"the `_id` {str(name)!r} occurs on an earlier line")
        title = record.get("title") or "" if with_title else ""
        if not isinstance(title, str):
            raise _error(where, f"the `title` is {title!r:.60}; it must be a text")
        texts.append(f"{title} {_text(where, record, 'text', may_be_empty=with_title)}".strip())
    if not texts:
        raise GigabatchError(f"{path}: contains no JSON object. Write one per line.")
    return rows, texts


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (location, line) for each line that is not empty."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}, line {number}", line
    except UnicodeDecodeError as error:
        raise GigabatchError(
            f"{path}: is not UTF-8 text: {error}. Save the file as UTF-8."
        ) from None
    except OSError as error:
        raise GigabatchError(f"{path}: cannot be read: {error.strerror}.") from error


def _parse(where: str, line: str) -> dict[str, Any]:
    """Parse a line that must be a JSON object."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise _error(where, f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise _error(where, "not a JSON object, {...}")
    return record


def _text(where: str, record: dict[str, Any], name: str, may_be_empty: bool = False) -> str:
    """Return the text in a field, stripped."""
    value = record.get(name)
    if not isinstance(value, str) or not (value.strip() or may_be_empty):
        fields = ", ".join(record) or "none"
        raise _error(where, f"no text in `{name}`; the fields are: {fields}")
    return value.strip()


def _text_list(where: str, record: dict[str, Any], *names: str) -> tuple[str, ...]:
    """Return the text or texts of the first of several fields that is present, stripped."""
    name = next((name for name in names if record.get(name) is not None), None)
    if name is None:
        return ()
    texts = record[name] if isinstance(record[name], list) else [record[name]]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise _error(where, f"an item of `{name}` is not a text, or is empty")
    return tuple(text.strip() for text in texts)


def _error(where: str, what: str) -> GigabatchError:
    return GigabatchError(f"{where}: {what}.")
