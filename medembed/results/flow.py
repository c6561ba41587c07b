"""The flow of images, studies and patients: found, left out and why, used, by split and class."""

from collections import Counter
from collections.abc import Sequence

import pandas as pd

from medembed.dataset.build_file import Excluded
from medembed.results.comparison_schema import Flow, FlowPart, ReasonCount, UsedCounts
from medembed.results.run_schema import Data, RowCounts
from medembed.results.runs import Run

__all__ = ["CLASSES", "NOT_RECORDED", "describe_flow"]

CLASSES = ("normal", "abnormal")
NOT_RECORDED = "not recorded"
MAX_REASONS = 20
"""Why images could not be embedded; what comes after the most frequent is one line."""
OTHERS = "other reasons"


def describe_flow(runs: Sequence[Run], names: Sequence[str]) -> list[Flow]:
    """Count what each run found, left out and used.

    Parameters
    ----------
    runs : sequence of Run
        Their `run.json` says what was found, if the manifest's build was available, and what could
        not be embedded; their predictions say what was used.
    names : sequence of str
        The runs' names in the comparison.

    Returns
    -------
    list of dict
        For each run, with None for what it does not record, numbers of images:

        ``run``, ``found``, ``not_listed``, ``excluded`` (``reason``, ``images``); ``manifest``
        (``images``, ``studies``, ``patients``); ``not_asked`` (rows of a split that an evaluation
        left aside), ``failed`` and ``failures`` (``reason``, ``images``), ``unlabelled``,
        ``not_given`` (training patients beyond the share asked for); ``used`` (images, studies,
        patients), and ``splits``: for each ``split`` its ``images``, ``failed``, ``unlabelled``,
        ``not_given``, ``used`` and ``classes``, the used ones of each class. A study is abnormal if
        one of its images is; a patient with studies of both classes counts in each.

        ``found`` is the sum of ``not_listed``, all excluded and the manifest's images; the last is
        the sum of ``not_asked``, ``failed``, ``unlabelled``, ``not_given`` and the images used.
    """
    return [_of_run(run, name) for run, name in zip(runs, names, strict=True)]


def _of_run(run: Run, name: str) -> Flow:
    data = run.info.data
    build = None if data.build is None else data.build.counts
    rows = _image_rows(run)
    splits = [_of_split(split, rows, data) for split in ("train", "test")]
    splits = [own for own in splits if own["images"] or own["used"]["images"]]
    whole = build or data
    n_asked, n_used = data.images, _count(rows[rows["is_used"]])
    failed = None if n_asked is None else data.left_out or 0
    not_given = int(rows["is_left"].sum())
    return {
        "run": name,
        "found": None if build is None else build.found,
        "not_listed": None if build is None else build.not_listed,
        "excluded": None if build is None else list(map(_count_reason, build.excluded)),
        "manifest": {
            "images": whole.images,
            "studies": whole.studies,
            "patients": whole.patients,
        },
        "not_asked": None if n_asked is None else (whole.images or 0) - n_asked,
        "failed": failed,
        "failures": _failures(run, failed or 0),
        "unlabelled": _rest(n_asked, failed, not_given, n_used["images"]),
        "not_given": not_given,
        "used": n_used,
        "splits": splits,
    }


def _count_reason(own: Excluded) -> ReasonCount:
    return {"reason": own.reason, "images": own.images}


def _of_split(split: str, rows: pd.DataFrame, data: Data) -> FlowPart:
    own, part = data.splits.get(split, RowCounts()), rows[rows["split"] == split]
    used = part[part["is_used"]]
    abnormal = used["label"].eq(1)
    by_study = abnormal.groupby(used["study"]).transform("any").astype(bool)
    counted = {
        name: _count_studies(int((abnormal == is_it).sum()), used[by_study == is_it])
        for name, is_it in zip(CLASSES, (False, True), strict=True)
    }
    n, failed = own.images, own.left_out
    not_given = int(part["is_left"].sum())
    return {
        "split": split,
        "images": n,
        "failed": failed,
        "unlabelled": _rest(n, failed, not_given, len(used)),
        "not_given": not_given,
        "used": _count(used),
        "classes": counted,
    }


def _image_rows(run: Run) -> pd.DataFrame:
    """Return one row per embedded image, from the head that names the most, such as a prior."""
    predictions = run.predictions()
    named = predictions[predictions["sha256"] != ""]
    if len(named):
        named = named[named["head"] == named["head"].value_counts(sort=True).index[0]]
    is_known = named["label"].notna()
    is_given = named["split"].eq("test") | named["fold"].notna()
    return named.assign(is_used=is_known & is_given, is_left=is_known & ~is_given)


def _count(rows: pd.DataFrame) -> UsedCounts:
    return _count_studies(len(rows), rows)


def _count_studies(n_images: int, rows: pd.DataFrame) -> UsedCounts:
    return {
        "images": n_images,
        "studies": int(rows["study"].nunique()),
        "patients": int(rows["patient"].nunique()),
    }


def _rest(n: int | None, failed: int | None, *others: int) -> int | None:
    """Return what is left, or None if that is unknown or entries contradict each other."""
    if n is None or failed is None:
        return None
    rest = n - failed - sum(others)
    return rest if rest >= 0 else None


def _failures(run: Run, n_failed: int) -> list[ReasonCount]:
    """Return counts of the listed reasons of left-out images, and the rest as one entry."""
    listed = Counter(str(image.reason) for image in run.info.left_out)
    found = listed.most_common(MAX_REASONS)
    rest = n_failed - sum(n for _, n in found)
    found += [(OTHERS, rest)] if rest > 0 else []
    return [{"reason": reason, "images": n} for reason, n in found]
