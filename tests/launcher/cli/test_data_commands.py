"""`gigabatch data ...` and `bench data`: exit codes and output."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from support import outcome, spoil, write_rich, write_samples
from tarfiles import write_tar

from gigabatch.data.shards.indexing import open_index

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *arguments: outcome(monkeypatch, capsys, *arguments)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_samples(tmp_path / "set", 40, 20, seed=1)
    return tmp_path / "set"


def test_index_prints_samples_members_and_columns(run: Run, folder: Path) -> None:
    code, out, _ = run("data", "index", folder, "--columns", "concept,colour")
    assert code == 0
    assert f"{folder}: 40 samples in 2 shards" in out
    assert "json 40, png 40, txt 40; CRC-32C of every member" in out
    assert "concept (int64), colour (string)" in out
    assert open_index(folder).digest[:16] in out
    code, out, _ = run("data", "index", folder, "--headers-only")
    assert code == 0
    assert "no checksums" in out


def test_index_keeps_columns_and_adds_others(run: Run, folder: Path) -> None:
    assert "columns: concept (int64)" in run("data", "index", folder, "--columns", "concept")[1]
    manifest = folder / ".gigabatch" / "manifest.json"
    before = manifest.stat().st_mtime_ns
    assert "columns: concept (int64)" in run("data", "index", folder)[1]
    assert manifest.stat().st_mtime_ns == before  # no shard was scanned again
    code, out, _ = run("data", "index", folder, "--columns", "colour,concept")
    assert (code, "columns: concept (int64), colour (string)" in out) == (0, True)
    pattern = f"{folder}/set-*.tar"  # its index is in the cache
    run("data", "index", pattern, "--columns", "colour")
    assert "columns: colour (string)" in run("data", "index", pattern, "--headers-only")[1]


def test_view_has_the_columns_of_its_source(run: Run, folder: Path, tmp_path: Path) -> None:
    run("data", "index", folder, "--columns", "concept")
    run("data", "filter", folder, "concept < 10", tmp_path / "view")
    code, out, _ = run("data", "index", tmp_path / "view", "--columns", "concept")
    assert (code, "columns: concept (int64)" in out) == (0, True)
    code, _, err = run("data", "index", tmp_path / "view", "--columns", "concept,colour")
    assert code == 2
    assert "the view has no column colour. Run `gigabatch data index" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "{}/t.csv", "{}/out", "--shard-mib", "nan"], "--shard-mib nan: is not a size"),
        (["pack", "{}/t.csv", "{}/out", "--shard-mib", "inf"], "--shard-mib inf: is not a size"),
        (["stats", "{}/set", "--sheet", "/"], "/: this is a folder. Specify a file name"),
        (["index", "{}/set", "--columns", "concept,,colour"], "--columns: '' cannot be"),
        (["index", "{}/set", "--columns", "key"], "--columns: 'key' cannot be"),
        (["check", "{}/set", "--every", "9" * 20], "--every"),
        (["batch", "{}/c.yaml", "--world", "9" * 20], "--world"),
        (["filter", "{}/set", "'a' * 99999999999999 == key"], "arithmetic needs a column"),
        (["filter", "{}/set", "not " * 20_000 + "key"], "the condition has 80,003 characters"),
    ],
)  # fmt: skip
def test_wrong_argument_exits_with_one_message(
    arguments: list[str], message: str, run: Run, folder: Path
) -> None:
    (folder.parent / "t.csv").touch()
    (folder.parent / "c.yaml").touch()
    code, _, err = run("data", *(a.replace("{}", str(folder.parent)) for a in arguments))
    assert code == 2
    assert message in err


def test_missing_members_are_an_error_without_partial(run: Run, tmp_path: Path) -> None:
    write_rich(tmp_path / "rich", 40, seed=1)
    code, out, _ = run("data", "index", tmp_path / "rich")
    assert code == 2
    assert "8 samples have no .png; the first is 'r00000'" in out
    assert "rich-000.tar: at byte 512)" in out
    assert run("data", "index", tmp_path / "rich", "--partial")[0] == 0


def test_all_shards_of_a_folder_are_indexed_as_the_folder(run: Run, folder: Path) -> None:
    shards = sorted(folder.glob("*.tar"))
    code, out, _ = run("data", "index", *shards)
    assert code == 0
    assert f"{folder}: 40 samples in 2 shards" in out
    write_samples(folder / "more", 5, 5, seed=1)
    (folder / "more" / "more-000.tar").rename(folder / "z.tar")
    code, _, err = run("data", "index", *shards)
    assert code == 2
    assert "put the pattern in quotes" in err


def test_check_reports_changed_bytes(run: Run, folder: Path) -> None:
    assert run("data", "check", folder)[:2] == (0, "40 samples, 0.0 MB read: all valid\n")
    index = open_index(folder)
    spoil(index, 7, "png")
    spoil(index, 33, "json", at=2)
    code, out, _ = run("data", "check", folder)
    assert code == 2
    for sample, member in ((7, "png"), (33, "json")):
        offset = index.member_span(sample, member)[0]
        shard = folder / f"set-{sample // 20:03d}.tar"
        assert f"{shard}: at byte {offset}: member .{member} of sample 's{sample:05d}'" in out
    assert "40 samples, 0.0 MB read: 2 bad" in out


def test_check_compares_with_the_index_after_a_shard_was_rewritten(run: Run, folder: Path) -> None:
    index = open_index(folder)
    shard = spoil(index, 7, "txt", at=2)
    os.utime(shard)
    code, out, _ = run("data", "check", folder)
    assert code == 2
    assert "member .txt of sample 's00007' is not what was indexed" in out
    with open(shard, "ab") as file:
        file.write(bytes(1024))
    assert f"{shard}: size is " in run("data", "check", folder)[1]


def test_check_decodes_each_of_several_images(run: Run, tmp_path: Path) -> None:
    file = BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    members = {f"k{i}.{kind}": file.getvalue() for i in range(3) for kind in ("png", "jpg")}
    write_tar(tmp_path / "a.tar", members | {"k1.jpg": b"GIF89a"})
    code, out, _ = run("data", "check", tmp_path)
    assert code == 2
    assert "sample 'k1': the image cannot be decoded: it is a GIF" in out
    assert "1 bad" in out
    for command in ("index", "stats"):
        assert "3 samples have several images" in run("data", command, tmp_path)[1]


def test_check_reports_invalid_json(run: Run, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.txt": b"x", "a.json": b"{", "b.txt": b"x", "b.json": b"{}"})
    code, out, _ = run("data", "check", tmp_path)
    assert code == 2
    assert "sample 'a': the json member cannot be read" in out


def test_stats_prints_counts_and_draws_a_sheet(run: Run, folder: Path, tmp_path: Path) -> None:
    code, out, _ = run("data", "stats", folder, "--sheet", tmp_path / "sheet.png")
    assert code == 0
    assert "40 samples in 2 shards" in out
    assert "16 x 16 100.0%" in out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 500
    code, out, _ = run("data", "stats", folder, "--json")
    assert json.loads(out)["samples"] == 40


def test_filter_counts_samples_and_writes_a_view(run: Run, folder: Path, tmp_path: Path) -> None:
    run("data", "index", folder, "--columns", "concept")
    code, out, _ = run("data", "filter", folder, "concept < 10")
    assert (code, out) == (0, "10 of 40 samples (25.0%)\n")
    code, out, _ = run("data", "filter", folder, "concept < 10", tmp_path / "view")
    assert code == 0
    assert len(open_index(tmp_path / "view")) == 10
    code, _, err = run("data", "filter", folder, "colour == 'x'")
    assert code == 2
    assert "there is no column 'colour' (the columns are: key, concept)" in err


def test_pack_writes_shards_from_a_table(run: Run, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with open(tmp_path / "table.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "caption", "lang"])
        for i in range(10):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
            rows.writerow([f"images/{i}.png", f"number {i}", "en"])
    code, out, _ = run("data", "pack", tmp_path / "table.csv", tmp_path / "out", "--per-shard", 4)
    assert code == 0
    assert "10 samples in 3 shards" in out
    assert len(open_index(tmp_path / "out")) == 10
    code, _, err = run("data", "pack", tmp_path / "none.csv", tmp_path / "out2")
    assert code == 2
    assert "none.csv" in err


def test_batch_prints_the_samples_of_any_step_and_rank(run: Run, tiny: Path) -> None:
    code, batch, _ = run("data", "batch", tiny, "--step", 5)
    assert code == 0
    keys = batch.split()
    assert len(keys) == len(set(keys)) == 32
    ranks = [
        run("data", "batch", tiny, "--step", 5, "--world", 3, "--rank", r)[1] for r in range(3)
    ]
    assert "".join(ranks) == batch
    long = run("data", "batch", tiny, "--step", 5, "--world", 3, "--long")[1]
    fields = [line.split("\t") for line in long.splitlines()]
    assert [line[-1] for line in fields] == keys
    assert [int(line[1]) for line in fields] == [j for j in range(4) for _ in range(8)]
    assert {line[0] for line in fields} == {"0", "1", "2"}
    assert run("data", "batch", tiny, "--world", 2, "--rank", 2)[0] == 2
    last = (2**62 - 1) // 32
    assert len(run("data", "batch", tiny, "--step", last)[1].split()) == 32
    for step in (last + 1, "9" * 20):
        code, _, err = run("data", "batch", tiny, "--step", step)
        assert (code, f"the last step is {last}" in err) == (2, True)


def test_batch_of_a_mixture_keeps_the_weights(run: Run, tiny: Path) -> None:
    mix = "data.train=[{path: train, weight: 3}, {path: val, weight: 1}]"
    command = ["data", "batch", tiny, mix, "batch.global_size=4000", "batch.micro_size=40"]
    _, out, _ = run(*command, "--long")
    sources = [line.split("\t")[2] for line in out.splitlines()]
    assert abs(sources.count("train") - 3000) < 120
    code, _, err = run("data", "batch", tiny, "data.train=[train, {path: val, weight: 0.00001}]")
    assert code == 2
    assert "data.train" in err


@pytest.mark.slow
def test_bench_names_the_bottleneck(run: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench"
    code, out_text, _ = run("bench", "data", tiny, "--minutes", 0.3, "--workers", "0", "--out", out)
    assert code == 0
    assert "bottleneck: " in out_text
    assert json.loads((out / "data.json").read_text())["stages"]
