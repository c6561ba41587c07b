"""Heads that read nothing of an encoder: the covariates alone, and what a film is like."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from made_extraction import HalvesEncoder, list_images
from made_sweeps import QUICK, auroc_of, command, predictions_of
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import medembed as me
from medembed.cache.store import open_cache
from medembed.cli import main
from medembed.core.errors import EncoderError, ImageError
from medembed.dataset.manifest import Manifest, image_path, write_manifest
from medembed.heads.registry import BASELINES, HEADS, head_class
from medembed.images.decode import decode_image
from medembed.images.statistics import measure_image
from medembed.results.comparison import compare
from medembed.results.label_audit import audit_labels
from medembed.results.runs import open_run
from medembed.sweeps import sweep

OPTIONS: dict[str, Any] = {"batch_size": 8, "decoders": 1, "dtype": "float32"}
ASKED: dict[str, Any] = {**QUICK, "heads": "logistic,metadata,imagestats", "covariates": ["age"]}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Abnormal films are wider, which no encoder of squares sees; the old are rather abnormal."""
    home, generator = tmp_path_factory.mktemp("baselines"), np.random.default_rng(0)
    (home / "images").mkdir()
    label = np.arange(64) // 2 % 2
    for number in range(64):
        width = 24 + 2 * label[number] + generator.integers(0, 3)
        pixels = generator.integers(0, 256, (24, width), dtype=np.uint8)
        Image.fromarray(pixels).save(home / "images" / f"{number:03d}.png")
    rows = list_images(home / "images").rows
    rows["label"] = pd.array(label, "Int8")
    rows["split"] = np.where(np.isin(np.arange(64) % 8, (0, 3)), "test", "train")
    rows["age"] = [f"{age:.0f}" for age in 40 + 15 * label + generator.normal(0, 12, 64)]
    write_manifest(Manifest(rows, "study"), home / "manifest.csv")
    for name, poolings in {"plain": "mean", "measured": "mean,imagestats"}.items():
        me.extract(
            home / "manifest.csv",
            home / "images",
            HalvesEncoder(),
            home / name,
            poolings=poolings,
            **OPTIONS,
        )
    return home


@pytest.fixture(scope="module")
def run(home: Path) -> Path:
    sweep(home / "measured", home / "manifest.csv", home / "run", **ASKED)
    return home / "run"


def test_extraction_keeps_the_statistics_of_the_films_beside_what_it_kept(home: Path) -> None:
    found = me.load_embeddings(home / "measured", home / "manifest.csv", pool="imagestats")
    files = [image_path(home / "images", name) for name in found.rows["image"]]
    measured = [measure_image(decode_image(file.read_bytes()).pixels) for file in files]
    assert np.array_equal(found.X, np.stack(measured))
    plain = me.load_embeddings(home / "plain", home / "manifest.csv")
    usual = me.load_embeddings(home / "measured", home / "manifest.csv")
    assert usual.pooling == "mean"  # heads do not read the statistics unless they are named
    assert np.array_equal(plain.X, usual.X)
    canary = open_cache(home / "measured").canary
    assert canary is not None
    assert list(canary["embeddings"]) == ["mean"]
    with pytest.raises(EncoderError, match=r"without the encoder.*--pool mean,imagestats"):
        me.extract(
            home / "manifest.csv",
            home / "images",
            HalvesEncoder(),
            home / "no",
            poolings="imagestats",
        )


def test_each_reads_its_own_columns_alone(home: Path, run: Path) -> None:
    for head, pool in (("metadata", None), ("imagestats", "imagestats")):
        rows = me.load_embeddings(home / "measured", home / "manifest.csv", pool=pool)
        X = rows.X if pool else rows.rows[["age"]].astype(float).to_numpy()
        is_train = rows.rows["split"].eq("train").to_numpy()
        model = make_pipeline(
            StandardScaler(), LogisticRegression(C=1.0, class_weight="balanced", max_iter=1000)
        ).fit(X[is_train], rows.y[is_train])
        expected = model.predict_proba(X[~is_train])[:, 1]
        own = predictions_of(run, head).query("split == 'test'")
        order = rows.rows[~is_train].set_index("sha256").index.get_indexer(own["sha256"])
        assert own["probability"].to_numpy() == pytest.approx(expected[order], abs=1e-3)
    films = auroc_of(predictions_of(run, "imagestats").query("split == 'test'"))
    assert films > 0.9 > auroc_of(predictions_of(run, "logistic").query("split == 'test'"))


