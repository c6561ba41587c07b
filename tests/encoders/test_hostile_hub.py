"""A hub that means harm: names that lead elsewhere, endless waits, ranges and redirects that lie.

What is held is the whole disk below a temporary root, of which the hub's cache is a small part.
"""

import json
import os
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from hub_server import INDEX, NEW, OLD, Answer, Hub, Request, ask, serving
from hypothesis import given
from hypothesis import strategies as st
from made_checkpoints import PROCESSOR, SHARDS, classifier, sharded, single

from medembed.core.errors import EncoderError
from medembed.core.hub_http import LONGEST_PAUSE, plain_tag, seconds_to_wait
from medembed.encoders.hub import resolve_checkpoint

# Waits of hundredths of a second in our own fetching, and of none in the hub's, whose wish for more
# than a minute ends the child.
QUICK = """
import os, types
import huggingface_hub.file_download as d, huggingface_hub.utils._http as h
import medembed.core.hub_http as r
r._PAUSES = (0.01, 0.02)
r.LONGEST_PAUSE = 0.01
d.time = h.time = types.SimpleNamespace(**vars(h.time))
h.time.sleep = lambda seconds: None if seconds <= 61 else os._exit(3)
"""
LONG = "a" * 5000


class Disk:
    """A root with a home for the hub three levels below, and all that is below the root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / "user" / "cache" / "home"
        self.home.parent.mkdir(parents=True)
        (root / "user" / "x.pth").write_text("import sys")
        (root / "outside.safetensors").write_bytes(b"not of this repository")
        self.before = self.state()

    def state(self) -> dict[str, tuple[int, int]]:
        entries = ((entry, entry.lstat()) for entry in self.root.rglob("*"))
        return {
            str(entry.relative_to(self.root)): (status.st_mode, status.st_mtime_ns)
            for entry, status in entries
            if entry.is_symlink() or not entry.is_dir()
        }

    def outside(self) -> dict[str, tuple[int, int]]:
        """All files but those of the hub's cache."""
        inside = str((self.home / "hub").relative_to(self.root))
        return {name: held for name, held in self.state().items() if not name.startswith(inside)}

    def links_out(self) -> list[Path]:
        """Links that lead out of the cache."""
        hub = (self.home / "hub").resolve()
        links = [entry for entry in hub.rglob("*") if entry.is_symlink()]
        return [link for link in links if not link.resolve().is_relative_to(hub)]


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub()) as hub:
        yield hub


def repo_of(request: Request) -> str:
    return "/".join(request.path.split("/")[1:3])


def asked_of(
    hub: Hub,
    disk: Disk,
    lies: list[Callable[[Request, Answer], Answer]],
    files: dict[str, bytes] | None = None,
    **environment: str,
) -> list[str]:
    """Ask for one repository per lie in one process, each for the first time; give what is said."""
    shutil.rmtree(disk.home, ignore_errors=True)
    names = [f"evil/n{number}" for number in range(len(lies))]
    for name in names:
        hub.repos[name] = {NEW: files or sharded()}
        hub.branches[name] = {"main": NEW}
    lie_of = dict(zip(names, lies, strict=True))
    hub.tamper = lambda request, answer: lie_of[repo_of(request)](request, answer)
    answers = ask(hub.address, disk.home, *names, TEST_PREPARE=QUICK, **environment)
    said = [str(answer.get("error", "")) for answer in answers]
    for text in said:
        assert not [c for c in text if unicodedata.category(c).startswith("C")], repr(text)
    return said


def header(
    name: str, value: str, when: Callable[[Request], bool] = lambda request: True
) -> Callable[[Request, Answer], Answer]:
    """Answer with this header."""

    def lie(request: Request, answer: Answer) -> Answer:
        status, headers, body = answer
        return (status, {**headers, name: value}, body) if when(request) else answer

    return lie


def tags(root: Path) -> list[str]:
    return [
        *('"../../x.pth"', '"../../../x.pth"', 'W/"../y"', '"../"', f'"{root}/absolute"', '"/x"'),
        *("W//etc/x", '"a/b"', r'"..\x"', r'"C:\x"', '".."', '"."', '".hidden"', '""', '"', "W/"),
        *(f'"{LONG}"', '"a b"', '"a\tb"', '"a\x7fb"', '"a\x1b[2Jb"', '"x\u202egpj.exe"', '"a"b"'),
        *('"%2e%2e%2fx"', '"~root"', '"$HOME"', '"é"', '"²"', '"a:b"', '"-rf"', '"a\u200bb"'),
    ]


