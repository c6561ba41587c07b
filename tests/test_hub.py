"""A small hub on loopback; huggingface_hub reads its address at import, so it runs in a child."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from medembed.encoders.hub import resolve_checkpoint
from medembed.errors import EncoderError

OLD, NEW = "a" * 40, "b" * 40
INDEX = "model.safetensors.index.json"
CHILD = """
import json, sys
from medembed.encoders.hub import resolve_checkpoint
from medembed.errors import EncoderError
answers = []
for ref in sys.argv[1:]:
    try:
        found = resolve_checkpoint(ref)
    except EncoderError as error:
        answers.append({"error": str(error)})
    else:
        files = sorted(path.name for path in found.path.iterdir())
        answers.append({"source": found.source, "revision": found.revision, "files": files})
print(json.dumps(answers))
"""


@dataclass
class Hub:
    """What the server holds and was asked: repository -> commit -> file -> bytes."""

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    address: str = ""

    def answer(self, path: str, token: str) -> tuple[int, dict[str, str], bytes]:
        if "/resolve/" not in path:
            return 404, {}, b""
        owner, name, _, revision, file = path.lstrip("/").split("/", 4)
        repo = f"{owner}/{name}"
        if repo in self.refusals:
            status, code = self.refusals[repo]
            return status, {"X-Error-Code": code} if code else {}, b""
        if repo not in self.repos:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if self.tokens.get(repo, "") not in token:
            return 401, {"X-Error-Code": "GatedRepo"}, b""
        commit = self.branches[repo].get(revision, revision)
        if commit not in self.repos[repo]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if file not in self.repos[repo][commit]:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        body = self.repos[repo][commit][file]
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        return 200, {"ETag": etag, "X-Repo-Commit": commit}, body


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def respond(self, with_body: bool) -> None:
            hub.requests.append((self.command, self.path))
            token = self.headers.get("Authorization", "")
            status, headers, body = hub.answer(self.path, token)
            if with_body and "/google/moving/" in self.path:
                hub.branches["google/moving"]["main"] = NEW
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.respond(with_body=False)

        def do_GET(self) -> None:
            self.respond(with_body=True)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


def ask(address: str, home: Path, *refs: str, **environment: str) -> list[dict[str, Any]]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    kept |= {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    kept |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *refs],
        env={**kept, **environment},
        cwd=home.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert child.returncode == 0, child.stderr
    answers: list[dict[str, Any]] = json.loads(child.stdout)
    return answers


def sharded() -> dict[str, bytes]:
    weight_map = {
        "language_model.model.norm.weight": "model-00001-of-00003.safetensors",
        "vision_tower.vision_model.post_layernorm.bias": "model-00002-of-00003.safetensors",
        "multi_modal_projector.mm_soft_emb_norm.weight": "model-00003-of-00003.safetensors",
    }
    files = {name: name.encode() for name in weight_map.values()}
    index = json.dumps({"weight_map": weight_map}).encode()
    return {"config.json": b"{}", "preprocessor_config.json": b"{}", INDEX: index, **files}


def single() -> dict[str, bytes]:
    files = {"config.json": b"{}", "processor_config.json": b"{}", "model.safetensors": b"weights"}
    return {**files, "tokenizer.json": b"{}"}


def test_only_what_the_tower_needs_is_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.repos = {"google/sharded": {NEW: sharded()}, "google/single": {NEW: single()}}
    hub.branches = {"google/sharded": {"main": NEW}, "google/single": {"main": NEW}}
    answers = ask(hub.address, tmp_path / "home", "google/sharded", "google/single")
    assert answers[0] == {
        "source": "google/sharded",
        "revision": NEW,
        "files": [
            "config.json",
            "model-00002-of-00003.safetensors",
            INDEX,
            "preprocessor_config.json",
        ],
    }
    assert answers[1]["files"] == ["config.json", "model.safetensors", "processor_config.json"]
    fetched = {path.rsplit("/", 1)[1] for method, path in hub.requests if method == "GET"}
    assert "model-00001-of-00003.safetensors" not in fetched
    assert "tokenizer.json" not in fetched

    hub.requests.clear()
    offline = ask(
        hub.address, tmp_path / "home", "google/sharded", "google/single", HF_HUB_OFFLINE="1"
    )
    assert offline == answers
    assert hub.requests == []
    unreached = ask("http://127.0.0.1:9", tmp_path / "home", "google/sharded", "google/single")
    assert unreached == answers  # what was fetched once needs no connection


def test_all_files_are_of_the_commit_that_answered_first(hub: Hub, tmp_path: Path) -> None:
    hub.repos = {"google/moving": {OLD: single(), NEW: {"config.json": b"[]"}}}
    hub.branches = {"google/moving": {"main": OLD}}
    (answer,) = ask(hub.address, tmp_path / "home", "google/moving")
    assert hub.branches["google/moving"]["main"] == NEW
    assert answer["revision"] == OLD
    assert answer["files"] == ["config.json", "model.safetensors", "processor_config.json"]


def test_a_revision_is_honoured(hub: Hub, tmp_path: Path) -> None:
    hub.repos = {"google/two": {OLD: single(), NEW: sharded()}}
    hub.branches = {"google/two": {"main": NEW, "v1": OLD}}
    refs = ("google/two@v1", f"google/two@{OLD}", "google/two", "google/two@v9")
    answers = ask(hub.address, tmp_path / "home", *refs)
    assert [answer.get("revision") for answer in answers] == [OLD, OLD, NEW, None]
    assert answers[3]["error"].startswith("google/two has no revision v9; see http")


def test_a_token_opens_a_gated_repository(hub: Hub, tmp_path: Path) -> None:
    hub.repos = {"google/gated": {NEW: single()}}
    hub.branches = {"google/gated": {"main": NEW}}
    hub.tokens = {"google/gated": "Bearer hf_right"}
    (refused,) = ask(hub.address, tmp_path / "home", "google/gated", HF_TOKEN="hf_wrong")
    assert refused["error"] == (
        f"google/gated is gated: accept its terms at {hub.address}/google/gated and set HF_TOKEN "
        "to a token of the account that did."
    )
    (opened,) = ask(hub.address, tmp_path / "home", "google/gated", HF_TOKEN="hf_right")
    assert opened["revision"] == NEW


def test_every_refusal_is_one_line_with_the_way_out(hub: Hub, tmp_path: Path) -> None:
    hub.repos = {
        "google/no-config": {NEW: {"README.md": b""}},
        "google/no-processor": {NEW: {"config.json": b"{}"}},
        "google/pickles": {NEW: {"config.json": b"{}", "preprocessor_config.json": b"{}"}},
        "google/bad-index": {NEW: {**sharded(), INDEX: b'{"weight_map": {"a": "../b"}}'}},
    }
    hub.branches = {repo: {"main": NEW} for repo in hub.repos}
    hub.refusals = {"google/forbidden": (403, ""), "google/broken": (500, "")}
    expected = {
        "google/absent": f"neither a directory here nor a repository at {hub.address}",
        "google/no-config": "google/no-config holds no config.json",
        "google/no-processor": "holds no preprocessor_config.json or processor_config.json",
        "google/pickles": "holds no model.safetensors.index.json or model.safetensors",
        "google/bad-index": "not an index of safetensors files",
        "google/forbidden": "(HTTP 403): the token in HF_TOKEN is wrong or lacks access",
        "google/broken": "answered HTTP 500",
    }
    answers = ask(hub.address, tmp_path / "home", *expected)
    for (ref, said), answer in zip(expected.items(), answers, strict=True):
        assert said in answer["error"], ref
        assert ref in answer["error"]
        assert "\n" not in answer["error"]


def test_no_connection_and_offline_are_said(tmp_path: Path) -> None:
    closed = "http://127.0.0.1:9"
    (answer,) = ask(closed, tmp_path / "home", "google/medgemma-4b-pt")
    assert answer["error"].startswith(f"{closed} cannot be reached and config.json of google/")
    (answer,) = ask(closed, tmp_path / "home", "google/medgemma-4b-pt", HF_HUB_OFFLINE="1")
    assert "was not fetched before, and HF_HUB_OFFLINE is set" in answer["error"]


@pytest.mark.parametrize("ref", ["./absent", "/absent/encoder", "medgemma", "a/b/c", "a/b@", ""])
def test_what_can_be_no_hub_id_is_said_to_be_no_directory(ref: str) -> None:
    with pytest.raises(EncoderError, match=r"no directory and not a hub id\. Give a checkpoint"):
        resolve_checkpoint(ref)


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(EncoderError, match="a file and not a hub id"):
        resolve_checkpoint(tmp_path / "model.safetensors")


def test_a_directory_is_taken_before_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "google" / "medgemma").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = resolve_checkpoint("google/medgemma")
    assert (found.source, found.revision) == ("medgemma", None)
    monkeypatch.chdir(tmp_path / "google" / "medgemma")
    assert resolve_checkpoint(".").source == "medgemma"


def test_demo_is_the_packaged_one_even_beside_a_directory_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medembed.encoders import hub as module

    (tmp_path / "assets").mkdir()
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "_DEMO_PATH", tmp_path / "assets")
    assert resolve_checkpoint("demo") == module.Checkpoint(tmp_path / "assets", "demo")
    assert resolve_checkpoint("./demo").path == Path("demo")
    monkeypatch.setattr(module, "_DEMO_PATH", tmp_path / "none")
    with pytest.raises(EncoderError, match="not part of this installation"):
        resolve_checkpoint("demo")
