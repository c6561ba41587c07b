"""Patients needed: closed forms, published sizes, and simulation with medembed's own intervals."""

import json
from math import sqrt

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.special import ndtri
from scipy.stats import multivariate_normal
from statsmodels.stats.proportion import proportion_confint

from medembed.cli import main
from medembed.core.errors import MedembedError
from medembed.evaluation.bounds import auroc_variance
from medembed.evaluation.estimates import estimate_scores
from medembed.evaluation.paired import paired_difference
from medembed.evaluation.sample_size import (
    MOST_PATIENTS,
    Sampling,
    auroc_correlation,
    difference_error,
    plan_difference,
    plan_width,
)


def riley(auroc, prevalence, width):
    """Criterion 3 of Riley et al. (2021), as `pmvalsampsize` computes it."""
    n = 10
    while True:
        half = n / 2 - 1
        factor = 1 + half * (1 - auroc) / (2 - auroc) + half * auroc / (1 + auroc)
        variance = auroc * (1 - auroc) * factor / (n * n * prevalence * (1 - prevalence))
        if 2 * 1.96 * sqrt(variance) <= width:
            return n
        n += 1


def draw(generator, patients, sampling, aurocs, correlation=0.0):
    """Binormal scores of heads whose patients' studies share a label and, by the ICC, noise."""
    size = int(sampling.studies_per_patient)
    codes = np.repeat(np.arange(patients), size)
    y = (generator.random(patients) < sampling.prevalence).astype(int)[codes]

    def noise():
        shared, own = generator.normal(size=patients)[codes], generator.normal(size=len(codes))
        return sqrt(sampling.icc) * shared + sqrt(1 - sampling.icc) * own

    common = noise()
    scores = [
        sqrt(correlation) * common + sqrt(1 - correlation) * noise() + y * sqrt(2) * ndtri(auroc)
        for auroc in aurocs
    ]
    return y, [1 / (1 + np.exp(-own)) for own in scores], codes


def test_the_published_size_of_pmvalsampsize():
    """Its documentation plans C = .8 at a prevalence of .018 and a width of .1: 4,252."""
    assert riley(0.8, 0.018, 0.1) == 4252
    assert plan_width("auroc", 0.8, 0.1, Sampling(0.018)).patients == pytest.approx(4252, rel=0.02)


