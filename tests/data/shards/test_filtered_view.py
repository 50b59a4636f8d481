from __future__ import annotations

import multiprocessing
import os
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import outcome
from tarfiles import write_tar
from test_indexing import jsons, keys

from gigabatch.data.errors import GigabatchError
from gigabatch.data.files import atomic_replace
from gigabatch.data.shards.filter_expression import parse_filter
from gigabatch.data.shards.filtered_view import count_matches, create_view
from gigabatch.data.shards.index import Index
from gigabatch.data.shards.index_files import write_index
from gigabatch.data.shards.indexing import open_index
from gigabatch.data.shards.reader import Reader

ROWS: list[dict[str, Any]] = [
    {"lang": "en", "score": 0.1, "n": 1},
    {"lang": "de", "score": 0.9, "n": 2},
    {"lang": None, "score": 0.5, "n": 3},
    {"lang": "en", "score": 0.7, "n": 4},
    {"lang": "Zh-Hant", "score": None, "n": -5},
]
COLUMNS = ["lang", "score", "n"]


@pytest.fixture
def index(tmp_path: Path) -> Index:
    write_tar(tmp_path / "set" / "a.tar", jsons(ROWS[:2]))
    write_tar(tmp_path / "set" / "b.tar", jsons(ROWS[2:], first=2))
    return open_index(tmp_path / "set", columns=COLUMNS)


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ('lang == "en"', [0, 3]),
        ('lang != "en"', [1, 4]),  # null is neither equal nor unequal
        ('not lang == "en"', [1, 4]),
        ("lang is None", [2]),
        ("lang is not None and score > 0.5", [1, 3]),
        ('lang in ["de", "fr"]', [1]),
        ("lang not in ('de', 'en')", [2, 4]),
        ("0.1 < score <= 0.7", [2, 3]),
        ("score > 0.8 or n < 0", [1, 4]),
        ("n * 2 + 1 >= 7 and not n / 2 > 1.5", [2]),
        ("n == -5", [4]),
        ('contains(lang, "Han")', [4]),
        ('starts_with(lower(lang), "zh")', [4]),
        ('matches(lang, "^.e$")', [1]),
        ("length(lang) > 2", [4]),
        ('size("json") > 37', [4]),
        ("key == 's003'", [3]),
    ],
)
def test_view_keeps_samples_that_meet_condition(
    condition: str, expected: list[int], index: Index, tmp_path: Path
) -> None:
    assert count_matches(index, condition) == len(expected)
    view = create_view(index, condition, tmp_path / "view")
    assert keys(view) == [f"s{i:03d}" for i in expected]
    assert view.values("n", view.shard_starts[:1]) == [ROWS[expected[0]]["n"]]
    with Reader(view) as reader:
        assert [reader.read(i, "txt") for i in range(len(view))] == [b"x"] * len(expected)


MISSING = [1.5, float("nan"), None, float("inf"), -2.0]
TEXTS = ["a", "", None, "  ", "b"]
MIXED: list[Any] = [1, "", None, [], {"a": 1}]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("x is None", [1, 2, 3]), ("x is not None", [0, 4]), ("x != 1.5", [3, 4]),
        ("not x == 1.5", [3, 4]), ("x not in [1.5]", [1, 2, 3, 4]), ("x > 0", [0, 3]),
        ("x + 1 != 0", [0, 3, 4]), ("t not in ['a', 'c']", [1, 2, 3, 4]),
        ("t in ['a', '']", [0, 1]),
        ("t is None", [1, 2, 3]), ("t is not None", [0, 4]), ("t != 'a'", [1, 3, 4]),
        ("t == ''", [1]), ("m is None", [1, 2, 3]), ("m is not None", [0, 4]),
        ("x is not None and t is not None and m is not None", [0, 4]),
    ],
)  # fmt: skip
def test_none_stands_for_every_missing_value(
    condition: str, expected: list[int], tmp_path: Path
) -> None:
    fields = zip(MISSING, TEXTS, MIXED, strict=True)
    samples: list[object] = [{"x": x, "t": t, "m": m} for x, t, m in fields]
    write_tar(tmp_path / "set" / "a.tar", jsons(samples))
    index = open_index(tmp_path / "set", columns=["x", "t", "m"])
    assert count_matches(index, condition) == len(expected)
    assert keys(create_view(index, condition, tmp_path / "view")) == [f"s00{i}" for i in expected]


