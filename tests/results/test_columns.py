"""Scores by a column of the manifest, and the gaps between groups, against fairlearn and pandas."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from fairlearn.metrics import MetricFrame
from made_runs import make_images, make_run
from sklearn.metrics import brier_score_loss, recall_score, roc_auc_score

from medembed.cli import main
from medembed.core.errors import ManifestError, RunError
from medembed.core.schema import as_json
from medembed.dataset.manifest import make_manifest, read_manifest, write_manifest
from medembed.evaluation.bounds import wilson
from medembed.evaluation.calibration import Calibration
from medembed.evaluation.estimates import estimate_share
from medembed.evaluation.unpaired import (
    GAP_SCORES,
    estimate_difference,
    find_gaps,
    score_groups,
)
from medembed.report import page
from medembed.report.group_tables import render_groups
from medembed.report.page import write_report
from medembed.results.alignment import align_runs
from medembed.results.comparison import compare
from medembed.results.runs import Run, open_run
from medembed.results.subgroups import describe_gaps

FAST = {"n_resamples": 100}
HOSTILE = ["=cmd|'/c calc'!A1", "<script>x</script>", "\u202egnp.exe", 'a\x1b[31m,\n"b" & $x_1$']


def make_columns(images, seed=1):
    """A manifest of these images, with columns that belong to the patient and to the image."""
    generator = np.random.default_rng(seed)
    n = images["patient"].max() + 1
    own = pd.DataFrame(
        {
            "sex": generator.choice(["F", "M", ""], n, p=[0.5, 0.4, 0.1]),
            "age": generator.integers(0, 25, n).astype(str),
            "site": generator.choice([*"ABCDEF", ""], n),
            "device": generator.choice(HOSTILE, n),
            "mrn": [f"X{i:05}" for i in range(n)],
        }
    )
    rows = pd.DataFrame(
        {
            "image": [f"i{i:05}.png" for i in range(len(images))],
            "sha256": images["sha256"],
            "patient": images["patient"].map("p{}".format),
            "study": images["study"].map("s{}".format),
            "region": images["region"],
            "label": images["label"].astype(str),
            "split": images["split"],
        }
    )
    for name in own:
        rows[name] = images["patient"].map(own[name])
    rows["side"] = generator.choice(["left", "right", ""], len(rows))
    return make_manifest(rows, "study")


def give(run, manifest):
    run.update_info(asked={**as_json(run.info.asked), "manifest": manifest.digest()})
    return run


@pytest.fixture(scope="module")
def images():
    return make_images(n_patients=240)


@pytest.fixture(scope="module")
def manifest(images):
    return make_columns(images)


@pytest.fixture(scope="module")
def run(images, manifest, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "sweep"
    return give(make_run(path, images, {"mlp": 0.9, "logistic": 1.6}), manifest)


@pytest.fixture(scope="module")
def manifest_path(manifest, tmp_path_factory):
    path = tmp_path_factory.mktemp("manifest") / "m.csv"
    write_manifest(manifest, path)
    return path


@pytest.fixture
def write_page(monkeypatch, tmp_path):
    """Write a page without figures, which take longer than all else, and return its text."""
    monkeypatch.setattr(page, "plot_all", lambda *_: [])

    def write(run, **options):
        return Path(
            write_report([run.path], tmp_path / "page", **options, **FAST)["page"]
        ).read_text()

    return write


def studies_of(run, manifest, column):
    """The test studies with what pandas finds in the manifest for them."""
    test_set = align_runs([run])
    found = manifest.rows.set_index("sha256")[column]
    values = [{found[own] for own in images.split()} - {""} for images in test_set.units["images"]]
    names = [
        "not known" if not own else own.copy().pop() if len(own) == 1 else "several"
        for own in values
    ]
    return test_set, np.array(names)


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("column", ["sex", "side", "region"])
def test_every_group_has_the_scores_of_fairlearn(run, manifest, column):
    result = compare([run.path], by=column, manifest=manifest, **FAST)
    test_set, names = studies_of(run, manifest, column)
    y = test_set.y
    assert {own["name"] for own in result["groups"]["groups"]} == set(names)
    for own in result["groups"]["groups"]:
        chosen = names == own["name"]
        assert (own["n"], own["n_abnormal"]) == (chosen.sum(), y[chosen].sum())
        assert own["n_patients"] == len(set(test_set.patients[chosen]))
    for row, contender in zip(
        result["groups"]["rows"], sorted_contenders(result, test_set), strict=True
    ):
        called = (contender.probability >= contender.threshold).astype(int)
        decided = MetricFrame(
            metrics={"sensitivity": recall_score}, y_true=y, y_pred=called, sensitive_features=names
        )
        ranked = MetricFrame(
            metrics={"auroc": roc_auc_score, "brier": brier_score_loss},
            y_true=y,
            y_pred=contender.probability,
            sensitive_features=names,
        )
        inverse = MetricFrame(
            metrics=recall_score, y_true=1 - y, y_pred=1 - called, sensitive_features=names
        )
        for name, block in row["groups"].items():
            assert block["auroc"]["value"] == pytest.approx(ranked.by_group["auroc"][name])
            assert block["brier"]["value"] == pytest.approx(ranked.by_group["brier"][name])
            assert block["sensitivity"]["value"] == pytest.approx(
                decided.by_group["sensitivity"][name]
            )
            assert block["specificity"]["value"] == pytest.approx(inverse.by_group[name])
        for gap in (own for own in result["gaps"] if own["head"] == row["head"]):
            frame = {"sensitivity": decided, "auroc": ranked, "brier": ranked}.get(gap["score"])
            by_group = inverse.by_group if frame is None else frame.by_group[gap["score"]]
            assert gap["difference"] == pytest.approx(by_group[gap["a"]] - by_group[gap["b"]])


def sorted_contenders(result, test_set):
    own = {contender.head: contender for contender in test_set.contenders}
    return [own[row["head"]] for row in result["rows"]]


def test_groups_by_region_are_what_compare_gives_without_a_manifest(run, manifest):
    plain = compare([run.path], **FAST)
    result = compare([run.path], by="region", manifest=manifest, **FAST)
    assert {name: result[name] for name in plain} == plain
    for row, own in zip(plain["rows"], result["groups"]["rows"], strict=True):
        for name, block in row["regions"].items():
            for score in ("auroc", "sensitivity", "kappa", "brier"):
                assert own["groups"][name][score] == block[score]


def test_gaps_are_of_trained_heads_and_groups_that_were_asked_for(run, manifest):
    result = compare([run.path], by="age:0-8-16", manifest=manifest, **FAST)
    names = [own["name"] for own in result["groups"]["groups"]]
    assert names == ["[0, 8)", "[8, 16]", "outside"]
    assert result["groups"]["bands"] == [0.0, 8.0, 16.0]
    assert {gap["head"] for gap in result["gaps"]} == {"mlp", "logistic"}
    assert [gap["score"] for gap in result["gaps"][:4]] == [*GAP_SCORES]
    assert {(gap["a"], gap["b"]) for gap in result["gaps"]} == {("[0, 8)", "[8, 16]")}
    for gap in result["gaps"]:
        assert gap["low"] < gap["difference"] < gap["high"]
        assert 0 < gap["p"] <= gap["p_holm"] <= 1
        assert gap["method"] == "mover"
        assert (gap["p"] < 0.05) == (gap["low"] > 0 or gap["high"] < 0)
    json.dumps(result, allow_nan=False)


def test_of_more_than_five_groups_each_is_compared_with_all_others(run, manifest):
    result = compare([run.path], by="site", manifest=manifest, **FAST)
    test_set, names = studies_of(run, manifest, "site")
    contender = next(own for own in test_set.contenders if own.head == "mlp")
    gaps = [gap for gap in result["gaps"] if gap["head"] == "mlp" and gap["score"] == "brier"]
    assert [(gap["a"], gap["b"]) for gap in gaps] == [(name, "all others") for name in "ABCDEF"]
    squares = (contender.probability - test_set.y) ** 2
    for gap in gaps:
        inside, others = names == gap["a"], (names != gap["a"]) & (names != "not known")
        expected = squares[inside].mean() - squares[others].mean()
        assert gap["difference"] == pytest.approx(expected)
    assert any("all others" in note for note in result["groups"]["notes"])


def test_a_gap_that_is_there_is_found_and_said(images, tmp_path):
    manifest = make_columns(images)
    run = give(make_run(tmp_path / "run", images, {"mlp": 0.5}), manifest)
    frame = run.predictions()
    sex = manifest.rows.set_index("sha256")["sex"]
    hidden = (frame["head"] == "mlp") & frame["sha256"].map(sex).eq("M") & frame["label"].eq(1)
    run.write_predictions(frame.assign(probability=frame["probability"].mask(hidden, 0.02)))
    result = compare([run.path], by="sex", manifest=manifest, **FAST)
    gap = next(own for own in result["gaps"] if own["score"] == "sensitivity")
    assert gap["low"] > 0.5
    assert gap["p_holm"] < 0.001
    told = render_groups(result)
    assert "significant at 0.05 after Holm's" in told
    assert "mlp, sensitivity, F − M" in " ".join(told.split())


def test_small_groups_are_not_estimable_and_say_why(images, tmp_path):
    images = images[images["patient"] < 40]
    manifest = make_columns(images)
    rare = manifest.rows.assign(sex=np.where(manifest.rows["patient"].isin(["p1", "p3"]), "X", "F"))
    manifest = make_manifest(rare.astype({"label": str}), "study")
    run = give(make_run(tmp_path / "run", images, {"mlp": 1.0}), manifest)
    result = compare([run.path], by="sex", manifest=manifest, **FAST)
    for gap in result["gaps"]:
        assert gap["low"] is gap["high"] is gap["p"] is gap["p_holm"] is gap["method"] is None
        assert gap["reason"].startswith("X: ") or "; X: " in gap["reason"]
    assert "none could be tested" in describe_gaps(result["gaps"], several=False)
    for table_format in ("table", "markdown", "csv", "latex"):
        text = render_groups(result, table_format)
        assert "nan" not in text
    assert "No interval, X: " in render_groups(result)


def test_studies_whose_images_differ_are_a_group_that_is_in_no_gap(run, manifest):
    result = compare([run.path], by="side", manifest=manifest, **FAST)
    assert [own["name"] for own in result["groups"]["groups"]][-2:] == ["several", "not known"]
    assert {(gap["a"], gap["b"]) for gap in result["gaps"]} == {("left", "right")}
    by_image = compare([run.path], by="side", manifest=manifest, level="image", **FAST)
    names = [own["name"] for own in by_image["groups"]["groups"]]
    assert names == ["left", "right", "not known"]
    assert sum(own["n"] for own in by_image["groups"]["groups"]) == by_image["test"]["n"]


def test_another_manifest_is_refused_with_both_digests(run, manifest, tmp_path):
    other = make_manifest(manifest.rows.assign(sex="F").astype({"label": str}), "study")
    path = tmp_path / "other.csv"
    write_manifest(other, path)
    for arguments in (
        ("compare", run.path, "--by", "sex", "--manifest", path),
        ("report", run.path, "--manifest", path, "-o", tmp_path / "page"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 1
        assert manifest.digest()[:12] in result.output
        assert other.digest()[:12] in result.output
        assert "Give --manifest the one that the run was made from" in result.output
    assert not (tmp_path / "page").exists()


def test_with_thumbnails_another_manifest_leaves_the_columns_out_and_says_so(
    run, manifest, write_page
):
    other = make_manifest(manifest.rows.assign(sex="F").astype({"label": str}), "study")
    text = write_page(run, manifest=other, find_thumbnails=lambda wanted: {})
    assert "was made from another manifest" in text
    assert "By sex" not in text


def test_a_run_that_does_not_say_its_manifest_is_joined_by_the_images(images, manifest, tmp_path):
    run = make_run(tmp_path / "old", images, {"mlp": 1.0})
    assert run.info.asked.manifest is None
    result = compare([run.path], by="sex", manifest=manifest, **FAST)
    assert sum(own["n"] for own in result["groups"]["groups"]) == result["test"]["n"]
    fewer = manifest.rows[manifest.rows["patient"] != "p1"].astype({"label": str})
    result = compare([run.path], by="sex", manifest=make_manifest(fewer, "study"), **FAST)
    assert "2 test images are not in the manifest" in " ".join(result["groups"]["notes"])
    nothing = manifest.rows[manifest.rows["split"] == "train"].astype({"label": str})
    with pytest.raises(RunError, match="none of the test images"):
        compare([run.path], by="sex", manifest=make_manifest(nothing, "study"), **FAST)


def test_a_run_of_format_1_is_grouped_by_its_own_manifest():
    home = Path(__file__).parents[1] / "assets" / "format-1"
    manifest = read_manifest(home / "manifest.csv")
    result = compare([home / "run"], by="region", manifest=manifest, margin=0.1, **FAST)
    assert sum(own["n"] for own in result["groups"]["groups"]) == result["test"]["n"]
    assert all("an interval needs 5" in gap["reason"] for gap in result["gaps"])
    assert len(result["non_inferiority"]) == 2


def test_a_manifest_without_hashes_is_refused(run, manifest, tmp_path):
    bare = make_manifest(manifest.rows.assign(sha256="").astype({"label": str}), "study")
    document = json.loads((run.path / "run.json").read_text())
    document["asked"]["manifest"] = bare.digest()
    run = Run(run.path, document)
    from medembed.results.subgroups import join_groups

    with pytest.raises(ManifestError, match="no sha256"):
        join_groups([run], align_runs([run]), bare, "sex")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--by", "sex"), 2, "--by sex requires --manifest"),
        (("--manifest", "{m}"), 2, "--manifest requires --by"),
        (("--by", "age", "--manifest", "{m}"), 1, "Give bands, such as --by age:0-"),
        (("--by", "mrn", "--manifest", "{m}"), 1, "nothing that does leaves the manifest"),
        (("--by", "split", "--manifest", "{m}"), 1, "is not a covariate"),
        (("--by", "sex", "--manifest", "{m}.gone"), 1, "no manifest at"),
    ],
)
def test_wrong_questions_end_in_one_clear_error(run, manifest_path, arguments, code, words):
    result = invoke("compare", run.path, *(own.format(m=manifest_path) for own in arguments))
    assert result.exit_code == code
    assert words in " ".join(result.output.split())


def test_the_csv_has_full_precision_and_the_gaps_below(run, manifest):
    result = compare([run.path], by="sex", manifest=manifest, **FAST)
    groups, _, gaps = render_groups(result, "csv").partition("\n\n")
    read = list(csv.DictReader(io.StringIO(groups)))
    assert [row["sex"] for row in read] == ["F", "F", "M", "M", "not known", "not known"]
    blocks = {row["head"]: row["groups"] for row in result["groups"]["rows"]}
    for row in read:
        assert float(row["auroc"]) == blocks[row["head"]][row["sex"]]["auroc"]["value"]
    read = list(csv.DictReader(io.StringIO(gaps)))
    assert [float(row["difference"]) for row in read] == [g["difference"] for g in result["gaps"]]


def test_tables_are_written_with_the_others(run, manifest_path, tmp_path):
    arguments = ("--by", "sex", "--manifest", manifest_path, "--tables", tmp_path, "--json")
    assert invoke("compare", run.path, *arguments).exit_code == 0
    names = {path.name for path in tmp_path.iterdir()}
    kinds = ("heads", "regions", "operating_points", "groups", "gaps")
    assert names == {f"{kind}.{end}" for kind in kinds for end in ("csv", "tex")}


def test_values_are_shown_and_never_obeyed(run, manifest, write_page):
    result = compare([run.path], by="device", manifest=manifest, **FAST)
    for table_format in ("table", "markdown", "csv", "latex"):
        text = render_groups(result, table_format)
        assert "\u202e" not in text
        assert "\x1b" not in text
        if table_format == "markdown":
            assert "<script" not in text
        if table_format == "csv":
            cells = [cell for line in csv.reader(io.StringIO(text)) for cell in line]
            assert not [cell for cell in cells if cell.startswith("=")]
    text = write_page(run, manifest=manifest)
    assert "By device" in text
    assert text.count("<script>") == 1
    assert "\u202e" not in text


def test_the_page_has_a_section_for_each_column_and_names_no_patient(run, manifest, write_page):
    text = write_page(run, manifest=manifest)
    for column in ("sex", "age", "site", "device", "side"):
        assert f">By {column}</h4>" in text
    assert "Not shown by mrn: it has " in text
    assert "X00001" not in text
    assert "--manifest MANIFEST" in text
    assert 'id="columns"' not in write_page(run)


def test_report_with_a_manifest_alone_and_without_columns(run, images, tmp_path, write_page):
    result = invoke("report", run.path, "-o", tmp_path / "p", "--image-root", tmp_path)
    assert result.exit_code == 2
    bare = make_columns(images)
    keep = ["image", "sha256", "patient", "study", "region", "label", "split"]
    bare = make_manifest(bare.rows[keep].astype({"label": str}), "study")
    own = give(make_run(tmp_path / "run", images, {"mlp": 1.0}), bare)
    text = write_page(own, manifest=bare)
    assert "The manifest has no column whose groups can be shown." in text


def make_scores(generator, n_patients, *, shared):
    """Studies of patients, two groups of one distribution: of a patient in both, or in one."""
    sizes = generator.integers(1, 4, n_patients)
    patients = np.repeat(np.arange(n_patients), sizes)
    n = len(patients)
    of_patient = generator.random(n_patients) < 0.4
    y = np.where(generator.random(n) < 0.7, of_patient[patients], generator.random(n) < 0.4)
    noise = generator.normal(size=n_patients)[patients] * 0.7 + generator.normal(size=n) * 0.7
    probability = 1 / (1 + np.exp(-1.5 * (1.5 * y + noise - 0.75)))
    group = generator.random(n) < 0.5 if shared else (generator.random(n_patients) < 0.5)[patients]
    return y.astype(int), probability, patients, group


@pytest.mark.parametrize("shared", [True, False])
def test_equal_groups_differ_in_one_of_twenty_at_most(shared):
    generator = np.random.default_rng(5)
    hits = {score: [] for score in GAP_SCORES}
    families = []
    for _ in range(250):
        y, probability, patients, group = make_scores(generator, 80, shared=shared)
        found = score_groups(y, probability, 0.5, patients, {"a": group, "b": ~group})
        gaps = find_gaps(found, {}, "")
        for gap in gaps:
            hits[gap.score].append(gap.found.p < 0.05)
        families.append(min(gap.p_holm for gap in gaps) < 0.05)
    for score, own in hits.items():
        assert np.mean(own) <= 0.07, score
    assert np.mean(hits["brier"]) >= 0.02
    assert np.mean(families) <= 0.07


def test_patients_in_both_groups_are_accounted_for():
    """Twins of one row in either group differ by nothing but noise, and the interval knows."""
    generator = np.random.default_rng(2)
    of_patient = np.clip(generator.normal(0.5, 0.25, 200), 0.01, 0.99)
    y = (generator.random(200) < 0.4).astype(int)
    probability = np.clip(np.concatenate([of_patient, of_patient + 0.02]), 0, 1)
    labels, patients = np.tile(y, 2), np.tile(np.arange(200), 2)
    group = np.arange(400) < 200
    own = {"a": group, "b": ~group}
    together = find_gaps(score_groups(labels, probability, 0.5, patients, own), {}, "")
    apart = find_gaps(score_groups(labels, probability, 0.5, np.arange(400), own), {}, "")
    for a, b in zip(together, apart, strict=True):
        assert a.found.difference == b.found.difference
        assert a.found.high - a.found.low < 0.4 * (b.found.high - b.found.low)


def test_a_gap_of_shares_is_newcombes_interval():
    """Without shared patients MOVER of two Wilson intervals is Newcombe's method 10 (1998)."""
    hits = [np.arange(56) < 48, np.arange(80) < 58]
    estimates = [
        estimate_share(own, np.ones(len(own), bool), np.arange(len(own)) + 100 * i, 200)
        for i, own in enumerate(hits)
    ]
    found = estimate_difference(*estimates)
    (la, ua), (lb, ub) = (
        wilson(own.value, own.n, reach) for own, reach in zip(estimates, reaches(hits), strict=True)
    )
    a, b = 48 / 56, 58 / 80
    low = a - b - np.hypot(a - la, ub - b)
    high = a - b + np.hypot(ua - a, b - lb)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)
    assert (found.low, found.high) == pytest.approx((-0.0100, 0.2642), abs=0.012)


