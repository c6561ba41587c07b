"""Targets of real label tables: real chest films, and a table of 20,327 wrists."""

import hashlib

import numpy as np
import pytest
from made_sweeps import predictions_of

from medembed.cache.spec import CacheSpec, keys_from_hex
from medembed.cache.store import create_cache
from medembed.dataset.manifest import Manifest
from medembed.dataset.recipes.build import build_manifest
from medembed.dataset.recipes.schema import make_recipe
from medembed.evaluation.scores import by_study, score
from medembed.sweeps.targets import sweep_targets

QUICK = {"heads": "logistic", "n_configs": 1, "n_folds": 3, "jobs": 1}
WRISTS = ("fracture", "metal", "cast", "osteopenia", "diagnosis_uncertain")
SHIFT = 1.5


def test_findings_of_real_films_are_the_label_and_its_mirror(shared_data, tmp_path):
    nih = shared_data / "nih"
    if not nih.is_dir():
        pytest.skip("shared/data/nih is not beside this checkout")
    text = (nih / "nih.toml").read_text()
    text += '\n[targets.finding]\ncolumn = "finding"\neach_value = true\n'
    manifest = build_manifest(make_recipe(text, tmp_path / "nih.toml"), nih).manifest
    names = ("label", "finding_pneumonia", "finding_no_finding")
    runs = sweep_targets(nih / "cache", manifest, tmp_path / "runs", names, **QUICK)
    label, same, mirror = (
        predictions_of(runs.run_path(name), "logistic")["probability"].to_numpy() for name in names
    )
    assert np.array_equal(label, same)
    assert label + mirror == pytest.approx(1)


def test_all_targets_of_the_wrists_come_from_one_synthetic_cache(shared_data, tmp_path):
    """Each target is planted in a column of its own, and found there."""
    table = build_manifest("grazpedwri", shared_data / "grazpedwri", structure_only=True).manifest
    assert len(table.rows) == 20_327
    patients = table.rows["patient"]  # a fifth of them has some of every target
    rows = table.rows[patients.isin(patients.unique()[::5])].reset_index(drop=True)
    names = [hashlib.sha256(image.encode()).hexdigest() for image in rows["image"]]
    rows = rows.assign(sha256=names)
    X = np.random.default_rng(0).normal(size=(len(rows), 8)).astype(np.float32)
    for k, name in enumerate(WRISTS):
        X[:, k] += SHIFT * (rows[f"target_{name}"] == "1")
    spec = CacheSpec("cd" * 32, {"size": [8, 8], "fit": "stretch"}, {"mean": (8,)}, "float32")
    cache = create_cache(tmp_path / "cache", spec, {"source": "synthetic", "precision": "fp32"})
    cache.commit(keys_from_hex(names), {"mean": X})
    manifest = Manifest(rows, table.label_level)
    runs = sweep_targets(cache, manifest, tmp_path / "runs", WRISTS, **QUICK)
    assert runs.names == list(WRISTS)
    test = (rows["split"] == "test").to_numpy()
    for k, name in enumerate(WRISTS):
        found = by_study(predictions_of(runs.run_path(name), "logistic").query("split == 'test'"))
        planted = by_study(
            rows[test].assign(
                label=rows[f"target_{name}"][test].astype(int),
                probability=1 / (1 + np.exp(-X[test, k].astype(float))),
            )
        )
        best = score(planted["label"].to_numpy(int), planted["probability"].to_numpy(), 0.5)
        ours = score(found["label"].to_numpy(int), found["probability"].to_numpy(), 0.5)
        assert ours["auroc"] > best["auroc"] - 0.02
