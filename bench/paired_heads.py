"""Is a head's test AUROC lower than it was? Old and new code on the same tables and seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from medembed.evaluation.paired import holm

__all__ = ["compare_heads"]

Scores = Mapping[tuple[str, int], Mapping[str, float]]
"""(table, seed) -> head -> test AUROC."""


def compare_heads(before: Scores, now: Scores) -> dict[str, dict[str, Any]]:
    """Compare each head over the pairs of table and seed that both have.

    Returns
    -------
    dict
        head -> `pairs`, means `before` and `now`, `difference` with its 95 % `interval`
        (Student's), `p_worse` and `p_worse_wilcoxon` (one-sided: how likely a difference as low is
        if the new code is not worse). `tables` holds, for each table, `pairs`, `difference`,
        `interval`, `p_worse` and `p_worse_holm`, which Holm's method corrects for the tables. Only
        heads and tables with two pairs or more.
    """
    found: dict[str, dict[str, Any]] = {}
    pairs = sorted(set(before) & set(now))
    heads = dict.fromkeys(head for pair in pairs for head in now[pair] if head in before[pair])
    for head in heads:
        own = [pair for pair in pairs if head in before[pair] and head in now[pair]]
        if len(own) < 2:
            continue
        old, new = (np.array([scores[pair][head] for pair in own]) for scores in (before, now))
        change = new - old
        found[head] = {
            "pairs": len(own),
            "before": round(float(old.mean()), 5),
            "now": round(float(new.mean()), 5),
            **_test(change),
            "p_worse_wilcoxon": _wilcoxon(change),
            "tables": _by_table([table for table, _ in own], change),
        }
    return found


def _by_table(tables: Sequence[str], change: np.ndarray) -> dict[str, dict[str, Any]]:
    own = {name: change[[table == name for table in tables]] for name in dict.fromkeys(tables)}
    found = {
        name: {"pairs": len(values), **_test(values)}
        for name, values in own.items()
        if len(values) >= 2
    }
    corrected = holm([each["p_worse"] for each in found.values()])
    for each, p in zip(found.values(), corrected.tolist(), strict=True):
        each["p_worse_holm"] = round(p, 5)
    return found


def _test(change: np.ndarray) -> dict[str, Any]:
    """Student's paired test and interval; equal scores are not worse, and differ by 0 surely."""
    if not change.any():
        return {"difference": 0.0, "interval": [0.0, 0.0], "p_worse": 1.0}
    tested = stats.ttest_1samp(change, 0.0, alternative="less")
    interval = stats.ttest_1samp(change, 0.0).confidence_interval(0.95)
    return {
        "difference": round(float(change.mean()), 5),
        "interval": [round(float(interval.low), 5), round(float(interval.high), 5)],
        "p_worse": round(float(tested.pvalue), 5),
    }


def _wilcoxon(change: np.ndarray) -> float:
    if not change.any():
        return 1.0
    return round(float(stats.wilcoxon(change, alternative="less").pvalue), 5)
