"""Answers to further targets by image, with which the page filters cases and colours its map."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medembed.dataset.manifest import Manifest
from medembed.dataset.targets import LABEL, list_targets, select_target
from medembed.results.runs import Run

__all__ = ["UNKNOWN", "Answers", "code_answers", "find_answers", "name_target", "read_answers"]

UNKNOWN = 2
"""The code of an answer that is not known; 0 is negative, 1 positive."""
Answers = Mapping[str, pd.Series]
"""Of each target the answers by SHA-256, each image once: Int8, `<NA>` unknown."""


def name_target(runs: Sequence[Run]) -> str:
    """Return the target that the runs of a page predict."""
    return runs[0].info.asked.target or LABEL


def find_answers(runs: Sequence[Run], manifest: Manifest | None, others: Answers) -> Answers:
    """Return the answers to the targets that the runs of a page do not predict.

    Parameters
    ----------
    runs : sequence of Run
    manifest : Manifest, optional
        The manifest of the runs, with all of its targets.
    others : mapping of str to Series
        What is known without a manifest, see `read_answers`.
    """
    found = others
    if manifest is not None:
        rows = manifest.rows
        found = {
            name: _by_image(rows["sha256"], select_target(rows, name)["label"])
            for name in list_targets(rows.columns)
        }
    predicted = {run.info.asked.target or LABEL for run in runs}
    return {name: own for name, own in found.items() if name not in predicted}


def read_answers(runs: Mapping[str, Run]) -> Answers:
    """Return the answers that the runs of a sweep's targets were trained and tested on."""
    found = {}
    for name, run in runs.items():
        rows = run.predictions()
        rows = rows[rows["sha256"].ne("")]
        found[name] = _by_image(rows["sha256"], rows["label"])
    return found


def _by_image(images: pd.Series, answers: pd.Series) -> pd.Series:
    """Return the largest known answer of each image, as a study is abnormal if any view is."""
    return answers.astype("Int8").groupby(images.to_numpy()).max()


def code_answers(answers: pd.Series, views: Sequence[Sequence[str]]) -> NDArray[np.uint8]:
    """Return a code for each group of images: its largest known answer, or `UNKNOWN`.

    >>> answers = pd.Series([0, 1, pd.NA], ["a", "b", "c"], dtype="Int8")
    >>> code_answers(answers, [["a", "b"], ["a"], ["c"], ["a", "c"]])
    array([1, 0, 2, 0], dtype=uint8)
    """
    if not views:
        return np.empty(0, np.uint8)
    images = [image for own in views for image in own]
    codes = answers.reindex(images).fillna(-1).to_numpy(np.int8)
    starts = np.cumsum([0, *(len(own) for own in views)])[:-1]
    largest = np.maximum.reduceat(codes, starts)
    return np.where(largest < 0, UNKNOWN, largest).astype(np.uint8)
