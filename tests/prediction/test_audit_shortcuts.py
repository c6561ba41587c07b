"""An audit of shortcuts finds a marker that is there, and reads nothing of one that is not."""

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from made_sweeps import make_data, make_table
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import medembed as me
from medembed.cache.spec import CacheSpec, keys_from_hex
from medembed.cache.store import create_cache
from medembed.cli import main
from medembed.dataset.manifest import make_manifest, write_manifest
from medembed.prediction import shortcuts
from medembed.prediction.shortcuts import audit_shortcuts

Data = tuple[Path, Path]


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """`cast` mostly goes with the label, `coin` and `age` with nothing."""
    table, generator = make_table(160), np.random.default_rng(1)
    codes = pd.factorize(table["patient"])[0]
    label = table["label"].astype(int).to_numpy()
    flipped = generator.random(160)[codes] < 0.15
    table["cast"] = np.where((label == 1) ^ flipped, "yes", "no")
    table["coin"] = generator.choice(["heads", "tails"], 160)[codes]
    table["age"] = generator.integers(1, 90, 160)[codes].astype(str)
    table["device"] = generator.choice(["A", "B", "C"], 160)[codes]
    table.loc[codes < 4, "device"] = "rare"
    table.loc[codes == 4, "device"] = ""
    table["room"] = "1"
    table["target_metal"] = np.where(label == 1, "1", "0")
    return table


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, table: pd.DataFrame) -> Data:
    """The label is in no column of the embedding but through the cast, of which one knows."""
    home = tmp_path_factory.mktemp("shortcuts")
    write_manifest(make_manifest(table, "study"), home / "manifest.csv")
    spec = CacheSpec("ab" * 32, {"size": [8, 8], "fit": "stretch"}, {"mean": (6,)}, "float32")
    X = np.random.default_rng(2).normal(size=(len(table), 6)).astype(np.float32)
    X[:, 3] += 4 * (table["cast"] == "yes").to_numpy()
    cache = create_cache(home / "cache", spec, {"source": "demo", "precision": "fp32"})
    cache.commit(keys_from_hex(table["sha256"].tolist()), {"mean": X})
    return home / "cache", home / "manifest.csv"


def test_a_planted_marker_is_found_and_chance_is_not(data: Data) -> None:
    found = audit_shortcuts(*data, ["cast", "coin"])
    cast, coin = (found.columns[name].as_dict() for name in ("cast", "coin"))
    assert cast["encoded"]["low"] > 0.9
    assert cast["encoded"]["p_holm"] == 2 / 1000  # the least of 999 draws, for two columns
    assert cast["alone"]["low"] < 0.85 < cast["alone"]["high"]  # of patients the cast is right
    assert coin["alone"]["low"] < 0.5
    for kind in ("residualised", "matched"):
        assert cast["used"][kind]["lost"]["low"] > 0.2
        assert cast["used"][kind]["score"]["low"] < 0.5 < cast["used"][kind]["score"]["high"]
    assert cast["used"]["residualised"]["lost"]["p_holm"] < 0.001
    assert coin["encoded"]["low"] < 0.5
    for p in (coin["encoded"], coin["used"]["residualised"]["lost"], coin["gap"]):
        assert p["p_holm"] > 0.05
        assert p["p_holm"] >= p["p"]


def test_scores_are_those_of_scikit_learn_on_the_same_folds(
    data: Data, table: pd.DataFrame
) -> None:
    own = audit_shortcuts(*data, ["cast"], n_folds=3, seed=4).columns["cast"]
    embeddings = me.load_embeddings(*data, split="train")
    folds = me.patient_folds(embeddings, 3, 4)
    model = make_pipeline(
        StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=1000)
    )
    for asked, found in (
        (embeddings.y, own.score),
        (embeddings.rows["cast"].eq("yes").to_numpy(int), own.encoded and own.encoded.estimate),
    ):
        scored = cross_val_predict(model, embeddings.X, asked, cv=folds, method="predict_proba")[
            :, 1
        ]
        within = [roc_auc_score(asked[test], scored[test]) for _, test in folds]
        pairs = [asked[test].sum() * (1 - asked[test]).sum() for _, test in folds]
        assert found is not None
        assert found.value == pytest.approx(np.average(within, weights=pairs), abs=1e-3)


def test_numbers_are_split_at_their_median_or_in_bands_and_words_as_they_are(data: Data) -> None:
    found = audit_shortcuts(*data, ["age", "region", "device"], n_folds=2).columns
    low, high = found["age"].groups
    assert low.name.startswith("<")
    assert abs(low.n_patients - high.n_patients) < 10
    assert [group.name for group in found["region"].groups] == ["hand", "wrist"]
    device = found["device"]
    assert [group.name for group in device.groups] == ["A", "B", "C"]
    assert device.n_left_out > 0  # the rare device, and the unknown one
    assert device.encoded is not None
    [banded] = audit_shortcuts(*data, ["age:0-30-60-100"], n_folds=2).columns.values()
    assert [group.name for group in banded.groups] == ["[0, 30)", "[30, 60)", "[60, 100]"]


