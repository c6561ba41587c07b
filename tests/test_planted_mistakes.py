"""Mistakes that statistics of this kind have been published with: planted, and caught by the suite.

Each is planted in a copy of the package, and the tests that should see it have to fail there. They
take minutes, so `make soak` runs them, not `make test`.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from crashing import SOAK

import medembed

TESTS = Path(__file__).parent
PACKAGE = Path(medembed.__file__).parent
# What a test fails with where the mistake is one of spelling, and nothing was measured.
CRASHES = ("AttributeError", "ImportError", "IndentationError", "NameError", "SyntaxError")
# Says which package was tested. Any failing example will do: hypothesis looks for no smaller one.
PLUGIN = """
from hypothesis import Phase, settings

settings.register_profile("planted", database=None, derandomize=True, phases=[Phase.generate])
settings.load_profile("planted")


def pytest_terminal_summary(terminalreporter):
    import medembed

    terminalreporter.write_line(f"tested: {medembed.__file__}")
"""

pytestmark = pytest.mark.skipif(
    not SOAK, reason="mistakes are planted with MEDEMBED_SOAK=1 only: `make soak`"
)


SCIKIT = "test_scores::test_scores_equal_scikit_learns_under_every_set_of_weights"
SCIPY = "test_paired::test_the_difference_in_brier_scores_is_scipys_paired_t_test"


class Mistake(NamedTuple):
    """Text of a module that is replaced, and the test that has to fail: its file, ::, its name."""

    module: str
    right: str
    wrong: str
    test: str


MISTAKES = {
    # Scores
    "sensitivity and specificity have their classes swapped": Mistake(
        "evaluation/scores.py",
        '"sensitivity": hit / positive,\n            "specificity": passed / negative,',
        '"sensitivity": passed / negative,\n            "specificity": hit / positive,',
        SCIKIT,
    ),
    "an abnormal row wins every tie of an AUROC": Mistake(
        "evaluation/scores.py",
        "below - negative / 2",
        "below",
        SCIKIT,
    ),
    "macro-F1 is the F1 of the abnormal class": Mistake(
        "evaluation/scores.py",
        "hit / (2 * hit + miss + false) + passed / (2 * passed + miss + false)",
        "2 * hit / (2 * hit + miss + false)",
        SCIKIT,
    ),
    "kappa takes a half for the agreement by chance": Mistake(
        "evaluation/scores.py",
        "(positive * called + negative * (total - called)) / total**2",
        "np.full_like(total, 0.5)",
        SCIKIT,
    ),
    "every bin of an ECE weighs the same": Mistake(
        "evaluation/scores.py",
        "np.arange(N_ECE_BINS)) * error[:, None]",
        "np.arange(N_ECE_BINS)) * (error * len(error) / N_ECE_BINS"
        " / np.bincount(self._bins)[self._bins])[:, None]",
        SCIKIT,
    ),
    "a study's score is the largest of its views'": Mistake(
        "evaluation/scores.py",
        'studies["probability"].mean()',
        'studies["probability"].max()',
        "test_scores::test_a_study_takes_its_largest_known_label_and_its_mean_probability",
    ),
    "the threshold makes the fewest mistakes, and is not Youden's": Mistake(
        "evaluation/thresholds.py",
        "hits * false[0] - false * hits[0]",
        "hits - false",
        "test_thresholds::test_the_youden_index_is_the_best_on_scikit_learns_curve",
    ),
    # Intervals
    "rows are resampled, not patients": Mistake(
        "evaluation/bootstrap.py",
        "in _weights(codes, n_resamples, seed):",
        "in _weights(np.arange(len(codes)), n_resamples, seed):",
        "test_intervals::test_eces_bound_is_that_of_resampled_patients_one_at_a_time",
    ),
    "DeLong's rows are taken as independent": Mistake(
        "evaluation/delong.py",
        "codes = patient_codes(patients)",
        "codes = np.arange(len(patient_codes(patients)))",
        "test_delong::test_with_patients_it_is_obuchowskis_sum_over_patients",
    ),
    "the design effect is left out of shares": Mistake(
        "evaluation/estimates.py",
        "n / _design_effect(share, n, n_own, counts, parts)",
        "float(n)",
        "test_estimates::test_the_design_effect_is_that_of_clusters",
    ),
    "Newcombe's interval of an AUROC counts rows, not patients": Mistake(
        "evaluation/estimates.py",
        "n_abnormal, n_normal = _count_patients(rows)\n        ratio",
        "n_abnormal, n_normal = int((rows.y == 1).sum()), int((rows.y == 0).sum())\n        ratio",
        "test_intervals::test_studies_of_one_patient_move_together",
    ),
    "the slope of a calibration takes rows as independent": Mistake(
        "evaluation/calibration.py",
        "name: measure_spread(labels, added, codes)",
        "name: measure_spread(labels, added, np.arange(len(codes)))",
        "test_recalibration::test_the_intervals_are_those_of_statsmodels_clustered_covariance",
    ),
    # Comparisons
    "Holm's correction does not step down": Mistake(
        "evaluation/paired.py",
        "np.arange(len(order), 0, -1)",
        "len(order)",
        "test_intervals::test_holm_steps_down_as_computed_by_hand",
    ),
    "Holm's correction is not monotone": Mistake(
        "evaluation/paired.py",
        "np.maximum.accumulate(scaled)",
        "scaled",
        "test_intervals::test_holm_steps_down_as_computed_by_hand",
    ),
    "the interval of a difference has the wrong sign": Mistake(
        "evaluation/paired.py",
        "max(value - reach, -1.0), min(value + reach, 1.0)",
        "max(-value - reach, -1.0), min(-value + reach, 1.0)",
        SCIPY,
    ),
    "the variance of a difference is that of unpaired heads": Mistake(
        "evaluation/paired.py",
        "added[a] - added[b] if added else np.full(len(codes), nan),\n            (labels, codes),",
        "np.r_[added[a], -added[b]] if added else np.full(len(codes), nan),\n"
        "            (np.r_[labels, labels], np.r_[codes, codes + codes.max() + 1]),",
        SCIPY,
    ),
    "a paired test takes rows as independent": Mistake(
        "evaluation/paired.py",
        "thresholds or {}, patient_codes(patients), np.asarray(y)",
        "thresholds or {}, np.arange(len(patient_codes(patients))), np.asarray(y)",
        "test_paired::test_copies_of_a_patients_rows_are_no_further_evidence",
    ),
    "a test has one side": Mistake(
        "evaluation/paired.py",
        "p = 2 * float(_tail(",
        "p = float(_tail(",
        SCIPY,
    ),
    # Prediction sets
    "the quantile of prediction sets is one score too low": Mistake(
        "evaluation/conformal.py",
        "(1 + strange) / (1 + len(kept))",
        "strange / len(kept)",
        "test_conformal::test_membership_of_a_class_is_mapies_on_the_rows_of_that_class",
    ),
    "prediction sets pool their classes": Mistake(
        "evaluation/conformal.py",
        "[parts[column] for parts in self.scores.values()]",
        "[part for parts in self.scores.values() for part in parts]",
        "test_conformal::test_coverage_holds_in_every_region_with_scores_enough",
    ),
    # What must not see the test rows
    "thresholds are fitted on test": Mistake(
        "results/alignment.py",
        "decisions = fit_decisions(train, rules)",
        "decisions = fit_decisions(train, rules)._replace("
        "threshold=fit_decisions(test, rules).threshold)",
        "test_comparison::test_scores_are_those_of_the_evaluation_floor",
    ),
    "calibration is fitted on test": Mistake(
        "results/alignment.py",
        "decisions = fit_decisions(train, rules)",
        "decisions = fit_decisions(train, rules)._replace("
        "calibration=fit_decisions(test, rules).calibration)",
        "test_comparison::test_scores_are_those_of_the_evaluation_floor",
    ),
    "a prior knows the labels of test": Mistake(
        "results/predictions.py",
        "predict_prior(name, regions[trained], y[trained], regions)",
        "predict_prior(name, regions[y >= 0], y[y >= 0], regions)",
        "test_clean_cv::test_a_prior_knows_neither_the_fold_that_it_is_scored_on_nor_test",
    ),
    # What must not see the fold that is scored
    "a prior has seen the fold that it is scored on": Mistake(
        "results/predictions.py",
        "trained & (folds != fold)",
        "trained",
        "test_clean_cv::test_a_prior_knows_neither_the_fold_that_it_is_scored_on_nor_test",
    ),
    "a fold is predicted by a model that has seen it": Mistake(
        "sweeps/finalize.py",
        "_train(training, item, training.others(item.fold))",
        "_train(training, item, np.flatnonzero(training.folds >= 0))",
        "test_clean_cv::test_a_refit_learns_from_all_other_folds_and_not_from_its_own",
    ),
    "rows of train keep the predictions of the model that learnt from them": Mistake(
        "sweeps/finalize.py",
        "probability[trained] = found.out_of_fold[trained]",
        "probability[trained] = probability[trained]",
        "test_sweeps::test_train_predictions_are_the_winners_on_its_held_out_folds",
    ),
    "a model's calibration rests on what it has learnt from": Mistake(
        "sweeps/finalize.py",
        "_score_studies(found.out_of_fold, ",
        "_score_studies(predict(training, found.head), ",
        "test_sweeps::test_reported_scores_come_from_the_model_on_disk",
    ),
    "folds are drawn by row": Mistake(
        "dataset/splits.py",
        "return name_persons(rows).map(fold).to_numpy(dtype=np.int64)",
        "return np.arange(len(rows)) % n_folds",
        "test_splits::test_folds_keep_patients_whole_or_are_refused",
    ),
    "test rows are drawn by row": Mistake(
        "dataset/splits.py",
        'name_persons(rows).map(part).to_numpy() == 1, "test"',
        'np.arange(len(rows)) % round(1 / fraction) == 0, "test"',
        "test_splits::test_a_split_keeps_patients_whole_in_any_order",
    ),
    "the rows that stop a training share patients with those that it learns from": Mistake(
        "dataset/splits.py",
        "flags[:] = names.map(part).to_numpy() == 1",
        "flags[:] = (folds != fold) & (np.arange(len(rows)) % n_folds == 0)",
        "test_clean_cv::test_each_fold_has_other_patients_that_decide",
    ),
    "the fold that is scored decides when to stop": Mistake(
        "sweeps/training.py",
        "return np.flatnonzero(self.inner[fold])",
        "return np.flatnonzero(self.folds == fold)",
        "test_clean_cv::test_a_trial_does_not_look_at_its_fold",
    ),
    "embeddings are scaled by rows that a trial may not know": Mistake(
        "sweeps/training.py",
        "Projector(\n        training.X,\n        training.learnt(unit.fold),",
        "Projector(\n        training.X,\n        np.arange(len(training.X)),",
        "test_clean_cv::test_a_trial_does_not_look_at_its_fold",
    ),
}


def plant(mistake: Mistake, place: Path) -> None:
    """Write a copy of the package with the mistake."""
    copy = Path(shutil.copytree(PACKAGE, place / "medembed")) / mistake.module
    text = copy.read_text(encoding="utf-8")
    assert text.count(mistake.right) == 1, f"{mistake.module} does not have it once; plant it anew"
    copy.write_text(text.replace(mistake.right, mistake.wrong), encoding="utf-8")


def locate(test: str) -> str:
    """Return where pytest finds a test that is named by its file's stem, ::, and its own name."""
    stem, _, name = test.partition("::")
    [path] = TESTS.rglob(f"{stem}.py")
    return f"{path}::{name}"


