"""Fetching a part of a model by range, from a hub on loopback that counts and misbehaves."""

import hashlib
import itertools
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import INDEX, NEW, Answer, Hub, Request, ask, finish, serving, start
from huggingface_hub import constants
from made_checkpoints import CONFIG, PROCESSOR, SHARDS, n_bytes, projector, sharded, tower
from safetensors import safe_open
from safetensors.torch import load, save

from medembed.core.errors import EncoderError
from medembed.encoders.checkpoint_files import match_tensors, weight_files
from medembed.encoders.hub import describe_remote, has_token
from medembed.encoders.stored_tensors import read_header

REF = "google/medgemma"
FETCHED = "medembed-vision-tower.safetensors"
QUICK = "import medembed.core.hub_http as r; r._PAUSES = (0.01, 0.02)\n"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub()) as hub:
        yield hub


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def storage(home: Path) -> Path:
    return home / "hub" / f"models--{REF.replace('/', '--')}"


def snapshot(home: Path) -> Path:
    return storage(home) / "snapshots" / NEW


def read(path: Path) -> dict[str, torch.Tensor]:
    """Read through a memory map, as loading does: only aligned tensors can be read so."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def assert_equal(path: Path, expected: dict[str, torch.Tensor]) -> None:
    found = read(path)
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def left_over(home: Path) -> list[str]:
    return sorted(path.name for path in (storage(home) / "blobs").glob("*incomplete*"))


def error_of(hub: Hub, home: Path, **environment: str) -> str:
    (answer,) = ask(hub.address, home, REF, **environment)
    assert "\n" not in answer["error"]
    return str(answer["error"])


def is_piece(request: Request) -> bool:
    """Whether a request is for tensors, not for the head of a file."""
    first, _, last = request.span.removeprefix("bytes=").partition("-")
    return bool(request.span) and int(last) - int(first) >= 1 << 16


def test_a_tower_costs_its_own_bytes_on_the_wire_and_equals_the_published_one(
    hub: Hub, home: Path
) -> None:
    made = tower(9, 512)
    hub.put(REF, sharded(made))
    (answer,) = ask(hub.address, home, REF, TEST_TOLD="1")
    assert n_bytes(made) > 20e6
    assert n_bytes(made) < hub.sent <= 1.02 * n_bytes(made)
    assert_equal(snapshot(home) / FETCHED, made)
    totals = {total for _, total in answer["told"]}
    done = [done for done, _ in answer["told"]]
    assert totals == {n_bytes(made)}
    assert done == sorted(done)
    assert done[-1] == n_bytes(made)


def test_the_result_is_a_blob_of_the_hubs_cache(hub: Hub, home: Path) -> None:
    hub.put(REF, sharded())
    ask(hub.address, home, REF)
    link = snapshot(home) / FETCHED
    blob = link.resolve()
    assert os.readlink(link) == f"../../blobs/{blob.name}"
    assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
    assert left_over(home) == []
    with safe_open(link, framework="pt") as file:
        metadata = file.metadata()
    tags = {
        f"etag {name}": hashlib.sha256(hub.repos[REF][NEW][name]).hexdigest() for name in SHARDS[:2]
    }
    assert metadata == {"format": "pt", "source": REF, "commit": NEW, **tags}

    from huggingface_hub import scan_cache_dir

    cache = scan_cache_dir(home / "hub")
    assert not cache.warnings
    (repo,) = cache.repos
    (revision,) = repo.revisions
    assert FETCHED in {file.file_name for file in revision.files}
    assert repo.size_on_disk >= blob.stat().st_size
    cache.delete_revisions(NEW).execute()
    assert not blob.exists()


NO_LINKS = "import os\ndef refuse(*a, **k): raise OSError(95, 'no links')\nos.symlink = refuse"


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"TEST_PREPARE": NO_LINKS}, id="disk"),
        pytest.param(
            {"HF_HUB_DISABLE_SYMLINKS": "1"},
            id="setting",
            marks=pytest.mark.skipif(
                not hasattr(constants, "HF_HUB_DISABLE_SYMLINKS"),
                reason="huggingface_hub 1.5 does not know HF_HUB_DISABLE_SYMLINKS",
            ),
        ),
    ],
)
def test_a_disk_without_symlinks_gets_a_plain_file(
    environment: dict[str, str], hub: Hub, home: Path
) -> None:
    made = tower(2, 64)
    hub.put(REF, sharded(made))
    ask(hub.address, home, REF, **environment)
    assert not (snapshot(home) / FETCHED).is_symlink()
    assert_equal(snapshot(home) / FETCHED, made)
    assert weight_files(snapshot(home)) == [snapshot(home) / FETCHED]


def test_a_blob_that_was_damaged_is_told_by_its_name(hub: Hub, home: Path) -> None:
    hub.put(REF, sharded())
    ask(hub.address, home, REF)
    path = snapshot(home) / FETCHED
    assert weight_files(snapshot(home)) == [path]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.resolve().write_bytes(content)
    with pytest.raises(EncoderError, match=r"was damaged after it was fetched.*Delete .* and"):
        weight_files(snapshot(home))


@pytest.mark.parametrize("prefix", ["", "model."])
def test_the_projector_comes_only_when_asked_for(hub: Hub, home: Path, prefix: str) -> None:
    files = sharded()
    renamed = {f"{prefix}{name}": tensor for name, tensor in load(files[SHARDS[2]]).items()}
    weight_map = {
        name if name in load(files[shard]) else f"{prefix}{name}": shard
        for name, shard in json.loads(files[INDEX])["weight_map"].items()
    }
    if prefix:
        old = {n: s for n, s in weight_map.items() if s != SHARDS[2]}
        weight_map = {**old, **dict.fromkeys(renamed, SHARDS[2])}
    index = json.dumps({"weight_map": weight_map}).encode()
    hub.put(REF, {**files, SHARDS[2]: save(renamed), INDEX: index})
    ask(hub.address, home, REF)
    hub.requests.clear()
    (answer,) = ask(hub.address, home, REF, TEST_PROJECTOR="1")
    assert {request.path.rsplit("/", 1)[1] for request in hub.asked("GET", "safetensors")} == {
        SHARDS[2]
    }
    expected = {f"{prefix}{name}": tensor for name, tensor in projector().items()}
    assert_equal(snapshot(home) / "medembed-projector.safetensors", expected)
    (path,) = weight_files(snapshot(home), "projector")
    found = match_tensors(((path, name) for name in read(path)), REF, "projector")
    assert sorted(found) == ["mm_input_projection_weight", "mm_soft_emb_norm.weight"]
    hub.requests.clear()
    assert ask("http://127.0.0.1:9", home, REF, TEST_PROJECTOR="1") == [answer]


def test_tensors_of_every_width_stay_aligned(hub: Hub, home: Path) -> None:
    prefix = "vision_tower."
    made = {
        f"{prefix}encoder.a": torch.ones(3, dtype=torch.bfloat16),  # 6 bytes, in the first shard
        f"{prefix}encoder.b": torch.arange(5, dtype=torch.float64),
        f"{prefix}encoder.c": torch.ones(7, dtype=torch.float16),
        f"{prefix}encoder.d": torch.tensor(2.5),
        f"{prefix}encoder.e": torch.empty(0, 4),
    }
    hub.put(REF, sharded(made))
    (answer,) = ask(hub.address, home, REF)
    assert "error" not in answer
    assert_equal(snapshot(home) / FETCHED, made)
    widths = [t.element_size() for t in made.values()]
    found = {tensor.name: tensor.start for tensor in read_header(snapshot(home) / FETCHED)}
    assert all(found[name] % width == 0 for name, width in zip(made, widths, strict=True))


def test_a_cut_connection_goes_on_where_it_was(hub: Hub, home: Path) -> None:
    made = tower(6, 256)
    hub.put(REF, sharded(made))
    cuts = itertools.count()
    hub.cut_after = lambda r: 150_000 if is_piece(r) and next(cuts) < 6 else None
    (answer,) = ask(hub.address, home, REF)
    assert "error" not in answer
    assert next(cuts) > 6
    assert_equal(snapshot(home) / FETCHED, made)
    assert hub.sent <= n_bytes(made) + 50_000  # heads and index, and no byte twice


def test_a_connection_that_keeps_breaking_is_said_and_the_next_run_goes_on(
    hub: Hub, home: Path
) -> None:
    made = tower(6, 256)
    hub.put(REF, sharded(made))
    hub.cut_after = lambda r: 200_000 if is_piece(r) and hub.sent < 1.5e6 else None
    hub.status_for = lambda r: 503 if is_piece(r) and hub.sent > 1.5e6 else None
    message = error_of(hub, home, TEST_PREPARE=QUICK)
    assert f"the connection to {hub.address} broke while model-0000" in message
    assert message.endswith("HTTP 503. The part received is kept: run again to resume.")
    came = sum(request.sent for request in hub.requests if is_piece(request))
    hub.status_for = hub.cut_after = lambda _: None
    hub.requests.clear()
    ask(hub.address, home, REF)
    assert_equal(snapshot(home) / FETCHED, made)
    assert hub.sent <= n_bytes(made) - came + 50_000
    assert left_over(home) == []


def test_a_killed_fetch_resumes(hub: Hub, home: Path) -> None:
    made = tower(8, 256)
    hub.put(REF, sharded(made))
    hub.seconds_per_mb = 0.5
    child = start(hub.address, home, REF)
    journal = f"blobs/medembed-vision-tower-{NEW}.incomplete.journal"
    until = time.monotonic() + 30
    while time.monotonic() < until:
        path = storage(home) / journal
        if path.exists() and path.read_text().count("\n") >= 4:  # its head and three pieces
            break
        time.sleep(0.01)
    child.kill()
    child.communicate()
    assert left_over(home)
    assert not (snapshot(home) / FETCHED).exists()
    with pytest.raises(EncoderError, match="lacks model-00001-of-00003"):
        weight_files(snapshot(home))
    notes = (storage(home) / journal).read_text().splitlines()[1:]
    noted = sum(int(note.split()[1]) for note in notes)
    assert noted > 1e6
    with (storage(home) / journal).open("a") as file:
        file.write("0 12")  # a note that the kill cut
    hub.seconds_per_mb = 0.0
    hub.requests.clear()
    ask(hub.address, home, REF)
    assert_equal(snapshot(home) / FETCHED, made)
    assert hub.sent <= n_bytes(made) - noted + 50_000


def test_a_kill_between_link_and_file_leaves_what_the_next_run_completes(
    hub: Hub, home: Path
) -> None:
    made = tower(2, 64)
    hub.put(REF, sharded(made))
    dying = "import os, pathlib\npathlib.Path.replace = lambda self, target: os._exit(9)"
    child = start(hub.address, home, REF, TEST_PREPARE=dying)
    child.communicate()
    assert child.returncode == 9
    assert (snapshot(home) / FETCHED).is_symlink()
    assert not (snapshot(home) / FETCHED).exists()
    hub.requests.clear()
    ask(hub.address, home, REF)
    assert_equal(snapshot(home) / FETCHED, made)
    assert (snapshot(home) / FETCHED).is_symlink()
    assert not any(is_piece(request) for request in hub.requests)


def test_two_processes_at_once_fetch_it_once(hub: Hub, home: Path) -> None:
    made = tower(8, 256)
    hub.put(REF, sharded(made))
    hub.seconds_per_mb = 0.1
    children = [start(hub.address, home, REF) for _ in range(2)]
    answers = [finish(child) for child in children]
    assert answers[0] == answers[1]
    assert_equal(snapshot(home) / FETCHED, made)
    pieces = sum(request.sent for request in hub.requests if is_piece(request))
    assert pieces == n_bytes(made)


def test_a_shard_that_changes_under_its_revision_is_an_error_and_nothing_is_kept(
    hub: Hub, home: Path
) -> None:
    made, other = tower(8, 256), {name: -t for name, t in tower(8, 256).items()}
    hub.put(REF, sharded(made))
    came = itertools.count()

    def change(request: Request) -> None:
        if is_piece(request) and next(came) == 2:  # its own answer is of the new file already
            hub.put(REF, sharded(other))

    hub.status_for = change
    message = error_of(hub, home)
    assert f"of {REF} changed at the hub under commit {NEW[:12]} while it was fetched" in message
    assert left_over(home) == []
    assert not (snapshot(home) / FETCHED).exists()
    ask(hub.address, home, REF)
    assert_equal(snapshot(home) / FETCHED, other)


def test_a_shard_that_changed_before_the_resume_is_an_error_too(hub: Hub, home: Path) -> None:
    made, other = tower(8, 256), {name: -t for name, t in tower(8, 256).items()}
    hub.put(REF, sharded(made))
    hub.status_for = lambda r: 500 if is_piece(r) and hub.sent > 2e6 else None
    error_of(hub, home, TEST_PREPARE=QUICK)
    assert left_over(home)
    hub.status_for = lambda _: None
    hub.put(REF, sharded(other))
    assert "changed at the hub" in error_of(hub, home)
    assert left_over(home) == []
    ask(hub.address, home, REF)
    assert_equal(snapshot(home) / FETCHED, other)


def test_a_server_that_ignores_ranges_is_refused(hub: Hub, home: Path) -> None:
    hub.put(REF, sharded(tower(8, 256)))
    hub.ignores_ranges = True
    message = error_of(hub, home)
    assert "answered HTTP 200 instead of the part asked for (HTTP 206)" in message
    assert not (snapshot(home) / FETCHED).exists()


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, f"refused {SHARDS[0]} of {REF} (HTTP 401): the token in HF_TOKEN is wrong or lacks"),
        (403, f"refused {SHARDS[0]} of {REF} (HTTP 403): the token in HF_TOKEN is wrong or lacks"),
        (404, f"{SHARDS[0]} of {REF} could not be fetched: "),
    ],
)
def test_weights_that_are_refused_are_said_in_one_line(
    hub: Hub, home: Path, status: int, said: str
) -> None:
    hub.put(REF, sharded())
    hub.status_for = lambda r: status if r.path.endswith(".safetensors") else None
    assert said in error_of(hub, home)


def test_the_token_does_not_follow_a_redirect_to_another_host(hub: Hub, home: Path) -> None:
    made = tower(8, 256)
    hub.put(REF, sharded(made))
    hub.tokens = {REF: "Bearer hf_secret"}
    counts = itertools.count()
    own = Hub(hub.repos, hub.branches, etag_of=lambda _: f"bucket-{next(counts)}")
    with serving(own) as bucket:
        hub.storage = bucket.address
        ask(hub.address, home, REF, HF_TOKEN="hf_secret")
    assert_equal(snapshot(home) / FETCHED, made)
    assert len([r for r in bucket.requests if is_piece(r)]) >= 8
    assert {request.token for request in bucket.requests} == {""}
    assert {r.token for r in hub.requests if "/resolve/" in r.path} == {"Bearer hf_secret"}
    etag = hashlib.sha256(hub.repos[REF][NEW][SHARDS[0]]).hexdigest()
    with safe_open(snapshot(home) / FETCHED, framework="pt") as file:
        assert file.metadata()[f"etag {SHARDS[0]}"] == etag  # the hub's, not the bucket's


def test_the_head_of_a_file_is_of_one_file(hub: Hub, home: Path) -> None:
    """Even where the first connection breaks in it."""
    hub.put(REF, sharded())
    heads = itertools.count()

    def swap(request: Request, answer: Answer) -> Answer:
        status, headers, body = answer
        if request.method == "GET" and request.path.endswith(SHARDS[0]) and next(heads):
            return status, {**headers, "ETag": '"another"'}, body
        return answer

    hub.tamper = swap
    cuts = itertools.count()
    hub.cut_after = lambda r: (
        4 if r.path.endswith(SHARDS[0]) and r.span and not next(cuts) else None
    )
    assert "changed at the hub under commit" in error_of(hub, home)
    assert next(heads) == 2  # what came second was not taken for the rest of the first


def test_a_stall_is_waited_out_by_a_new_connection(hub: Hub, home: Path) -> None:
    made = tower(6, 256)
    hub.put(REF, sharded(made))
    stalls = itertools.count()
    hub.before_body = lambda r: time.sleep(3) if is_piece(r) and next(stalls) < 2 else None
    (answer,) = ask(hub.address, home, REF, HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert "error" not in answer
    assert_equal(snapshot(home) / FETCHED, made)


def test_a_hub_that_never_answers_is_said_soon(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"http://127.0.0.1:{mute.getsockname()[1]}"
        began = time.monotonic()
        (answer,) = ask(address, home, REF)
        seconds = time.monotonic() - began
        assert answer["error"].startswith(f"{address} cannot be reached and config.json of {REF}")
        assert "HF_HUB_ETAG_TIMEOUT allows more" in answer["error"]
        assert seconds < 7  # 4.2 as a rule; the hub's own way takes a minute and more


def test_a_name_service_that_never_answers_is_said_soon(home: Path) -> None:
    mute = "import socket, time\nsocket.getaddrinfo = lambda *a, **k: time.sleep(60)"
    began = time.monotonic()
    (answer,) = ask("http://hub.invalid", home, REF, TEST_PREPARE=mute)
    assert "(no answer in 3 s: HF_HUB_ETAG_TIMEOUT allows more)" in answer["error"]
    assert time.monotonic() - began < 7
    (answer,) = ask("http://hub.invalid", home, REF, TEST_PREPARE=mute, HF_HUB_ETAG_TIMEOUT="1")
    assert "(no answer in 1 s" in answer["error"]


def test_a_disk_too_small_is_said_before_the_first_piece(hub: Hub, home: Path) -> None:
    hub.put(REF, sharded(tower(8, 256)))
    full = "import shutil\nshutil.disk_usage = lambda p: type('U', (), {'free': 1_000_000})"
    message = error_of(hub, home, TEST_PREPARE=full)
    assert f"no space is left for the vision tower of {REF} in {home / 'hub'} (5," in message
    assert "bytes are needed, 1,000,000 are free). Free some, or set HF_HOME to another" in message
    assert not any(is_piece(request) for request in hub.requests)
    assert left_over(home) == []


def test_a_file_too_large_for_its_disk_is_said(hub: Hub, home: Path) -> None:
    hub.put(REF, sharded(tower(8, 256)))
    small = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))"
    message = error_of(hub, home, TEST_PREPARE=small)
    assert message.startswith(f"no space is left for the vision tower of {REF} in ")


def test_a_disk_that_fills_in_the_middle_is_said_and_the_next_run_goes_on(
    hub: Hub, home: Path
) -> None:
    made = tower(8, 256)
    hub.put(REF, sharded(made))
    filling = """
