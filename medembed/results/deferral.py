"""The studies that heads would defer to a reader, by the prediction sets of their models."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from medembed.core.errors import ModelError, RunError
from medembed.evaluation.conformal import Conformal
from medembed.evaluation.intervals import plain
from medembed.evaluation.selective import deferral_curve, estimate_deferral
from medembed.results.alignment import ScoredHead, TestSet
from medembed.results.comparison_schema import Deferral, HeadDeferral
from medembed.results.runs import Run

__all__ = ["NOMINAL", "find_deferrals", "find_sets"]

NOMINAL = (0.8, 0.9, 0.95)
"""Nominal coverages that are reported with intervals."""
ALPHAS = tuple(step / 200 for step in range(1, 101))
"""The curve's shares of sets that may miss the truth."""

NOT_STUDIES = "Prediction sets are of studies: compare with --level study."
PRIOR = "A baseline reads no embedding and has no prediction sets."
NO_MODEL = "This run holds no model of the head."
DAMAGED = "The model cannot be read: it was damaged or edited. Make the run again."
OLDER = "The model was saved before models had prediction sets. Make the run again."


def find_deferrals(runs: Sequence[Run], test_set: TestSet) -> dict[tuple[str, str], HeadDeferral]:
    """Return, by run and head, how prediction sets perform on test.

    The sets are those of `medembed predict`: of the packaged model, on the head's study
    probabilities before calibration. A run that evaluates a model on other data may keep the
    model's conformal scores in its ``decisions``.

    Parameters
    ----------
    runs : sequence of Run
        The runs of the test set, in its order.
    test_set : TestSet

    Returns
    -------
    dict of (str, str) to dict
        ``deferral``: None if the head has no sets, else ``levels``, one per nominal coverage of
        `NOMINAL` (``nominal``, ``alpha``, and each of `abstention.SHARES` as ``{value, low, high,
        method, k, n}``; ``regions``: by region these shares, ``n``, ``n_abnormal``, and
        ``coverage_of``, "region" or "marginal": whether coverage holds within the region, see
        `Conformal.is_marginal`), ``curve``, a list for each column of `deferral_curve`,
        ``min_group``, and ``warning``, if the sets are not reliable. ``deferral_note``: why there
        are no sets, else None.
    """
    by_name = dict(zip(test_set.dropped, runs, strict=True))
    found: dict[tuple[str, str], HeadDeferral] = {}
    for contender in test_set.contenders:
        conformal, note = None, NOT_STUDIES
        if test_set.level == "study":
            conformal, note = _find_conformal(by_name[contender.run], contender)
        deferral = None
        if conformal is not None:
            deferral = _measure(conformal, contender, test_set)
        found[contender.run, contender.head] = {
            "deferral": deferral,
            "deferral_note": note if deferral is None else None,
        }
    return found


def find_sets(
    runs: Sequence[Run], test_set: TestSet, contender: ScoredHead, alpha: float = 0.1
) -> NDArray[np.uint8] | None:
    """Return a head's prediction set of each test row, or None if it has none.

    Returns
    -------
    ndarray of uint8, shape (n,), or None
        0 neither class, 1 normal, 2 abnormal, 3 both.
    """
    if test_set.level != "study":
        return None
    by_name = dict(zip(test_set.dropped, runs, strict=True))
    conformal, _ = _find_conformal(by_name[contender.run], contender)
    if conformal is None:
        return None
    found = conformal.sets(contender.raw, test_set.units["region"].to_numpy(), alpha)
    return np.asarray(found @ np.array([1, 2]), np.uint8)


def _measure(conformal: Conformal, contender: ScoredHead, test_set: TestSet) -> Deferral:
    p_values = conformal.p_values(contender.raw, test_set.units["region"].to_numpy())
    alphas = [round(1 - nominal, 6) for nominal in NOMINAL]
    levels = estimate_deferral(test_set.y, p_values, test_set.patients, alphas)
    regions = _measure_regions(conformal, p_values, test_set, alphas)
    curve = deferral_curve(test_set.y, p_values, ALPHAS)
    told = [
        {"nominal": nominal, "alpha": alpha, **level, "regions": own}
        for nominal, alpha, level, own in zip(NOMINAL, alphas, levels, regions, strict=True)
    ]
    columns = {str(name): column.tolist() for name, column in curve.items()}
    known = {"min_group": conformal.min_group, "warning": conformal.warning()}
    return cast("Deferral", plain({"levels": told, "curve": columns, **known}))


def _measure_regions(
    conformal: Conformal,
    p_values: np.ndarray,
    test_set: TestSet,
    alphas: Sequence[float],
) -> list[dict[str, dict[str, Any]]]:
    """Return, for each alpha, how the sets perform in each region, by the region's name."""
    names = test_set.units["region"].to_numpy(str)
    found: list[dict[str, dict[str, Any]]] = [{} for _ in alphas]
    for name in np.unique(names).tolist():
        own = names == name
        y = test_set.y[own]
        known = {
            "n": len(y),
            "n_abnormal": int(y.sum()),
            "coverage_of": "marginal" if conformal.is_marginal(np.array([name]))[0] else "region",
        }
        levels = estimate_deferral(y, p_values[own], test_set.patients[own], alphas)
        for place, level in zip(found, levels, strict=True):
            place[name] = {**known, **level}
    return found


def _find_conformal(run: Run, contender: ScoredHead) -> tuple[Conformal | None, str]:
    """Return a head's conformal scores, or why there are none."""
    if contender.is_baseline:
        return None, PRIOR
    own = run.info.decisions.get(contender.head, {}).get("conformal")
    try:
        if own is not None:
            return Conformal.from_dict(own), ""
        return _read_model(run, contender.head)
    except ModelError:
        # a comparison reads predictions: a damaged model, which it does not need, must not stop it
        return None, DAMAGED


def _read_model(run: Run, head: str) -> tuple[Conformal | None, str]:
    try:
        path = run.model_path(head)
    except RunError:
        return None, NO_MODEL
    if not path.is_dir():
        return None, NO_MODEL
    # these imports take longer than most comparisons, and runs without models do not need them
    from medembed.heads.packaging import read_document
    from medembed.results.model_card import read_conformal

    conformal = read_conformal(run, head)
    note = read_document(path).card.get("conformal_note") if conformal is None else None
    return conformal, note if isinstance(note, str) and note else OLDER
