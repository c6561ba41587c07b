"""Which labels of a run's data its own heads contradict.

Labels of train are judged by out-of-fold scores, so no head has seen the label, or another study of
the patient. Labels of test are judged by the final models, which have seen none of test. Each head
is calibrated on its out-of-fold scores, the heads are averaged, and the mean, which is too cautious
(Ranjan and Gneiting, Journal of the Royal Statistical Society B 72, 2010), is calibrated again.
Thresholds and the noise model are fitted on train alone.
"""

import json
import os
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from medembed.core.errors import ManifestError, PathNotFoundError, RunError, TrainingDataError
from medembed.core.files import as_path, read_plain
from medembed.core.schema import parse
from medembed.core.text import Summarised, Summary, counted
from medembed.dataset.manifest import Manifest, read_manifest, require_hashes
from medembed.evaluation.bootstrap import finite_or_none
from medembed.evaluation.calibration import fit_platt
from medembed.evaluation.label_errors import (
    NoiseModel,
    Thresholds,
    bound_errors,
    find_thresholds,
    fit_noise,
)
from medembed.evaluation.scores import by_study
from medembed.heads.registry import BASELINES
from medembed.results.audit_schema import AuditedPart, LabelAuditDocument, Noise, Suspect
from medembed.results.predictions import PRIORS
from medembed.results.runs import Run, RunLike, open_run

__all__ = ["DOCUMENT", "LabelAudit", "audit_labels", "read_suspects"]

DOCUMENT = "audit.json"
"""The file of a review that holds its `LabelAuditDocument`."""

_KEYS = ["study", "patient", "split", "region", "label"]


@dataclass(frozen=True, repr=False)
class LabelAudit(Summarised):
    """What an audit found.

    Attributes
    ----------
    run : Run
    manifest : Manifest
    heads : list of str
        The heads that judged.
    rows : pandas.DataFrame
        A row per audited study (or image, if labels are per image): `split`, `region`, `label` (0
        or 1), `probability` (of abnormal), a column per head in `scores`, `images` (list of
        SHA-256), `is_suspect`, `chance` (probability that a right label would be a suspect), and
        `error` (probability that the label is wrong). Suspects come first, the most contradicted
        on top.
    scores : pandas.DataFrame
        Calibrated probabilities, a column per head, in the order of `rows`.
    thresholds : Thresholds
    noise : NoiseModel
    error_limits : tuple of float
        Ends of the 95 % interval for `errors`, by a bootstrap over patients of train; NaN where it
        cannot be estimated.
    n_not_scored : int
        Labelled studies that not every head has scored without having seen their label.
    """

    run: Run
    manifest: Manifest
    heads: list[str]
    rows: pd.DataFrame
    scores: pd.DataFrame
    thresholds: Thresholds
    noise: NoiseModel
    error_limits: tuple[float, float]
    n_not_scored: int

    @property
    def suspects(self) -> pd.DataFrame:
        """The rows whose label is contradicted, the most contradicted first."""
        return self.rows[self.rows["is_suspect"]]

    @property
    def expected(self) -> float:
        """The number of suspects that is expected if all labels are right."""
        return float(self.rows["chance"].sum())

    @property
    def errors(self) -> float:
        """The estimated number of wrong labels, suspects or not."""
        return float(self.rows["error"].sum())

    def parts(self) -> list[AuditedPart]:
        """Return counts of each split, followed by those of its regions."""
        found = []
        for split in ("train", "test"):
            own = self.rows[self.rows["split"] == split]
            if len(own):
                found.append(_count(own, split, None))
                found += [_count(of, split, str(name)) for name, of in own.groupby("region")]
        return found

    def document(self, *, names: bool = False) -> LabelAuditDocument:
        """Return what `audit.json` holds; names of studies and images only if asked for."""
        known = _names_by_hash(self.manifest) if names else {}
        low, high = map(finite_or_none, self.error_limits)
        return LabelAuditDocument(
            format="medembed-label-audit",
            version=1,
            run=self.run.name,
            manifest=self.manifest.digest(),
            level="study" if self.manifest.label_level == "study" else "image",
            synthetic=self.run.info.data.synthetic,
            heads=self.heads,
            thresholds={"normal": self.thresholds.normal, "abnormal": self.thresholds.abnormal},
            noise=Noise(**vars(self.noise)),
            studies=len(self.rows),
            not_scored=self.n_not_scored,
            expected=self.expected,
            errors=self.errors,
            errors_low=low,
            errors_high=high,
            parts=self.parts(),
            suspects=[
                _describe(rank, row, self.scores.iloc[rank - 1], known)
                for rank, (_, row) in enumerate(self.suspects.iterrows(), start=1)
            ],
        )

    def summarise(self) -> Summary:
        """Return how many labels are contradicted, and how many by chance."""
        unit = "study" if self.manifest.label_level == "study" else "image"
        low, high = self.error_limits
        limits = "" if np.isnan(low) else f" ({low:,.0f} to {high:,.0f})"
        of_test = int((self.suspects["split"] == "test").sum())
        return Summary(
            f"Suspected labels: {len(self.suspects):,} of {counted(len(self.rows), unit)}",
            {
                "if all labels were right": f"about {self.expected:,.0f} expected",
                "wrong labels, estimated": f"{self.errors:,.0f}{limits}, suspected or not",
                "suspects in test": f"{of_test:,}",
                "not scored": f"{self.n_not_scored:,}",
                "heads": ", ".join(self.heads),
            },
        )