def test_films_are_measured_where_the_cache_has_no_statistics(home: Path, run: Path) -> None:
    out = home / "from-files"
    ran = CliRunner().invoke(
        main,
        command((home / "plain", home / "manifest.csv"), out, "--configs", "1", "--heads",
                "metadata", "--covariates", "age", "--image-root", str(home / "images")),
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    assert "imagestats" in ran.stdout
    for head in ("metadata", "imagestats"):
        ours, theirs = predictions_of(out, head), predictions_of(run, head)
        assert np.array_equal(ours["probability"], theirs["probability"])
    raw = predictions_of(out, "imagestats").query("split == 'test'").set_index("sha256")
    predictor = me.Predictor(out / "models" / "imagestats", encoder=HalvesEncoder())
    rows = me.read_manifest(home / "manifest.csv").rows
    rows = rows[rows["split"] == "test"]
    for some in (rows[:2], rows):  # decoded here, and by processes
        manifest = Manifest(some.reset_index(drop=True), "study")
        found = predictor.predict_manifest(manifest, image_root=home / "images")
        own = raw["probability"].loc[some["sha256"]].to_numpy()
        expected = predictor.card.calibration.apply(own)
        images = [row["probability"] for row in found if row["image"]]
        assert images == pytest.approx(expected.tolist(), abs=1e-6)


def test_they_stand_beside_the_priors(run: Path) -> None:
    result = compare(run)
    kinds = {row["head"]: row["baseline"] for row in result["rows"]}
    assert kinds == {
        "logistic": False,
        **dict.fromkeys(("metadata", "imagestats", "class-prior", "region-prior"), True),
    }
    assert audit_labels(run, run.parent / "manifest.csv").heads == ["logistic"]


def test_what_cannot_be_had_is_left_out_with_a_reason(home: Path, tmp_path: Path) -> None:
    asked = {**ASKED, "covariates": ()}
    run = sweep(home / "plain", home / "manifest.csv", tmp_path / "run", **asked)
    assert run.leaderboard["head"].tolist() == ["logistic"]
    notes = " ".join(compare(tmp_path / "run")["notes"])
    assert "metadata cannot be had: no covariates were named. Add --covariates" in notes
    assert "imagestats cannot be had: the cache does not hold imagestats. Add --image-root" in notes
    assert set(open_run(tmp_path / "run").info.lacking) == {"metadata", "imagestats"}


def test_an_audit_shows_the_label_by_the_films_and_the_columns_alone(home: Path) -> None:
    asked = (home / "manifest.csv", ["age"])
    stored = me.audit_shortcuts(home / "measured", *asked, n_folds=3)
    measured = me.audit_shortcuts(home / "plain", *asked, n_folds=3, image_root=home / "images")
    assert measured.as_dict() == stored.as_dict()
    found = stored.as_dict()["baselines"]
    assert found["imagestats"]["low"] > 0.7 > found["embedding"]["low"]
    assert found["metadata"]["low"] > 0.5
    lacking = me.audit_shortcuts(home / "plain", *asked, n_folds=3).lacking
    assert "--image-root" in lacking["imagestats"]


def test_a_missing_film_is_named(home: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(ImageError, match=r"images/000\.png cannot be measured: No such file"):
        sweep(
            home / "plain",
            home / "manifest.csv",
            tmp_path / "run",
            **QUICK,
            image_root=tmp_path / "images",
        )
    assert not (tmp_path / "run").exists()


def test_the_registry_knows_baselines_without_importing_them() -> None:
    assert {name for name in HEADS if head_class(name).is_baseline} == BASELINES