def run_tests(place: Path, tests: list[str]) -> tuple[int, str]:
    """Run tests on the copy of the package in a directory, up to a failure."""
    (place / "tell_package.py").write_text(PLUGIN)
    paths = [locate(test) for test in tests]
    plugins = ("-p", "no:cacheprovider", "-p", "tell_package")
    # The copy goes before the package of this checkout, which pyproject.toml would put first.
    first = ("-o", f"pythonpath={place} {TESTS.parent} {TESTS / 'helpers'}")
    own = {"PYTHONPATH": str(place), "OPENBLAS_NUM_THREADS": "1", "COLUMNS": "500"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-qx", "--tb=short", *plugins, *first, *paths],
        cwd=place,  # the first place that `python -m` imports from
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert f"tested: {place / 'medembed' / '__init__.py'}" in said, said
    return done.returncode, said


def test_the_tests_pass_where_nothing_is_planted(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "medembed")
    status, said = run_tests(tmp_path, sorted({mistake.test for mistake in MISTAKES.values()}))
    assert status == pytest.ExitCode.OK, said


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_caught(name: str, tmp_path: Path) -> None:
    plant(MISTAKES[name], tmp_path)
    status, said = run_tests(tmp_path, [MISTAKES[name].test])
    assert status == pytest.ExitCode.TESTS_FAILED, said
    assert re.search(r"^1 failed(?!.* error).* in [\d.]+s", said, re.MULTILINE), said
    [reason] = re.findall(r"^FAILED \S+ - (.*)$", said, re.MULTILINE)
    assert not reason.startswith(CRASHES), said
