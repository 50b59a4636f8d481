"""Object stores: forks, uploads in parts, credentials, and the clients of Google and Azure."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from remote_folder import QUICK, RemoteFolder, error_message
from servers import Answer, FailingServer, Request, answer_range

from gigabatch.data.remote import object_stores, transport
from gigabatch.data.remote.access import (
    FileTaken,
    check_writable,
    find,
    read_range,
    read_text,
    remove,
    write,
)
from gigabatch.data.remote.locations import expand, stat_all

FORK = multiprocessing.get_context("fork")
PART = 5 << 20
"""Bytes of the smallest part that S3 accepts."""


def read_in_forks(url: str, depth: int) -> None:
    assert len(read_range(url, 10, 2_000, QUICK)) == 1_990
    if depth:
        child = FORK.Process(target=read_in_forks, args=(url, depth - 1))
        child.start()
        child.join(20)
        assert child.exitcode == 0
    assert len(read_range(url, 20, 30, QUICK)) == 10


def test_forks_of_forks_read_from_s3(s3: RemoteFolder) -> None:
    start = time.monotonic()
    read_in_forks(f"{s3.url}/s1.tar", 2)
    assert s3.server.count() == 6  # no request was repeated
    assert time.monotonic() - start < 4 * QUICK.timeout_s


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of three parts."""
    monkeypatch.setattr(object_stores, "PART", PART)
    path = tmp_path / "large"
    path.write_bytes(os.urandom(2 * PART + 1000))
    return path


def test_large_new_file_is_written_exclusively(s3: RemoteFolder, large: Path) -> None:
    url = f"{s3.url}/large"
    write(large, url, new=True, retry=QUICK)
    content = large.read_bytes()
    assert read_range(url, 0, len(content), QUICK) == content
    large.write_bytes(bytes(len(content)))
    with pytest.raises(FileTaken):
        write(large, url, new=True, retry=QUICK)
    assert read_range(url, 0, len(content), QUICK) == content
    assert not [name for name in find(s3.url, QUICK) if name.endswith(object_stores.TEMPORARY)]
    write(large, url, retry=QUICK)
    assert read_range(url, 0, len(content), QUICK) == bytes(len(content))


def test_only_the_failed_part_is_sent_again(s3: RemoteFolder, large: Path) -> None:
    s3.server.status(503, method="PUT", path="*partNumber=2*", times=1)
    write(large, f"{s3.url}/large", retry=QUICK)
    counts = [s3.server.count("PUT", f"*partNumber={number}&*") for number in (1, 2, 3)]
    assert counts == [1, 2, 1]
    assert stat_all([f"{s3.url}/large"])[0].bytes == large.stat().st_size


def test_new_file_above_the_s3_copy_limit_does_not_replace_a_file(
    s3: RemoteFolder, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_stores, "S3_COPY_LIMIT", PART)
    write(large, f"{s3.url}/large", new=True, retry=QUICK)
    uploads = s3.server.count("POST", "*?uploads*")
    with pytest.raises(FileTaken):
        write(large, f"{s3.url}/large", new=True, retry=QUICK)
    assert s3.server.count("POST", "*?uploads*") == uploads == 1