def audit_labels(run: RunLike, manifest: Manifest | str | os.PathLike[str]) -> LabelAudit:
    """Find the studies whose label the scores of a run's heads contradict.

    A label is contradicted if the mean of the heads' calibrated probabilities favours the other
    class, and at least as much as it does on average where that class is the label (see
    `evaluation.label_errors`). If the manifest's label level is "image", images are judged.

    Parameters
    ----------
    run : Run or path
        A complete run of `sweep` or `ensemble`; priors do not judge.
    manifest : Manifest or path
        The manifest that the run was made from.

    Raises
    ------
    RunError
        The run is unfinished, was made from another manifest or from other labels, answers a
        target, or has no out-of-fold scores of both classes.
    """
    opened, known = open_run(run), read_manifest(manifest)
    opened.require_complete()
    require_hashes(known)
    opened.require_manifest(known.digest())
    _refuse_target(opened)
    predictions = opened.predictions()
    predictions = predictions[predictions["label"].notna()]
    _require_labels(opened, predictions, known)
    level: Literal["study", "image"] = "study" if known.label_level == "study" else "image"
    images = _images_by_unit(opened, predictions, level)
    rows, raw = _collect(opened, predictions, level)
    rows["images"] = images.reindex(rows["study"]).to_numpy()
    return _judge(opened, known, rows, raw, n_not_scored=len(images) - len(rows))


