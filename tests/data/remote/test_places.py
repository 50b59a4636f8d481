from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest
from far import QUICK, SIZES, Far, refusal, urls, write
from servers import Answer, FailingServer

from gigabatch.data.remote import places
from gigabatch.data.remote.places import expand, is_remote, stat_all
from gigabatch.data.remote.ranges import ShardState
from gigabatch.data.shards.indexing import open_index


def test_folders_globs_braces_and_files_in_the_order_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "t.tar").write_bytes(b"")
    (folder / ".hidden.tar").write_bytes(b"")
    (folder / "folder.tar").mkdir()
    s0, s1, s2 = (str(folder / name) for name in sorted(SIZES))
    assert expand([str(folder)]) == [s0, s1, s2]
    assert expand([f"{folder}/s[12].tar", s0]) == [s1, s2, s0]
    assert expand([f"{folder}/s{{2..0}}.tar"]) == [s0, s1, s2]
    assert expand([f"{folder}/**/*.tar"]) == [str(folder / "deep" / "t.tar"), s0, s1, s2]
    assert expand([str(folder)], default_glob="*.txt") == [str(folder / "notes.txt")]
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert expand(["set/s1.tar", "~/set/s0.tar"]) == [s1, s0]


def test_a_name_that_exists_is_no_pattern(tmp_path: Path) -> None:
    odd = tmp_path / "a{1,2}[x]*.tar"
    odd.write_bytes(b"")
    assert expand([str(odd)]) == [str(odd)]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("{}/none.tar", "{}/none.tar: there is no such file"),
        ("{}/empty", "{}/empty: the folder holds no *.tar"),
        ("{}/x*.tar", "{}/x*.tar: the glob matches no file"),
        ("{}/set/s{{0..3}}.tar", "{}/set/s3.tar: there is no such file"),
        ("{}/set/s{{0..3.tar", "the braces do not match"),
    ],
)
def test_what_is_missing_is_named(path: str, says: str, folder: Path) -> None:
    (folder.parent / "empty").mkdir()
    assert says.format(folder.parent) in refusal(expand, [path.format(folder.parent)])


def test_a_shard_named_twice_is_refused(folder: Path) -> None:
    message = refusal(expand, [str(folder), str(folder / "s1.tar")])
    assert f"{folder}/s1.tar: the shard is named 2 times" in message
    assert "named 2 times" in refusal(expand, [f"{folder}/{{s0,s0}}.tar"])


@pytest.mark.parametrize(
    "address",
    ["pipe:touch {}", "PIPE:touch {}", "pipe://touch {}", "simplecache::pipe://touch {}",
     "simplecache::s3://bucket/a.tar", "zip://a.tar::https://host/b.zip", "ssh://host/a.tar",
     "memory://a.tar", "S3://bucket/a.tar", "filecache::{}"],
)  # fmt: skip
def test_addresses_that_could_run_or_chain_something_are_refused(
    address: str, tmp_path: Path
) -> None:
    address = address.format(tmp_path / "ran")
    for call in (is_remote, lambda path: expand([path]), lambda path: stat_all([path])):
        message = refusal(call, address)
        assert message.startswith(address)
        assert "nothing was executed" in message
    assert not (tmp_path / "ran").exists()


def test_what_is_remote() -> None:
    for path in (
        "s3://b/x.tar",
        "gs://b/x",
        "hf://datasets/u/r/x",
        "http://[::1]:80/x",
        "https://h",
    ):
        assert is_remote(path)
    for path in ("x.tar", "/a/b.tar", "2024:x.tar", "a b://c", "./s3:/x"):
        assert not is_remote(path)


def test_a_file_url_is_refused_alike_by_all(folder: Path) -> None:
    address = f"file://{folder}"
    for call in (is_remote, open_index, lambda path: expand([path]), lambda path: stat_all([path])):
        message = refusal(call, address)
        assert message == f"{address}: name a local file or folder by its path alone, without " + (
            "file://."
        )


def test_what_is_no_regular_file_is_refused_and_not_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = folder / "pipe.tar"
    os.mkfifo(pipe)
    assert f"{pipe}: is no regular file" in refusal(stat_all, expand([str(folder)]))
    assert f"{pipe}: is no regular file" in refusal(open_index, pipe)
    monkeypatch.chdir(folder)  # the name of a socket may not be long
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.tar")
    assert "is no regular file" in refusal(stat_all, ["socket.tar"])
    assert "is no regular file" in refusal(stat_all, ["/dev/zero"])


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    message = refusal(stat_all, ["gs://bucket/x.tar"], retry=QUICK)
    assert "needs the package gcsfs" in message
    assert 'pip install "gigabatch[remote]"' in message


