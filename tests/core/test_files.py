"""Files are plain files, and foreign text has one spelling."""

import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medembed.core.files import open_plain, read_plain
from medembed.core.text import normalise


def test_a_plain_file_and_a_link_to_one_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"film")
    (tmp_path / "b").symlink_to("a")
    assert read_plain(tmp_path / "b") == b"film"
    assert read_plain(tmp_path / "a", max_bytes=4) == b"film"


@pytest.mark.parametrize("kind", ["named pipe", "directory", "socket", "device"])
def test_what_is_no_plain_file_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = tmp_path / "x"
    if kind == "named pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        monkeypatch.chdir(tmp_path)  # a socket's path is at most 108 bytes long
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("x")
    else:
        path = Path("/dev/zero")
    with pytest.raises(OSError, match=kind) as caught:
        open_plain(path)
    assert kind in (caught.value.strerror or "")


def test_a_larger_file_than_allowed_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    with pytest.raises(OSError, match="5 bytes; at most 4"):
        read_plain(tmp_path / "a", max_bytes=4)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (" P0\u00a0", "P0"),
        ("\ufeffP0\u200b\t", "P0"),
        ("e\u0301", "\u00e9"),
        ("\u3000 \u200d", ""),
        ("a b", "a b"),
    ],
)
def test_texts_that_look_alike_are_spelt_alike(text: str, wanted: str) -> None:
    assert normalise(text) == wanted


@given(st.text())
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once


def test_a_file_that_grows_while_it_is_read_is_read_whole_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    kind = path.stat().st_mode
    earlier = os.stat_result((kind, 0, 0, 0, 0, 0, 2, 0, 0, 0))
    monkeypatch.setattr(os, "fstat", lambda _: earlier)
    assert read_plain(path, max_bytes=5) == b"12345"
    with pytest.raises(OSError, match="it grew beyond 4 bytes"):
        read_plain(path, max_bytes=4)


def test_links_are_followed_unless_told_otherwise(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"film")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="it is a link, not a file"):
        read_plain(tmp_path / "b", follow_links=False)


@pytest.mark.parametrize("mode", ["ab", "a+b", "r+b"])
def test_only_plain_files_are_written_to(tmp_path: Path, mode: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="named pipe"):
        open_plain(tmp_path / "pipe", mode)
    if mode != "r+b":
        with open_plain(tmp_path / "new", mode) as file:
            file.write(b"film")
        assert (tmp_path / "new").read_bytes() == b"film"
