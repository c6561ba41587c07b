"""A small hub on loopback that counts, refuses, breaks and forgets; and a child that asks it.

huggingface_hub reads its address and cache at import, so what asks runs in a child process.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

Answer = tuple[int, dict[str, str], bytes]
OLD, NEW = "a" * 40, "b" * 40
INDEX = "model.safetensors.index.json"
CHILD = """
import json, os, sys
from pathlib import Path
if os.environ.get("TEST_PREPARE"):
    exec(os.environ["TEST_PREPARE"])
from medembed.encoders.hub import describe_remote, resolve_checkpoint
from medembed.core.errors import EncoderError
projector, words = "TEST_PROJECTOR" in os.environ, "TEST_WORDS" in os.environ
answers = []
for ref in sys.argv[1:]:
    told = []
    try:
        if "TEST_DESCRIBE" in os.environ:
            answers.append(vars(describe_remote(ref)))
            continue
        known = {"projector": projector, "words": words}
        found = resolve_checkpoint(ref, **known, progress=lambda *t: told.append(t))
    except EncoderError as error:
        answers.append({"error": str(error)})
    else:
        files = sorted(path.name for path in found.path.iterdir())
        answers.append({"source": found.source, "revision": found.revision, "files": files})
        if "TEST_TOLD" in os.environ:
            answers[-1] |= {"told": told, "path": str(found.path)}
print(json.dumps(answers))
"""


@dataclass
class Request:
    """One request as it came, and what of its answer's body went out."""

    method: str
    path: str
    span: str
    token: str
    sent: int = 0
    query: str = ""


@dataclass
class Hub:
    """What the server holds, how it misbehaves, and what it was asked."""

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    address: str = ""
    storage: str = ""  # where files of more than 1 MB are redirected to, if anywhere
    etag_of: Callable[[bytes], str] = lambda body: hashlib.sha256(body).hexdigest()
    ignores_ranges: bool = False
    cut_after: Callable[[Request], int | None] = lambda request: None
    status_for: Callable[[Request], int | None] = lambda request: None
    before_body: Callable[[Request], None] = lambda request: None
    tamper: Callable[[Request, Answer], Answer] = lambda request, answer: answer
    seconds_per_mb: float = 0.0

    def put(self, repo: str, files: dict[str, bytes], commit: str = NEW) -> None:
        """Make `files` the repository's only commit, on its main branch.

        A dataset's name begins `datasets/`.
        """
        self.repos[repo] = {commit: files}
        self.branches[repo] = {"main": commit}

    @property
    def sent(self) -> int:
        """Bytes of all bodies that went out."""
        return sum(request.sent for request in self.requests)

    def asked(self, method: str, ending: str = "") -> list[Request]:
        """List the requests of a method for files whose name ends so."""
        return [r for r in self.requests if r.method == method and r.path.endswith(ending)]

    def answer(self, request: Request) -> Answer:
        kind, path = "", request.path.lstrip("/")
        if path.removeprefix("api/").startswith("datasets/"):
            kind, path = "datasets/", path.removeprefix("api/").removeprefix("datasets/")
        parts = [unquote(part) for part in path.split("/", 4)]
        if "/resolve/" not in request.path and not kind:
            return 404, {}, b""
        asked = parts[2:] or ["revision", "main"]
        (owner, name), (what, revision, file) = parts[:2], (*asked, "")[:3]
        repo = f"{kind}{owner}/{name}"
        if repo in self.refusals:
            status, code = self.refusals[repo]
            return status, {"X-Error-Code": code} if code else {}, b""
        if repo not in self.repos:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if self.tokens.get(repo, "") not in request.token:
            return 401, {"X-Error-Code": "GatedRepo"}, b""
        commit = self.branches[repo].get(revision, revision)
        if commit not in self.repos[repo]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        is_file = what not in ("revision", "tree")
        if is_file and file not in self.repos[repo][commit]:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        if passing := self.status_for(request):
            return passing, {}, b""
        if not is_file:
            return self.describe(request, self.repos[repo][commit], commit, what)
        body = self.repos[repo][commit][file]
        etag = f'"{self.etag_of(body)}"'
        headers = {"ETag": etag, "X-Repo-Commit": commit}
        if self.storage and len(body) > 1 << 20:
            linked = {"X-Linked-Etag": etag, "X-Linked-Size": str(len(body))}
            where = f"{self.storage}{request.path}?signature=1"
            return 302, {**headers, **linked, "ETag": '"pointer"', "Location": where}, b""
        if not request.span or self.ignores_ranges:
            return 200, headers, body
        first, last = map(int, request.span.removeprefix("bytes=").split("-"))
        if first >= len(body):
            return 416, {"Content-Range": f"bytes */{len(body)}"}, b""
        part = body[first : last + 1]
        headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(body)}"
        return 206, headers, part

    def describe(self, request: Request, files: dict[str, bytes], commit: str, what: str) -> Answer:
        """Answer what the API says of a repository: its commit, or its files, three to a page."""
        if what == "revision":
            return 200, {}, json.dumps({"id": "owner/name", "sha": commit}).encode()
        names = sorted(files)
        start = int(request.query.partition("cursor=")[2] or 0)
        listed = [
            {"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40}
            for name in names[start : start + 3]
        ]
        more = start + 3 < len(names)
        place = f"{self.address}{request.path}?recursive=true&cursor={start + 3}"
        link = {"Link": f'<{place}>; rel="next"'} if more else {}
        return 200, link, json.dumps(listed).encode()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def respond(self, with_body: bool) -> None:
            path, _, query = self.path.partition("?")
            span = self.headers.get("Range", "")
            token = self.headers.get("Authorization", "")
            request = Request(self.command, path, span, token, query=query)
            hub.requests.append(request)
            status, headers, body = hub.tamper(request, hub.answer(request))
            if with_body and "/resolve/" in path:  # it asks for other things too, once a day
                hub.before_body(request)
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value.encode().decode("latin-1"))
            self.end_headers()
            if with_body:
                self.send_body(request, body)

        def send_body(self, request: Request, body: bytes) -> None:
            cut = hub.cut_after(request)
            for start in range(0, len(body) if cut is None else cut, 1 << 16):
                chunk = body[start : start + (1 << 16)][: None if cut is None else cut - start]
                try:
                    self.wfile.write(chunk)
                except OSError:  # it refused the answer, or was killed
                    self.close_connection = True
                    return
                request.sent += len(chunk)
                time.sleep(hub.seconds_per_mb * len(chunk) / (1 << 20))
            if cut is not None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

        def do_HEAD(self) -> None:
            self.respond(with_body=False)

        def do_GET(self) -> None:
            self.respond(with_body=True)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that went away; what the client then says is what is tested

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def start(address: str, home: Path, *refs: str, **environment: str) -> subprocess.Popen[str]:
    """Start a child that resolves `refs`; `TEST_…` variables say what else it does."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    kept |= {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    kept |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *refs],
        env={**kept, **environment},
        cwd=home.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(child: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """Wait for a child and give what it found, one dictionary per reference."""
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    answers: list[dict[str, Any]] = json.loads(out)
    return answers


def ask(address: str, home: Path, *refs: str, **environment: str) -> list[dict[str, Any]]:
    """Resolve `refs` in a child."""
    return finish(start(address, home, *refs, **environment))
