"""Local servers that fail on purpose: a web server of a folder, and an S3 server (moto) behind a
failing proxy.

    with web_server(folder) as web:
        web.status(500, times=2)
        read_range(web.url + "/a.tar", 0, 10)
        assert web.count("GET", "*/a.tar") == 3

The first rule, in order of creation, that matches a request acts on it.
"""

from __future__ import annotations

import fnmatch
import http.client
import logging
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

HTML = b"<!DOCTYPE html><html><body>Please sign in.</body></html>"
SIGNED = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, Signature=test"
HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "server", "date"}


@dataclass(frozen=True)
class Request:
    """A request; `range` is the header's value, such as "0-99", or empty for a complete file."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""

    @property
    def range(self) -> str:
        return self.headers.get("range", "").removeprefix("bytes=")


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes = b""


Origin = Callable[[Request], Answer]


@dataclass
class Rule:
    """A failure of requests whose path matches the pattern `path`.

    The first `skip` requests pass. The rule then acts on every `every`th request, at most `times`
    times (None: always).
    """

    action: str
    value: Any = None
    path: str = "*"
    method: str = "GET"
    times: int | None = None
    skip: int = 0
    every: int = 1
    matched: int = field(default=0, init=False)

    def matches(self, request: Request) -> bool:
        if request.method != self.method or not fnmatch.fnmatchcase(request.path, self.path):
            return False
        self.matched += 1
        number = self.matched - self.skip
        if number < 1 or number % self.every:
            return False
        return self.times is None or number // self.every <= self.times


class FailingServer:
    """An HTTP server in threads of this process, on a free port; `origin` produces its answers."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.requests: list[Request] = []
        self.rules: list[Rule] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def count(self, method: str = "GET", path: str = "*", range: str = "*") -> int:
        """Count the requests that match all three patterns."""
        with self._lock:
            return sum(
                fnmatch.fnmatchcase(r.method, method)
                and fnmatch.fnmatchcase(r.path, path)
                and fnmatch.fnmatchcase(r.range, range)
                for r in self.requests
            )

    def status(self, code: int, body: bytes = b"failed on purpose", **match: Any) -> None:
        """Answer with an error status."""
        self.rules.append(Rule("status", (code, body), **match))

    def stall(self, seconds: float, **match: Any) -> None:
        """Send half of the body, then nothing for `seconds`, then hang up."""
        self.rules.append(Rule("stall", seconds, **match))

    def hang_up(self, **match: Any) -> None:
        """Hang up after half of the body."""
        self.rules.append(Rule("hang_up", **match))

    def drip(self, pause_s: float, **match: Any) -> None:
        """Send the body in 20 pieces, with `pause_s` seconds after each."""
        self.rules.append(Rule("drip", pause_s, **match))

    def ignore_range(self, pause_s: float = 0, **match: Any) -> None:
        """Send the complete file for any range, in the pieces of `drip`."""
        self.rules.append(Rule("complete", pause_s, **match))

    def send_html(self, **match: Any) -> None:
        """Send a web page instead of the file, with status 200."""
        self.rules.append(Rule("html", **match))

    def before(self, call: Callable[[], object], **match: Any) -> None:
        """Call a function, which may change files, before answering."""
        self.rules.append(Rule("call", call, **match))

    def clear_rules(self) -> None:
        with self._lock:
            self.rules.clear()

    def close(self) -> None:
        self._closing.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def _rule(self, request: Request) -> Rule:
        with self._lock:
            self.requests.append(request)
            return next((rule for rule in self.rules if rule.matches(request)), Rule("pass"))

    def _answer(self, request: Request, rule: Rule) -> Answer:
        if rule.action == "status":
            return Answer(rule.value[0], {"Content-Type": "text/plain"}, rule.value[1])
        if rule.action == "html":
            return Answer(200, {"Content-Type": "text/html"}, HTML)
        if rule.action == "call":
            rule.value()
        if rule.action == "complete":
            headers = {k: v for k, v in request.headers.items() if k != "range"}
            request = Request(request.method, request.path, headers, request.body)
        return self.origin(request)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Request(self.command, self.path, headers, body)
                rule = server._rule(request)
                answer = server._answer(request, rule)
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                if "content-length" not in {name.lower() for name in answer.headers}:
                    self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                if self.command == "HEAD":
                    return
                if rule.action in ("hang_up", "stall"):
                    self.wfile.write(answer.body[: len(answer.body) // 2])
                    self.wfile.flush()
                    server._closing.wait(rule.value or 0)
                    self.close_connection = True
                    return
                piece = len(answer.body) // 20 + 1
                for start in range(0, len(answer.body), piece):
                    self.wfile.write(answer.body[start : start + piece])
                    server._closing.wait(rule.value if rule.action in ("drip", "complete") else 0)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

            def handle(self) -> None:
                with suppress(ConnectionError):  # the client hung up
                    super().handle()

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


def folder_origin(folder: Path) -> Origin:
    """Serve the current files of a folder, and folders as pages of links."""

    def answer(request: Request) -> Answer:
        path = folder / request.path.partition("?")[0].lstrip("/")
        if path.is_dir():
            links = "".join(f'<a href="{p.name}">{p.name}</a>\n' for p in sorted(path.iterdir()))
            return Answer(200, {"Content-Type": "text/html"}, links.encode())
        if not path.is_file():
            return Answer(404, {"Content-Type": "text/plain"}, b"not found")
        body, status = path.read_bytes(), path.stat()
        headers = {
            "Content-Type": "application/x-tar",
            "ETag": f'"{status.st_mtime_ns:x}-{status.st_size:x}"',
        }
        return answer_range(request, headers, body)

    return answer


def answer_range(request: Request, headers: dict[str, str], body: bytes) -> Answer:
    if not request.range:
        return Answer(200, headers, body)
    first, last = (int(number) for number in request.range.split("-"))
    if first >= len(body):
        return Answer(416, headers | {"Content-Range": f"bytes */{len(body)}"})
    part = body[first : last + 1]
    content_range = f"bytes {first}-{first + len(part) - 1}/{len(body)}"
    return Answer(206, headers | {"Content-Range": content_range}, part)


def upstream_origin(host: str, port: int) -> Origin:
    """Forward requests to another server."""

    def answer(request: Request) -> Answer:
        upstream = http.client.HTTPConnection(host, port, timeout=30)
        try:
            upstream.request(request.method, request.path, request.body, request.headers)
            response = upstream.getresponse()
            body = response.read()
        finally:
            upstream.close()
        headers = {k: v for k, v in response.getheaders() if k.lower() not in HOP_BY_HOP}
        return Answer(response.status, headers, body)

    return answer


@contextmanager
def web_server(folder: Path) -> Iterator[FailingServer]:
    server = FailingServer(folder_origin(folder))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("no_proxy", "127.0.0.1")
        try:
            yield server
        finally:
            server.close()


@contextmanager
def s3_server() -> Iterator[FailingServer]:
    """Start an empty S3 server and point the environment at it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    server = FailingServer(upstream_origin(*moto.get_host_and_port()))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("no_proxy", "127.0.0.1")
        environment.setenv("AWS_ENDPOINT_URL", server.url)
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            environment.delenv(name, raising=False)
        try:
            _send(server, "POST", "moto-api/reset")  # all servers of a process share their buckets
            yield server
        finally:
            server.close()
            moto.stop()


def make_bucket(server: FailingServer, bucket: str) -> None:
    """Create a bucket on an S3 server unless it exists."""
    try:
        _send(server, "PUT", bucket)
    except urllib.error.HTTPError as error:
        if error.code != 409:
            raise


def upload(server: FailingServer, folder: Path, bucket: str, prefix: str) -> None:
    """Upload the files of a folder to an S3 server, as s3://BUCKET/PREFIX/NAME."""
    make_bucket(server, bucket)
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        _send(server, "PUT", f"{bucket}/{prefix}/{path.name}", path.read_bytes())


def _send(server: FailingServer, method: str, path: str, data: bytes = b"") -> None:
    headers = {"Content-Type": "application/octet-stream", "Authorization": SIGNED}
    request = urllib.request.Request(f"{server.url}/{path}", data, headers, method=method)
    urllib.request.urlopen(request, timeout=30).close()
