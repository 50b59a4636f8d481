from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tarfiles import contents, make_shard, overwrite, stdlib_members, write_tar

from gigabatch.data.errors import GigabatchError
from gigabatch.data.shards.indexing import open_index
from gigabatch.data.shards.scan import IndexSettings


def open_error(root: Path) -> str:
    """Return the one-line error of opening a set."""
    with pytest.raises(GigabatchError) as error:
        open_index(root)
    assert "\n" not in str(error.value)
    return str(error.value)


def pairs(count: int, first: int = 0) -> dict[str, bytes]:
    """Return the members of `count` samples, a txt and a json each."""
    return {
        f"s{i:03d}.{extension}": b"x" * (i + 1)
        for i in range(first, first + count)
        for extension in ("txt", "json")
    }


def file_states(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size)
        for p in folder.rglob("*")
    }


def test_member_spans_match_tarfile(shards: Path) -> None:
    index = open_index(shards / "train")
    assert len(index) == 200
    assert index.shard_sizes.tolist() == [50] * 4
    assert index.members == ("json", "png", "txt")
    sample = 0
    for number, shard in enumerate(index.shards):
        spans = {m: (offset, size) for m, offset, size in stdlib_members(Path(shard.name))}
        for _ in range(50):
            assert index.shard_of(sample) == number
            for member in index.members:
                assert index.member_span(sample, member) == spans[f"{index.key(sample)}.{member}"]
            sample += 1


def test_keys_keep_folders_and_extensions_keep_dots(tmp_path: Path) -> None:
    members = {"a/1.seg.png": b"1", "a/1.txt": b"22", "b/1.txt": b"333", "b/1.seg.png": b""}
    write_tar(tmp_path / "s.tar", members)
    index = open_index(tmp_path)
    assert [index.key(i) for i in range(len(index))] == ["a/1", "b/1"]
    assert index.members == ("seg.png", "txt")
    assert [index.member_span(1, m)[1] for m in index.members] == [0, 3]


