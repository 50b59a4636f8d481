"""User errors: one message with location and fix, exit code 2, and no file changed."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from support import outcome, write_samples
from tarfiles import write_tar


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stpes=3"], "Did you mean train.steps?"),
        (["batch.micro_size=5"], "cannot be split"),
        (["data.root=/no/such/folder"], "data.root: /no/such/folder is not a folder"),
        (["data.root=demo:birds"], "demo:glyphs"),
        (["data.train=nothing"], "nothing: is not a folder"),
        (["data.root={}/tables"], "contains no train. This is a folder of tables (.csv)"),
        (["data.root={}/tables/*.csv"], "`gigabatch data pack {}/tables OUT`"),
        (["data.train=../tables"], "`gigabatch data pack {}/data/../tables OUT`"),
        (["data.root={}/pairs.zip"], "Unzip it, then write shards with `gigabatch data pack"),
        (["eval.sets=[nothing]"], "nothing: is not a folder"),
        (["data.train=empty"], "contains no .tar shards"),
        (["data.train=hollow"], "contain no samples"),
        (["data.train=words"], "no sample has a .png"),
        (["data.train=unreadable"], "a.tar: the shard cannot be read: No such file"),
        (["data.train=broken"], "broken-000.tar: at byte 1024: the header's checksum is wrong"),
        (["objective.positives=concpet"], "objective.positives: 40 of 40 samples"),
        (["objective.positives=sample"], "objective.positives: 'sample' is what a run calls"),
        (["data.group=lagn"], "data.group: 40 of 40 samples of"),
        (
            ["data.train=mute", "data.missing=mask", "objective.positives=null"],
            "there are no captions. Set data.captions",
        ),
        (["data.text.tokenizer=no/such"], "text.tokenizer: 'no/such'"),
        (["run.name=taken"], "taken exists and is not a run"),
        (["run.dir=/proc/nope"], "cannot be written"),
    ],
)
def test_invalid_start_exits_with_the_reason_and_changes_nothing(
    overrides: list[str],
    message: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "data"
    write_samples(root / "train", 40, 40, seed=1)
    write_samples(root / "val", 8, 8, seed=1)
    write_samples(root / "broken", 8, 8, seed=1)
    (root / "empty").mkdir()
    (root / "hollow").mkdir()
    (root / "hollow" / "a.tar").write_bytes(bytes(1024))
    write_captions(root / "words")
    write_tar(
        root / "mute" / "a.tar", {f"s{i}.{m}": b" " for i in range(40) for m in ("png", "txt")}
    )
    (root / "unreadable").mkdir()
    (root / "unreadable" / "a.tar").symlink_to(root / "missing.tar")
    shard = root / "broken" / "broken-000.tar"
    with tarfile.open(shard) as members:
        offset = members.getmembers()[1].offset
    data = bytearray(shard.read_bytes())
    data[offset] ^= 1
    shard.write_bytes(bytes(data))
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "a.csv").touch()
    (tmp_path / "pairs.zip").touch()
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    (tmp_path / "runs" / "taken" / "notes.txt").touch()
    before = snapshot(tmp_path)

    overrides = [override.replace("{}", str(tmp_path)) for override in overrides]
    command = ["train", tiny, f"data.root={root}", *overrides]
    code, out, err = outcome(monkeypatch, capsys, *command)
    assert (code, out) == (2, "")
    assert message.replace("{}", str(tmp_path)) in err
    assert "Traceback" not in err
    after = {p: c for p, c in snapshot(tmp_path).items() if ".gigabatch" not in p}
    assert after == before
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["taken"]


def write_captions(folder: Path) -> None:
    """Write a set with one caption and no image."""
    import webdataset as wds

    folder.mkdir()
    with wds.TarWriter(str(folder / "a.tar")) as writer:
        writer.write({"__key__": "a", "txt": "only words"})


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "none.yaml"], "none.yaml: there is no such config file or recipe"),
        (["resume", "none"], "none: not a run folder"),
        (["eval", "none", "--on", "."], "none: not a run folder"),
        (["eval", "run"], "--on"),
        (["board", "none"], "none: not a run folder"),
        (["trian"], "trian"),
        (["config"], "CONFIG"),
        (["submit", "--address", "http://h:1"], "submit needs a CONFIG"),
        (["submit", "a.yaml", "--allow", "x", "--address", "http://h:1"], "--allow needs --resume"),
        (["submit", "none.yaml", "--address", "http://h:1"], "none.yaml: there is no such config"),
        (["reproduce", "symlie"], "Did you mean symile?"),
    ],
)
def test_invalid_command_line_exits_with_the_reason(
    command: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    code, _, err = outcome(monkeypatch, capsys, *command)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
