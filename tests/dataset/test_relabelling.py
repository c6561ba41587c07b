"""A review changes the labels that it fills in, and nothing else; every change is kept."""

import json
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from made_recipes import FOLDERS, folder_tree, recipe_of

from medembed.cli import main
from medembed.core.errors import ManifestError
from medembed.dataset.build_file import read_build, write_build
from medembed.dataset.manifest import Manifest, make_manifest, read_manifest, write_manifest
from medembed.dataset.recipes.build import build_manifest
from medembed.dataset.relabelling import relabel, relabelling_path, write_relabelled

KEYS = [f"{i:064x}" for i in range(6)]


def make(level: str = "study", labels: str = "001 1 ") -> Manifest:
    """Six images in four studies of three patients; a blank is no label."""
    table = pd.DataFrame(
        {
            "image": [f"{i}.png" for i in range(6)],
            "sha256": KEYS,
            "patient": ["p", "p", "q", "r", "r", "r"],
            "study": ["p/1", "p/1", "q/1", "r/1", "r/2", "r/1"],
            "region": "hand",
            "label": [label.strip() for label in labels],
            "split": ["train"] * 3 + ["test"] * 3,
            "age": "7",
        }
    ).astype(str)
    return make_manifest(table, level)


def write_review(path: Path, rows: dict[int, str], **columns: list[str]) -> Path:
    table = pd.DataFrame({"sha256": [KEYS[i] for i in rows], "new_label": list(rows.values())})
    table.assign(**columns).to_csv(path, index=False)
    return path


def refusal(manifest: Manifest, review: Path) -> str:
    with pytest.raises(ManifestError) as caught:
        relabel(manifest, review)
    return str(caught.value)


def test_a_new_label_holds_for_every_view_of_its_study(tmp_path: Path) -> None:
    before = make()
    done = relabel(before, write_review(tmp_path / "r.csv", {0: "1", 2: "1", 3: "", 4: "1"}))
    assert done.manifest.rows["label"].fillna(-1).tolist() == [1, 1, 1, -1, 1, -1]
    assert [(own.sha256, own.before, own.after) for own in done.review.changes] == [
        (KEYS[0], 0, 1),
        (KEYS[1], 0, 1),
    ]
    assert done.as_dict() == {
        "changed": 2,
        "to_abnormal": 2,
        "to_normal": 0,
        "labelled": 0,
        "confirmed": 2,
    }
    same = done.manifest.rows.drop(columns="label")
    pd.testing.assert_frame_equal(same, before.rows.drop(columns="label"))


def test_by_image_only_the_reviewed_image_changes(tmp_path: Path) -> None:
    done = relabel(make("image"), write_review(tmp_path / "r.csv", {0: "abnormal", 3: "Normal"}))
    assert done.manifest.rows["label"].fillna(-1).tolist() == [1, 0, 1, 0, 1, -1]
    assert done.as_dict()["labelled"] == 1


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from("01 "), min_size=6, max_size=6),
    st.dictionaries(st.integers(0, 5), st.sampled_from(["0", "1", ""])),
)
def test_labels_are_those_of_the_review_and_else_the_old_ones(
    tmp_path_factory: pytest.TempPathFactory, old: list[str], new: dict[int, str]
) -> None:
    before = make("image", "".join(old))
    path = write_review(tmp_path_factory.mktemp("reviews") / "r.csv", new)
    if not any(new.values()):
        assert "no new_label" in refusal(before, path)
        return
    after = relabel(before, path).manifest.rows["label"].astype("string").fillna("").tolist()
    assert after == [new.get(i, "") or own.strip() for i, own in enumerate(old)]


def test_why_an_image_was_chosen_becomes_a_covariate(tmp_path: Path) -> None:
    path = write_review(tmp_path / "r.csv", {0: "1", 2: "0"}, chosen_by=["random", "cover"])
    done = relabel(make(), path)
    assert done.manifest.rows["chosen_by"].tolist() == ["random", "random", "cover", "", "", ""]
    write_review(path, {4: "0"}, chosen_by=["uncertainty"])
    again = relabel(done.manifest, path).manifest.rows["chosen_by"]
    assert again.tolist() == ["random", "random", "cover", "", "uncertainty", ""]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("sha256,label\n", ["new_label"]),
        ("new_label\n1\n", ["sha256"]),
        (f"sha256,new_label\n{KEYS[0]},2\n", ["'2'", "row 2"]),
        (f"sha256,new_label\n{KEYS[0]},\n", ["no new_label"]),
        (f"sha256,new_label\n{KEYS[0]},1\n{'f' * 64},1\n", ["1 of 2", "ffffffffffff", "row 3"]),
        (f"sha256,new_label\n{KEYS[0]},1\n{KEYS[1]},0\n", ["one study", "rows 2, 3"]),
        (f"sha256,label,new_label\n{KEYS[0]},1,1\n", ["another label", "row 2"]),
    ],
)
def test_a_review_that_does_not_fit_is_refused(tmp_path: Path, text: str, named: list[str]) -> None:
    path = tmp_path / "r.csv"
    path.write_text(text)
    message = refusal(make(), path)
    assert all(word in message for word in [str(path), *named]), message


def test_equal_bytes_get_one_label(tmp_path: Path) -> None:
    rows = make("image").rows.copy()
    rows.loc[1, "sha256"] = KEYS[0]
    rows["label"] = rows["label"].astype("string").fillna("")
    twins = make_manifest(rows.astype(str), "image")
    done = relabel(twins, write_review(tmp_path / "r.csv", {0: "1"}))
    assert done.manifest.rows["label"][:2].tolist() == [1, 1]


def test_changes_and_the_build_follow_the_manifest(tmp_path: Path) -> None:
    first, recipe = tmp_path / "first.csv", recipe_of(tmp_path, FOLDERS)
    write_build(build_manifest(recipe, folder_tree(tmp_path / "films")), recipe, first)
    known = read_manifest(first)
    key = known.rows["sha256"][known.rows["label"].eq(0)].iloc[0]
    review = tmp_path / "review.csv"
    review.write_text(f"sha256,label,new_label\n{key},0,1\n")
    second, third = tmp_path / "second.csv", tmp_path / "third.parquet"
    run = CliRunner().invoke(
        main, ["manifest", "relabel", str(first), str(review), "-o", str(second), "--json"]
    )
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["to_abnormal"] == 2
    changed = read_manifest(second)
    built = read_build(second, changed)
    assert built is not None
    assert built.counts.images == len(known.rows)
    review.write_text(f"sha256,new_label\n{key},0\n")
    write_relabelled(relabel(second, review), second, third)
    kept = json.loads(relabelling_path(third).read_text())["reviews"]
    assert {"sha256": key, "before": 0, "after": 1} in kept[0]["changes"]
    assert {"sha256": key, "before": 1, "after": 0} in kept[1]["changes"]
    assert kept[0]["before"] == known.digest() == kept[1]["after"]
    assert kept[0]["after"] == kept[1]["before"] == changed.digest()


def test_the_reviewed_manifest_and_damaged_records_stay(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    write_manifest(make(), path)
    before = path.read_bytes()
    done = relabel(path, write_review(tmp_path / "r.csv", {0: "1"}))
    with pytest.raises(ManifestError, match="Name another file"):
        write_relabelled(done, path, path)
    relabelling_path(path).write_text("{")
    with pytest.raises(ManifestError, match=r"m\.relabelling\.json"):
        write_relabelled(done, path, tmp_path / "new.csv")
    assert path.read_bytes() == before
    assert not (tmp_path / "new.csv").exists()
