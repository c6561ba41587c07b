"""Scores by layer of an encoder: each with its interval, and tested against the last layer."""

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medembed.core.poolings import block_of
from medembed.evaluation.bootstrap import finite_or_none
from medembed.evaluation.intervals import (
    Variant,
    bootstrap_variants,
    holm,
    paired_difference,
    plain,
)
from medembed.evaluation.paired import Difference
from medembed.results.comparison_schema import LayerSeries, LayerTest
from medembed.results.runs import Run

__all__ = ["compare_layers", "find_layers"]


def compare_layers(
    studies: pd.DataFrame,
    probabilities: Mapping[str, NDArray[np.float64]],
    *,
    head: str,
    pooling: str,
    n_blocks: int | None = None,
) -> LayerSeries:
    """Return the AUROC of each layer, and its difference from that of the last.

    Parameters
    ----------
    studies : DataFrame
        One row per study: label, patient.
    probabilities : dict of str to array of shape (n,)
        Out-of-fold probabilities of the studies by pooling, from the first layer to the last; what
        comes last is compared with.
    head, pooling : str
        Who predicted, and what the poolings have in common, such as `mean`.
    n_blocks : int, optional
        Blocks of the encoder.

    Returns
    -------
    dict
        JSON values: ``head``, ``pooling``, ``n`` studies, ``n_patients``, ``n_blocks``; ``points``
        with ``pooling``, ``block`` (None: the tower's own output), ``auroc`` with its interval and
        ``versus_last`` (None for the last itself): ``difference``, ``low``, ``high``, ``p``,
        ``method``, and ``p_holm`` after Holm's correction over the layers; ``best`` and ``last``,
        poolings; and ``unfreeze``, the number of blocks above the best one, None where the best is
        the last, or their number is unknown. Intervals and tests take patients as clusters; see
        `evaluation.intervals.paired_differences`.
    """
    y, patients = studies["label"].to_numpy(np.int8), studies["patient"].to_numpy()
    variants = {name: Variant(own, 0.5, ("auroc",)) for name, own in probabilities.items()}
    scores = bootstrap_variants(y, variants, patients)
    *earlier, last = probabilities
    tests = {
        name: paired_difference(y, probabilities[name], probabilities[last], patients)
        for name in earlier
    }
    adjusted = dict(zip(earlier, holm([test.p for test in tests.values()]), strict=True))
    values = {name: scores[name]["auroc"].value for name in probabilities}
    best = max(values, key=lambda name: -np.inf if np.isnan(values[name]) else values[name])
    return {
        "head": head,
        "pooling": pooling,
        "n": len(studies),
        "n_patients": int(studies["patient"].nunique()),
        "n_blocks": n_blocks,
        "points": [
            {
                "pooling": name,
                "block": _block(name),
                "auroc": plain(scores[name]["auroc"]),
                "versus_last": None
                if name == last
                else _describe_test(tests[name], float(adjusted[name])),
            }
            for name in probabilities
        ],
        "best": best,
        "last": last,
        "unfreeze": _count_above(best, last, n_blocks),
    }


def find_layers(runs: Sequence[Run], names: Sequence[str]) -> list[LayerSeries]:
    """Return the scores by layer that the runs hold, each with its ``run``."""
    return [
        cast("LayerSeries", {"run": name, **series})
        for run, name in zip(runs, names, strict=True)
        for series in run.info.layers or []
    ]


def _describe_test(test: Difference, p_holm: float) -> LayerTest:
    return cast("LayerTest", {**test.as_dict(), "p_holm": finite_or_none(p_holm)})


def _block(name: str) -> int | None:
    at = block_of(name)
    return None if at is None else at[1]


def _count_above(best: str, last: str, n_blocks: int | None) -> int | None:
    block, end = _block(best), _block(last)
    if block is None or n_blocks is None or best == last or end not in (None, n_blocks):
        return None
    return n_blocks - block if n_blocks > block else None
