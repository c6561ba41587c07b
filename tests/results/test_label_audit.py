"""`audit labels` lists what heads that saw neither label nor patient contradict."""

import hashlib
import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from made_images import encode
from made_runs import make_images, make_run

import medembed as me
from medembed.cli import main
from medembed.core.errors import ArgumentError, RunError
from medembed.core.schema import as_json
from medembed.dataset.manifest import make_manifest, write_manifest
from medembed.report.label_audit import write_label_audit
from medembed.results.label_audit import audit_labels

HEADS = {"logistic": 0.6, "mlp": 0.6, "knn": 0.8}
N_PLANTED = 6


def as_manifest(images, level="study"):
    table = images[["sha256", "region", "label", "split"]].copy()
    table["image"] = [f"film-{k}.png" for k in range(len(images))]
    table["patient"] = images["patient"].map("p{:04d}".format)
    table["study"] = images["study"].map("s{:04d}".format)
    return make_manifest(table.astype(str), level)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A run whose heads read the right label, and a manifest in which some labels are wrong."""
    home = tmp_path_factory.mktemp("audit")
    images = make_images(n_patients=240)
    run = make_run(home / "run", images, HEADS)
    flipped = images["patient"] < N_PLANTED
    images["label"] = images["label"].where(~flipped, 1 - images["label"])
    predictions = run.predictions()
    is_wrong = predictions["patient"] < N_PLANTED
    predictions["label"] = predictions["label"].where(~is_wrong, 1 - predictions["label"])
    run.write_predictions(predictions)
    write_manifest(as_manifest(images), home / "manifest.csv")
    run.update_info(
        asked={
            **as_json(run.info.asked),
            "manifest": as_manifest(images).digest(),
        }
    )
    return home / "run", home / "manifest.csv", images


def invoke(*arguments):
    return CliRunner().invoke(main, ["audit", "labels", *map(str, arguments)])


def test_planted_errors_of_both_splits_come_first(case):
    run, manifest, images = case
    found = audit_labels(run, manifest)
    top = {sha256 for own in found.suspects["images"][:N_PLANTED] for sha256 in own}
    planted = set(images[images["patient"] < N_PLANTED]["sha256"])
    assert len(top & planted) >= 0.8 * len(planted)
    assert set(found.suspects["split"]) == {"train", "test"}
    assert len(found.rows) == images["study"].nunique()
    assert found.n_not_scored == 0
    assert found.heads == list(HEADS)
    assert found.error_limits[0] <= found.errors <= found.error_limits[1]
    assert found.expected < len(found.suspects)


def test_labels_of_test_change_nothing_that_is_fitted(tmp_path):
    images = make_images(n_patients=120)
    run = make_run(tmp_path / "run", images, HEADS)
    first = audit_labels(run, as_manifest(images))
    of_test = images["split"] == "test"
    images["label"] = images["label"].where(~of_test, 1 - images["label"])
    predictions = run.predictions()
    others = predictions["label"].where(predictions["split"] == "train", 1 - predictions["label"])
    run.write_predictions(predictions.assign(label=others))
    second = audit_labels(run, as_manifest(images))
    assert (second.thresholds, second.noise) == (first.thresholds, first.noise)
    assert (second.suspects["split"] == "test").sum() > 30


def test_parts_add_up(case):
    found = audit_labels(*case[:2])
    parts = found.parts()
    for split in ("train", "test"):
        [whole] = [p for p in parts if p.split == split and p.region is None]
        regions = [p for p in parts if p.split == split and p.region is not None]
        for name in ("studies", "suspects", "expected", "errors"):
            assert sum(getattr(p, name) for p in regions) == pytest.approx(getattr(whole, name))
    wholes = [p for p in parts if p.region is None]
    assert sum(p.expected for p in wholes) == pytest.approx(found.expected)
    assert sum(p.suspects for p in wholes) == len(found.suspects)


def test_heads_that_saw_a_label_do_not_judge_it(tmp_path):
    """Rows of train without a fold were not scored out of fold; priors see no image."""
    images = make_images(n_patients=120)
    left_out = images["patient"].isin(range(0, 40, 2))
    images.loc[left_out, "fold"] = np.nan
    run = make_run(tmp_path / "run", images, HEADS)
    found = audit_labels(run, as_manifest(images))
    judged = {sha256 for own in found.rows["images"] for sha256 in own}
    assert judged == set(images[~left_out]["sha256"])
    assert found.n_not_scored == images[left_out]["study"].nunique() == 20
    assert not {"class-prior", "region-prior"} & set(found.heads)


def test_each_image_is_judged_where_labels_are_per_image(tmp_path):
    images = make_images(n_patients=90)
    run = make_run(tmp_path / "run", images, HEADS)
    found = audit_labels(run, as_manifest(images, "image"))
    assert found.rows["images"].map(len).eq(1).all()
    assert len(found.rows) == len(images)
    assert found.document().level == "image"


def test_review_can_be_filled_in_and_applied(case, tmp_path):
    run, manifest, _ = case
    out = tmp_path / "review"
    ran = invoke(run, "--manifest", manifest, "-o", out, "--json")
    assert ran.exit_code == 0, ran.output
    document = json.loads(ran.stdout)
    assert document == json.loads((out / "audit.json").read_text())
    review = pd.read_csv(out / "review.csv", dtype=str)
    assert ",".join(review) == "rank,sha256,split,region,label,probability,new_label"
    assert review["new_label"].isna().all()
    assert review["sha256"].tolist() == [x for own in document["suspects"] for x in own["images"]]
    shown = review["rank"].astype(int) <= N_PLANTED
    review.loc[shown, "new_label"] = (1 - review["label"].astype(int)).astype(str)
    review.to_csv(out / "review.csv", index=False)
    done = me.relabel(manifest, out / "review.csv")
    assert {change.sha256 for change in done.review.changes} == set(review[shown]["sha256"])
    assert "medembed manifest relabel" in ran.stderr


def test_an_existing_review_is_kept(case, tmp_path):
    run, manifest, _ = case
    out = tmp_path / "review"
    out.mkdir()
    (out / "review.csv").write_text("mine")
    ran = invoke(run, "--manifest", manifest, "-o", out)
    assert ran.exit_code == 1
    assert "already exists, and may hold labels" in ran.stderr
    with pytest.raises(ArgumentError, match="may hold labels"):
        write_label_audit(audit_labels(run, manifest), out)
    assert [path.name for path in out.iterdir()] == ["review.csv"]
    assert (out / "review.csv").read_text() == "mine"


def test_names_are_written_only_if_asked_for(case, tmp_path):
    run, manifest, _ = case
    for names in (False, True):
        out = tmp_path / str(names)
        ran = invoke(run, "--manifest", manifest, "-o", out, *(["--names"] if names else []))
        assert ran.exit_code == 0, ran.output
        for path in out.iterdir():
            text = path.read_text()
            assert ("film-" in text) == names, path
            if path.suffix != ".html":
                assert ("s0000" in text) == names, path
    assert {path.name for path in out.iterdir()} == {"index.html", "audit.json", "review.csv"}


def test_the_page_shows_the_films_of_the_first(tmp_path):
    images, root = make_images(n_patients=90), tmp_path / "films"
    root.mkdir()
    for k in range(len(images)):
        film = encode(np.arange(k, k + 1200).reshape(40, 30).astype(np.uint8), "PNG")
        images.loc[k, "sha256"] = hashlib.sha256(film).hexdigest()
        (root / f"film-{k}.png").write_bytes(film)
    run = make_run(tmp_path / "run", images, {"logistic": 2.5, "mlp": 2.5})
    write_manifest(as_manifest(images), tmp_path / "manifest.csv")
    found = audit_labels(run, tmp_path / "manifest.csv")
    assert len(found.suspects) > 2
    given = (run.path, "--manifest", tmp_path / "manifest.csv", "--image-root", root, "-n", "2")
    n_views = found.suspects["images"][:2].map(len).sum()
    for name, n_shown in (("whole", n_views), ("lacking", n_views - 1)):
        ran = invoke(*given, "-o", tmp_path / name)
        assert ran.exit_code == 0, ran.output
        text = (tmp_path / name / "index.html").read_text()
        assert text.count("data:image/jpeg;base64,") == n_shown
        assert text.count("<p><strong>") == 2
        assert f"{len(found.suspects) - 2} more are in <code>review.csv</code>" in text
        assert ("1 of" in text and "not at hand" in text) == (name == "lacking")
        gone = images.index[images["sha256"] == found.suspects["images"][0][0]][0]
        (root / f"film-{gone}.png").write_bytes(b"another")


def test_what_cannot_be_audited_is_refused(case, tmp_path):
    run, manifest, images = case
    with pytest.raises(RunError, match="another manifest"):
        audit_labels(run, as_manifest(images.assign(label=1)))
    other = make_run(tmp_path / "labels", images, HEADS)
    with pytest.raises(RunError, match="not in the manifest or have another label"):
        audit_labels(other, as_manifest(images.assign(label=1)))
    unfinished = make_run(tmp_path / "unfinished", images, HEADS, complete=False)
    with pytest.raises(RunError, match="unfinished"):
        audit_labels(unfinished, manifest)
    other.update_info(asked={**as_json(other.info.asked), "target": "fracture"})
    with pytest.raises(RunError, match="answers the target 'fracture'"):
        audit_labels(other, manifest)
    no_folds = make_run(tmp_path / "no-folds", images, HEADS)
    no_folds.write_predictions(no_folds.predictions().assign(fold=pd.NA))
    with pytest.raises(RunError, match="no out-of-fold scores"):
        audit_labels(no_folds, manifest)
    priors = make_run(tmp_path / "priors", images, HEADS)
    priors.write_predictions(priors.predictions().query("head == 'class-prior'"))
    with pytest.raises(RunError, match="no trained head"):
        audit_labels(priors, manifest)
    ran = invoke(run, "--manifest", manifest, "--image-root", tmp_path / "none", "-o", tmp_path)
    assert ran.exit_code == 1
    assert not (tmp_path / "review.csv").exists()
