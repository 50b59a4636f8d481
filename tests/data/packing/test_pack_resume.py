"""Interrupted packs: kills, full disks, concurrent packs, changed settings."""

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
from packs import (
    PNG,
    album,
    make_source,
    members,
    pack_error,
    pack_until,
    run_in_child,
    shard_files,
    write_table,
)
from tarfiles import write_tar

from gigabatch.data.errors import GigabatchError
from gigabatch.data.packing.pack import PackSettings, pack

SOURCES = pytest.mark.parametrize("kind", ["files", "parquet", "arrow", "shards"])


@SOURCES
@pytest.mark.parametrize("seed", [None, 4])
def test_resuming_killed_pack_gives_identical_files(
    kind: str, seed: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gigabatch.data.packing.pack.PROGRESS_EVERY", 7)
    source = make_source(kind, tmp_path, 120)
    settings = PackSettings(per_shard=30, shuffle_seed=seed, prefix="p", shard_bytes=60_000)
    report = pack(source, tmp_path / "uninterrupted", settings)
    assert report.shards > 4
    for calls in (0, 1, 5, 9):  # within the first shard and later
        pack_until(source, tmp_path / "out", settings, calls)
    unfinished = list((tmp_path / "out").glob(".p-*.tmp"))
    assert len(unfinished) == 1, "the kill did not interrupt a shard"
    finished = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.tar")}
    assert 1 <= len(finished) < report.shards
    assert pack(source, tmp_path / "out", settings) == report
    assert shard_files(tmp_path / "out") == shard_files(tmp_path / "uninterrupted")
    for name, time in finished.items():
        assert (tmp_path / "out" / name).stat().st_mtime_ns == time, f"{name} was written twice"


def test_pack_resumes_after_shard_was_renamed_but_not_recorded(tmp_path: Path) -> None:
    source = make_source("files", tmp_path, 100)
    settings = PackSettings(per_shard=30, prefix="p")
    pack(source, tmp_path / "uninterrupted", settings)
    out = tmp_path / "out"
    pack(source, out, settings)
    state = json.loads((out / "pack.json").read_text())
    state |= {"complete": False, "rows": 60, "shards": state["shards"][:2]}
    (out / "pack.json").write_text(json.dumps(state))
    (out / "p-000003.tar").unlink()
    pack(source, out, settings)
    assert shard_files(out) == shard_files(tmp_path / "uninterrupted")


def test_repeating_finished_pack_writes_nothing(tmp_path: Path) -> None:
    source = make_source("files", tmp_path, 40)
    report = pack(source, tmp_path / "out")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert pack(source, tmp_path / "out") == report
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before


def test_ctrl_c_leaves_only_finished_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gigabatch.data.packing.pack.PROGRESS_EVERY", 7)
    source, settings = make_source("files", tmp_path, 100), PackSettings(per_shard=30, prefix="p")
    pack(source, tmp_path / "uninterrupted", settings)

    def stop(done: int, total: int) -> None:
        if done > 70:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "out", settings, stop)
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["p-000000.tar", "p-000001.tar", "pack.json"]
    pack(source, tmp_path / "out", settings)
    assert shard_files(tmp_path / "out") == shard_files(tmp_path / "uninterrupted")


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


def test_full_disk_leaves_only_finished_shards(tmp_path: Path) -> None:
    source, settings = make_source("files", tmp_path, 100), PackSettings(per_shard=30, prefix="p")
    pack(source, tmp_path / "uninterrupted", settings)
    disk = tmp_path / "disk"
    with small_disk(disk):
        message = pack_error(source, disk / "out", **settings.model_dump())
        assert "No space left on device" in message
        assert sorted(p.name for p in (disk / "out").iterdir()) == ["p-000000.tar", "pack.json"]
        subprocess.run(["mount", "-o", "remount,size=9M", str(disk)], check=True)
        pack(source, disk / "out", settings)
        assert shard_files(disk / "out") == shard_files(tmp_path / "uninterrupted")


def test_file_size_limit_leaves_only_finished_shards(tmp_path: Path) -> None:
    rows = album(tmp_path, 100)
    (tmp_path / rows[80]["file"]).write_bytes(PNG + bytes(500_000))
    source, settings = write_table(tmp_path / "t.csv", rows), PackSettings(per_shard=30, prefix="p")
    pack(source, tmp_path / "uninterrupted", settings)
    out = tmp_path / "out"

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        assert "File too large" in pack_error(source, out, **settings.model_dump())

    assert run_in_child(limited) == 0
    names = sorted(p.name for p in out.iterdir())
    assert names == ["p-000000.tar", "p-000001.tar", "pack.json"]
    pack(source, out, settings)
    assert shard_files(out) == shard_files(tmp_path / "uninterrupted")


def test_concurrent_pack_into_same_folder_fails(tmp_path: Path) -> None:
    source = make_source("files", tmp_path, 10)
    exit_codes = []

    def pack_again(done: int, total: int) -> None:
        exit_codes.append(
            run_in_child(lambda: "another pack" in pack_error(source, tmp_path / "out") or exit(1))
        )

    pack(source, tmp_path / "out", progress=pack_again)
    assert exit_codes == [0]
    assert members(tmp_path / "out")


def test_files_of_another_pack_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gigabatch.data.packing.pack.PROGRESS_EVERY", 7)
    source, out = make_source("files", tmp_path, 100), tmp_path / "out"
    other = write_tar(out / "out-000001.tar", {"a.txt": b"other"})
    data = other.read_bytes()
    assert "not part of this pack" in pack_error(source, out, per_shard=30)
    assert [p.name for p in out.iterdir()] == [other.name]
    other.unlink()
    (out / "skipped.jsonl").write_text("other")
    assert "not part of this pack" in pack_error(source, out, per_shard=30)
    (out / "skipped.jsonl").unlink()

    def write_other(done: int, total: int) -> None:
        other.write_bytes(data)

    with pytest.raises(GigabatchError, match=r"out-000001\.tar: this file already exists"):
        pack(source, out, PackSettings(per_shard=30, shard_bytes=20_480), write_other)
    assert other.read_bytes() == data
    assert not list(out.glob(".*"))


def test_resuming_with_other_settings_or_source_fails(tmp_path: Path) -> None:
    source, out = make_source("files", tmp_path, 40), tmp_path / "out"
    pack(source, out, PackSettings(per_shard=30))
    before = shard_files(out)
    assert "per_shard 30, now 20" in pack_error(source, out, per_shard=20)
    assert "shuffle_seed None, now 1" in pack_error(source, out, per_shard=30, shuffle_seed=1)
    with open(source, "a") as file:
        file.write("im/0/0.x.png,more,1\n")
    assert "the source has changed" in pack_error(source, out, per_shard=30)
    assert shard_files(out) == before
    (out / "pack.json").write_text("{")
    assert "is damaged" in pack_error(source, out, per_shard=30)


@pytest.mark.parametrize("damage", ["truncated", "deleted"])
def test_changed_finished_shard_is_reported(damage: str, tmp_path: Path) -> None:
    source, out = make_source("files", tmp_path, 40), tmp_path / "out"
    pack(source, out)
    shard = out / "out-000000.tar"
    if damage == "truncated":
        os.truncate(shard, 5000)
    else:
        shard.unlink()
    assert "missing or has a different size" in pack_error(source, out)
