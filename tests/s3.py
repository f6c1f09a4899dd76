"""A real S3 server on localhost, and what can go wrong on the way to it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import boto3
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

Environ = dict[str, Any]
Answer = Iterable[bytes]
Handle = Callable[[Environ, Any], Answer]
Trouble = Callable[[Handle, Environ, Any], Answer]


class _Quiet(WSGIRequestHandler):
    def log(self, *_: Any) -> None: ...


@dataclass
class S3:
    """The server: what was asked of it, and the trouble that some requests meet."""

    requests: list[tuple[str, str]] = field(default_factory=list)
    troubles: list[tuple[str, str, Trouble]] = field(default_factory=list)
    port: int = 0

    def __call__(self, environ: Environ, start: Any) -> Answer:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        for number, (wanted, part, trouble) in enumerate(self.troubles):
            if wanted == method and part in path:
                del self.troubles[number]
                return trouble(self.app, environ, start)
        return self.app(environ, start)

    app: Handle = field(default_factory=lambda: DomainDispatcherApplication(create_backend_app))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def bucket(self, name: str) -> Any:
        """A new bucket, as boto3 shows it."""
        options = {"endpoint_url": self.url, "aws_access_key_id": "a", "aws_secret_access_key": "b"}
        bucket = boto3.resource("s3", region_name="us-east-1", **options).Bucket(name)
        bucket.create()
        return bucket


def unavailable(_app: Handle, environ: Environ, start: Any) -> Answer:
    """503, and nothing is done."""
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    start("503 Slow Down", [("Content-Type", "application/xml")])
    return [b"<Error><Code>SlowDown</Code></Error>"]


def hanging(_app: Handle, environ: Environ, _start: Any) -> Answer:
    """No answer, and nothing is done."""
    environ["werkzeug.socket"].settimeout(30)
    with_socket: socket.socket = environ["werkzeug.socket"]
    while with_socket.recv(1 << 16):  # until the client gives up
        pass
    return []


def lost(app: Handle, environ: Environ, _start: Any) -> Answer:
    """It is done, and the connection breaks before the answer."""
    list(app(environ, lambda *_: None))
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    return []


def conflict(_app: Handle, environ: Environ, start: Any) -> Answer:
    """409: another conditional put is under way."""
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    start("409 Conflict", [("Content-Type", "application/xml")])
    return [b"<Error><Code>ConditionalRequestConflict</Code></Error>"]


@contextmanager
def s3_server() -> Iterator[S3]:
    """The server, and the environment that leads there."""
    s3 = S3()
    server = make_server("127.0.0.1", 0, s3, threaded=True, request_handler=_Quiet)
    server.daemon_threads = True  # type: ignore[attr-defined]
    s3.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", s3.url)
        patch.setenv("AWS_ACCESS_KEY_ID", "a")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        patch.setenv("AWS_REGION", "us-east-1")
        try:
            yield s3
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


@contextmanager
def process(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process with the tests' own modules at hand, killed in the end."""
    started = subprocess.Popen(
        [sys.executable, "-c", f"import sys\nsys.path.insert(0, {os.path.dirname(__file__)!r})\n{code}", *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield started
    finally:
        started.kill()
        started.wait()
        assert started.stdout is not None
        started.stdout.close()


def wait_until(true: Callable[[], bool], timeout_s: float = 30) -> None:
    """Wait for something to come true; fail if it does not."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