def reaches(hits):
    """Student's quantiles, by the freedom that `estimate_share` takes."""
    from scipy.stats import t

    for own in hits:
        parts = (own - own.mean()) / len(own)
        freedom = 3 * (parts**2).sum() ** 2 / (parts**4).sum() - 1
        yield t.ppf(0.975, max(freedom, 1))


def test_real_radiographs_agree_with_pandas_and_fairlearn(shared_data, tmp_path, write_page):
    """NIH's follow-up number is a column of its table: the first film, or how many came before."""
    table = pd.read_csv(shared_data / "nih" / "labels.csv", dtype=str).set_index("file")
    given = read_manifest(shared_data / "nih" / "manifest.csv")
    rows = given.rows.assign(follow_up=given.rows["image"].map(table["exam"]).astype(int))
    later = np.where(rows["follow_up"] == 0, "first film", "follow-up")
    rows = rows.assign(visit=later).astype({"follow_up": str, "label": str})
    manifest = make_manifest(rows, given.label_level)
    path, run = tmp_path / "m.csv", tmp_path / "run"
    write_manifest(manifest, path)
    asked = ("--heads", "logistic", "--configs", 1, "--folds", 2, "--jobs", 1)
    swept = invoke("sweep", shared_data / "nih" / "cache", path, "--out", run, *asked)
    assert swept.exit_code == 0, swept.output
    level = ("--level", "image")
    done = invoke("compare", run, "--by", "visit", "--manifest", path, *level, "--json")
    result = json.loads(done.stdout)
    predicted = open_run(run).predictions().query("split == 'test' and head == 'logistic'")
    predicted = predicted.assign(label=predicted["label"].astype(int))
    row = next(own for own in result["rows"] if own["head"] == "logistic")
    calibration = Calibration.from_dict(row["calibration"])
    calibrated = calibration.apply(predicted["probability"].to_numpy())
    frame = predicted.assign(calibrated=calibrated, called=calibrated >= row["threshold"])
    known = manifest.rows.drop_duplicates("sha256").set_index("sha256")
    frame["visit"] = frame["sha256"].map(known["visit"])
    blocks = next(own for own in result["groups"]["rows"] if own["head"] == "logistic")["groups"]
    for name, own in frame.groupby("visit"):
        expected = {
            "auroc": roc_auc_score(own["label"], own["calibrated"]),
            "sensitivity": recall_score(own["label"], own["called"]),
            "specificity": recall_score(1 - own["label"], ~own["called"]),
            "brier": brier_score_loss(own["label"], own["calibrated"]),
        }
        for score, value in expected.items():
            assert blocks[name][score]["value"] == pytest.approx(value, abs=1e-9), score
        counted = next(group for group in result["groups"]["groups"] if group["name"] == name)
        assert counted["n"] == len(own)
        assert counted["n_patients"] == own["patient"].nunique()
    by_group = MetricFrame(
        metrics=roc_auc_score,
        y_true=frame["label"],
        y_pred=frame["calibrated"],
        sensitive_features=frame["visit"],
    )
    gap = next(own for own in result["gaps"] if own["score"] == "auroc")
    assert abs(gap["difference"]) == pytest.approx(by_group.difference())
    banded = json.loads(
        invoke(
            "compare", run, "--by", "follow_up:0-1-5-200", "--manifest", path, *level, "--json"
        ).stdout
    )
    follow_up = frame["sha256"].map(known["follow_up"].astype(int))
    counts = np.histogram(follow_up, [0, 1, 5, 200])[0]
    assert [own["n"] for own in banded["groups"]["groups"]] == counts.tolist()
    text = write_page(open_run(run), manifest=manifest)
    assert ">By visit</h4>" in text
    assert ">By follow_up</h4>" in text