COMMITS = ["../../../x", "a/b", "/x", "..", ".", "", "x" * 40, "a" * 39, "A" * 40, "a" * 41, LONG]
COMMITS += [f"{NEW}/..", f"{NEW}\u2028", "\u202e" + "a" * 39, "١" * 40]


@pytest.mark.parametrize("name", ["ETag", "X-Linked-Etag", "X-Repo-Commit"])
def test_a_name_that_is_no_name_is_refused_before_anything_is_written(
    hub: Hub, disk: Disk, name: str
) -> None:
    values = COMMITS if name == "X-Repo-Commit" else tags(disk.root)
    said = asked_of(hub, disk, [header(name, value) for value in values])
    for value, text in zip(values, said, strict=True):
        assert (
            f"as {name.removeprefix('X-Linked-').replace('Etag', 'ETag')}, which is not" in text
        ), value
    assert disk.state() == disk.before


def test_a_name_that_turns_bad_later_is_refused_too(hub: Hub, disk: Disk) -> None:
    """Names of later files, of missing ones, and of the second answer for the same file."""
    bad = ["../../x.pth", f"{disk.root}/absolute"]
    lies = [
        *(header("ETag", f'"{tag}"', lambda r: r.path.endswith(INDEX)) for tag in bad),
        *(header("ETag", f'"{tag}"', lambda r: r.path.endswith(PROCESSOR)) for tag in bad),
        *(header("X-Repo-Commit", tag, lambda r: "processor_config" in r.path) for tag in bad),
        *(header("X-Repo-Commit", tag, lambda r: "adapter" in r.path) for tag in bad),
        header("X-Repo-Commit", OLD, lambda r: f"/{NEW}/" in r.path),  # another than was asked for
        *(header("ETag", f'"{tag}"', lambda r: r.method == "GET" and bool(r.span)) for tag in bad),
    ]
    for tag in bad:
        asked: list[Request] = []

        def second(request: Request, answer: Answer, tag: str = tag, asked: list = asked) -> Answer:
            asked.append(request)
            return header("ETag", f'"{tag}"', lambda r: len(asked) > 1)(request, answer)

        lies.append(second)
    for text in asked_of(hub, disk, lies):
        assert ", which is not " in text
    assert disk.outside() == disk.before
    assert disk.links_out() == []
    assert not list(disk.root.rglob("*absolute*"))


INDEX_NAMES = [
    *("../../outside.safetensors", "../x.safetensors", "/etc/x.safetensors", "a/b.safetensors"),
    *(
        r"..\x.safetensors",
        "..",
        ".",
        "",
        "model.bin",
        "model.pt",
        ".safetensors",
        "a\0.safetensors",
    ),
    *("a\n.safetensors", "\u202esafetensors.safetensors", "é.safetensors", f"{LONG}.safetensors"),
    *(
        "model.safetensors/",
        "model.safetensors.",
        "~x.safetensors",
        "$x.safetensors",
        "-a.safetensors",
    ),
]


def test_an_index_names_plain_files_alone(hub: Hub, disk: Disk) -> None:
    lies = []
    for name in [*INDEX_NAMES, 1, None, ["a.safetensors"], {"a": 1}]:
        index = {"weight_map": {"vision_tower.post_layernorm.bias": name}}
        body = json.dumps(index).encode()

        def lie(request: Request, answer: Answer, body: bytes = body) -> Answer:
            is_asked = request.path.endswith(INDEX) and answer[0] == 200
            return (200, answer[1], body) if is_asked else answer

        lies.append(lie)
    for files in (sharded(), classifier()):  # by range, and whole
        for text in asked_of(hub, disk, lies, files):
            assert "is not an index of safetensors files" in text
        assert disk.outside() == disk.before


def test_a_local_index_names_plain_files_alone(tmp_path: Path) -> None:
    from medembed.encoders.checkpoint_files import weight_files

    directory = tmp_path / "inner" / "checkpoint"
    directory.mkdir(parents=True)
    (tmp_path / "outside.safetensors").write_bytes(single()["model.safetensors"])
    for name in [*INDEX_NAMES, str(tmp_path / "outside.safetensors")]:
        index = {"weight_map": {"vision_tower.post_layernorm.bias": name}}
        (directory / INDEX).write_text(json.dumps(index))
        with pytest.raises(EncoderError, match="is not an index of safetensors files"):
            weight_files(directory)