@pytest.mark.parametrize("auroc", [0.6, 0.75, 0.85, 0.95])
@pytest.mark.parametrize("prevalence", [0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("width", [0.03, 0.1])
def test_auroc_is_near_the_closed_form_of_riley(auroc, prevalence, width):
    found = plan_width("auroc", auroc, width, Sampling(prevalence))
    expected = riley(auroc, prevalence, width)
    tolerance = (
        0.04 if expected > 300 else 0.3
    )  # of few patients it is neither symmetric nor normal
    assert found.patients == pytest.approx(expected, rel=tolerance)
    assert found.studies == found.patients
    assert found.abnormal_studies == pytest.approx(prevalence * found.patients, abs=1)


def test_the_variance_is_hanley_and_mcneils():
    """With equal classes Newcombe's is that of Radiology 143 (1982) exactly."""
    a, n = 0.85, 60
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    expected = (a * (1 - a) + (n - 1) * (q1 - a * a) + (n - 1) * (q2 - a * a)) / (n * n)
    assert auroc_variance(a, n, n) == pytest.approx(expected)


@pytest.mark.parametrize("score", ["sensitivity", "specificity"])
def test_shares_are_wilsons_of_statsmodels(score):
    found = plan_width(score, 0.9, 0.1, Sampling(0.25))
    share = 0.25 if score == "sensitivity" else 0.75
    for patients, is_enough in ((found.patients, True), (found.patients - 1, False)):
        n = patients * share
        low, high = proportion_confint(0.9 * n, n, method="wilson")
        assert (high - low <= 0.1) == is_enough


def test_one_patient_fewer_is_not_enough():
    for sampling in (Sampling(0.3), Sampling(0.1, 2.5, 0.4)):
        enough = plan_width("auroc", 0.8, 0.08, sampling).patients
        wider = plan_width("auroc", 0.8, 0.0801, sampling).patients
        assert wider <= enough


def test_the_correlation_of_aurocs_is_that_of_bivariate_normal_differences():
    for aurocs in ((0.7, 0.7), (0.85, 0.8), (0.95, 0.9)):
        z = ndtri(np.array(aurocs))

        def both(r, first, second):
            inside = multivariate_normal([0, 0], [[1, r], [r, 1]]).cdf([first, second])
            return inside - multivariate_normal([0, 0]).cdf([first, second])

        for correlation in (0.2, 0.6, 0.9):
            variances = both(0.4999999, z[0], z[0]) * both(0.4999999, z[1], z[1])
            expected = both(correlation / 2, *z) / sqrt(variances)
            assert auroc_correlation(aurocs, correlation) == pytest.approx(expected, abs=1e-3)
    assert auroc_correlation((0.8, 0.8), 1.0) == pytest.approx(1)
    assert auroc_correlation((0.8, 0.8), 0.0) == 0


def test_the_error_of_a_difference_is_hanley_and_mcneils():
    counts, aurocs = (90.0, 210.0), (0.85, 0.82)
    first, second = (auroc_variance(own, *counts) for own in aurocs)
    r = auroc_correlation(aurocs, 0.7)
    expected = sqrt(first + second - 2 * r * sqrt(first * second))
    assert difference_error(aurocs, 0.7, counts) == pytest.approx(expected)


def test_a_difference_wants_the_textbook_number():
    """(1.96 + 0.84)² times the variance of one patient over the difference squared."""
    sampling = Sampling(0.3)
    found = plan_difference(0.85, 0.03, 0.8, 0.8, sampling).patients
    error = difference_error((0.85, 0.82), 0.8, sampling.count(found))
    assert (ndtri(0.975) + ndtri(0.8)) * error == pytest.approx(0.03, rel=0.01)
    assert plan_difference(0.85, 0.03, 0.8, 0.9, sampling).patients > found
    assert plan_difference(0.85, 0.03, 0.4, 0.8, sampling).patients > found
    assert plan_difference(0.85, 0.02, 0.8, 0.8, sampling).patients > found


@pytest.mark.parametrize(
    ("auroc", "width", "sampling"),
    [
        (0.85, 0.05, Sampling(0.3)),
        (0.75, 0.1, Sampling(0.1)),
        (0.85, 0.1, Sampling(0.3, 3, 0.5)),
        (0.85, 0.1, Sampling(0.3, 2, 1.0)),
    ],
)
def test_medembeds_own_interval_is_about_as_wide_as_asked(auroc, width, sampling):
    patients = plan_width("auroc", auroc, width, sampling).patients
    generator = np.random.default_rng(1)
    widths = []
    for _ in range(60):
        y, (probability,), codes = draw(generator, patients, sampling, [auroc])
        own = estimate_scores(y, probability, 0.5, codes, ["auroc"])["auroc"].interval()
        widths.append(own.high - own.low)
    assert np.mean(widths) == pytest.approx(width, rel=0.1)


@pytest.mark.parametrize(
    ("auroc", "difference", "correlation", "sampling"),
    [
        (0.85, 0.05, 0.5, Sampling(0.3)),
        (0.8, 0.1, 0.0, Sampling(0.4)),
        (0.85, 0.06, 0.6, Sampling(0.3, 2, 0.5)),
    ],
)
def test_medembeds_own_test_has_about_the_power_asked(auroc, difference, correlation, sampling):
    patients = plan_difference(auroc, difference, correlation, 0.8, sampling).patients
    generator = np.random.default_rng(2)
    found = []
    for _ in range(400):
        aurocs = (auroc, auroc - difference)
        y, (a, b), codes = draw(generator, patients, sampling, aurocs, correlation)
        found.append(paired_difference(y, a, b, codes).p < 0.05)
    assert np.mean(found) == pytest.approx(0.8, abs=0.07)


def test_a_design_effect_of_alike_studies_wants_as_many_patients():
    alone = plan_width("auroc", 0.85, 0.1, Sampling(0.3))
    alike = plan_width("auroc", 0.85, 0.1, Sampling(0.3, 3, 1.0))
    apart = plan_width("auroc", 0.85, 0.1, Sampling(0.3, 3, 0.0))
    assert alike.patients == alone.patients
    assert alike.studies == 3 * alone.patients
    assert apart.patients == pytest.approx(alone.patients / 3, abs=1)
    assert Sampling(0.3, 3, 0.5).design_effect == 2


def test_five_patients_of_either_class_are_the_least():
    assert plan_width("auroc", 0.9, 0.99, Sampling(0.1)).patients == 50


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (lambda: plan_width("auroc", 0.5, 0.05, Sampling(0.3)), "AUROC 0.5 is out of range"),
        (lambda: plan_width("auroc", 1.0, 0.05, Sampling(0.3)), "AUROC 1 is out of range"),
        (lambda: plan_width("auroc", 0.8, 0.0, Sampling(0.3)), "width 0 is out of range"),
        (lambda: plan_width("auroc", 0.8, 1.0, Sampling(0.3)), "width 1 is out of range"),
        (lambda: plan_width("auroc", 0.8, 1e-5, Sampling(0.3)), "more than 1,000,000 test"),
        (lambda: plan_width("auroc", 0.8, 0.1, Sampling(1e-320)), "more than 1,000,000 test"),
        (lambda: plan_width("kappa", 0.8, 0.1, Sampling(0.3)), "is none of auroc, sens"),
        (lambda: plan_width("sensitivity", 1.0, 0.1, Sampling(0.3)), "sensitivity 1 is out"),
        (lambda: Sampling(0.0), "prevalence 0 is out of range"),
        (lambda: Sampling(float("nan")), "prevalence nan is out of range"),
        (lambda: Sampling(0.3, 0.5), "studies per patient 0.5 is out"),
        (lambda: Sampling(0.3, float("inf")), "studies per patient inf is out"),
        (lambda: Sampling(0.3, 2, 1.5), "icc 1.5 is out of range"),
        (lambda: plan_difference(0.8, 0.31, 0.5, 0.8, Sampling(0.3)), "below 0.3, so that"),
        (lambda: plan_difference(0.8, 0.0, 0.5, 0.8, Sampling(0.3)), "difference 0 is out"),
        (lambda: plan_difference(0.8, 0.1, 1.0, 0.8, Sampling(0.3)), "correlation 1 is out"),
        (lambda: plan_difference(0.8, 0.1, 0.5, 1.0, Sampling(0.3)), "power 1 is out of range"),
        (lambda: plan_difference(0.8, 1e-6, 0.5, 0.8, Sampling(0.3)), "more than 1,000,000"),
    ],
)
def test_what_cannot_be_planned_is_one_clear_error(plan, words):
    with pytest.raises(MedembedError) as raised:
        plan()
    assert words in str(raised.value)


