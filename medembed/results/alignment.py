"""Bring the heads of several runs onto the same test rows.

Patients and studies are numbered within a run, so rows of different runs are matched by what
cannot differ: the SHA-256 of the image, or of all the images of a study.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medembed.errors import RunError
from medembed.evaluation.calibration import Calibration, fit_platt, youden_threshold
from medembed.evaluation.scores import by_study
from medembed.results.runs import Run

__all__ = ["BASELINES", "LEVELS", "Contender", "TestSet", "align_runs"]

LEVELS = ("study", "image")
BASELINES = ("class-prior", "region-prior")
"""Heads that look at no image; no run is without them."""


@dataclass(frozen=True)
class Contender:
    """One head of one run, as it competes on the common test rows.

    Attributes
    ----------
    run, head : str
        Its names; `run` is the shortest end of the run's path that tells the runs apart.
    is_baseline : bool
        Whether it is a prior that looks at no image.
    pooling, trial, params, cv : str, int, dict, float, or None
        The winning configuration and its cross-validated score.
    calibration : Calibration
        Platt scaling, fitted on the run's out-of-fold predictions at the same level.
    threshold : float
        Youden's threshold on the calibrated out-of-fold probabilities.
    raw, probability : ndarray of float64, shape (n,)
        Before and after calibration, in the order of the test set's units, in [0, 1].
    """

    run: str
    head: str
    is_baseline: bool
    pooling: str | None
    trial: int | None
    params: dict[str, Any] | None
    cv: float | None
    calibration: Calibration
    threshold: float
    raw: NDArray[np.float64]
    probability: NDArray[np.float64]


@dataclass(frozen=True)
class TestSet:
    """The labelled test rows that all runs have in common.

    Attributes
    ----------
    level : str
        What one row is: "study" or "image".
    units : DataFrame
        Columns patient (int), region (str), label (0 or 1), n_views (views of the study).
    contenders : list of Contender
        All heads of all runs, in the order given.
    dropped : dict of str to int
        For each run, how many of its own labelled test rows fell out.
    """

    __test__ = False  # not a test case, whatever pytest makes of its name

    level: str
    units: pd.DataFrame
    contenders: list[Contender]
    dropped: dict[str, int]

    @property
    def y(self) -> NDArray[np.int8]:
        """Labels, shape (n,)."""
        return self.units["label"].to_numpy(np.int8)

    @property
    def patients(self) -> NDArray[np.int64]:
        """Patient codes, shape (n,)."""
        return self.units["patient"].to_numpy(np.int64)


def align_runs(runs: Sequence[Run], level: str = "study") -> TestSet:
    """Read the runs' predictions, calibrate every head, keep the rows common to all.

    Raises
    ------
    RunError
        A run given twice, no common test rows, or labels that differ between runs.
    """
    names = _short_names(runs)
    entries = [
        entry
        for run, name in zip(runs, names, strict=True)
        for entry in _read_heads(run, name, level)
    ]
    tables = [table for _, table in entries]
    common = _common_keys(tables, names, level)
    units = tables[0].loc[common, ["patient", "region", "label", "n_views"]]
    for contender, table in entries:
        _require_equal_labels(units, table.loc[common], contender, level)
    contenders = [_on_rows(contender, table, common) for contender, table in entries]
    own_sizes = {contender.run: len(table) for contender, table in entries}
    dropped = {name: own_sizes[name] - len(common) for name in names}
    return TestSet(level, units.reset_index(drop=True), contenders, dropped)


def _read_heads(run: Run, name: str, level: str) -> list[tuple[Contender, pd.DataFrame]]:
    predictions = run.predictions()
    labelled = predictions[predictions["label"].notna()]
    labelled = labelled.astype({"label": "int8"})
    studies = _describe_studies(predictions)
    winners = {entry["head"]: entry for entry in run.info.get("leaderboard", [])}
    entries = []
    for head, rows in labelled.groupby("head", sort=False):
        if level == "image" and rows["sha256"].eq("").any():
            continue  # this head judges whole studies and has no score for one image
        train = _units(rows[rows["split"] == "train"].dropna(subset="fold"), level, studies)
        test = _units(rows[rows["split"] == "test"], level, studies)
        winner = winners.get(str(head), {})
        entries.append((_contender(name, str(head), winner, train, test), test))
    return entries


def _contender(
    run: str, head: str, winner: dict[str, Any], train: pd.DataFrame, test: pd.DataFrame
) -> Contender:
    out_of_fold, y = train["probability"].to_numpy(np.float64), train["label"].to_numpy(np.int8)
    calibration = fit_platt(out_of_fold, y)
    raw = test["probability"].to_numpy(np.float64)
    return Contender(
        run=run,
        head=head,
        is_baseline=head in BASELINES,
        pooling=winner.get("pooling"),
        trial=winner.get("trial"),
        params=winner.get("params"),
        cv=winner.get("cv"),
        calibration=calibration,
        threshold=float(youden_threshold(y, calibration.apply(out_of_fold))),
        raw=raw,
        probability=calibration.apply(raw),
    )


def _on_rows(contender: Contender, table: pd.DataFrame, keys: pd.Index) -> Contender:
    order = table.index.get_indexer(keys)
    raw, probability = contender.raw[order], contender.probability[order]
    return replace(contender, raw=raw, probability=probability)


def _units(rows: pd.DataFrame, level: str, studies: pd.DataFrame) -> pd.DataFrame:
    """One row per study or image, indexed by a key that means the same in every run."""
    if level == "study":
        known = studies.reindex((units := by_study(rows))["study"])
        units = units.assign(n_views=known["n_views"].to_numpy())
        keys = known["key"].to_numpy()
    else:
        units = rows.assign(n_views=rows.groupby("study")["study"].transform("size"))
        keys = units["sha256"].to_numpy()
    # Copies of one image in two studies have equal keys; runs list them in the same order.
    copies = pd.Series(keys).groupby(keys).cumcount().astype(str).to_numpy()
    return units.set_index(pd.Index(keys + "#" + copies))


def _describe_studies(predictions: pd.DataFrame) -> pd.DataFrame:
    """Return a digest of each study's labelled images and their number, by the run's study codes.

    Heads that judge whole studies have one row each: they do not say.
    """
    named = predictions[predictions["sha256"].ne("") & predictions["label"].notna()]
    one_head = named[named["head"] == named["head"].iloc[0]] if len(named) else named
    images = one_head.sort_values("sha256").groupby("study")["sha256"]
    keys = images.agg("".join).map(lambda text: hashlib.sha256(text.encode()).hexdigest())
    return pd.DataFrame({"key": keys, "n_views": images.size()})


def _common_keys(tables: Sequence[pd.DataFrame], names: Sequence[str], level: str) -> pd.Index:
    plural = "studies" if level == "study" else "images"
    if not tables or not len(tables[0]):
        raise RunError(
            f"no labelled test {plural} in {', '.join(names)}. "
            "Give the manifest test rows with labels and sweep again."
        )
    common = tables[0].index
    for table in tables[1:]:
        common = common[common.isin(table.index)]
    if not len(common):
        raise RunError(
            f"the runs {', '.join(names)} have no test {plural} in common: they were tested on "
            "different images. Compare runs whose manifests hold the same test rows."
        )
    return common


def _require_equal_labels(
    units: pd.DataFrame, rows: pd.DataFrame, contender: Contender, level: str
) -> None:
    n_other = int((units["label"].to_numpy() != rows["label"].to_numpy()).sum())
    if n_other:
        plural = "studies" if level == "study" else "images"
        raise RunError(
            f"run {contender.run} was scored on other labels: {n_other} of the {len(units)} common "
            f"test {plural} differ. Sweep both caches on one manifest, then compare."
        )


def _short_names(runs: Sequence[Run]) -> list[str]:
    paths = [run.path.resolve() for run in runs]
    for path in paths:
        if paths.count(path) > 1:
            raise RunError(f"run {path} was given twice. Name each run once.")
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names
