from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from packs import album, in_child, make, members, pack_until, refusal, shard_files, write_table
from tarfiles import write_tar

from gigabatch.data.errors import GigabatchError
from gigabatch.data.packing.pack import PackSettings, pack

SOURCES = pytest.mark.parametrize("kind", ["files", "parquet", "arrow", "shards"])


@SOURCES
@pytest.mark.parametrize("seed", [None, 4])
def test_a_killed_pack_ends_with_the_same_files(
    kind: str, seed: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gigabatch.data.packing.pack.TOLD_EVERY", 7)
    source = make(kind, tmp_path, 120)
    settings = PackSettings(per_shard=30, shuffle_seed=seed, prefix="p", shard_bytes=60_000)
    report = pack(source, tmp_path / "whole", settings)
    assert report.shards > 4
    for calls in (0, 1, 5, 9):  # in the first shard, and later
        pack_until(source, tmp_path / "out", settings, calls)
    unfinished = list((tmp_path / "out").glob(".p-*.tmp"))
    assert len(unfinished) == 1, "the kill came at no place where it could hurt"
    finished = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.tar")}
    assert 1 <= len(finished) < report.shards
    assert pack(source, tmp_path / "out", settings) == report
    assert shard_files(tmp_path / "out") == shard_files(tmp_path / "whole")
    for name, time in finished.items():
        assert (tmp_path / "out" / name).stat().st_mtime_ns == time, "written a second time"


def test_a_pack_killed_between_a_name_and_its_record_goes_on(tmp_path: Path) -> None:
    source = make("files", tmp_path, 100)
    settings = PackSettings(per_shard=30, prefix="p")
    pack(source, tmp_path / "whole", settings)
    out = tmp_path / "out"
    pack(source, out, settings)
    state = json.loads((out / "pack.json").read_text())
    state |= {"complete": False, "rows": 60, "shards": state["shards"][:2]}
    (out / "pack.json").write_text(json.dumps(state))
    (out / "p-000003.tar").unlink()
    pack(source, out, settings)
    assert shard_files(out) == shard_files(tmp_path / "whole")


def test_a_finished_pack_is_left_as_it_is(tmp_path: Path) -> None:
    source = make("files", tmp_path, 40)
    report = pack(source, tmp_path / "out")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert pack(source, tmp_path / "out") == report
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before


def test_ctrl_c_leaves_finished_shards_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gigabatch.data.packing.pack.TOLD_EVERY", 7)
    source, settings = make("files", tmp_path, 100), PackSettings(per_shard=30, prefix="p")
    pack(source, tmp_path / "whole", settings)

    def stop(done: int, total: int) -> None:
        if done > 70:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "out", settings, stop)
    found = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert found == ["p-000000.tar", "p-000001.tar", "pack.json"]
    pack(source, tmp_path / "out", settings)
    assert shard_files(tmp_path / "out") == shard_files(tmp_path / "whole")


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=140k", "none", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_finished_shards_and_nothing_else(tmp_path: Path) -> None:
    source, settings = make("files", tmp_path, 100), PackSettings(per_shard=30, prefix="p")
    pack(source, tmp_path / "whole", settings)
    disk = tmp_path / "disk"
    with small_disk(disk):
        message = refusal(source, disk / "out", **settings.model_dump())
        assert "No space left on device" in message
        assert sorted(p.name for p in (disk / "out").iterdir()) == ["p-000000.tar", "pack.json"]
        subprocess.run(["mount", "-o", "remount,size=9M", str(disk)], check=True)
        pack(source, disk / "out", settings)
        assert shard_files(disk / "out") == shard_files(tmp_path / "whole")


def test_a_file_that_grows_too_large_leaves_finished_shards(tmp_path: Path) -> None:
    rows = album(tmp_path, 100)
    (tmp_path / rows[80]["file"]).write_bytes(bytes(500_000))
    source, settings = write_table(tmp_path / "t.csv", rows), PackSettings(per_shard=30, prefix="p")
    pack(source, tmp_path / "whole", settings)
    out = tmp_path / "out"

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        assert "File too large" in refusal(source, out, **settings.model_dump())

    assert in_child(limited) == 0
    found = sorted(p.name for p in out.iterdir())
    assert found == ["p-000000.tar", "p-000001.tar", "pack.json"]
    pack(source, out, settings)
    assert shard_files(out) == shard_files(tmp_path / "whole")


def test_a_second_pack_into_the_folder_is_refused(tmp_path: Path) -> None:
    source = make("files", tmp_path, 10)
    asked = []

    def meanwhile(done: int, total: int) -> None:
        asked.append(
            in_child(lambda: "another pack" in refusal(source, tmp_path / "out") or exit(1))
        )

    pack(source, tmp_path / "out", progress=meanwhile)
    assert asked == [0]
    assert members(tmp_path / "out")


def test_nothing_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gigabatch.data.packing.pack.TOLD_EVERY", 7)
    source, out = make("files", tmp_path, 100), tmp_path / "out"
    other = write_tar(out / "out-000001.tar", {"a.txt": b"mine"})
    data = other.read_bytes()
    assert "not by this pack" in refusal(source, out, per_shard=30)
    assert [p.name for p in out.iterdir()] == [other.name]
    other.unlink()
    (out / "skipped.jsonl").write_text("mine")
    assert "not by this pack" in refusal(source, out, per_shard=30)
    (out / "skipped.jsonl").unlink()

    def meanwhile(done: int, total: int) -> None:
        other.write_bytes(data)

    with pytest.raises(GigabatchError, match=r"out-000001\.tar: is there already"):
        pack(source, out, PackSettings(per_shard=30, shard_bytes=20_480), meanwhile)
    assert other.read_bytes() == data
    assert not list(out.glob(".*"))


def test_another_pack_is_not_taken_up(tmp_path: Path) -> None:
    source, out = make("files", tmp_path, 40), tmp_path / "out"
    pack(source, out, PackSettings(per_shard=30))
    before = shard_files(out)
    assert "per_shard 30 and not 20" in refusal(source, out, per_shard=20)
    assert "shuffle_seed None and not 1" in refusal(source, out, per_shard=30, shuffle_seed=1)
    with open(source, "a") as file:
        file.write("im/0/0.x.png,more,1\n")
    assert "the source has changed" in refusal(source, out, per_shard=30)
    assert shard_files(out) == before
    (out / "pack.json").write_text("{")
    assert "is damaged" in refusal(source, out, per_shard=30)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_finished_shard_that_changed_is_told(damage: str, tmp_path: Path) -> None:
    source, out = make("files", tmp_path, 40), tmp_path / "out"
    pack(source, out)
    shard = out / "out-000000.tar"
    if damage == "cut":
        os.truncate(shard, 5000)
    else:
        shard.unlink()
    assert "gone or of another size" in refusal(source, out)
