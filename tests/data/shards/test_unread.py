"""Data beside and inside shards that a set does not use is named, and each remedy works."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tarfiles import write_tar

from gigabatch.data.decode.audio import AudioSettings
from gigabatch.data.decode.fields import Fields
from gigabatch.data.decode.images import ImageSettings
from gigabatch.data.errors import GigabatchError
from gigabatch.data.shards import indexing
from gigabatch.data.shards.indexing import open_index
from gigabatch.data.shards.unread import files_by_split, split_of, split_pattern
from gigabatch.data.text.captions import CaptionSettings


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with one shard of three samples, and harmless files beside it."""
    indexing._warn_once.cache_clear()
    folder = tmp_path / "set"
    shard(folder / "000.tar", "a")
    for name in ("README.md", "000.parquet", "000_stats.json", "000.tar.idx", ".001.tar.part"):
        (folder / name).write_bytes(b"x")
    (folder / "logs").mkdir()
    return folder


def shard(path: Path, key: str) -> Path:
    return write_tar(path, {f"{key}{i}.txt": b"x" for i in range(3)})


def compressed(path: Path, compress: Callable[[bytes], bytes]) -> Path:
    """Replace a shard by its compressed form at `path`."""
    plain = shard(path.parent / "plain", path.name.partition(".")[0])
    path.write_bytes(compress(plain.read_bytes()))
    plain.unlink()
    return path


def run(command: str, **options: str) -> None:
    subprocess.run(["bash", "-c", command], check=True, **options)  # type: ignore[call-overload]