def test_the_order_of_columns_and_what_stands_beside_them_change_nothing(data: Data) -> None:
    alone = audit_shortcuts(*data, ["coin"], n_folds=2).columns["coin"].as_dict()
    beside = audit_shortcuts(*data, ["device", "coin", "cast"], n_folds=2).columns["coin"].as_dict()
    for part in (alone["encoded"], alone["used"]["residualised"]["lost"], alone["gap"]):
        del part["p_holm"]
    for part in (beside["encoded"], beside["used"]["residualised"]["lost"], beside["gap"]):
        del part["p_holm"]
    assert alone == beside


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        (["patient"], "patient is not a covariate"),
        (["study"], "study is not a covariate"),
        (["target_metal"], "target_metal is a target"),
        (["casts"], "Did you mean cast"),
        (["coin", "coin"], "named twice"),
        (["age:5-1"], "do not ascend"),
        ([], "at least one column"),
    ],
)
def test_what_is_no_covariate_is_refused(data: Data, columns: list[str], named: str) -> None:
    with pytest.raises(me.MedembedError, match=named):
        audit_shortcuts(*data, columns)


def test_names_of_persons_in_a_column_are_refused(tmp_path: Path) -> None:
    table = make_table(80)
    table["name"] = "N" + table["patient"]
    with pytest.raises(me.ManifestError, match="may identify patients"):
        audit_shortcuts(*make_data(tmp_path / "named", table=table), ["name"])


def test_the_command_prints_a_table_of_80_columns_writes_csv_and_a_document(
    data: Data, tmp_path: Path
) -> None:
    arguments = ["audit", "shortcuts", *map(str, data), "--columns", "cast,room"]
    out = tmp_path / "audit"
    ran = CliRunner().invoke(main, [*arguments, "-o", str(out)])
    assert ran.exit_code == 0, ran.output
    table = ran.stdout.partition("\n\nimagestats cannot be had:")[0]
    assert max(map(len, table.splitlines())) <= 80
    assert "room: not estimable" in ran.stdout
    lines = list(csv.DictReader((out / "shortcuts.csv").read_text().splitlines()))
    assert [line["number"] for line in lines if line["column"] == "cast"] == [
        *("encoded", "label", "label, column alone", "lost, residualised", "lost, matched", "gap")
    ]
    again = CliRunner().invoke(main, [*arguments, "--json"])
    assert again.exit_code == 0, again.output
    document = json.loads(again.stdout)
    of_cast = next(line for line in lines if line["column"] == "cast")
    assert float(of_cast["value"]) == document["columns"]["cast"]["encoded"]["value"]
    assert document["baselines"]["metadata"]["low"] > 0.8  # the cast gives the label away
    assert document["baselines"]["embedding"] == document["columns"]["cast"]["used"]["score"]
    assert "--image-root" in document["lacking"]["imagestats"]
    assert document["columns"]["room"]["encoded"] is None
    shown = ran.stdout + again.stdout + (out / "groups.csv").read_text()
    assert "patient0" not in shown
    assert "Next: medembed compare" in ran.stderr


def test_a_file_in_place_of_the_directory_is_refused_before_any_work(
    data: Data, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    for out in (file, file / "below"):
        arguments = ["audit", "shortcuts", *map(str, data), "--columns", "cast", "-o", str(out)]
        ran = CliRunner().invoke(main, arguments)
        assert ran.exit_code == 1
        assert f"{file} is not a directory" in ran.output
        assert "columns," not in ran.output  # no progress
    assert file.read_text() == "kept"


def test_a_missing_option_and_an_empty_name_are_wrong_usage(data: Data) -> None:
    for more in ([], ["--columns", "cast,"], ["--columns", "cast", "--folds", "1"]):
        assert (
            CliRunner().invoke(main, ["audit", "shortcuts", *map(str, data), *more]).exit_code == 2
        )


def test_of_very_many_images_patients_are_drawn(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = audit_shortcuts(*data, ["cast"], n_folds=2)
    monkeypatch.setattr(shortcuts, "MOST_IMAGES", 150)
    some = audit_shortcuts(*data, ["cast"], n_folds=2)
    assert 140 < some.n <= 150 < whole.n
    assert some.columns["cast"].groups[0].n_patients < whole.columns["cast"].groups[0].n_patients
    assert audit_shortcuts(*data, ["cast"], n_folds=2).as_dict() == some.as_dict()
