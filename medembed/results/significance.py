"""Paired tests between the heads of a comparison, on the test rows that all of them have.

A head is non-inferior if it is worse than the best by less than a margin set beforehand.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import isnan
from typing import Any, NotRequired, TypedDict

from medembed.core.errors import RunError
from medembed.dataset.targets import ClassNames, name_classes
from medembed.evaluation.bootstrap import MIN_PATIENTS, finite_or_none
from medembed.evaluation.delong import auroc_differences
from medembed.evaluation.intervals import paired_differences, plain
from medembed.evaluation.paired import (
    Difference,
    bootstrap_p,
    holm,
    mcnemar,
    non_inferiority_p,
    paired_difference,
)
from medembed.results.alignment import ScoredHead, TestSet
from medembed.results.comparison_schema import (
    ComparedHead,
    HeadName,
    McNemar,
    NonInferiority,
    Pair,
    VersusBest,
)

__all__ = [
    "LARGEST_MARGIN",
    "SIGNIFICANCE",
    "check_margin",
    "describe_margins",
    "find_non_inferior",
    "pair_rows",
    "row_name",
    "versus_best",
]

SIGNIFICANCE = 0.05
"""A difference is significant if Holm's adjusted p is below this."""
RESAMPLES_PER_PAIR = 100
"""Keeps the smallest p that the bootstrap can give, times the number of pairs, near 0.02."""


def pair_rows(
    test_set: TestSet, rows: list[ComparedHead], n_resamples: int, seed: int
) -> dict[tuple[int, int], Pair]:
    """Return paired tests of the trained heads with each other, and of the best row with priors.

    Returns
    -------
    dict of (int, int) to dict
        By the indices of two rows, the better first: ``a``, ``b``, ``score``, ``difference``,
        ``low``, ``high``, ``p`` and ``method`` of AUROC, see `paired_differences`, ``p_holm``
        after Holm's correction over all pairs; as uncorrected cross-checks, ``p_bootstrap`` and
        ``p_delong`` (normal) of this difference and ``mcnemar`` of the decisions (rows that only
        one of the two got right).
    """
    chosen = [
        (i, j)
        for i, j in combinations(range(len(rows)), 2)
        if i == 0 or not (rows[i]["baseline"] or rows[j]["baseline"])
    ]
    own = {(contender.run, contender.head): contender for contender in test_set.contenders}
    contenders = [own[row["run"], row["head"]] for row in rows]
    probabilities = {str(i): contender.probability for i, contender in enumerate(contenders)}
    # p is at least 2 / (resamples + 1), and Holm multiplies it by up to the number of pairs
    n_resamples = max(n_resamples, RESAMPLES_PER_PAIR * len(chosen))
    y, patients = test_set.y, test_set.patients
    found = paired_differences(y, probabilities, patients)
    resampled = bootstrap_p(y, probabilities, patients, n_resamples=n_resamples, seed=seed)
    delong = auroc_differences(y, probabilities, patients)
    adjusted = holm([found[str(i), str(j)].p for i, j in chosen])
    names = [row_name(row, several=len(test_set.dropped) > 1) for row in rows]
    return {
        (i, j): {
            "a": names[i],
            "b": names[j],
            "score": "auroc",
            **_test_of(found[str(i), str(j)]),
            "p_holm": plain(float(p)),
            "p_bootstrap": plain(resampled[str(i), str(j)]),
            "p_delong": plain(delong[str(i), str(j)].p),
            "mcnemar": _mcnemar(test_set, contenders[i], contenders[j]),
        }
        for (i, j), p in zip(chosen, adjusted, strict=True)
    }


def versus_best(pair: Pair | None) -> VersusBest | None:
    """Return the test against the best, None for the best itself; `tied` if it may be chance."""
    if pair is None:
        return None
    return {
        "difference": pair["difference"],
        "p_holm": pair["p_holm"],
        "tied": pair["p_holm"] is not None and pair["p_holm"] >= SIGNIFICANCE,
    }


def row_name(row: HeadName, *, several: bool) -> str:
    """Return the head's name, together with its run's if there are several runs."""
    return f"{row['run']}/{row['head']}" if several else str(row["head"])


def _mcnemar(test_set: TestSet, a: ScoredHead, b: ScoredHead) -> McNemar:
    found = mcnemar(test_set.y, a.probability >= a.threshold, b.probability >= b.threshold)
    return {"only_a": found.only_a, "only_b": found.only_b, "p": finite_or_none(found.p)}


LARGEST_MARGIN = 0.5
"""The largest margin of AUROC: 0.5 is chance, so a larger margin would pass any head."""
ONE_SIDED = 0.025
"""The one-sided level that belongs to the lower end of a 95 % interval."""
_NO_SPREAD = "the rows do not tell how far the difference varies"


