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
from tarfiles import contents, listed, overwrite, shard_of, write_tar

from gigabatch.data.errors import GigabatchError
from gigabatch.data.shards.indexing import open_index
from gigabatch.data.shards.scan import IndexSettings


def refusal(root: Path) -> str:
    with pytest.raises(GigabatchError) as caught:
        open_index(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pairs(count: int, first: int = 0) -> dict[str, bytes]:
    """`count` samples of a caption and a json member each."""
    return {
        f"s{i:03d}.{extension}": b"x" * (i + 1)
        for i in range(first, first + count)
        for extension in ("txt", "json")
    }


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size)
        for p in folder.rglob("*")
    }


def test_every_member_is_found_where_tarfile_finds_it(shards: Path) -> None:
    index = open_index(shards / "train")
    assert len(index) == 200
    assert index.shard_sizes.tolist() == [50] * 4
    assert index.members == ("json", "png", "txt")
    sample = 0
    for number, shard in enumerate(index.shards):
        found = {m: (offset, size) for m, offset, size in listed(Path(shard.name))}
        for _ in range(50):
            assert index.shard_of(sample) == number
            for member in index.members:
                assert index.member_span(sample, member) == found[f"{index.key(sample)}.{member}"]
            sample += 1


def test_keys_keep_their_folder_and_extensions_their_dots(tmp_path: Path) -> None:
    members = {"a/1.seg.png": b"1", "a/1.txt": b"22", "b/1.txt": b"333", "b/1.seg.png": b""}
    write_tar(tmp_path / "s.tar", members)
    index = open_index(tmp_path)
    assert [index.key(i) for i in range(len(index))] == ["a/1", "b/1"]
    assert index.members == ("seg.png", "txt")
    assert [index.member_span(1, m)[1] for m in index.members] == [0, 3]