@pytest.mark.parametrize(
    "condition",
    [
        "", "lang ==", "lang = 'en'", "langs == 'en'", "lang.upper() == 'EN'", "f'{lang}'",
        "__import__('os').system('touch pwned')", "[x for x in lang]", "lambda: 1", "1 == 1",
        "(lambda lang: lang)(1)", "lang == 'en' if 1 else 2", "score", "lang is 'en'", "lang < 3",
        "contains(lang)", "eval('1')", "size('gif') > 3", "b'x' == lang", "lang + 1 == 2",
        "n == '" + "x" * 70_000 + "'", "-" * 60_000 + "n == 1", "not " * 15_000 + "n == 1",
        "n == 1" + " + 1" * 9_000, "'a' * 99999999999999 == key", "n > 2 - 1",
        "lang == {1: 2}", "~score", "lang[0] == 'e'", "score ** 2 > 3", "(" * 300 + "n" + ")" * 300,
    ],
)  # fmt: skip
def test_invalid_condition_raises_and_runs_nothing(
    condition: str, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GigabatchError) as error:
        create_view(index, condition, tmp_path / "view")
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set"]


@given(text=st.text("lang scoren()[]<>=!'\"0.9+-*/,:andornti", max_size=30))
def test_any_text_parses_or_raises_one_line_error(text: str) -> None:
    try:
        parse_filter(text, COLUMNS)
    except GigabatchError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_long_condition_works_up_to_term_limit(index: Index) -> None:
    assert count_matches(index, " or ".join(f"n == {i}" for i in range(3, 900))) == 2
    assert count_matches(index, f"n in {list(range(3, 9_000))}") == 2
    for condition in (
        " or ".join(["n == 1"] * 5_000),
        "0" + " < n" * 9_000,
        "n < 1" + " < 2" * 9_000,
    ):
        with pytest.raises(GigabatchError, match="more than 1,000 terms"):
            count_matches(index, condition)


def test_column_of_mixed_types_compares_by_value(tmp_path: Path) -> None:
    values = [1, "1", True, None, "en", 2**70, 0.5]
    write_tar(tmp_path / "a.tar", jsons([{"v": v, "row": 7 - i} for i, v in enumerate(values)]))
    index = open_index(tmp_path, columns=["v", "row"])
    for value in values:
        if value is not None:
            assert count_matches(index, f"v == {value!r}") == 1
    assert count_matches(index, "v is None") == 1
    assert count_matches(index, "v in [1, 'en', 'de']") == 2
    assert count_matches(index, "v != '1'") == 5
    assert keys(create_view(index, "row < 3", tmp_path / "view")) == ["s005", "s006"]
    assert keys(create_view(open_index(tmp_path / "view"), "v == 0.5", tmp_path / "2")) == ["s006"]