def test_remote_globs_and_braces(far: Far) -> None:
    assert expand([f"{far.url}/*.tar"], retry=QUICK) == urls(far)
    assert expand([f"{far.url}/s*.tar"], retry=QUICK) == urls(far)
    far.server.requests.clear()
    assert expand([f"{far.url}/s{{1..2}}.tar", f"{far.url}/s0.tar"]) == urls(
        far, "s1.tar", "s2.tar", "s0.tar"
    )
    assert far.server.requests == []  # a million names are not asked for one by one
    message = refusal(expand, [f"{far.url}/x*.tar"], retry=QUICK)
    assert message.startswith(f"{far.url}/x*.tar: the glob matches no file")


def test_a_folder_of_a_bucket(s3: Far) -> None:
    assert expand([s3.url], retry=QUICK) == expand([f"{s3.url}/"], retry=QUICK) == urls(s3)
    assert expand([f"{s3.url}/notes.txt"], retry=QUICK) == [f"{s3.url}/notes.txt"]
    for missing in (f"{s3.url}x", "s3://no-such-bucket/x"):
        assert f"{missing}: there is no such file, and no folder" in refusal(expand, [missing])
    for empty in ("s3://no-such-bucket/*.tar", f"{s3.url[:-3]}*"):  # a folder is no shard
        assert "the glob matches no file" in refusal(expand, [empty])


def test_a_web_address_with_a_query_is_one_file(site: Far) -> None:
    signed = f"{site.url}/s0.tar?signature=a%2Fb&x=[1]"
    assert expand([signed]) == [signed]
    assert stat_all([signed])[0].bytes == SIZES["s0.tar"]


def test_a_listing_is_tried_again(far: Far) -> None:
    far.server.status(503, times=2)
    assert expand([f"{far.url}/*.tar"], retry=QUICK) == urls(far)


# Sizes and versions


def test_local_states_change_with_the_file(folder: Path) -> None:
    names = expand([str(folder)])
    states = stat_all(names)
    assert states == [ShardState(n, os.stat(n).st_size, str(os.stat(n).st_mtime_ns)) for n in names]
    os.utime(names[1], ns=(0, 5))
    assert stat_all(names)[1] == ShardState(names[1], SIZES["s1.tar"], "5")
    os.unlink(names[2])
    assert refusal(stat_all, names).startswith(
        f"{names[2]}: the shard cannot be read: No such file"
    )


def test_remote_states_change_with_the_file(far: Far) -> None:
    states = stat_all(urls(far), retry=QUICK)
    assert [(s.url, s.bytes) for s in states] == list(zip(urls(far), SIZES.values(), strict=True))
    assert all(state.version for state in states)
    assert stat_all(urls(far)) == states
    write(far, "s1.tar", b"x" * SIZES["s1.tar"])
    now = stat_all(urls(far))
    assert [a == b for a, b in zip(now, states, strict=True)] == [True, False, True]


def test_an_empty_file_has_a_size(far: Far) -> None:
    write(far, "empty.tar", b"")
    assert stat_all(urls(far, "empty.tar"), retry=QUICK)[0].bytes == 0


def test_a_listing_tells_the_same_as_each_file_by_itself(
    s3: Far, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_by_one = stat_all(urls(s3), retry=QUICK)
    assert s3.server.count("HEAD") == 3
    monkeypatch.setattr(places, "LISTED", 3)
    assert stat_all(urls(s3), retry=QUICK) == one_by_one
    assert (s3.server.count("HEAD"), s3.server.count("GET")) == (3, 1)
    s3.server.status(403, path="*list-type*")  # some keys allow reading, but no listing
    assert stat_all(urls(s3), retry=QUICK) == one_by_one
    assert s3.server.count("HEAD") == 6


def test_an_error_that_passes_does_not_matter_to_stating(site: Far, s3: Far) -> None:
    site.server.status(500, times=2, path="*/s1.tar")
    s3.server.status(500, times=2, path="*/s1.tar", method="HEAD")
    for far in (site, s3):
        assert [s.bytes for s in stat_all(urls(far), retry=QUICK)] == list(SIZES.values())


@pytest.mark.parametrize("code", [403, 404])
def test_a_shard_that_is_missing_or_forbidden_is_named_at_once(
    code: int, site: Far, s3: Far
) -> None:
    for far, method in ((site, "GET"), (s3, "HEAD")):
        far.server.status(code, path="*/s1.tar", method=method)
        message = refusal(stat_all, urls(far), retry=QUICK)
        assert message.startswith(f"{far.url}/s1.tar: its size cannot be read: ")
        assert far.server.count(method, "*/s1.tar") == 1


def test_a_file_whose_size_is_not_told_is_refused() -> None:
    server = FailingServer(lambda _: Answer(206, {"Content-Range": "bytes 0-0/*"}, b"x"))
    try:
        message = refusal(stat_all, [f"{server.url}/s.tar"], retry=QUICK)
        assert "does not tell the file's size" in message
    finally:
        server.close()
