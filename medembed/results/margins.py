"""Whether a head is worse than the best one by less than a margin that was set beforehand."""

from collections.abc import Sequence
from math import isnan
from typing import Any

from medembed.core.errors import RunError
from medembed.evaluation.bootstrap import MIN_PATIENTS, finite_or_none
from medembed.evaluation.paired import (
    Difference,
    holm,
    non_inferiority_p,
    paired_difference,
)
from medembed.results.alignment import TestSet
from medembed.results.significance import row_name

__all__ = ["LARGEST_MARGIN", "check_margin", "describe_margins", "find_non_inferior"]

LARGEST_MARGIN = 0.5
"""Of AUROC: an AUROC of 0.5 is chance, so a larger margin would pass any head."""
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
    rows: Sequence[dict[str, Any]], test_set: TestSet, margin: float
) -> list[dict[str, Any]]:
    """Test every other trained head against the best one.

    The best is the one of the highest AUROC on these very rows, which favours it: a head that is
    found non-inferior to it is so to a lesser one too.

    Parameters
    ----------
    rows : sequence of dict
        Those of a comparison, best AUROC first.
    test_set : TestSet
    margin : float
        Loss of AUROC that would be acceptable, in (0, `LARGEST_MARGIN`).

    Returns
    -------
    list of dict
        ``a`` (the head), ``b`` (the best), ``score`` ("auroc"), ``margin``, ``difference`` (a - b)
        with its 95 % interval ``low``, ``high``; the one-sided ``p`` at the margin, ``p_holm``
        after Holm's correction over these tests, and ``non_inferior``: whether that is below 0.025
        (of one head alone: whether ``low`` lies above ``-margin``). Null, with a ``reason``, where
        the difference has no interval.

    Raises
    ------
    RunError
        As `check_margin`.
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
            **({"reason": _explain(test_set)} if isnan(p) else {}),
        }
        for row, difference, p, adjusted in zip(
            others, found, p_values, holm(p_values), strict=True
        )
    ]


def describe_margins(tests: Sequence[dict[str, Any]], margin: float) -> list[str]:
    """Say of each head, in a sentence, whether it is non-inferior to the best one."""
    if not tests:
        return [f"Non-inferiority (margin {margin:g}): there is no second trained head to test."]
    after = " after Holm's correction" if len(tests) > 1 else ""
    return [_describe(test, after) for test in tests]


def _describe(test: dict[str, Any], after: str) -> str:
    if test["non_inferior"] is None:
        return (
            f"Whether {test['a']} is non-inferior to {test['b']} cannot be tested: "
            f"{test['reason']}."
        )
    verdict = "is non-inferior" if test["non_inferior"] else "is not shown to be non-inferior"
    p = "< 0.001" if test["p_holm"] < 0.001 else f"= {test['p_holm']:.3f}"
    return (
        f"{test['a']} {verdict} to {test['b']} at a margin of {test['margin']:g} in AUROC: "
        f"difference {test['difference']:+.3f} [{test['low']:+.3f}, {test['high']:+.3f}], "
        f"one-sided p {p}{after} (level {ONE_SIDED})."
    )


def _ends(difference: Difference) -> dict[str, float | None]:
    return {
        name: finite_or_none(getattr(difference, name)) for name in ("difference", "low", "high")
    }


def _explain(test_set: TestSet) -> str:
    """Return why a difference in AUROC has no interval."""
    patients, y = test_set.patients, test_set.y
    counts = {
        name: len(set(patients[y == label])) for label, name in ((1, "abnormal"), (0, "normal"))
    }
    name = min(counts, key=lambda own: counts[own])
    if counts[name] < MIN_PATIENTS:
        return f"{counts[name]} patients with {name} rows; an interval wants {MIN_PATIENTS}"
    return _NO_SPREAD