import errno, os
room, pwrite = [2_000_000], os.pwrite
def limited(file, data, at):
    room[0] -= len(data)
    if room[0] < 0:
        raise OSError(errno.ENOSPC, "No space left on device")
    return pwrite(file, data, at)
os.pwrite = limited
"""
    message = error_of(hub, home, TEST_PREPARE=filling)
    assert message.startswith(f"no space is left for the vision tower of {REF} in ")
    hub.requests.clear()
    ask(hub.address, home, REF)
    assert_equal(snapshot(home) / FETCHED, made)
    assert hub.sent < n_bytes(made) - 1_000_000


def damaged(kind: str) -> tuple[dict[str, bytes], str]:
    """Make a repository with one fault, and what must be said of it."""
    made = tower(2, 64)
    files = sharded(made)
    first = load(files[SHARDS[0]])
    name = next(iter(sorted(n for n in first if "vision" in n)))
    index: dict[str, Any] = json.loads(files[INDEX])
    if kind == "not finite":
        first[name][3, 5] = float("nan")
        return {**files, SHARDS[0]: save(first)}, f"{name} holds values that are not finite"
    if kind == "quantised":
        first[name] = first[name].to(torch.int8)
        return {**files, SHARDS[0]: save(first)}, "is stored as I8; quantised towers are not"
    if kind == "index names a tensor that the shard lacks":
        del first[name]
        return {**files, SHARDS[0]: save(first)}, f"disagree on where {name} is"
    if kind == "shard holds a tensor that the index lacks":
        del index["weight_map"][name]
        return {**files, INDEX: json.dumps(index).encode()}, f"disagree on where {name} is"
    if kind == "two namings":
        first[f"model.{name}"] = first[name].clone()
        index["weight_map"][f"model.{name}"] = SHARDS[0]
        changed = {INDEX: json.dumps(index).encode(), SHARDS[0]: save(first)}
        return {**files, **changed}, "twice"
    if kind == "cut short":
        return {**files, SHARDS[0]: files[SHARDS[0]][:-2]}, "its tensors end at byte"
    if kind == "seven bytes":
        return {**files, SHARDS[0]: b"weights"}, "it ends at byte 7"
    if kind == "a pointer":
        return {**files, SHARDS[0]: b"version https://git-lfs.github.com/spec/v1"}, "its header"
    assert kind == "no tower"
    parts = {"config.json": CONFIG, PROCESSOR: b"{}"}
    return {**parts, "model.safetensors": save({"a": torch.ones(1)})}, "holds no vision tower"


@pytest.mark.parametrize(
    "kind",
    [
        "not finite",
        "quantised",
        "index names a tensor that the shard lacks",
        "shard holds a tensor that the index lacks",
        "two namings",
        "cut short",
        "seven bytes",
        "a pointer",
        "no tower",
    ],
)
def test_a_damaged_repository_is_refused_and_nothing_is_kept(
    hub: Hub, home: Path, kind: str
) -> None:
    files, said = damaged(kind)
    hub.put(REF, files)
    assert said in error_of(hub, home)
    assert left_over(home) == []
    assert not (snapshot(home) / FETCHED).exists()


def test_a_checkpoint_is_described_without_its_weights(hub: Hub, home: Path) -> None:
    made = tower(8, 256)
    hub.put(REF, sharded(made))
    (found,) = ask(hub.address, home, REF, TEST_DESCRIBE="1")
    expected = {"source": REF, "revision": NEW, "config": json.loads(CONFIG)}
    assert found == {**expected, "fetched": False, "tower_bytes": n_bytes(made)}
    assert hub.sent < 20_000
    assert not any(is_piece(request) for request in hub.requests)
    (found,) = ask("http://127.0.0.1:9", home, REF, TEST_DESCRIBE="1")
    assert found == {**expected, "fetched": False, "tower_bytes": None}
    ask(hub.address, home, REF)
    (found,) = ask("http://127.0.0.1:9", home, REF, TEST_DESCRIBE="1")
    assert found == {**expected, "fetched": True, "tower_bytes": n_bytes(made)}


def test_a_directory_and_the_demo_are_described_alike(tmp_path: Path) -> None:
    for name, content in sharded().items():
        (tmp_path / name).write_bytes(content)
    found = describe_remote(tmp_path)
    assert (found.source, found.revision, found.fetched) == (tmp_path.name, None, True)
    assert found.tower_bytes == n_bytes(tower(2, 64))
    demo = describe_remote("demo")
    assert demo.fetched
    assert demo.tower_bytes
    (tmp_path / SHARDS[0]).unlink()
    with pytest.raises(EncoderError, match=r"lacks model-00001-of-00003\.safetensors"):
        describe_remote(tmp_path)


def test_a_token_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_some")
    assert has_token()