def run(*arguments):
    return CliRunner().invoke(main, ["plan", *(str(own) for own in arguments)])


def test_the_command_prints_sentences_or_one_document():
    asked = ("--auroc", 0.85, "--prevalence", 0.3)
    text = run(*asked, "--width", 0.05).output
    expected = plan_width("auroc", 0.85, 0.05, Sampling(0.3))
    assert text.startswith(f"Test patients: {expected.patients:,}, with {expected.studies:,}")
    document = json.loads(run(*asked, "--width", 0.05, "--json").stdout)
    assert (document["patients"], document["studies"]) == (expected.patients, expected.studies)
    assert document["method"] == expected.method
    assert document["asked"]["width"] == 0.05
    paired = ("--difference", 0.03, "--correlation", 0.8)
    document = json.loads(run(*asked, *paired, "--json").stdout)
    expected = plan_difference(0.85, 0.03, 0.8, 0.8, Sampling(0.3))
    assert document["patients"] == expected.patients
    assert document["asked"]["power"] == 0.8
    assert "with a power of 0.8" in run(*asked, *paired).output
    more = run(*asked, "--width", 0.1, "--studies-per-patient", 2, "--icc", 0.5, "--json").stdout
    assert json.loads(more)["design_effect"] == 1.5
    assert json.loads(more)["patients"] < MOST_PATIENTS


@pytest.mark.parametrize(
    "arguments",
    [
        ("--auroc", 0.85),
        ("--auroc", 0.85, "--prevalence", 0.3),
        ("--prevalence", 0.3, "--width", 0.1),
        ("--auroc", 0.85, "--prevalence", 0.3, "--width", 0.1, "--difference", 0.1),
        ("--auroc", 0.85, "--sensitivity", 0.9, "--prevalence", 0.3, "--width", 0.1),
        ("--auroc", 0.85, "--prevalence", 0.3, "--difference", 0.1),
        ("--auroc", 0.85, "--prevalence", 0.3, "--width", 0.1, "--power", 0.9),
        ("--sensitivity", 0.9, "--prevalence", 0.3, "--difference", 0.1, "--correlation", 0.5),
    ],
)
def test_questions_that_do_not_fit_together_are_wrong_usage(arguments):
    assert run(*arguments).exit_code == 2
