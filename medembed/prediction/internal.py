"""What lies beside a packaged model: the run that made it, with its own test and training rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from medembed.core.errors import MedembedError
from medembed.evaluation.calibration import Calibration
from medembed.heads.packaging import read_document
from medembed.results.alignment import ScoredHead, align_runs
from medembed.results.decisions import write_points
from medembed.results.model_card import Card, require_winner
from medembed.results.runs import Run, open_run

__all__ = ["Internal", "count_labels", "find_internal"]


@dataclass(frozen=True, eq=False)
class Internal:
    """The run that a model still lies in.

    Attributes
    ----------
    studies : DataFrame
        Its labelled test studies: `patient`, `region`, `label`, `probability` (not calibrated).
    images : frozenset of str
        SHA-256 of their images.
    trained : DataFrame
        What it was trained on: `region`, `label`, and how many images `n` have both.
    decisions : dict of str to dict
        By head, priors among them: ``calibrations``, ``threshold``, ``sensitive_threshold``,
        ``operating_points``, as `results.decisions` reads them.
    """

    studies: pd.DataFrame
    images: frozenset[str]
    trained: pd.DataFrame
    decisions: Mapping[str, dict[str, Any]]


def find_internal(model_path: Path) -> Internal | None:
    """Return the complete run that the model at this path is a winner of, or None.

    Raises
    ------
    ModelError
        It lies where the winner does, and is another model.
    """
    path = model_path.resolve()
    try:
        run = open_run(path.parent.parent)
        if not run.is_complete or run.model_path(path.name).resolve() != path:
            return None
        test_set = align_runs([run])
    except (MedembedError, OSError):
        return None
    require_winner(run, path.name, read_document(path)["card"])
    own = {contender.head: contender for contender in test_set.contenders}
    if path.name not in own:
        return None
    images = frozenset(sha256 for names in test_set.units["images"] for sha256 in names.split())
    return Internal(
        studies=test_set.units.assign(probability=own[path.name].raw),
        images=images,
        trained=_trained(run),
        decisions={head: _decisions(contender) for head, contender in own.items()},
    )


def count_labels(card: Card) -> pd.DataFrame:
    """Return how many images `n` of each `region` and `label` the card counts as trained on.

    Empty where a card of before does not count.
    """
    trained = (card.document.get("data") or {}).get("trained") or {}
    counts = [
        (str(name), label, n)
        for name, own in trained.get("regions", {}).items()
        for label, n in ((0, own["images"] - own["abnormal"]), (1, own["abnormal"]))
    ]
    return pd.DataFrame([own for own in counts if own[-1]], columns=["region", "label", "n"])


def _trained(run: Run) -> pd.DataFrame:
    """Count the rows of the first prior that are trained on: it has one per image."""
    rows = run.predictions().query("head == 'class-prior'")
    is_trained = rows["split"].eq("train") & rows["fold"].notna() & rows["label"].notna()
    return rows[is_trained].groupby(["region", "label"], sort=True).size().reset_index(name="n")


def _decisions(contender: ScoredHead) -> dict[str, Any]:
    known = {
        name: calibration.as_dict()
        for name, calibration in contender.calibrations.items()
        if isinstance(calibration, Calibration) and name != "none"
    }
    return {
        "calibrations": known,
        "threshold": contender.threshold,
        "sensitive_threshold": contender.sensitive_threshold,
        "operating_points": write_points(contender.points),
    }
