"""The demo takes only a directory of its own, and goes on in it."""

from pathlib import Path

import pytest

from medembed.core.errors import RunError
from medembed.dataset.recipes.build import build_manifest
from medembed.demo import pipeline
from medembed.demo.cohort import draw_cohort, view_name


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


def test_the_manifest_answers_further_questions(tmp_path: Path) -> None:
    views = draw_cohort(60, 0)
    for view in views:
        (tmp_path / view_name(view)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / view_name(view)).touch()
    (tmp_path / "labels.csv").write_bytes(pipeline._table(views))
    (tmp_path / "recipe.toml").write_text(pipeline.RECIPE)
    built = build_manifest(tmp_path / "recipe.toml", tmp_path, structure_only=True)
    rows = built.manifest.rows.set_index("image")
    kinds = {"fracture": ("line", "displaced"), "implant": ("implant",), "lesion": ("lesion",)}
    for name, own in kinds.items():
        expected = {view_name(view): str(int(view.kind in own)) for view in views}
        assert rows[f"target_{name}"].to_dict() == expected
    assert list(built.manifest.rows.columns).count("kind") == 0  # it gives the label away
