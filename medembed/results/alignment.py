"""Align the heads of several runs on common test rows.

Patients and studies are numbered within a run, so rows of different runs are matched by something
that cannot differ: the SHA-256 of the image, or of all the images of a study.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medembed.core.errors import RunError
from medembed.evaluation.calibration import Calibration, IsotonicCalibration
from medembed.evaluation.scores import by_study
from medembed.evaluation.thresholds import SHOWN, OperatingPoint, ThresholdRule
from medembed.heads.registry import BASELINES
from medembed.results.decisions import SENSITIVITY, Decisions, fit_decisions, read_decisions
from medembed.results.predictions import PRIORS
from medembed.results.run_schema import RunInfo
from medembed.results.runs import Run

__all__ = ["LEVELS", "SENSITIVITY", "ScoredHead", "TestSet", "align_runs", "short_names"]

LEVELS = ("study", "image")


@dataclass(frozen=True)
class ScoredHead:
    """One head of one run, with its scores of the common test rows.

    Attributes
    ----------
    run, head : str
        The names of both; `run` is the shortest end of the run's path that tells the runs apart.
    is_baseline : bool
        Whether the head is a prior, which looks at no image.
    pooling, trial, params, cv : str, int, dict, float, or None
        The winning configuration and its cross-validated score.
    n_tried : int or None
        The number of configurations that the winner was chosen from.
    cv_method : str or None
        How the cross-validated score was made, see `run_schema.CV_METHOD`; None in older runs.
    seconds : float or None
        Duration of all the head's trials.
    depth : int or None
        Encoder blocks that were trained with the head.
    seed : int or None
    train_fraction : float
        Share of the training patients that the head was trained on, in (0, 1].
    n_train_patients : int
        Patients of all folds, including those held out.
    calibration : Calibration
        Platt scaling, fitted on the run's out-of-fold predictions at the same level. For a run that
        evaluates a model on other data, this and all attributes below are the model's own.
    calibrations : dict of str to Calibration or IsotonicCalibration
        All calibrations fitted on those predictions: "none", "platt", "temperature", "isotonic".
    threshold : float
        Youden's threshold on the calibrated out-of-fold probabilities.
    sensitive_threshold : float or None
        The highest threshold on these with a sensitivity of `SENSITIVITY`; None if an evaluated
        model does not record one.
    points : tuple of OperatingPoint
        Operating points of the test set's rules; for an evaluated model, those that it records.
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
    n_tried: int | None
    cv_method: str | None
    seconds: float | None
    depth: int | None
    seed: int | None
    train_fraction: float
    n_train_patients: int
    calibration: Calibration
    calibrations: dict[str, Calibration | IsotonicCalibration]
    threshold: float
    sensitive_threshold: float | None
    points: tuple[OperatingPoint, ...]
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
        Columns patient (int), region (str), label (0 or 1), n_views (views of the study), images
        (the SHA-256 of each image, joined by spaces).
    contenders : list of ScoredHead
        All heads of all runs, in the order of the runs.
    dropped : dict of str to int
        For each run, how many of its labelled test rows other runs lack.
    rules : tuple of ThresholdRule
        The operating points to show.
    """

    __test__ = False  # not a test case, whatever pytest makes of its name

    level: str
    units: pd.DataFrame
    contenders: list[ScoredHead]
    dropped: dict[str, int]
    rules: tuple[ThresholdRule, ...] = SHOWN

    @property
    def y(self) -> NDArray[np.int8]:
        """Labels, shape (n,)."""
        return self.units["label"].to_numpy(np.int8)

    @property
    def patients(self) -> NDArray[np.int64]:
        """Patient codes, shape (n,)."""
        return self.units["patient"].to_numpy(np.int64)


def align_runs(
    runs: Sequence[Run], level: str = "study", rules: Sequence[ThresholdRule] = ()
) -> TestSet:
    """Read the runs' predictions, calibrate every head, and keep the rows common to all.

    `rules` are operating points in addition to those that are always shown.

    Raises
    ------
    RunError
        The level is unknown, a run is given twice, there are no common test rows, the label, region
        or patient of a row differs between runs, or an evaluated model has no threshold for a rule.
    """
    if level not in LEVELS:
        raise RunError(f"level {level!r} is unknown. Choose one of: {', '.join(LEVELS)}.")
    names = short_names(runs)
    entries = [
        entry
        for run, name in zip(runs, names, strict=True)
        for entry in _read_heads(run, name, level, rules)
    ]
    tables = [table for _, table in entries]
    common = _common_keys(tables, names, level)
    units = tables[0].loc[common, ["patient", "region", "label", "n_views", "images"]]
    for contender, table in entries:
        _require_same_test(units, table.loc[common], entries[0][0].run, contender.run, level)
    contenders = [_on_rows(contender, table, common) for contender, table in entries]
    own_sizes = {contender.run: len(table) for contender, table in entries}
    dropped = {name: own_sizes[name] - len(common) for name in names}
    shown = tuple(dict.fromkeys((*SHOWN, *rules)))
    return TestSet(level, units.reset_index(drop=True), contenders, dropped, shown)


def _read_heads(
    run: Run, name: str, level: str, rules: Sequence[ThresholdRule]
) -> list[tuple[ScoredHead, pd.DataFrame]]:
    predictions = run.predictions()
    studies = _describe_studies(predictions[predictions["split"] == "test"])
    labelled = predictions[predictions["label"].notna()].astype({"label": "int8"})
    del predictions  # of a million rows a gigabyte
    folded = labelled[(labelled["split"] == "train") & labelled["fold"].notna()]
    n_patients = int(folded["patient"].nunique())
    entries = []
    for head, rows in labelled.groupby("head", sort=False):
        _require_winners_rows(run, str(head), rows)
        if level == "image" and rows["sha256"].eq("").any():
            continue  # this head predicts whole studies and has no score for one image
        test = _units(rows[rows["split"] == "test"], name, level, studies)
        given = (run.info.asked.share, n_patients)
        own = run.info.decisions.get(str(head))
        if own is None:
            train = rows[rows["split"] == "train"].dropna(subset="fold")
            decisions = fit_decisions(by_study(train) if level == "study" else train, rules)
        else:
            decisions = read_decisions(own, run.path, () if head in PRIORS else rules)
        entries.append((_contender(run.info, name, str(head), given, decisions, test), test))
    return entries


def _require_winners_rows(run: Run, head: str, rows: pd.DataFrame) -> None:
    """Refuse predictions of a trial that `run.json` does not name as the winner."""
    named = run.info.winner(head).trial
    others = sorted(set(rows["trial"].dropna().unique()) - {named})
    if named is not None and others:
        raise RunError(
            f"run.json of {run.path} names trial {named} as the winner of {head}, and "
            f"predictions.parquet holds trial {others[0]}: the two files are not of one run. "
            "Restore them, or run it again into another --out."
        )


def _contender(
    info: RunInfo,
    run: str,
    head: str,
    given: tuple[float, int],
    decisions: Decisions,
    test: pd.DataFrame,
) -> ScoredHead:
    raw, winner = test["probability"].to_numpy(np.float64), info.winner(head)
    known = winner.model_fields_set  # what the leaderboard lacks, the run may say of all heads
    return ScoredHead(
        run=run,
        head=head,
        is_baseline=head in PRIORS or head in BASELINES,
        pooling=winner.pooling,
        trial=winner.trial,
        params=winner.params,
        cv=winner.cv,
        n_tried=winner.n_tried,
        cv_method=winner.cv_method if "cv_method" in known else info.cv_method,
        seconds=winner.seconds,
        depth=winner.depth,
        seed=winner.seed if "seed" in known else info.seed,
        train_fraction=given[0],
        n_train_patients=given[1],
        calibration=decisions.calibration,
        calibrations=decisions.calibrations,
        threshold=decisions.threshold,
        sensitive_threshold=decisions.sensitive_threshold,
        points=decisions.points,
        raw=raw,
        probability=decisions.calibration.apply(raw),
    )


def _on_rows(contender: ScoredHead, table: pd.DataFrame, keys: pd.Index) -> ScoredHead:
    order = table.index.get_indexer(keys)
    raw, probability = contender.raw[order], contender.probability[order]
    return replace(contender, raw=raw, probability=probability)


def _units(rows: pd.DataFrame, name: str, level: str, studies: pd.DataFrame) -> pd.DataFrame:
    """Return one row per study or image, indexed by a key that is valid across runs."""
    if level == "study":
        known = studies.reindex((units := by_study(rows))["study"])
        if known["key"].isna().any():
            raise RunError(
                f"the run {name} does not say which images its studies have: no head in its "
                "predictions.parquet names them. Delete the run and make it again."
            )
        units = units.assign(n_views=known["n_views"].to_numpy(), images=known["images"].to_numpy())
        keys = known["key"].to_numpy()
    else:
        sizes = rows.groupby("study")["study"].transform("size")
        units = rows.assign(n_views=sizes, images=rows["sha256"])
        keys = units["sha256"].to_numpy()
    # Copies of an image in two studies have equal keys; all runs list them in the same order.
    copies = pd.Series(keys).groupby(keys).cumcount().astype(str).to_numpy()
    return units.set_index(pd.Index(keys + "#" + copies))


def _describe_studies(tested: pd.DataFrame) -> pd.DataFrame:
    """Return a digest of each test study's labelled images, and their number, by the run's codes.

    The images are those of the head with the most rows, the first of several. Heads that predict
    whole studies are not considered: they have one row per study.
    """
    is_named = tested["sha256"].ne("") & tested["label"].notna()
    named = tested.loc[is_named, ["study", "head", "sha256"]]
    sizes = named.groupby(["study", "head"], sort=False).size()
    ranked = sizes.sort_values(ascending=False, kind="stable").reset_index()
    fullest = ranked.drop_duplicates("study").set_index("study")["head"]
    one_head = named[named["head"] == named["study"].map(fullest)]
    one_head = one_head.sort_values(["study", "sha256"])
    studies, names = one_head["study"].to_numpy(), one_head["sha256"].tolist()
    starts = np.flatnonzero(np.diff(studies, prepend=studies[:1] - 1)).tolist()
    joined = [" ".join(names[a:b]) for a, b in pairwise([*starts, len(names)])]
    return pd.DataFrame(
        {
            "key": [hashlib.sha256(text.encode()).hexdigest() for text in joined],
            "n_views": np.diff([*starts, len(names)]),
            "images": joined,
        },
        index=pd.Index(studies[starts], name="study"),
    )


def _common_keys(tables: Sequence[pd.DataFrame], names: Sequence[str], level: str) -> pd.Index:
    plural = "studies" if level == "study" else "images"
    if not tables or not len(tables[0]):
        raise RunError(
            f"no labelled test {plural} in {', '.join(names)}. "
            "Give the manifest test rows with labels, and make the run again."
        )
    common = tables[0].index
    for table in tables[1:]:
        if not common.equals(table.index):
            common = common[common.isin(table.index)]
    if not len(common):
        raise RunError(
            f"the runs {', '.join(names)} have no test {plural} in common: they were tested on "
            "different images. Compare runs whose manifests hold the same test rows; a run of "
            "`medembed evaluate` on other images has a page of its own: name it alone."
        )
    return common


def _require_same_test(
    units: pd.DataFrame, rows: pd.DataFrame, first: str, run: str, level: str
) -> None:
    """Refuse rows whose label, region or patient differs from those in the run `first`."""
    codes = [pd.factorize(own["patient"])[0] for own in (units, rows)]  # numbered within a run
    compared = {
        "labels": (units["label"], rows["label"]),
        "regions": (units["region"], rows["region"]),
        "patients": tuple(map(pd.Series, codes)),
    }
    for name, (expected, found) in compared.items():
        n_other = int((expected.to_numpy() != found.to_numpy()).sum())
        if n_other:
            plural = "studies" if level == "study" else "images"
            raise RunError(
                f"run {run} was scored on other {name} than {first}: {n_other} of the {len(units)} "
                f"common test {plural} differ. Sweep both caches on one manifest, then compare."
            )


def short_names(runs: Sequence[Run]) -> list[str]:
    """Return the shortest ends of the runs' paths that tell them apart.

    Raises
    ------
    RunError
        A run is given twice.
    """
    paths = [run.path.resolve() for run in runs]
    for path in paths:
        if paths.count(path) > 1:
            raise RunError(f"run {path} was given twice. Name each run once.")
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names