def redirect(location: str, when: str = "") -> Callable[[Request, Answer], Answer]:
    def lie(request: Request, answer: Answer) -> Answer:
        if request.path.endswith(when):
            return 302, {**answer[1], "Location": location.replace("SELF", request.path)}, b""
        return answer

    return lie


def test_a_redirect_leads_to_an_error_and_to_no_file(hub: Hub, disk: Disk) -> None:
    places = [
        "SELF",
        f"{hub.address}SELF",
        "file:///etc/passwd",
        "ftp://x/y",
        "http://127.0.0.1:9/",
    ]
    places += ["../../../../x", "//", "http://[", "javascript:1", "\\\\host\\share", LONG]
    lies = [redirect(place) for place in places]
    lies += [redirect(place, SHARDS[0]) for place in places]  # where parts of it are fetched
    said = asked_of(hub, disk, lies)
    assert all(said), said
    assert disk.outside() == disk.before
    assert disk.links_out() == []


def of_shard(change: Callable[[dict[str, str], bytes], Answer]) -> Callable[..., Answer]:
    def lie(request: Request, answer: Answer) -> Answer:
        return change(answer[1], answer[2]) if request.span else answer

    return lie


def span(text: str) -> Callable[..., Answer]:
    return of_shard(lambda headers, body: (206, {**headers, "Content-Range": text}, body))


def test_a_range_that_lies_is_refused(hub: Hub, disk: Disk) -> None:
    spans = ["bytes 0-7/8", "bytes 0-7/1", "bytes 1-8/999", "bytes 7-0/999", "bytes -8/999"]
    spans += ["bytes 0-7/*", "bytes */999", "items 0-7/999", "", "bytes 0-7/" + "9" * 5000]
    spans += ["bytes 0-7/999\u202e", "bytes ٠-٧/٩", "bytes 0-7/999, 8-9/999", "bytes 0-7/-1"]
    lies = [span(text) for text in spans]
    lies += [
        of_shard(lambda headers, body: (200, headers, body)),
        of_shard(lambda headers, body: (206, headers, body + b"more")),
        of_shard(lambda headers, body: (206, headers, body[:-1])),
        of_shard(lambda headers, body: (206, headers, b"")),
        of_shard(lambda headers, body: (206, {**headers, "Content-Encoding": "gzip"}, body)),
        of_shard(lambda headers, body: (206, {**headers, "Content-Encoding": "\x1b[2J"}, body)),
        of_shard(lambda headers, body: (206, headers, b"\xff" * len(body))),
        of_shard(lambda headers, body: (204, headers, b"")),
        of_shard(lambda headers, body: (206, {"Content-Range": headers["Content-Range"]}, body)),
    ]
    said = asked_of(hub, disk, lies)
    assert all(said), said
    assert disk.outside() == disk.before
    assert not list(disk.root.rglob("medembed-vision-tower*.safetensors"))


def test_a_storage_hash_that_is_none_is_refused(hub: Hub, disk: Disk) -> None:
    """Large storage names its content by a hash, which names a file of the hub's cache too."""
    values = ["../../x", "z" * 64, "a" * 63, "", LONG]

    def lie(value: str) -> Callable[[Request, Answer], Answer]:
        route = header("X-Xet-Refresh-Route", f"{hub.address}/x")
        named = header("X-Xet-Hash", value)
        return lambda request, answer: named(request, route(request, answer))

    for text in asked_of(hub, disk, [lie(value) for value in values]):
        assert "as X-Xet-Hash, which is not 64 hex digits" in text
    assert disk.state() == disk.before


def test_a_servers_words_cannot_reach_the_terminal(hub: Hub, disk: Disk) -> None:
    words = "\x1b[2J\x1b]0;owned\x07 \u202egnp.exe \x9b31m"
    wrong = {"X-Error-Message": words, "X-Error-Code": words, "X-Request-Id": words}

    def lie(status: int, ending: str) -> Callable[[Request, Answer], Answer]:
        def answer_badly(request: Request, answer: Answer) -> Answer:
            return (status, wrong, b"") if request.path.endswith(ending) else answer

        return answer_badly

    endings = ("config.json", PROCESSOR, INDEX, SHARDS[0])
    lies = [lie(status, ending) for status in (400, 403, 404, 418, 451, 501) for ending in endings]
    said = asked_of(hub, disk, lies)  # which looks for what a terminal obeys
    assert all(said)
    assert disk.outside() == disk.before


