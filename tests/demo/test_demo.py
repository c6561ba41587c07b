"""The demo takes only a directory of its own, and goes on in it."""

from pathlib import Path

import pytest

from medembed.core.errors import RunError
from medembed.demo import pipeline


@pytest.mark.parametrize("note", [b"", b"[3]", b"{", b"\xff", b"[" * 100_000])
def test_a_damaged_note_is_one_error(tmp_path: Path, note: bytes) -> None:
    (tmp_path / "demo.json").write_bytes(note)
    with pytest.raises(RunError, match=r"demo\.json was damaged"):
        pipeline.run_demo(tmp_path)


def test_a_crash_before_the_note_does_not_lock_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(pipeline, "_build", stop)
    (tmp_path / ".demo.json.abc.partial").write_bytes(b"{")
    with pytest.raises(InterruptedError):
        pipeline.run_demo(tmp_path)
    assert (tmp_path / "demo.json").is_file()
    (tmp_path / "demo.json").unlink()
    (tmp_path / "films").mkdir()
    with pytest.raises(RunError, match="is not empty and holds no demo"):
        pipeline.run_demo(tmp_path)
