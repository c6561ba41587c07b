"""What a reference to the hub resolves to, what is fetched for it, and what refusals say."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import INDEX, NEW, OLD, Hub, ask, serving
from made_checkpoints import CONFIG, SHARDS, classifier, sharded, single

from medembed.core.errors import EncoderError
from medembed.encoders.hub import resolve_checkpoint

FETCHED = "medembed-vision-tower.safetensors"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub()) as hub:
        yield hub


def test_only_what_the_tower_needs_is_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.put("google/sharded", sharded())
    hub.put("google/single", single())
    refs = ("google/sharded", "google/single")
    answers = ask(hub.address, tmp_path / "home", *refs)
    assert answers[0] == {
        "source": "google/sharded",
        "revision": NEW,
        "files": ["config.json", FETCHED, INDEX, "preprocessor_config.json"],
    }
    assert answers[1]["files"] == ["config.json", FETCHED, "processor_config.json"]
    fetched = {request.path.rsplit("/", 1)[1] for request in hub.asked("GET")}
    assert SHARDS[2] not in fetched  # holds the projector and language only
    assert "tokenizer.json" not in fetched
    assert all(request.span for request in hub.asked("GET", ".safetensors"))

    hub.requests.clear()
    assert ask(hub.address, tmp_path / "home", *refs, HF_HUB_OFFLINE="1") == answers
    assert hub.requests == []
    # What was fetched once needs no connection, and no right to it either.
    assert ask("http://127.0.0.1:9", tmp_path / "home", *refs) == answers
    hub.refusals = dict.fromkeys(refs, (403, "GatedRepo"))
    assert ask(hub.address, tmp_path / "home", *refs) == answers


def test_a_model_that_is_no_siglip_is_fetched_whole(hub: Hub, tmp_path: Path) -> None:
    hub.put("facebook/vit", classifier())
    (answer,) = ask(hub.address, tmp_path / "home", "facebook/vit")
    assert answer["files"] == sorted(classifier())
    assert not any(request.span for request in hub.requests)


def test_whole_files_that_are_there_are_used(hub: Hub, tmp_path: Path) -> None:
    hub.put("google/sharded", sharded())
    fetch_all = (
        "from huggingface_hub import hf_hub_download\n"
        f"for name in {[*SHARDS, INDEX]}: hf_hub_download('google/sharded', name)"
    )
    (answer,) = ask(hub.address, tmp_path / "home", "google/sharded", TEST_PREPARE=fetch_all)
    assert FETCHED not in answer["files"]
    assert not any(request.span for request in hub.requests)


def test_all_files_are_of_the_commit_that_answered_first(hub: Hub, tmp_path: Path) -> None:
    hub.repos = {"google/moving": {OLD: single(), NEW: {"config.json": b"[]"}}}
    hub.branches = {"google/moving": {"main": OLD}}
    hub.before_body = lambda _: hub.branches["google/moving"].update(main=NEW)
    (answer,) = ask(hub.address, tmp_path / "home", "google/moving")
    assert hub.branches["google/moving"]["main"] == NEW
    assert answer["revision"] == OLD, answer
    assert answer["files"] == ["config.json", FETCHED, "processor_config.json"]


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
        "google/no-processor": {NEW: {"config.json": CONFIG}},
        "google/pickles": {NEW: {"config.json": CONFIG, "preprocessor_config.json": b"{}"}},
        "facebook/pickles": {NEW: {"config.json": b"{}", "preprocessor_config.json": b"{}"}},
        "google/bad-index": {NEW: {**sharded(), INDEX: b'{"weight_map": {"a": "../b"}}'}},
        "google/bad-config": {NEW: {**sharded(), "config.json": b"[]"}},
    }
    hub.branches = {repo: {"main": NEW} for repo in hub.repos}
    hub.refusals = {"google/forbidden": (403, ""), "google/broken": (500, "")}
    expected = {
        "google/absent": f"neither a directory here nor a repository at {hub.address}",
        "google/no-config": "google/no-config holds no config.json",
        "google/no-processor": "holds no preprocessor_config.json or processor_config.json",
        "google/pickles": "holds no model.safetensors: it is not a checkpoint",
        "facebook/pickles": "holds no model.safetensors.index.json or model.safetensors",
        "google/bad-index": "not an index of safetensors files",
        "google/bad-config": "config.json of google/bad-config is no JSON object",
        "google/forbidden": "(HTTP 403): the token in HF_TOKEN is wrong or lacks access",
        "google/broken": "answered HTTP 500",
    }
    answers = ask(hub.address, tmp_path / "home", *expected)
    for (ref, said), answer in zip(expected.items(), answers, strict=True):
        assert said in answer["error"], ref
        assert ref in answer["error"]
        assert "\n" not in answer["error"]


def test_a_mirror_that_says_missing_by_the_status_alone_is_understood(
    hub: Hub, tmp_path: Path
) -> None:
    hub.put("google/sharded", sharded())
    hub.put("google/single", single())
    hub.put("facebook/vit", classifier())
    hub.put("google/pickles", {"config.json": CONFIG, "preprocessor_config.json": b"{}"})
    hub.tamper = lambda _, answer: (answer[0], {}, b"") if answer[0] == 404 else answer
    refs = ("google/sharded", "google/single", "facebook/vit", "google/pickles")
    *answers, pickles = ask(hub.address, tmp_path / "home", *refs)
    assert answers[0]["files"] == ["config.json", FETCHED, INDEX, "preprocessor_config.json"]
    assert answers[1]["files"] == ["config.json", FETCHED, "processor_config.json"]
    assert answers[2]["files"] == sorted(classifier())
    assert "model.safetensors" in pickles["error"]


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


def test_a_reference_is_judged_before_torch_has_loaded() -> None:
    code = (
        "import sys\n"
        "from medembed.encoders.hub import resolve_checkpoint\n"
        "resolve_checkpoint('demo')\n"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def extract_with(hub_address: str, home: Path, ref: str, **environment: str) -> str:
    """Run `medembed extract` as a user would; give what it says. It must begin nothing."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    kept |= {"HF_ENDPOINT": hub_address, "HF_HOME": str(home), "no_proxy": "127.0.0.1"}
    demo = home.parent / "one"
    demo.mkdir()
    head = "image,sha256,patient,study,region,label,split,label_level\n"
    (demo / "m.csv").write_text(f"{head}a.png,{'0' * 64},p,s,hand,0,train,study\n")
    command = ["extract", "m.csv", "--image-root", ".", "--encoder", ref, "--cache", "cache"]
    done = subprocess.run(
        [sys.executable, "-m", "medembed", *command],
        env={**kept, **environment},
        cwd=demo,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert not done.stdout
    assert not (demo / "cache").exists()
    return done.stderr


@pytest.mark.parametrize(
    ("refusal", "revision", "said"),
    [
        ((401, ""), "", "the token in HF_TOKEN is wrong"),
        ((403, "GatedRepo"), "", "is gated: accept its terms"),
        (None, "@v9", "has no revision v9"),
        ((404, "RepoNotFound"), "", "Check the name"),
    ],
)
def test_extract_says_in_one_line_why_it_cannot_begin(
    hub: Hub, tmp_path: Path, refusal: tuple[int, str] | None, revision: str, said: str
) -> None:
    hub.put("google/some", single())
    if refusal:
        hub.refusals["google/some"] = refusal
    told = extract_with(hub.address, tmp_path / "home", f"google/some{revision}", HF_TOKEN="hf_x")
    assert told.startswith("Error: ")
    assert told.count("\n") == 1
    assert said in told


def test_extract_says_in_one_line_that_there_is_no_network(tmp_path: Path) -> None:
    told = extract_with("http://127.0.0.1:9", tmp_path / "home", "google/some")
    assert told.startswith("Error: http://127.0.0.1:9 cannot be reached")
    assert told.count("\n") == 1