def test_member_without_name_raises(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", [("a.txt", b"x"), ("", b"y")])
    assert open_error(tmp_path).startswith(f"{shard}: at byte 1536: a member has no name")


def test_hidden_files_and_names_without_extension_are_skipped(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", {"README": b"x", ".hidden": b"y", "a.txt": b"z"})
    index = open_index(tmp_path)
    assert [index.key(i) for i in range(len(index))] == ["a"]


def test_parquet_file_matches_table(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", pairs(5))
    index = open_index(tmp_path)
    assert pq.read_table(index.folder / "samples.parquet").equals(index.table)


def truncate_between_members(path: Path) -> int:
    edge = stdlib_members(path)[7][1] - 512
    path.write_bytes(path.read_bytes()[:edge])
    return edge


def truncate_data(path: Path) -> int:
    offset = stdlib_members(path)[9][1]
    path.write_bytes(path.read_bytes()[: offset + 1])
    return offset


def truncate_header(path: Path) -> int:
    start = stdlib_members(path)[9][1] - 512
    path.write_bytes(path.read_bytes()[: start + 300])
    return start


def change_header_byte(path: Path) -> int:
    start = stdlib_members(path)[5][1] - 512
    overwrite(path, start + 20, b"\xaa")
    return start


def overwrite_header_with_zeros(path: Path) -> int:
    start = stdlib_members(path)[6][1] - 512
    overwrite(path, start, bytes(1024))
    return start


def replace_with_html(path: Path) -> int:
    path.write_bytes(b"<html>not here</html>" * 100)
    return 0


def make_empty(path: Path) -> int:
    path.write_bytes(b"")
    return 0


def replace_with_link(path: Path) -> int:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        link = tarfile.TarInfo("a.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return 0


Damage = Callable[[Path], int]
"""Damages a shard; returns the byte offset that the error must name."""
DAMAGES: list[Damage] = [
    truncate_between_members, truncate_data, truncate_header, change_header_byte,
    overwrite_header_with_zeros, replace_with_html, make_empty, replace_with_link,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shard_raises_with_name_and_offset(damage: Damage, tmp_path: Path) -> None:
    write_tar(tmp_path / "a-intact.tar", pairs(3, first=100))
    damaged = make_shard(tmp_path).rename(tmp_path / "b-bad.tar")
    position = damage(damaged)
    message = open_error(tmp_path)
    assert str(damaged) in message
    assert f"at byte {position}:" in message
    assert "a-intact" not in message


@pytest.mark.parametrize("damage", DAMAGES)
def test_shard_damaged_after_indexing_raises(damage: Damage, tmp_path: Path) -> None:
    shard = make_shard(tmp_path)
    open_index(tmp_path)
    os.utime(shard, ns=(0, 0))
    damage(shard)
    assert str(shard) in open_error(tmp_path)


@pytest.mark.parametrize(
    ("names", "key"),
    [
        (["a.txt", "a.txt"], "a"),
        (["a.txt", "b.txt", "a.json"], "a"),
        (["a.txt", "a.json", "b.txt", "a.txt"], "a"),
        (["img.v1.jpg", "img.txt", "img.v2.jpg", "img.txt"], "img"),
        (["d/a.txt", "d/b.txt", "d/a.png"], "d/a"),
    ],
)
def test_repeated_key_raises(tmp_path: Path, names: list[str], key: str) -> None:
    """webdataset would silently merge or split such samples."""
    shard = write_tar(tmp_path / "s.tar", [(name, b"x") for name in names])
    message = open_error(tmp_path)
    assert str(shard) in message
    assert repr(key) in message
    assert f"at byte {stdlib_members(shard)[-1][1]}:" in message


@pytest.mark.parametrize(
    ("names", "position"),
    [
        (["img.v1.jpg", "img.v2.jpg"], 0),  # one sample `img` by webdataset's rule
        (["a.jpg", "www.site.jpg"], 1),  # a sample `www` without a .jpg
        (["a.txt", "a.left.jpg", "b.txt", "b.jpg"], 1),
    ],
)
def test_ambiguous_extension_raises_without_dotted(
    tmp_path: Path, names: list[str], position: int
) -> None:
    shard = write_tar(tmp_path / "s.tar", [(name, b"x") for name in names])
    message = open_error(tmp_path)
    offset = stdlib_members(shard)[position][1]
    assert f"{shard}: at byte {offset}: member {names[position]!r}" in message
    assert "--dotted" in message
    index = open_index(tmp_path, settings=IndexSettings(dotted=True))
    assert sum(count for _, count in index.member_counts) == len(names)
    assert open_index(tmp_path) == index  # the index keeps its settings


@pytest.mark.parametrize("name", ["a.pkl", "a.pyd", "a.seg.PTH", "a.pickle", "a.pt"])
def test_pickle_member_raises(tmp_path: Path, name: str) -> None:
    shard = write_tar(tmp_path / "s.tar", {"a.txt": b"x", name: b"cos\nsystem\n(S'x'\ntR."})
    message = open_error(tmp_path)
    assert f"{shard}: at byte {stdlib_members(shard)[1][1]}:" in message
    assert "pickle" in message


@pytest.mark.parametrize("name", ["../a.txt", "/etc/a.txt", "b/../../a.txt"])
def test_name_leading_out_of_shard_raises(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "s.tar", {name: b"x"})
    assert "leads out of the shard" in open_error(tmp_path)


def test_unchanged_set_is_not_indexed_again(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", pairs(5))
    calls: list[tuple[int, int]] = []
    first = open_index(tmp_path, lambda *done: calls.append(done))
    before = file_states(tmp_path)
    second = open_index(tmp_path, lambda *done: calls.append(done))
    assert calls == [(1, 1)]
    assert file_states(tmp_path) == before
    assert second == first


def test_added_rewritten_and_removed_shards_update_index(tmp_path: Path) -> None:
    write_tar(tmp_path / "s0.tar", pairs(5))
    first = open_index(tmp_path)
    write_tar(tmp_path / "s1.tar", pairs(4, first=5))
    second = open_index(tmp_path)
    assert second.shard_sizes.tolist() == [5, 4]
    assert second.key(8) == "s008"
    write_tar(tmp_path / "s1.tar", pairs(7, first=5))
    third = open_index(tmp_path)
    assert third.shard_sizes.tolist() == [5, 7]
    assert third.key(11) == "s011"
    assert len({first.digest, second.digest, third.digest}) == 3
    (tmp_path / "s1.tar").unlink()
    assert open_index(tmp_path).digest == first.digest


def test_shard_with_new_time_and_same_size_is_scanned_again(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", {"a.txt": b"x"})
    open_index(tmp_path)
    write_tar(shard, {"b.txt": b"x"})
    os.utime(shard, ns=(1, 1))
    assert open_index(tmp_path).key(0) == "b"


@pytest.mark.parametrize("content", ["", "{", '{"format": 0}'])
def test_invalid_manifest_is_rebuilt(tmp_path: Path, content: str) -> None:
    write_tar(tmp_path / "s.tar", pairs(5))
    index = open_index(tmp_path)
    (index.folder / "manifest.json").write_text(content)
    assert open_index(tmp_path) == index


@pytest.mark.parametrize(
    ("other", "equal"),
    [
        (pairs(5), True),
        (pairs(5) | {"s004.json": b"y" * 5}, False),
        (pairs(5) | {"s004.json": b"x" * 6}, False),
        (pairs(6), False),
        ({name.replace("s001", "t001"): data for name, data in pairs(5).items()}, False),
        ({name.replace("txt", "cap"): data for name, data in pairs(5).items()}, False),
    ],
)
def test_digest_depends_on_names_sizes_and_checksums(
    tmp_path: Path, other: dict[str, bytes], equal: bool
) -> None:
    write_tar(tmp_path / "one" / "s.tar", pairs(5))
    write_tar(tmp_path / "two" / "s.tar", other)
    one, two = (open_index(tmp_path / name).digest for name in ("one", "two"))
    assert (one == two) == equal


def test_golden_digest(tmp_path: Path) -> None:
    """Checkpoints hold the digest: if it changed, resumed runs would reject their data."""
    write_tar(tmp_path / "s.tar", pairs(3))
    golden = "22c7a0ae4900cca079a84851965b4f6bb92fe036018e9b21ccb9c7d63141f81e"
    assert open_index(tmp_path).digest == golden


def test_read_only_set_is_indexed_in_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = tmp_path / "set", tmp_path / "cache"
    write_tar(root / "s.tar", pairs(5))
    monkeypatch.setenv("GIGABATCH_CACHE", str(cache))
    root.chmod(0o555)
    try:
        before = file_states(root)
        index = open_index(root)
        assert index.key(4) == "s004"
        assert index.folder.is_relative_to(cache)
        assert file_states(root) == before
        assert open_index(root) == index
    finally:
        root.chmod(0o755)


def test_read_only_sets_of_equal_name_have_separate_indexes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIGABATCH_CACHE", str(tmp_path / "cache"))
    roots = [tmp_path / "a" / "train", tmp_path / "b" / "train"]
    for count, root in enumerate(roots, 3):
        write_tar(root / "s.tar", pairs(count))
        root.chmod(0o555)
    try:
        assert [len(open_index(root)) for root in roots] == [3, 4]
    finally:
        for root in roots:
            root.chmod(0o755)


def test_unwritable_cache_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "set"
    write_tar(root / "s.tar", pairs(2))
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("GIGABATCH_CACHE", str(tmp_path / "file"))
    root.chmod(0o555)
    try:
        assert "cannot be written" in open_error(root)
    finally:
        root.chmod(0o755)


def test_folder_without_shards_or_samples_raises(tmp_path: Path) -> None:
    assert "contains no .tar shards" in open_error(tmp_path)
    assert "is not a folder" in open_error(tmp_path / "missing")
    write_tar(tmp_path / "s.tar", {"README": b"x"})
    assert "contain no samples" in open_error(tmp_path)


def test_empty_shard_between_others_has_no_rows(tmp_path: Path) -> None:
    write_tar(tmp_path / "s0.tar", pairs(2))
    write_tar(tmp_path / "s1.tar", {})
    write_tar(tmp_path / "s2.tar", pairs(3, first=2))
    index = open_index(tmp_path)
    assert index.shard_sizes.tolist() == [2, 0, 3]
    assert [index.shard_of(i) for i in range(5)] == [0, 0, 2, 2, 2]


def test_require_members_accepts_alternatives(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", {"a.jpg": b"1", "a.txt": b"1", "b.png": b"1"})
    index = open_index(tmp_path)
    assert index.require_members("png", "jpg", "webp") == ("png", "jpg")
    with pytest.raises(GigabatchError, match=r"s\.tar: sample 'b' has no \.txt.*\(1 of 2"):
        index.require_members("txt")
    assert index.require_members("txt", allow_missing=True) == ("txt",)
    with pytest.raises(GigabatchError, match=r"no sample has a \.webp or \.gif.*\.jpg, \.png"):
        index.require_members("webp", "gif", allow_missing=True)


def test_index_pickles_without_its_table(shards: Path) -> None:
    index = open_index(shards / "train")
    key, first = index.key(150), index.shard_starts
    data = pickle.dumps(index)
    assert len(data) < 2000
    copy = pickle.loads(data)
    assert copy == index
    assert copy.key(150) == key
    assert (copy.shard_starts == first).all()


def open_all(barrier: Barrier, roots: list[Path], results: Any) -> None:
    """Open every folder at the same time as the other processes do."""
    outcomes: list[str] = []
    for root in roots:
        barrier.wait()
        try:
            index = open_index(root)
            outcomes.append(f"{index.digest} {index.key(4)}")
        except Exception as error:
            outcomes.append(repr(error))
    results.put(outcomes)


def test_concurrent_processes_all_open_the_same_index(tmp_path: Path) -> None:
    roots = [tmp_path / str(i) for i in range(40)]
    for root in roots:
        write_tar(root / "s.tar", pairs(5))
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    workers = [
        context.Process(target=open_all, args=(barrier, roots, results), daemon=True)
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    outcomes = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    expected = [f"{open_index(root).digest} s004" for root in roots]
    assert outcomes == [expected] * 4
    leftovers = [p for root in roots for p in (root / ".gigabatch").iterdir() if p.is_dir()]
    assert leftovers == []


def test_member_sizes_sum_to_shard_contents(tmp_path: Path) -> None:
    shard = make_shard(tmp_path)
    index = open_index(tmp_path)
    total = sum(index.member_span(i, m)[1] for i in range(len(index)) for m in index.members)
    assert total == sum(map(len, contents(shard).values()))


@pytest.mark.parametrize("damage", ["missing arrow", "truncated arrow", "a list", "not json"])
def test_damaged_index_is_rebuilt(damage: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", pairs(5))
    index = open_index(tmp_path)
    arrow, manifest = index.folder / index.arrow, index.folder / "manifest.json"
    if damage == "missing arrow":
        arrow.unlink()
    elif damage == "truncated arrow":
        arrow.write_bytes(arrow.read_bytes()[:100])
    else:
        manifest.write_text("[]" if damage == "a list" else "{")
    rebuilt = open_index(tmp_path)
    assert rebuilt.digest == index.digest
    assert rebuilt.table.num_rows == len(index)


def test_extensions_become_lower_case(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"x.JPG": b"j", "x.txt": b"t"})
    assert open_index(tmp_path).members == ("jpg", "txt")


def test_opening_index_does_not_import_pandas(tmp_path: Path) -> None:
    """Some pyarrow calls import pandas, which takes a second and swallows Ctrl-C."""
    write_tar(tmp_path / "a.tar", pairs(5))
    open_index(tmp_path)
    command = (
        "import sys; from pathlib import Path; "
        "from gigabatch.data.shards.indexing import open_index; "
        "open_index(Path(sys.argv[1])).require_members('txt'); sys.exit('pandas' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", command, str(tmp_path)]).returncode == 0