def read_suspects(audit: str | os.PathLike[str], manifest: Manifest) -> list[Suspect]:
    """Return the suspects of an audit of a manifest's labels.

    Parameters
    ----------
    audit : path
        `audit.json`, or the directory of the review.
    manifest : Manifest
        The one that was audited.

    Raises
    ------
    PathNotFoundError
        There is no such file.
    ManifestError
        It is no audit, or one of another manifest.
    """
    path = as_path(audit, "an audit")
    path = path / DOCUMENT if path.is_dir() else path
    if not path.is_file():
        raise PathNotFoundError(f"{path} does not exist. `medembed audit labels` writes it.")
    way_out = "Audit the labels again: medembed audit labels RUN --manifest MANIFEST -o review."
    try:
        document = json.loads(read_plain(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"{path} is no audit of labels. {way_out}") from error
    found = parse(LabelAuditDocument, document, ManifestError, path, way_out)
    if found.manifest != manifest.digest():
        raise ManifestError(f"{path} is of another manifest. Give the one that was audited.")
    return found.suspects


def _judge(
    run: Run, manifest: Manifest, rows: pd.DataFrame, raw: pd.DataFrame, n_not_scored: int
) -> LabelAudit:
    is_train = (rows["split"] == "train").to_numpy()
    y = rows["label"].to_numpy(np.int8)

    def calibrate(p: np.ndarray) -> np.ndarray:
        return fit_platt(p[is_train], y[is_train]).apply(p)

    try:
        scores = raw.apply(lambda own: calibrate(own.to_numpy(np.float64)))
        probability = calibrate(scores.mean(axis=1).to_numpy(np.float64))
        thresholds = find_thresholds(y[is_train], probability[is_train])
        noise = fit_noise(y[is_train], probability[is_train])
        patients = rows["patient"].to_numpy()[is_train]
        limits = bound_errors(y[is_train], probability[is_train], patients, noise, (y, probability))
    except TrainingDataError as error:
        raise RunError(f"the labels of the run at {run.path} cannot be audited: {error}") from error
    judged = rows.assign(
        probability=probability,
        is_suspect=thresholds.contradicts(y, probability),
        chance=noise.chance(probability, thresholds),
        error=noise.error_probability(y, probability),
    )
    of_label = np.where(y == 1, probability, 1 - probability)
    order = np.lexsort((rows["study"].to_numpy(), of_label, ~judged["is_suspect"].to_numpy()))
    judged = judged.drop(columns=["study", "patient"]).iloc[order].reset_index(drop=True)
    scores = scores.iloc[order].reset_index(drop=True)
    return LabelAudit(
        run, manifest, list(raw.columns), judged, scores, thresholds, noise, limits, n_not_scored
    )


def _refuse_target(run: Run) -> None:
    target = run.info.asked.target
    if target not in (None, "label"):
        raise RunError(
            f"the run at {run.path} answers the target {target!r}, but an audit is of the column "
            "label, which `medembed manifest relabel` corrects. Audit a run of the labels."
        )


def _require_labels(run: Run, predictions: pd.DataFrame, manifest: Manifest) -> None:
    """Refuse a manifest that lacks an image of the run, or labels it otherwise."""
    named = predictions[predictions["sha256"] != ""].drop_duplicates(["sha256", "label"])
    known = manifest.rows.drop_duplicates("sha256").set_index("sha256")["label"]
    now = known.reindex(named["sha256"]).to_numpy(np.float64, na_value=np.nan)
    n_other = int((now != named["label"].to_numpy(np.float64)).sum())
    if n_other:
        raise RunError(
            f"{n_other:,} images of the run at {run.path} are not in the manifest or have another "
            "label there. Give the manifest that the run was made from."
        )


def _collect(run: Run, predictions: pd.DataFrame, level: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the units that all heads have scored blindly, and the scores, a column per head."""
    is_blind = (predictions["split"] == "test") | predictions["fold"].notna()
    tables = {}
    for head, rows in predictions[is_blind].groupby("head", sort=False):
        if (
            head in PRIORS
            or head in BASELINES
            or (level == "image" and rows["sha256"].eq("").any())
        ):
            continue  # a baseline sees no embedding, and a head of whole studies scores none
        units = by_study(rows.assign(study=_name_units(rows, level)))
        tables[str(head)] = units.set_index("study")
    if not tables:
        raise RunError(
            f"the run at {run.path} has no trained head that scores one {level} at a time. Audit a "
            "run of `medembed sweep` with such a head."
        )
    raw = pd.concat({head: own["probability"] for head, own in tables.items()}, axis=1).dropna()
    first = next(iter(tables.values())).loc[raw.index].reset_index()
    if not (first["split"] == "train").any():
        raise RunError(
            f"the run at {run.path} has no out-of-fold scores, so its labels cannot be audited. "
            "Audit the run of `medembed sweep` that trained the heads."
        )
    return first[_KEYS], raw.reset_index(drop=True)


def _images_by_unit(run: Run, predictions: pd.DataFrame, level: str) -> "pd.Series[Any]":
    """Return the SHA-256 of each labelled unit's images, a list by the unit's name."""
    named = predictions[predictions["sha256"] != ""]
    units = named.assign(unit=_name_units(named, level))[["unit", "sha256"]].drop_duplicates()
    found = units.sort_values("sha256").groupby("unit")["sha256"].agg(list)
    lacking = set(predictions["study"]) - set(named["study"])
    if lacking:
        raise RunError(
            f"the run at {run.path} does not say which images its studies have: no head in its "
            "predictions.parquet names them. Sweep again."
        )
    return found


def _name_units(rows: pd.DataFrame, level: str) -> "pd.Series[Any]":
    """Return a name for the unit of each row, which sorts as its study does."""
    study = rows["study"].map("{:010d}".format)
    return study if level == "study" else study + " " + rows["sha256"]


def _count(rows: pd.DataFrame, split: Any, region: str | None) -> AuditedPart:
    return AuditedPart(
        split=split,
        region=region,
        studies=len(rows),
        suspects=int(rows["is_suspect"].sum()),
        expected=float(rows["chance"].sum()),
        errors=float(rows["error"].sum()),
    )


def _names_by_hash(manifest: Manifest) -> dict[str, tuple[str, str]]:
    """Return image and study of each content; of copies, the first."""
    rows = manifest.rows.drop_duplicates("sha256")
    return dict(zip(rows["sha256"], zip(rows["image"], rows["study"], strict=True), strict=True))


def _describe(
    rank: int, row: Any, scores: "pd.Series[Any]", names: dict[str, tuple[str, str]]
) -> Suspect:
    known = [names[sha256] for sha256 in row["images"]] if names else []
    named: dict[str, Any] = {}
    if known:
        named = {"names": [image for image, _ in known], "study": known[0][1]}
    return Suspect(
        rank=rank,
        split=row["split"],
        region=row["region"],
        label=int(row["label"]),
        probability=float(row["probability"]),
        scores={str(head): float(p) for head, p in scores.items()},
        images=row["images"],
        **named,
    )
