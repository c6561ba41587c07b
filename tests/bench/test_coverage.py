"""The simulation of `bench/coverage.py` in short, and that what it found last is committed."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

from coverage_table import name_cell, parse_cells, summarise  # noqa: E402

# not by its name: a well-known package has the same
spec = importlib.util.spec_from_file_location("bench_coverage", ROOT / "bench" / "coverage.py")
coverage = importlib.util.module_from_spec(spec)
spec.loader.exec_module(coverage)

DECIDED = ("sensitivity", "specificity", "accuracy", "macro_f1", "kappa", "ppv", "npv")


@pytest.fixture(scope="module")
def populations():
    return {kind: coverage.find_population(*kind, n=40_000) for kind in ((0.5, 0.85), (0.1, 0.97))}


@pytest.mark.parametrize("cell", [(0.5, 0.85, 40), (0.1, 0.97, 100)])
def test_intervals_cover_at_small_sizes(populations, cell):
    n = 150
    found = coverage.run_batch(cell, populations[cell[:2]], n, 15)["scores"]
    for name in ("auroc", "average_precision", "brier", "slope", "intercept", *DECIDED):
        own = found[name]
        # four standard errors of .95 over 150 are .07
        assert own["shown"] > 0.9 * n, name
        assert own["held"] / own["shown"] > 0.88, (name, dict(own))
        assert not own.get("no_width", 0)
    assert found["ece"]["held"] >= 14


def test_tests_keep_their_level(populations):
    found = coverage.run_batch((0.5, 0.85, 40), populations[0.5, 0.85], 150, 0, part="tests")
    assert 1 <= found["tests"]["pair"]["found"] <= 18
    assert found["tests"]["family"]["found"] <= 18
    for name, own in found["tests"].items():
        assert own["found"] <= 0.13 * own["n"], name


def test_resampling_rows_for_patients_would_be_seen(populations, monkeypatch):
    """A simulation that cannot tell is worth nothing: intervals of rows cover too seldom."""
    kept = coverage.estimate_scores

    def by_row(y, probability, threshold, patients, names):
        return kept(y, probability, threshold, np.arange(len(y)), names)

    def one_label(n, prevalence, separation, rng, n_heads=1):
        y, heads, patients = drawn(n, prevalence, separation, rng, n_heads)
        return np.repeat(y, 4), [np.repeat(own, 4) for own in heads], np.repeat(patients, 4)

    drawn = coverage.draw_patients
    monkeypatch.setattr(coverage, "draw_patients", one_label)
    cell = (0.5, 0.85, 100)
    own = coverage.run_batch(cell, populations[0.5, 0.85], 60, 0)["scores"]["auroc"]
    monkeypatch.setattr(coverage, "estimate_scores", by_row)
    rows = coverage.run_batch(cell, populations[0.5, 0.85], 60, 0)["scores"]["auroc"]
    assert rows["held"] / rows["shown"] < 0.85 < own["held"] / own["shown"]


def test_counts_add_up_batch_by_batch():
    before = {"scores": {"auroc": {"held": 9.0, "width": 0.25}}}
    total = coverage.add_counts(before, {"scores": {"auroc": {"held": 8.0, "shown": 9.0}}})
    assert total == {"scores": {"auroc": {"held": 17.0, "width": 0.25, "shown": 9.0}}}
    assert before["scores"]["auroc"]["held"] == 9


def test_the_committed_results_hold_every_cell_and_no_interval_without_width():
    results = json.loads((ROOT / "bench" / "results" / "coverage.json").read_text())
    every = parse_cells(None)
    assert set(results["cells"]) == {name_cell(cell) for cell in every}
    assert results["summary"] == summarise(results["cells"])
    assert all(own["without_width"] == 0 for own in results["summary"].values())
    assert not any(math.isnan(own["lowest"]) for own in results["summary"].values())
