from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest
from remote_folder import QUICK, SIZES, RemoteFolder, error_message, urls, write
from servers import Answer, FailingServer

from gigabatch.data.remote import locations
from gigabatch.data.remote.access import ShardState
from gigabatch.data.remote.locations import expand, is_remote, stat_all
from gigabatch.data.shards.indexing import open_index


def test_expand_keeps_the_order_of_folders_globs_braces_and_files(
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


def test_existing_name_with_pattern_characters_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a{1,2}[x]*.tar"
    path.write_bytes(b"")
    assert expand([str(path)]) == [str(path)]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{}/none.tar", "{}/none.tar: there is no such file"),
        ("{}/empty", "{}/empty: the folder contains no *.tar"),
        ("{}/x*.tar", "{}/x*.tar: the glob matches no file"),
        ("{}/set/s{{0..3}}.tar", "{}/set/s3.tar: there is no such file"),
        ("{}/set/s{{0..3.tar", "the braces do not match"),
    ],
)
def test_missing_path_raises_with_its_name(path: str, message: str, folder: Path) -> None:
    (folder.parent / "empty").mkdir()
    assert message.format(folder.parent) in error_message(expand, [path.format(folder.parent)])


def test_shard_named_twice_raises(folder: Path) -> None:
    message = error_message(expand, [str(folder), str(folder / "s1.tar")])
    assert f"{folder}/s1.tar: the shard is named 2 times" in message
    assert "named 2 times" in error_message(expand, [f"{folder}/{{s0,s0}}.tar"])


@pytest.mark.parametrize(
    "address",
    ["pipe:touch {}", "PIPE:touch {}", "pipe://touch {}", "simplecache::pipe://touch {}",
     "simplecache::s3://bucket/a.tar", "zip://a.tar::https://host/b.zip", "ssh://host/a.tar",
     "memory://a.tar", "S3://bucket/a.tar", "filecache::{}"],
)  # fmt: skip
def test_address_that_runs_a_command_or_chains_raises(address: str, tmp_path: Path) -> None:
    address = address.format(tmp_path / "ran")
    for call in (is_remote, lambda path: expand([path]), lambda path: stat_all([path])):
        message = error_message(call, address)
        assert message.startswith(address)
        assert "nothing was executed" in message
    assert not (tmp_path / "ran").exists()


def test_is_remote_by_scheme() -> None:
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


def test_file_url_raises_in_every_function(folder: Path) -> None:
    address = f"file://{folder}"
    for call in (is_remote, open_index, lambda path: expand([path]), lambda path: stat_all([path])):
        message = error_message(call, address)
        assert message == f"{address}: name a local file or folder by its path alone, without " + (
            "file://."
        )