def test_conflict_with_another_write_is_retried(s3: RemoteFolder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    body = b"<Error><Code>ConditionalRequestConflict</Code></Error>"
    s3.server.status(409, body, method="PUT", times=1)
    write(tmp_path / "file", f"{s3.url}/new", new=True, retry=QUICK)
    assert s3.server.count("PUT", "*/new") == 2
    with pytest.raises(FileTaken):
        write(tmp_path / "file", f"{s3.url}/new", new=True, retry=QUICK)


@pytest.mark.parametrize("name", ["a b.tar", "x%2Fy.tar", "ü+=&.tar", "#1.tar"])
def test_keys_with_special_characters_are_written_listed_and_read(
    name: str, s3: RemoteFolder, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("text")
    write(tmp_path / "file", f"{s3.url}/deep/{name}", retry=QUICK)
    assert expand([f"{s3.url}/deep"], retry=QUICK) == [f"{s3.url}/deep/{name}"]
    assert expand([f"{s3.url}/**/*.tar"], retry=QUICK)[0] == f"{s3.url}/deep/{name}"
    assert read_text(f"{s3.url}/deep/{name}", QUICK) == "text"


# Credentials


def test_requests_are_signed_with_keys_of_the_aws_profile(
    s3: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "credentials").write_text(
        "[work]\naws_access_key_id = FROMPROFILE\naws_secret_access_key = secret\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "work")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    read_range(f"{s3.url}/s0.tar", 0, 10, QUICK)
    assert "Credential=FROMPROFILE/" in s3.server.requests[-1].headers["authorization"]


@pytest.mark.parametrize(
    "text",
    [
        "Error performing PUT http://169.254.169.254/latest/api/token in 5s - HTTP error: error "
        "sending request",
        "Error performing token request: GET http://metadata.google.internal/computeMetadata",
    ],
)
def test_missing_credentials_error_is_not_retried(text: str) -> None:
    from obstore.exceptions import GenericError

    error = GenericError(f"Generic S3 error: {text}\n\nDebug source:\nGeneric")
    assert transport.is_final(error)
    assert transport.reason(error) == f"no credentials were found: Generic S3 error: {text}"


def test_azure_without_an_account_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    assert "Account must be specified" in error_message(stat_all, ["az://no-account/x.tar"])


# Google and Azure


class Bucket:
    """A bucket of Google Cloud Storage or container of Azure, which answers requests."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def __call__(self, request: Request) -> Answer:
        parts = urlsplit(request.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        key = unquote(parts.path).removeprefix("/bucket").lstrip("/")
        if "list-type" in query or query.get("comp") == "list":
            return self._list(query)
        if query.get("comp") == "batch":
            return self._delete_batch(request)
        if request.method == "PUT":
            return self._put(request, key)
        if key not in self.objects:
            return Answer(404, {}, b"<Error><Message>not found</Message></Error>")
        if request.method == "DELETE":
            del self.objects[key]
            return Answer(202, {})
        return answer_range(request, self._headers(key), self.objects[key])

    def _headers(self, key: str) -> dict[str, str]:
        return {
            "ETag": f'"{hash(self.objects[key])}"',
            "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
            "x-goog-generation": "1",
        }

    def _put(self, request: Request, key: str) -> Answer:
        new = request.headers.get("if-none-match") == "*"
        if key in self.objects and new:
            return Answer(409, {}, b"<Error><Code>BlobAlreadyExists</Code></Error>")
        if key in self.objects and request.headers.get("x-goog-if-generation-match") == "0":
            return Answer(412, {}, b"<Error><Code>PreconditionFailed</Code></Error>")
        self.objects[key] = request.body
        return Answer(201, self._headers(key))

    def _delete_batch(self, request: Request) -> Answer:
        """Remove an object as Azure does, by a request that contains others."""
        (name,) = re.findall(rb"DELETE /bucket/(\S+) HTTP", request.body)
        status = (
            b"404 Not Found"
            if self.objects.pop(unquote(name.decode()), None) is None
            else b"202 OK"
        )
        part = b"--x\r\nContent-Type: application/http\r\nContent-ID: 0\r\n\r\nHTTP/1.1 " + status
        headers = {"Content-Type": "multipart/mixed; boundary=x"}
        return Answer(202, headers, part + b"\r\n\r\n\r\n--x--\r\n")

    def _list(self, query: dict[str, str]) -> Answer:
        names = [name for name in sorted(self.objects) if name.startswith(query.get("prefix", ""))]
        google = "".join(
            f"<Contents><Key>{name}</Key><Size>{len(self.objects[name])}</Size><LastModified>"
            f"2026-01-01T00:00:00.000Z</LastModified><ETag>{self._headers(name)['ETag']}</ETag>"
            "</Contents>"
            for name in names
        )
        azure = "".join(
            f"<Blob><Name>{name}</Name><Properties><Last-Modified>Thu, 01 Jan 2026 00:00:00 GMT"
            f"</Last-Modified><Etag>{self._headers(name)['ETag']}</Etag><Content-Length>"
            f"{len(self.objects[name])}</Content-Length><Content-Type>x</Content-Type></Properties>"
            "</Blob>"
            for name in names
        )
        if query.get("comp") == "list":
            text = f"<EnumerationResults><Blobs>{azure}</Blobs><NextMarker/></EnumerationResults>"
        else:
            text = f"<ListBucketResult>{google}</ListBucketResult>"
        return Answer(200, {"Content-Type": "application/xml"}, text.encode())


@pytest.fixture(params=["gs", "az"])
def bucket(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The URL of an empty bucket of Google or Azure."""
    server = FailingServer(Bucket())
    account = {"gcs_base_url": server.url, "disable_oauth": True}
    account |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
    (tmp_path / "account.json").write_text(json.dumps(account))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", server.url)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_SKIP_SIGNATURE", "true")
    object_stores._client.cache_clear()
    yield f"{request.param}://bucket"
    server.close()
    object_stores._client.cache_clear()


def test_google_and_azure_files_are_written_listed_read_and_removed(
    bucket: str, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_text("0123456789")
    check_writable(f"{bucket}/set", QUICK)
    write(path, f"{bucket}/set/a.tar", new=True, retry=QUICK)
    with pytest.raises(FileTaken):
        write(path, f"{bucket}/set/a.tar", new=True, retry=QUICK)
    (listed,) = find(f"{bucket}/set", QUICK).items()
    (state,) = stat_all(expand([f"{bucket}/set"], retry=QUICK), retry=QUICK)
    assert listed == ("a.tar", state)
    assert (state.url, state.bytes) == (f"{bucket}/set/a.tar", 10)
    assert read_range(state.url, 3, 6, QUICK) == b"345"
    remove(state.url, QUICK)
    remove(state.url, QUICK)
    assert read_text(state.url, QUICK) is None