def test_harmless_files_are_not_named(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(open_index(root)) == 3
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def unpack(program: str) -> Callable[[Path, Path], str]:
    def fix(root: Path, file: Path) -> str:
        run(f"{program} {file}")
        return str(root)

    return fix


def rename(root: Path, file: Path) -> str:
    file.rename(file.with_suffix(".tar"))
    return str(root)


def pattern(root: Path, file: Path) -> str:
    return f"{root}/**/*.tar"


UNREAD: dict[str, tuple[str, Callable[[Path], Path], str, Callable[[Path, Path], str]]] = {
    "gzip": ("001.tar.gz", lambda p: compressed(p, gzip.compress), "`gunzip`", unpack("gunzip")),
    "tgz": ("b.TGZ", lambda p: compressed(p, gzip.compress), "`gunzip`", unpack("gunzip")),
    "bzip2": ("1.tar.bz2", lambda p: compressed(p, bz2.compress), "`bunzip2`", unpack("bunzip2")),
    "xz": ("1.tar.xz", lambda p: compressed(p, lzma.compress), "`unxz`", unpack("unxz")),
    "upper case": ("003.TAR", lambda p: shard(p, "b"), "rename to end in .tar", rename),
    "a subfolder": ("sub/2.tar", lambda p: shard(p, "b"), "/**/*.tar' reads all", pattern),
    "a deeper one": ("x/y/2.tar", lambda p: shard(p, "b"), "/**/*.tar' reads all", pattern),
}


@pytest.mark.parametrize("case", UNREAD)
def test_data_beside_shards_is_named_and_the_remedy_reads_it(
    case: str, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, make, remedy, fix = UNREAD[case]
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    file = make(root / name)
    if case == "tgz":
        file = file.rename(root / "b.tgz")
        name = "b.tgz"
    assert len(open_index(root)) == 3
    assert len(open_index(root)) == 3  # the warning comes once in a process
    (message,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert message.startswith(f"{root}: not read: 1 ")
    assert f"({name}: " in message
    assert remedy in message
    assert len(open_index(fix(root, file))) == 6


def test_folder_with_only_unread_data_says_so(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    compressed(tmp_path / "1.tar.gz", gzip.compress)
    compressed(tmp_path / "2.tar.gz", gzip.compress)
    shard(tmp_path / "sub" / "3.tar", "c")
    with pytest.raises(GigabatchError) as error:
        open_index(tmp_path)
    assert "contains no .tar shards" in str(error.value)
    assert "2 compressed shards (such as 1.tar.gz: unpack with `gunzip`)" in str(error.value)
    assert "1 shard in a subfolder (sub/3.tar: " in str(error.value)


def test_subfolders_of_several_splits_are_not_merged_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("train", "heldout"):
        (tmp_path / name).mkdir()
        shard(tmp_path / name / "0.tar", name)
    with pytest.raises(GigabatchError) as error:
        open_index(tmp_path)
    folder = re.search(r"hold several splits; name one of them, such as (\S+)\)", str(error.value))
    assert folder is not None
    assert len(open_index(folder[1])) == 3
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    assert len(open_index(f"{tmp_path}/**/*.tar")) == 6
    (message,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "several splits, which this set merges, as their folders state: validation" in message
    assert f"{tmp_path}/heldout, {tmp_path}/train" in message


COMPRESSORS = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_compressed_shard_called_tar_is_named_and_the_command_unpacks_it(
    kind: str, tmp_path: Path
) -> None:
    compressed(tmp_path / "a b.tar", COMPRESSORS[kind])
    with pytest.raises(GigabatchError) as error:
        open_index(tmp_path)
    assert f"this is not a tar file but {kind}-compressed data" in str(error.value)
    command = re.search(r"`([^`]+)`", str(error.value))
    assert command is not None
    run(command[1])
    assert len(open_index(tmp_path)) == 3


def test_compressed_shard_named_by_its_path_is_unpacked_in_place(tmp_path: Path) -> None:
    file = compressed(tmp_path / "1.tar.gz", gzip.compress)
    with pytest.raises(GigabatchError) as error:
        open_index(file)
    command = re.search(r"`([^`]+)`, and use (.*)\.$", str(error.value))
    assert command is not None
    run(command[1])
    assert len(open_index(command[2])) == 3


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer"),
        (b"<html><body>404 Not Found</body></html>" * 60, "an HTML page"),
        (b"", "0 bytes"),
        (b"PK\x03\x04" + bytes(range(256)) * 9, "a zip archive"),
    ],
)
def test_file_called_tar_is_named(content: bytes, kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(GigabatchError, match=f"this is not a tar file but {kind}"):
        open_index(tmp_path)


def test_members_without_extension_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    indexing._warn_once.cache_clear()
    members = {"a.txt": b"x", "image1": b"x", "dir/image2": b"x", ".hidden": b"x", "d/._a": b"x"}
    write_tar(tmp_path / "one" / "a.tar", members)
    open_index(tmp_path / "one")
    assert "not used: 2 members without an extension" in caplog.text
    shard(tmp_path / "one" / "b.tar", "b")
    caplog.clear()
    indexing._warn_once.cache_clear()
    assert len(open_index(tmp_path / "one")) == 4
    assert "not used: 2 members without an extension" in caplog.text
    write_tar(tmp_path / "none" / "a.tar", {"image1": b"x"})
    with pytest.raises(GigabatchError, match="no samples; 1 members have no extension"):
        open_index(tmp_path / "none")


def test_shards_of_several_splits_are_named_with_patterns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("train-0", "train-1", "val-0"):
        shard(tmp_path / f"{name}.tar", name)
    assert len(open_index(tmp_path)) == 9
    assert "train (2 files), validation (1 file)" in caplog.text
    train, val = f"{tmp_path}/train-*.tar", f"{tmp_path}/val-0.tar"
    assert f"{train}, {val}" in caplog.text.replace("'", "")
    assert [len(open_index(name)) for name in (train, val)] == [6, 3]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"), ("coco_val2017.csv", "validation"),
        ("my.dev.tsv", "validation"), ("flickr_test_1k.tar", "test"), ("00012.tar", None),
        ("trainers.csv", None), ("latest.tar", None), ("contest-1.tar", None),
        ("validated.tsv", None), ("tst2014.csv", "test"), ("heldout-1.tar", "validation"),
        ("coco-minival.tar", "validation"), ("wiki-train-00000.arrow", "train"),
    ],
)  # fmt: skip
def test_split_is_a_word_of_the_name(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_pattern_of_a_split_matches_no_other() -> None:
    splits = files_by_split(["a-train.csv", "a-train-2.csv", "a-test.csv", "a-test-2.csv"])
    assert split_pattern("train", splits) == "a-train*.csv"
    splits = files_by_split(["1.train.csv", "2.train.csv", "1.test.csv"])
    assert split_pattern("train", splits) == "*.train.csv"
    splits = files_by_split(["1_train_a", "2_train_b", "3_test_a"])
    assert split_pattern("train", splits) == "{1_train_a,2_train_b}"
    assert files_by_split(["train-1.tar", "other.tar"]) == {}


def test_keys_may_repeat_across_shards(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", "s")
    shard(tmp_path / "b.tar", "s")
    index = open_index(tmp_path)
    assert [index.key(row) for row in range(len(index))] == ["s0", "s1", "s2"] * 2
    assert index.where(0) != index.where(3)


SEVERAL = {
    "an image and a mask": (("jpg", "png"), "data.image.member", "jpg"),
    "three images": (("webp", "png", "jpeg"), "data.image.member", "webp"),
    "jpg and jpeg": (("jpg", "jpeg"), "data.image.member", "jpeg"),
    "two audio files": (("wav", "flac"), "towers.more.sound.member", "flac"),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_samples_with_several_members_are_refused_until_one_is_named(
    case: str, tmp_path: Path
) -> None:
    kinds, key, choice = SEVERAL[case]
    names = [f"s{i}.{kind}" for i in range(4) for kind in kinds if i or kind == choice]
    write_tar(tmp_path / "a.tar", dict.fromkeys([*names, "t.txt"], b"x"))
    index = open_index(tmp_path)

    def fields(member: str | None) -> Fields:
        if "image" in key:
            return Fields(image=ImageSettings(member=member), allow_missing=True)
        return Fields(more={"sound": AudioSettings(member=member)}, allow_missing=True)

    with pytest.raises(GigabatchError) as error:
        fields(None).members([index])
    assert "3 of 5 samples have several" in str(error.value)
    for kind in kinds:
        assert f"{3 + (kind == choice)} .{kind}" in str(error.value)
    assert f"such as {key}={choice}." in str(error.value)
    assert fields(choice).members([index]) == (choice,)
    assert fields(choice.upper()).members([index]) == (choice,)


def test_samples_with_one_image_each_need_no_key(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.jpg": b"x", "b.png": b"x", "c.webp": b"x"})
    fields = Fields(image=ImageSettings())
    assert fields.members([open_index(tmp_path)]) == ("png", "jpg", "webp")


def test_run_of_the_first_version_keeps_the_first_of_several_images(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.jpg": b"x", "a.png": b"x"})
    fields = Fields(image=ImageSettings(version=1))
    assert fields.members([open_index(tmp_path)]) == ("png", "jpg")


def test_missing_captions_name_the_field_key(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.json": b'{"title": "x"}'})
    index = open_index(tmp_path)
    with pytest.raises(GigabatchError, match=r"a \.txt member.*set data\.captions\.field to the"):
        Fields(text=CaptionSettings()).members([index])
    assert Fields(text=CaptionSettings(field="title")).members([index]) == ("json",)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("size", ["4k", "64k", "110k"])  # full in a first file, a part, the join
def test_full_disk_names_the_space_and_folder_and_the_remedies_work(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, source = tmp_path / "disk", tmp_path / "disk" / "set"
    monkeypatch.setenv("GIGABATCH_CACHE", str(tmp_path / "cache"))
    with small_disk(disk, "16M"):
        for number in range(2):
            members = {f"{number}-{i:05d}.txt": b"x" for i in range(900)}
            write_tar(source / f"{number}.tar", members)
        used = int(subprocess.check_output(["du", "-sk", disk]).split()[0])
        limit = f"remount,size={used + int(size[:-1])}k"
        subprocess.run(["mount", "-o", limit, disk], check=True)
        with pytest.raises(GigabatchError) as error:
            open_index(source)
        message = str(error.value)
        assert message.startswith(f"{source}/.gigabatch: ")
        needed = re.search(
            r"full\. The index of 1\.9 MB of shards needs about ([\d.]+) MB", message
        )
        assert needed is not None
        assert 0 < float(needed[1]) < 1
        command = re.search(r"`(chmod [^`]+)`", message)
        assert command is not None
        run(command[1])
        elsewhere = open_index(source)
        assert len(elsewhere) == 1800
        assert elsewhere.folder.is_relative_to(tmp_path / "cache")
        source.chmod(0o755)
        enough = f"remount,size={used + int(size[:-1]) + int(float(needed[1]) * 1000) + 8}k"
        subprocess.run(["mount", "-o", enough, disk], check=True)
        assert open_index(source).folder == source / ".gigabatch"