def check_margin(margin: float) -> None:
    """Raise RunError unless a margin of AUROC lies in (0, `LARGEST_MARGIN`)."""
    if not 0 < margin < LARGEST_MARGIN:
        raise RunError(
            f"margin {margin:g} is not between 0 and {LARGEST_MARGIN}, both excluded. Give the "
            "loss of AUROC that would still be acceptable, such as 0.02."
        )


def find_non_inferior(
    rows: Sequence[ComparedHead], test_set: TestSet, margin: float
) -> list[NonInferiority]:
    """Return a test of non-inferiority of every other trained head to the best one.

    The best head is the one with the highest AUROC on these same rows, which favours it: a head
    that is non-inferior to the best is non-inferior to a lesser one too.

    Parameters
    ----------
    rows : sequence of dict
        The rows of a comparison, best AUROC first.
    test_set : TestSet
    margin : float
        Acceptable loss of AUROC, in (0, `LARGEST_MARGIN`).

    Returns
    -------
    list of dict
        ``a`` (the head), ``b`` (the best), ``score`` ("auroc"), ``margin``, ``difference`` (a - b)
        with its 95 % interval ``low``, ``high``; the one-sided ``p`` at the margin, ``p_holm``
        after Holm's correction over these tests, and ``non_inferior``: whether ``p_holm`` is below
        0.025 (for a single head: whether ``low`` lies above ``-margin``). Null, with a ``reason``,
        if the difference has no interval.

    Raises
    ------
    RunError
        The margin is out of range.
    """
    check_margin(margin)
    several = len(test_set.dropped) > 1
    trained = [row for row in rows if not row["baseline"]]
    if not trained:
        return []
    best, *others = trained
    own = {(one.run, one.head): one.probability for one in test_set.contenders}
    reference = own[best["run"], best["head"]]
    found = [
        paired_difference(test_set.y, own[row["run"], row["head"]], reference, test_set.patients)
        for row in others
    ]
    p_values = [non_inferiority_p(difference, margin) for difference in found]
    return [
        {
            "a": row_name(row, several=several),
            "b": row_name(best, several=several),
            "score": "auroc",
            "margin": margin,
            **_ends(difference),
            "p": finite_or_none(p),
            "p_holm": finite_or_none(float(adjusted)),
            "non_inferior": None if isnan(adjusted) else bool(adjusted < ONE_SIDED),
            **_explain_absent(test_set, p),
        }
        for row, difference, p, adjusted in zip(
            others, found, p_values, holm(p_values), strict=True
        )
    ]


def describe_margins(
    tests: Sequence[NonInferiority], margin: float, classes: ClassNames | None = None
) -> list[str]:
    """Return a sentence for each head on whether it is non-inferior to the best one.

    `classes` are those of the comparison, by default normal and abnormal.
    """
    if not tests:
        return [f"Non-inferiority (margin {margin:g}): there is no second trained head to test."]
    after = " after Holm's correction" if len(tests) > 1 else ""
    return [_describe(test, after, classes or name_classes(None)) for test in tests]


def _describe(test: Mapping[str, Any], after: str, classes: ClassNames) -> str:
    if test["non_inferior"] is None:
        return (
            f"Whether {test['a']} is non-inferior to {test['b']} cannot be tested: "
            f"{classes.reword(test['reason'])}."
        )
    verdict = "is non-inferior" if test["non_inferior"] else "is not shown to be non-inferior"
    p = "< 0.001" if test["p_holm"] < 0.001 else f"= {test['p_holm']:.3f}"
    return (
        f"{test['a']} {verdict} to {test['b']} at a margin of {test['margin']:g} in AUROC: "
        f"difference {test['difference']:+.3f} [{test['low']:+.3f}, {test['high']:+.3f}], "
        f"one-sided p {p}{after} (level {ONE_SIDED})."
    )


class _Ends(TypedDict):
    difference: float | None
    low: float | None
    high: float | None


class _Test(_Ends):
    p: float | None
    method: str | None


class _Reason(TypedDict):
    reason: NotRequired[str]


def _ends(difference: Difference) -> _Ends:
    return {
        "difference": finite_or_none(difference.difference),
        "low": finite_or_none(difference.low),
        "high": finite_or_none(difference.high),
    }


def _test_of(found: Difference) -> _Test:
    return {**_ends(found), "p": finite_or_none(found.p), "method": found.method}


def _explain_absent(test_set: TestSet, p: float) -> _Reason:
    return {"reason": _explain(test_set)} if isnan(p) else {}


def _explain(test_set: TestSet) -> str:
    """Return why a difference in AUROC has no interval."""
    patients, y = test_set.patients, test_set.y
    counts = {
        name: len(set(patients[y == label])) for label, name in ((1, "abnormal"), (0, "normal"))
    }
    name = min(counts, key=lambda own: counts[own])
    if counts[name] < MIN_PATIENTS:
        return f"{counts[name]} patients with {name} rows; an interval needs {MIN_PATIENTS}"
    return _NO_SPREAD
