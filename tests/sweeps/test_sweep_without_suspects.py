"""A sweep that does not train on what an audit of labels suspects, and is scored on all of test."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from made_sweeps import QUICK, command, make_data, make_table, predictions_of, refuse

import medembed as me
from medembed.cli import main
from medembed.dataset.manifest import make_manifest, read_manifest, write_manifest
from medembed.report.label_audit import write_label_audit
from medembed.results.comparison import compare
from medembed.results.label_audit import audit_labels
from medembed.results.runs import open_run
from medembed.sweeps import sweep

FLIPPED = ("patient001", "patient017", "patient020", "patient036", "patient003", "patient007")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Return a cache, and a manifest and a review of it: six patients have the other label."""
    home = tmp_path_factory.mktemp("suspects")
    table = make_table(80)
    cache, manifest = make_data(home, {"mean": 3.0}, table=table)
    flipped = table["patient"].isin(FLIPPED)
    table.loc[flipped, "label"] = table.loc[flipped, "label"].map({"0": "1", "1": "0"})
    write_manifest(make_manifest(table, "study"), manifest)
    sweep(cache, manifest, home / "run", heads="logistic", **QUICK)
    write_label_audit(audit_labels(home / "run", manifest), home / "review")
    return cache, manifest, home / "review"


def test_suspects_of_train_are_not_trained_on_and_test_is_untouched(
    case: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    _, manifest, review = case
    ran = CliRunner().invoke(
        main,
        command(case[:2], tmp_path / "run", "--heads", "logistic", "--configs", "1",
                "--without-suspects", str(review)),
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    before, after = (
        predictions_of(run, "logistic") for run in (review.parent / "run", tmp_path / "run")
    )
    rows = read_manifest(manifest).rows.set_index("sha256")
    left_out = rows.loc[after["sha256"][(after["split"] == "train") & after["fold"].isna()]]
    assert {"patient001", "patient017", "patient020", "patient036"} <= set(left_out["patient"])
    assert len(left_out) < 20
    for split in (before, after):
        tested = split[split["split"] == "test"].set_index("sha256")["label"]
        assert tested.equals(rows.loc[tested.index, "label"].astype("Int8"))
    assert open_run(tmp_path / "run").info.asked.manifest == read_manifest(manifest).digest()
    result = compare([review.parent / "run", tmp_path / "run"])
    assert result["test"]["n"] == rows[rows["split"] == "test"]["study"].nunique()
    [note] = [own for own in result["notes"] if "Trained without" in own]
    assert f"({len(left_out)} images)" in note


def test_an_audit_of_another_manifest_and_what_is_no_audit_are_refused(
    case: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    cache, manifest, review = case
    rows = read_manifest(manifest).rows
    other = tmp_path / "other.csv"
    me.Manifest(rows.assign(label=rows["label"].mask(np.arange(len(rows)) == 0)), "study").write(
        other
    )
    (tmp_path / "audit.json").write_text("{}")
    for words, data, given in (
        ("of another manifest", (cache, other), review),
        ("audit.json", (cache, manifest), tmp_path),
        ("does not exist", (cache, manifest), tmp_path / "none"),
    ):
        out = tmp_path / "run"
        line = refuse(command(data, out, "--without-suspects", str(given)), out)
        assert words in line
    line = refuse(
        command((cache, manifest), out, "--without-suspects", str(review), "--target", "label"), out
    )
    assert "targets have answers of their own" in line
