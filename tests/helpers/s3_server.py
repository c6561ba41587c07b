"""S3 on loopback: moto's server, and before it a proxy that cuts, delays, repeats and lies.

moto looks whether a name is free and then writes, two steps that another thread may come between;
S3 does both at once. So the proxy lets one request at a time through that has a condition.
"""

import contextlib
import http.client
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BUCKET = "bucket"
NOWHERE = {"AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}
SECRET = "secret-that-nobody-may-print"


@dataclass
class Asked:
    """A request: `key` is the object's name, empty for a listing; `n` counts those like it."""

    method: str
    key: str
    query: str
    headers: dict[str, str]
    n: int = 0

    @property
    def is_listing(self) -> bool:
        return self.method == "GET" and "list-type=2" in self.query


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


Fault = Callable[[Asked], Any]


@dataclass
class S3:
    """A server, how it misbehaves, and what it was asked.

    `fault(asked)` decides before a request is passed on; it returns None, or

    - an int: the status to answer with instead, or a pair of it and an S3 error code;
    - "cut": close the connection instead of an answer, the request undone;
    - "lose": pass the request on, and close the connection instead of the answer;
    - "half": pass it on, and close in the middle of the answer's body;
    - "twice": pass it on twice, and answer with the second's answer.

    `tamper(asked, answer)` may change an answer.
    """

    address: str = ""
    fault: Fault = lambda asked: None
    tamper: Callable[[Asked, Answer], Answer] = lambda asked, answer: answer
    seconds: float = 0.0  # latency of each request
    bytes_per_second: float = 0.0  # of the line that all answers share; 0 for no limit
    asked: list[Asked] = field(default_factory=list)
    counts: dict[tuple[str, str], int] = field(default_factory=dict)

    def reset(self) -> None:
        """Behave again."""
        self.fault, self.tamper, self.seconds = (
            lambda asked: None,
            lambda asked, answer: answer,
            0.0,
        )
        self.asked.clear()
        self.counts.clear()

    @property
    def environ(self) -> dict[str, str]:
        """What a process needs to reach it."""
        return {
            "AWS_ENDPOINT_URL": self.address,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            **NOWHERE,
        }


def error_body(code: str) -> bytes:
    return f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>no</Message></Error>'.encode()


@contextlib.contextmanager
def serving() -> Iterator[S3]:
    """Serve one bucket, `BUCKET`, until the block ends."""
    os.environ.setdefault("AWS_ACCESS_KEY_ID", "key")  # botocore looks for it at moto's import
    os.environ.setdefault("AWS_SECRET_ACCESS_KEY", SECRET)
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    _, port = moto.get_host_and_port()
    s3 = S3()
    one_at_a_time, counting, line = threading.Lock(), threading.Lock(), threading.Lock()
    free_at = [0.0]

    def wait_for_line(n_bytes: int) -> None:
        """Wait until the line could have carried this many more bytes."""
        if s3.bytes_per_second:
            with line:
                free_at[0] = max(free_at[0], time.monotonic()) + n_bytes / s3.bytes_per_second
                until = free_at[0]
            time.sleep(max(0.0, until - time.monotonic()))

    connections = threading.local()

    def forward(asked: Asked, path: str, body: bytes) -> Answer:
        for _ in range(2):
            held = getattr(connections, "held", None)
            if held is None:
                held = connections.held = http.client.HTTPConnection("127.0.0.1", port)
            kept = {
                k: v for k, v in asked.headers.items() if k.lower() not in ("host", "connection")
            }
            try:
                held.request(asked.method, path, body or None, kept)
                got = held.getresponse()
                return Answer(got.status, dict(got.getheaders()), got.read())
            except (http.client.HTTPException, OSError):
                connections.held = None
        raise OSError("moto does not answer")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path, _, query = self.path.partition("?")
            key = re.sub(f"^/{BUCKET}/?", "", path)
            asked = Asked(self.command, key, query, dict(self.headers.items()))
            with counting:
                name = (asked.method, "list" if asked.is_listing else key)
                asked.n = s3.counts[name] = s3.counts.get(name, 0) + 1
                s3.asked.append(asked)
            time.sleep(s3.seconds)
            what = s3.fault(asked)
            if what == "cut":
                self.hang_up()
                return
            if isinstance(what, int | tuple):
                status, code = what if isinstance(what, tuple) else (what, "SlowDown")
                self.answer(Answer(status, {}, error_body(code)))
                return
            answer = self.ask(asked, body)
            if what == "twice":
                answer = self.ask(asked, body)
            if what == "lose":
                self.hang_up()
                return
            self.answer(s3.tamper(asked, answer), half=what == "half")

        def ask(self, asked: Asked, body: bytes) -> Answer:
            if any(name.lower() == "if-none-match" for name in asked.headers):
                with one_at_a_time:
                    return forward(asked, self.path, body)
            return forward(asked, self.path, body)

        def answer(self, answer: Answer, half: bool = False) -> None:
            self.send_response(answer.status)
            skipped = ("content-length", "connection", "transfer-encoding", "server", "date")
            for name, value in answer.headers.items():
                if name.lower() not in skipped:
                    self.send_header(name, value)
            length = str(len(answer.body))
            if self.command == "HEAD":
                length = next(
                    (v for k, v in answer.headers.items() if k.lower() == "content-length"), "0"
                )
            if answer.status != 204:
                self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                body = memoryview(answer.body)[: len(answer.body) // (2 if half else 1)]
                with contextlib.suppress(OSError):
                    for start in range(0, len(body), 1 << 18):
                        wait_for_line(len(body[start : start + (1 << 18)]))
                        self.wfile.write(body[start : start + (1 << 18)])
            if half:
                self.hang_up()

        def hang_up(self) -> None:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that was killed

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    s3.address = f"http://127.0.0.1:{server.server_port}"
    signed = {"Authorization": "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request"}
    forward(Asked("PUT", "", "", signed), f"/{BUCKET}", b"")
    try:
        yield s3
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        moto.stop()