def test_pipe_socket_or_device_raises_without_waiting(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = folder / "pipe.tar"
    os.mkfifo(pipe)
    assert f"{pipe}: is not a regular file" in error_message(stat_all, expand([str(folder)]))
    assert f"{pipe}: is not a regular file" in error_message(open_index, pipe)
    monkeypatch.chdir(folder)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.tar")
    assert "is not a regular file" in error_message(stat_all, ["socket.tar"])
    assert "is not a regular file" in error_message(stat_all, ["/dev/zero"])


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    message = error_message(stat_all, ["gs://bucket/x.tar"], retry=QUICK)
    assert "needs the package obstore" in message
    assert 'pip install "gigabatch[remote]"' in message


def test_expand_remote_globs_and_braces(remote: RemoteFolder) -> None:
    assert expand([f"{remote.url}/*.tar"], retry=QUICK) == urls(remote)
    assert expand([f"{remote.url}/s*.tar"], retry=QUICK) == urls(remote)
    remote.server.requests.clear()
    assert expand([f"{remote.url}/s{{1..2}}.tar", f"{remote.url}/s0.tar"]) == urls(
        remote, "s1.tar", "s2.tar", "s0.tar"
    )
    assert remote.server.requests == []  # braces without a glob need no requests
    message = error_message(expand, [f"{remote.url}/x*.tar"], retry=QUICK)
    assert message.startswith(f"{remote.url}/x*.tar: the glob matches no file")


def test_expand_folder_of_bucket(s3: RemoteFolder) -> None:
    assert expand([s3.url], retry=QUICK) == expand([f"{s3.url}/"], retry=QUICK) == urls(s3)
    assert expand([f"{s3.url}/notes.txt"], retry=QUICK) == [f"{s3.url}/notes.txt"]
    for missing in (f"{s3.url}x", "s3://no-such-bucket/x"):
        assert f"{missing}: there is no such file, and no folder" in error_message(
            expand, [missing]
        )
    for empty in ("s3://no-such-bucket/*.tar", f"{s3.url[:-3]}*"):  # a folder is not a shard
        assert "the glob matches no file" in error_message(expand, [empty])


def test_files_of_a_folder_that_are_not_shards_are_collected(s3: RemoteFolder) -> None:
    for location in (s3.url, str(s3.folder)):
        omitted: list[str] = []
        shards = expand([location], retry=QUICK, omitted=omitted)
        assert len(shards) == len(expand([f"{location}/*.tar"], retry=QUICK))
        assert [name.rpartition("/")[2] for name in omitted] == ["notes.txt"]


def test_web_address_with_query_is_one_file(site: RemoteFolder) -> None:
    signed = f"{site.url}/s0.tar?signature=a%2Fb&x=[1]"
    assert expand([signed]) == [signed]
    assert stat_all([signed])[0].bytes == SIZES["s0.tar"]


def test_listing_is_retried(remote: RemoteFolder) -> None:
    remote.server.status(503, times=2)
    assert expand([f"{remote.url}/*.tar"], retry=QUICK) == urls(remote)


# Sizes and versions


def test_local_state_changes_with_the_file(folder: Path) -> None:
    names = expand([str(folder)])
    states = stat_all(names)
    assert states == [ShardState(n, os.stat(n).st_size, str(os.stat(n).st_mtime_ns)) for n in names]
    os.utime(names[1], ns=(0, 5))
    assert stat_all(names)[1] == ShardState(names[1], SIZES["s1.tar"], "5")
    os.unlink(names[2])
    assert error_message(stat_all, names).startswith(
        f"{names[2]}: the shard cannot be read: No such file"
    )


def test_remote_state_changes_with_the_file(remote: RemoteFolder) -> None:
    states = stat_all(urls(remote), retry=QUICK)
    assert [(s.url, s.bytes) for s in states] == list(
        zip(urls(remote), SIZES.values(), strict=True)
    )
    assert all(state.version for state in states)
    assert stat_all(urls(remote)) == states
    write(remote, "s1.tar", b"x" * SIZES["s1.tar"])
    new_states = stat_all(urls(remote))
    assert [a == b for a, b in zip(new_states, states, strict=True)] == [True, False, True]


def test_stat_of_empty_file_returns_size_zero(remote: RemoteFolder) -> None:
    write(remote, "empty.tar", b"")
    assert stat_all(urls(remote, "empty.tar"), retry=QUICK)[0].bytes == 0


def test_listing_and_single_requests_return_equal_states(
    s3: RemoteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_by_one = stat_all(urls(s3), retry=QUICK)
    assert s3.server.count("HEAD") == 3
    monkeypatch.setattr(locations, "LISTED", 3)
    assert stat_all(urls(s3), retry=QUICK) == one_by_one
    assert (s3.server.count("HEAD"), s3.server.count("GET")) == (3, 1)
    s3.server.status(403, path="*list-type*")  # some credentials can read but not list
    assert stat_all(urls(s3), retry=QUICK) == one_by_one
    assert s3.server.count("HEAD") == 6


def test_stat_after_temporary_errors_succeeds(site: RemoteFolder, s3: RemoteFolder) -> None:
    site.server.status(500, times=2, path="*/s1.tar")
    s3.server.status(500, times=2, path="*/s1.tar", method="HEAD")
    for remote in (site, s3):
        assert [s.bytes for s in stat_all(urls(remote), retry=QUICK)] == list(SIZES.values())


@pytest.mark.parametrize("code", [403, 404])
def test_missing_or_forbidden_shard_is_named_without_retry(
    code: int, site: RemoteFolder, s3: RemoteFolder
) -> None:
    for remote, method in ((site, "GET"), (s3, "HEAD")):
        remote.server.status(code, path="*/s1.tar", method=method)
        message = error_message(stat_all, urls(remote), retry=QUICK)
        assert message.startswith(f"{remote.url}/s1.tar: its size cannot be read: ")
        assert remote.server.count(method, "*/s1.tar") == 1


def test_file_without_a_size_raises() -> None:
    server = FailingServer(lambda _: Answer(206, {"Content-Range": "bytes 0-0/*"}, b"x"))
    try:
        message = error_message(stat_all, [f"{server.url}/s.tar"], retry=QUICK)
        assert "does not send the file's size" in message
    finally:
        server.close()
