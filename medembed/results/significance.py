"""Paired tests between the heads of a comparison, on the test rows that all of them have."""

from itertools import combinations
from typing import Any

from medembed.evaluation.delong import auroc_differences
from medembed.evaluation.intervals import holm, paired_differences, plain
from medembed.evaluation.paired import bootstrap_p, mcnemar
from medembed.results.alignment import ScoredHead, TestSet

__all__ = ["SIGNIFICANCE", "pair_rows", "row_name", "versus_best"]

SIGNIFICANCE = 0.05
"""A difference counts where Holm's adjusted p is below this."""
RESAMPLES_PER_PAIR = 100
"""Keeps the smallest p that the bootstrap can give, times the number of pairs, near 0.02."""


def pair_rows(
    test_set: TestSet, rows: list[dict[str, Any]], n_resamples: int, seed: int
) -> dict[tuple[int, int], dict[str, Any]]:
    """Test the trained heads against each other and the best row against the priors too.

    Returns
    -------
    dict of (int, int) to dict
        By the places of two rows, the better first: ``a``, ``b``, ``score``, ``difference``,
        ``low``, ``high``, ``p`` and ``method`` of AUROC, see `paired_differences`, ``p_holm``
        after Holm's correction over all pairs; as cross-checks, not corrected, ``p_bootstrap`` and
        ``p_delong`` (normal) of the same difference and ``mcnemar`` of the decisions (rows that
        only one of the two got right).
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
            **found[str(i), str(j)].as_dict(),
            "p_holm": plain(float(p)),
            "p_bootstrap": plain(resampled[str(i), str(j)]),
            "p_delong": plain(delong[str(i), str(j)].p),
            "mcnemar": plain(_mcnemar(test_set, contenders[i], contenders[j])),
        }
        for (i, j), p in zip(chosen, adjusted, strict=True)
    }


def versus_best(pair: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return p against the best, None for the best itself; `tied` where it may be chance."""
    if pair is None:
        return None
    return {
        "difference": pair["difference"],
        "p_holm": pair["p_holm"],
        "tied": pair["p_holm"] is not None and pair["p_holm"] >= SIGNIFICANCE,
    }


def row_name(row: dict[str, Any], *, several: bool) -> str:
    """Return the head's name, with its run's where there are several runs."""
    return f"{row['run']}/{row['head']}" if several else str(row["head"])


def _mcnemar(test_set: TestSet, a: ScoredHead, b: ScoredHead) -> dict[str, Any]:
    found = mcnemar(test_set.y, a.probability >= a.threshold, b.probability >= b.threshold)
    return {"only_a": found.only_a, "only_b": found.only_b, "p": found.p}
