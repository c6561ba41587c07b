"""Is a head's test AUROC lower than it was? Old and new code on the same tables and seeds."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

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
        if the new code is not worse), and the mean difference in each of the `tables`. Only heads
        with two pairs or more.
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
        by_table: dict[str, list[float]] = {}
        for (table, _), value in zip(own, change.tolist(), strict=True):
            by_table.setdefault(table, []).append(value)
        found[head] = {
            "pairs": len(own),
            "before": round(float(old.mean()), 5),
            "now": round(float(new.mean()), 5),
            "difference": round(float(change.mean()), 5),
            **_test(change),
            "tables": {table: round(float(np.mean(v)), 5) for table, v in by_table.items()},
        }
    return found


def _test(change: np.ndarray) -> dict[str, Any]:
    if not change.any():
        return {"interval": [0.0, 0.0], "p_worse": 1.0, "p_worse_wilcoxon": 1.0}
    tested = stats.ttest_1samp(change, 0.0, alternative="less")
    interval = stats.ttest_1samp(change, 0.0).confidence_interval(0.95)
    return {
        "interval": [round(float(interval.low), 5), round(float(interval.high), 5)],
        "p_worse": round(float(tested.pvalue), 5),
        "p_worse_wilcoxon": round(float(stats.wilcoxon(change, alternative="less").pvalue), 5),
    }
