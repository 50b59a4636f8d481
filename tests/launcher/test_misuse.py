"""Each mistake: one message that names the place and the remedy, exit code 2, nothing touched."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from support import outcome, write_samples
from tarfiles import write_tar


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.stpes=3"], "Did you mean train.steps?"),
        (["batch.micro_size=5"], "cannot be cut"),
        (["data.root=/nowhere/at/all"], "data.root: /nowhere/at/all is not a folder"),
        (["data.root=demo:birds"], "demo:glyphs"),
        (["data.train=nothing"], "nothing: is not a folder"),
        (["eval.sets=[nothing]"], "nothing: is not a folder"),
        (["data.train=empty"], "holds no .tar shard"),
        (["data.train=hollow"], "hold no samples"),
        (["data.train=words"], "no sample has a .png"),
        (["data.train=unreadable"], "a.tar: the shard cannot be read: No such file"),
        (["data.train=broken"], "broken-000.tar: at byte 1024: the header's checksum is wrong"),
        (["objective.positives=concpet"], "has no 'concpet'. Set objective.positives"),
        (["data.group=lagn"], "data.group: no sample of"),
        (
            ["data.train=mute", "data.missing=mask", "objective.positives=null"],
            "there are no captions. Set data.captions",
        ),
        (["data.text.tokenizer=no/such"], "text.tokenizer: 'no/such'"),
        (["run.name=taken"], "taken exists and is not a run"),
        (["run.dir=/proc/nope"], "cannot be written"),
    ],
)
def test_a_start_that_cannot_work_says_why(
    overrides: list[str],
    words: str,
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
    write_words(root / "words")
    write_tar(
        root / "mute" / "a.tar", {f"s{i}.{m}": b" " for i in range(40) for m in ("png", "txt")}
    )
    (root / "unreadable").mkdir()
    (root / "unreadable" / "a.tar").symlink_to(root / "gone.tar")
    shard = root / "broken" / "broken-000.tar"
    with tarfile.open(shard) as members:
        second = members.getmembers()[1].offset
    data = bytearray(shard.read_bytes())
    data[second] ^= 1
    shard.write_bytes(bytes(data))
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    (tmp_path / "runs" / "taken" / "notes.txt").touch()
    before = snapshot(tmp_path)

    command = ["train", tiny, f"data.root={root}", *overrides]
    code, out, err = outcome(monkeypatch, capsys, *command)
    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err
    after = {p: c for p, c in snapshot(tmp_path).items() if ".gigabatch" not in p}
    assert after == before
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["taken"]


def write_words(folder: Path) -> None:
    import webdataset as wds

    folder.mkdir()
    with wds.TarWriter(str(folder / "a.tar")) as writer:
        writer.write({"__key__": "a", "txt": "words alone"})


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["train", "none.yaml"], "none.yaml: the config cannot be read"),
        (["resume", "none"], "none: not a run folder"),
        (["eval", "none", "--on", "."], "none: not a run folder"),
        (["eval", "none"], "--on"),
        (["board", "none"], "none: not a run folder"),
        (["trian"], "trian"),
        (["config"], "CONFIG"),
    ],
)
def test_a_command_line_that_cannot_be_read_says_why(
    command: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = outcome(monkeypatch, capsys, *command)
    assert code == 2
    assert words in err
    assert "Traceback" not in err


def test_config_prints_every_key_resolved(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gigabatch.trainer.config.load import load_config, parse_config

    code, out, _ = outcome(monkeypatch, capsys, "config", tiny, "train.steps=77")
    assert code == 0
    assert parse_config(out, "printed") == load_config(tiny, ["train.steps=77"])


def test_help_teaches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["train"], ["resume"], ["config"], ["eval"], ["board"]):
        code, out, err = outcome(monkeypatch, capsys, *command, "--help")
        assert code == 0, err
        assert "gigabatch" in out or "run" in out