def test_view_of_relative_path_opens_from_any_folder(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    create_view(open_index("set"), "n > 1", Path("view"))
    create_view(open_index("./set/*.tar", columns=["n"]), "n > 1", Path("other"))
    monkeypatch.chdir("/")
    for name in ("view", "other"):
        view = open_index(tmp_path / name)
        assert view.shards[0].name == str(tmp_path / "set" / "a.tar")
        with Reader(view) as reader:
            assert reader.read(0, "txt") == b"x"


def test_view_is_a_set_with_its_own_digest(index: Index, tmp_path: Path) -> None:
    one = create_view(index, "n > 1", tmp_path / "one")
    assert open_index(tmp_path / "one") == one
    assert one.shard_sizes.tolist() == [1, 2]
    assert (
        len({index.digest, one.digest, create_view(index, "n > 2", tmp_path / "two").digest}) == 3
    )
    view_of_view = create_view(one, 'lang == "en"', tmp_path / "three")
    assert keys(view_of_view) == ["s003"]


def test_create_view_replaces_only_views(index: Index, tmp_path: Path) -> None:
    create_view(index, "n > 1", tmp_path / "view")
    assert len(create_view(index, "n > 3", tmp_path / "view")) == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("x")
    for folder in (tmp_path / "other", tmp_path / "other" / "precious.txt", tmp_path / "set"):
        with pytest.raises(GigabatchError, match="is not a view"):
            create_view(index, "n > 1", folder)


def write_and_die(index: Index, home: Path, renames: int) -> None:
    """Write an index in a process that is killed after `renames` renames."""

    def work() -> None:
        rename, remaining = os.replace, iter(range(renames))

        def rename_or_die(*names: Any) -> None:
            if next(remaining, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*names)

        os.replace = rename_or_die
        manifest = {"digest": "d", "settings": {}}
        write_index([index.table], index.table.schema, manifest, home)

    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert list(home.glob(".*.tmp"))


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_files_of_killed_writer_are_removed_by_next_writer(
    renames: int, index: Index, tmp_path: Path
) -> None:
    for home in (tmp_path / "view", index.folder):
        write_and_die(index, home, renames)
    other = tmp_path / "view" / "samples-0123456789abcdef.arrow"
    with atomic_replace(other) as live:  # the file of a live writer
        assert len(create_view(index, "n > 1", tmp_path / "view")) == 3
        assert list((tmp_path / "view").glob(".*")) == [live]
    other.unlink()
    names = sorted(path.name for path in (tmp_path / "view").iterdir())
    assert (len(names), names[0], names[2]) == (3, "manifest.json", "samples.parquet")
    open_index(tmp_path / "set", columns=[*COLUMNS, "more"])
    assert len(list(index.folder.iterdir())) == 4  # the index files and the lock


def test_create_view_keeps_folder_with_users_parquet_file(index: Index, tmp_path: Path) -> None:
    table = tmp_path / "mine" / "samples.parquet"
    table.parent.mkdir()
    table.write_bytes(b"precious")
    with pytest.raises(GigabatchError, match="is not a view"):
        create_view(index, "n > 1", table.parent)
    assert table.read_bytes() == b"precious"


def test_condition_without_matches_raises(index: Index, tmp_path: Path) -> None:
    with pytest.raises(GigabatchError, match="no sample meets"):
        create_view(index, "n > 100", tmp_path / "view")


def test_opening_view_raises_if_used_shard_changed(index: Index, tmp_path: Path) -> None:
    create_view(index, "n > 3", tmp_path / "view")  # uses b.tar only
    os.utime(tmp_path / "set" / "a.tar", ns=(1, 1))
    open_index(tmp_path / "view")
    os.utime(tmp_path / "set" / "b.tar", ns=(1, 1))
    with pytest.raises(GigabatchError, match=r"b\.tar changed after this view was made"):
        open_index(tmp_path / "view")


@pytest.mark.parametrize(
    "condition", ["lang == 'en'", 'lang == "en" and score > 0.5', "key == '$1'"]
)
def test_commands_of_view_errors_make_it_again(
    condition: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source, out = tmp_path / "the set", tmp_path / "the view"
    records = {f"{key}.json": b'{"lang": "en", "score": 0.9, "x": 1}' for key in ("a", "$1")}
    shard = write_tar(source / "a.tar", records)
    create_view(open_index(source, columns=("lang", "score")), condition, out)
    errors = []
    with pytest.raises(GigabatchError) as missing:
        open_index(out, columns=("x",))
    errors.append(str(missing.value))
    os.utime(shard, (1, 1))
    with pytest.raises(GigabatchError) as changed:
        open_index(out)
    errors.append(str(changed.value))
    for error in reversed(errors):
        script = re.findall(r"`(gigabatch data .*?)`(?:[.,]| then|$)", error)
        assert script
        for command in script:
            code, _, err = outcome(monkeypatch, capsys, *shlex.split(command)[1:])
            assert code == 0, err
        assert len(open_index(out)) > 0
    assert "x" in open_index(out, columns=("x",)).columns