def test_a_member_without_a_name_is_refused(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", [("a.txt", b"x"), ("", b"y")])
    assert refusal(tmp_path).startswith(f"{shard}: at byte 1536: a member has no name")


def test_names_without_extension_and_hidden_files_are_no_samples(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", {"README": b"x", ".hidden": b"y", "a.txt": b"z"})
    index = open_index(tmp_path)
    assert [index.key(i) for i in range(len(index))] == ["a"]


def test_the_parquet_file_holds_the_same_table(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", pairs(5))
    index = open_index(tmp_path)
    assert pq.read_table(index.folder / "samples.parquet").equals(index.table)


def damage_edge(path: Path) -> int:
    edge = listed(path)[7][1] - 512
    path.write_bytes(path.read_bytes()[:edge])
    return edge


def damage_data(path: Path) -> int:
    offset = listed(path)[9][1]
    path.write_bytes(path.read_bytes()[: offset + 1])
    return offset


def damage_header(path: Path) -> int:
    start = listed(path)[9][1] - 512
    path.write_bytes(path.read_bytes()[: start + 300])
    return start


def damage_byte(path: Path) -> int:
    start = listed(path)[5][1] - 512
    overwrite(path, start + 20, b"\xaa")
    return start


def damage_zeros(path: Path) -> int:
    start = listed(path)[6][1] - 512
    overwrite(path, start, bytes(1024))
    return start


def damage_page(path: Path) -> int:
    path.write_bytes(b"<html>not here</html>" * 100)
    return 0


def damage_empty(path: Path) -> int:
    path.write_bytes(b"")
    return 0


def damage_link(path: Path) -> int:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        link = tarfile.TarInfo("a.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return 0


Damage = Callable[[Path], int]
DAMAGES: list[Damage] = [
    damage_edge, damage_data, damage_header, damage_byte, damage_zeros, damage_page, damage_empty,
    damage_link,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_by_shard_and_offset(damage: Damage, tmp_path: Path) -> None:
    write_tar(tmp_path / "a-sound.tar", pairs(3, first=100))
    bad = shard_of(tmp_path).rename(tmp_path / "b-bad.tar")
    position = damage(bad)
    message = refusal(tmp_path)
    assert str(bad) in message
    assert f"at byte {position}:" in message
    assert "a-sound" not in message


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_after_indexing_is_noticed(damage: Damage, tmp_path: Path) -> None:
    shard = shard_of(tmp_path)
    open_index(tmp_path)
    os.utime(shard, ns=(0, 0))
    damage(shard)
    assert str(shard) in refusal(tmp_path)


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
def test_keys_that_come_twice_are_refused(tmp_path: Path, names: list[str], key: str) -> None:
    """webdataset would silently merge or split such samples."""
    shard = write_tar(tmp_path / "s.tar", [(name, b"x") for name in names])
    message = refusal(tmp_path)
    assert str(shard) in message
    assert repr(key) in message
    assert f"at byte {listed(shard)[-1][1]}:" in message


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (["img.v1.jpg", "img.v2.jpg"], 0),  # one sample `img`, by webdataset's rule
        (["a.jpg", "www.site.jpg"], 1),  # a sample `www` without a .jpg
        (["a.txt", "a.left.jpg", "b.txt", "b.jpg"], 1),
    ],
)
def test_ambiguous_extensions_are_refused(tmp_path: Path, names: list[str], fault: int) -> None:
    shard = write_tar(tmp_path / "s.tar", [(name, b"x") for name in names])
    message = refusal(tmp_path)
    assert f"{shard}: at byte {listed(shard)[fault][1]}: member {names[fault]!r}" in message
    assert "--dotted" in message
    index = open_index(tmp_path, settings=IndexSettings(dotted=True))
    assert sum(count for _, count in index.member_counts) == len(names)
    assert open_index(tmp_path) == index  # what an index was told, it keeps


@pytest.mark.parametrize("name", ["a.pkl", "a.pyd", "a.seg.PTH", "a.pickle", "a.pt"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    shard = write_tar(tmp_path / "s.tar", {"a.txt": b"x", name: b"cos\nsystem\n(S'x'\ntR."})
    message = refusal(tmp_path)
    assert f"{shard}: at byte {listed(shard)[1][1]}:" in message
    assert "pickle" in message


@pytest.mark.parametrize("name", ["../a.txt", "/etc/a.txt", "b/../../a.txt"])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "s.tar", {name: b"x"})
    assert "leads out of the shard" in refusal(tmp_path)


def test_an_unchanged_set_is_not_indexed_again(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", pairs(5))
    calls: list[tuple[int, int]] = []
    first = open_index(tmp_path, lambda *done: calls.append(done))
    before = tree(tmp_path)
    second = open_index(tmp_path, lambda *done: calls.append(done))
    assert calls == [(1, 1)]
    assert tree(tmp_path) == before
    assert second == first


def test_an_added_or_rewritten_shard_is_seen(tmp_path: Path) -> None:
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


def test_a_shard_of_the_same_size_and_another_time_is_read_again(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", {"a.txt": b"x"})
    open_index(tmp_path)
    write_tar(shard, {"b.txt": b"x"})
    os.utime(shard, ns=(1, 1))
    assert open_index(tmp_path).key(0) == "b"


@pytest.mark.parametrize("rubbish", ["", "{", '{"format": 0}'])
def test_a_spoilt_manifest_is_rebuilt(tmp_path: Path, rubbish: str) -> None:
    write_tar(tmp_path / "s.tar", pairs(5))
    index = open_index(tmp_path)
    (index.folder / "manifest.json").write_text(rubbish)
    assert open_index(tmp_path) == index


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (pairs(5), True),
        (pairs(5) | {"s004.json": b"y" * 5}, False),
        (pairs(5) | {"s004.json": b"x" * 6}, False),
        (pairs(6), False),
        ({name.replace("s001", "t001"): data for name, data in pairs(5).items()}, False),
        ({name.replace("txt", "cap"): data for name, data in pairs(5).items()}, False),
    ],
)
def test_the_digest_is_that_of_names_sizes_and_checksums(
    tmp_path: Path, other: dict[str, bytes], same: bool
) -> None:
    write_tar(tmp_path / "one" / "s.tar", pairs(5))
    write_tar(tmp_path / "two" / "s.tar", other)
    equal = open_index(tmp_path / "one").digest == open_index(tmp_path / "two").digest
    assert equal == same


def test_the_digest_is_golden(tmp_path: Path) -> None:
    """Checkpoints hold it: a change makes resumed runs refuse their data."""
    write_tar(tmp_path / "s.tar", pairs(3))
    golden = "22c7a0ae4900cca079a84851965b4f6bb92fe036018e9b21ccb9c7d63141f81e"
    assert open_index(tmp_path).digest == golden


def test_a_read_only_set_is_indexed_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, cache = tmp_path / "set", tmp_path / "cache"
    write_tar(root / "s.tar", pairs(5))
    monkeypatch.setenv("GIGABATCH_CACHE", str(cache))
    root.chmod(0o555)
    try:
        before = tree(root)
        index = open_index(root)
        assert index.key(4) == "s004"
        assert index.folder.is_relative_to(cache)
        assert tree(root) == before
        again = open_index(root)
        assert again == index
    finally:
        root.chmod(0o755)


def test_read_only_sets_of_one_name_do_not_share_an_index(
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


def test_a_cache_that_cannot_be_written_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "set"
    write_tar(root / "s.tar", pairs(2))
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("GIGABATCH_CACHE", str(tmp_path / "file"))
    root.chmod(0o555)
    try:
        assert "cannot be written" in refusal(root)
    finally:
        root.chmod(0o755)


def test_folders_without_shards_are_refused(tmp_path: Path) -> None:
    assert "holds no .tar shard" in refusal(tmp_path)
    assert "is not a folder" in refusal(tmp_path / "nowhere")
    write_tar(tmp_path / "s.tar", {"README": b"x"})
    assert "hold no samples" in refusal(tmp_path)


def test_an_empty_shard_among_others(tmp_path: Path) -> None:
    write_tar(tmp_path / "s0.tar", pairs(2))
    write_tar(tmp_path / "s1.tar", {})
    write_tar(tmp_path / "s2.tar", pairs(3, first=2))
    index = open_index(tmp_path)
    assert index.shard_sizes.tolist() == [2, 0, 3]
    assert [index.shard_of(i) for i in range(5)] == [0, 0, 2, 2, 2]


def test_require_takes_members_of_which_each_sample_has_one(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", {"a.jpg": b"1", "a.txt": b"1", "b.png": b"1"})
    index = open_index(tmp_path)
    assert index.require_members("png", "jpg", "webp") == ("png", "jpg")
    with pytest.raises(GigabatchError, match=r"s\.tar: sample 'b' has no \.txt.*\(1 of 2"):
        index.require_members("txt")
    assert index.require_members("txt", allow_missing=True) == ("txt",)
    with pytest.raises(GigabatchError, match=r"no sample has a \.webp or \.gif.*\.jpg, \.png"):
        index.require_members("webp", "gif", allow_missing=True)


def test_an_index_pickles_without_its_table(shards: Path) -> None:
    index = open_index(shards / "train")
    key, first = index.key(150), index.shard_starts
    data = pickle.dumps(index)
    assert len(data) < 2000
    copy = pickle.loads(data)
    assert copy == index
    assert copy.key(150) == key
    assert (copy.shard_starts == first).all()


def open_all(barrier: Barrier, roots: list[Path], results: Any) -> None:
    """In a child process: open each folder at the same moment as the others do."""
    found: list[str] = []
    for root in roots:
        barrier.wait()
        try:
            index = open_index(root)
            found.append(f"{index.digest} {index.key(4)}")
        except Exception as error:
            found.append(repr(error))
    results.put(found)


def test_processes_that_index_the_same_set_at_once_all_succeed(tmp_path: Path) -> None:
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
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    expected = [f"{open_index(root).digest} s004" for root in roots]
    assert found == [expected] * 4
    leftovers = [p for root in roots for p in (root / ".gigabatch").iterdir() if p.is_dir()]
    assert leftovers == []


def test_sizes_add_up_to_the_bytes_of_the_members(tmp_path: Path) -> None:
    shard = shard_of(tmp_path)
    index = open_index(tmp_path)
    total = sum(index.member_span(i, m)[1] for i in range(len(index)) for m in index.members)
    assert total == sum(map(len, contents(shard).values()))


@pytest.mark.parametrize("damage", ["missing arrow", "cut arrow", "a list", "not json"])
def test_a_damaged_index_is_built_again(damage: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", pairs(5))
    whole = open_index(tmp_path)
    arrow, manifest = whole.folder / whole.arrow, whole.folder / "manifest.json"
    if damage == "missing arrow":
        arrow.unlink()
    elif damage == "cut arrow":
        arrow.write_bytes(arrow.read_bytes()[:100])
    else:
        manifest.write_text("[]" if damage == "a list" else "{")
    again = open_index(tmp_path)
    assert again.digest == whole.digest
    assert again.table.num_rows == len(whole)


def test_extensions_are_lower_case_as_webdataset_reads_them(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"x.JPG": b"j", "x.txt": b"t"})
    assert open_index(tmp_path).members == ("jpg", "txt")


def test_opening_an_index_does_not_import_pandas(tmp_path: Path) -> None:
    """pyarrow would, within some calls; that takes a second and swallows a Ctrl-C."""
    write_tar(tmp_path / "a.tar", pairs(5))
    open_index(tmp_path)
    look = (
        "import sys; from pathlib import Path; "
        "from gigabatch.data.shards.indexing import open_index; "
        "open_index(Path(sys.argv[1])).require('txt'); sys.exit('pandas' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", look, str(tmp_path)]).returncode == 0