WAITS = [
    "²",
    "-5",
    "9" * 30,
    "9" * 5000,
    "soon",
    "",
    "1.5",
    "١",
    "0x10",
    "NaN",
    "inf",
    "1e9",
    "5 s",
]
WAITS += ["Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 99 Foo 2099 07:28:00 GMT", "Wed, 21 Oct 9999 0:0"]


def busy_once(value: str, ending: str) -> Callable[[Request, Answer], Answer]:
    told: set[str] = set()

    def lie(request: Request, answer: Answer) -> Answer:
        key = request.path + request.span
        if request.method != "GET" or not request.path.endswith(ending) or key in told:
            return answer
        told.add(key)
        return 429, {"Retry-After": value, "RateLimit": '"api";r=0;t=' + "9" * 20}, b""

    return lie


def test_a_wait_that_is_none_costs_a_pause_and_not_the_fetch(hub: Hub, disk: Disk) -> None:
    assert asked_of(hub, disk, [busy_once(value, SHARDS[0]) for value in WAITS]) == [""] * len(
        WAITS
    )
    # The hub's own client waits for the small files, and for whole ones.
    assert asked_of(hub, disk, [busy_once(v, "config.json") for v in WAITS]) == [""] * len(WAITS)


def test_seconds_and_dates_are_read_and_bounded() -> None:
    assert seconds_to_wait("0") == 0
    assert seconds_to_wait(" 7 ") == 7
    assert seconds_to_wait("86400") == LONGEST_PAUSE
    soon = datetime.now(UTC) + timedelta(seconds=30)
    assert 25 < (seconds_to_wait(format_datetime(soon, usegmt=True)) or 0) <= 30
    assert seconds_to_wait("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert seconds_to_wait("Wed, 21 Oct 2099 07:28:00 GMT") == LONGEST_PAUSE
    assert [seconds_to_wait(text) for text in ("²", "-5", "soon", "", "9" * 5000)] == [None] * 5


@given(st.text())
def test_any_wait_is_bounded(text: str) -> None:
    seconds = seconds_to_wait(text)
    assert seconds is None or 0 <= seconds <= LONGEST_PAUSE


@given(st.text(alphabet=st.characters(codec="utf-8")) | st.text('./\\W"a~', max_size=8))
def test_any_tag_that_is_taken_is_a_name_in_its_directory(text: str) -> None:
    try:
        tag = plain_tag(text)
    except EncoderError:
        return
    assert os.path.normpath(f"/blobs/{tag}") == f"/blobs/{tag}"
    assert Path("/blobs", tag).parent == Path("/blobs")
    assert tag.isascii()
    assert len(tag) <= 128


@pytest.mark.parametrize("tag", [f'"{"0f" * 32}"', f'W/"{"0f" * 20}"', "5f-16a", '"d41d8cd9-12"'])
def test_tags_of_hubs_and_storages_are_taken(tag: str) -> None:
    assert plain_tag(tag) == tag.removeprefix("W/").strip('"')


@pytest.mark.parametrize("revision", ["..", "../x", "a/../../b", ".", "a/./b", "a//b", "...", "/x"])
def test_a_revision_is_no_path(revision: str) -> None:
    with pytest.raises(EncoderError, match=r"(no directory|not a (revision|directory))"):
        resolve_checkpoint(f"google/medgemma@{revision}")


def test_a_client_of_the_callers_own_is_kept_and_guarded(hub: Hub, disk: Disk) -> None:
    hub.put("evil/one", single())
    hub.tamper = header("ETag", '"../../x.pth"')
    note = disk.root / "made"
    mine = (
        "import huggingface_hub\n"
        "from huggingface_hub.utils._http import default_client_factory as make\n"
        "def mine():\n"
        f"    open({str(note)!r}, 'a').write('made')\n"
        "    return make()\n"
        "huggingface_hub.set_client_factory(mine)\n"
    )
    (answer,) = ask(hub.address, disk.home, "evil/one", TEST_PREPARE=mine)
    assert "as ETag, which is not a plain word" in answer["error"]
    assert note.read_text() == "made"
    note.unlink()
    assert disk.state() == disk.before
