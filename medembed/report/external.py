"""An external evaluation's findings besides scores, as tables for the terminal and the page."""

import hashlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from medembed.core.errors import RunError
from medembed.core.files import read_plain
from medembed.core.text import mask_controls
from medembed.dataset.targets import name_classes
from medembed.report.headline import write_headline
from medembed.report.operating_tables import tabulate_points
from medembed.report.tables import (
    MISSING,
    Table,
    format_count,
    format_interval,
    format_value,
    make_table,
    render_terminal,
)
from medembed.results.comparison_schema import ComparisonResult
from medembed.results.runs import Run

__all__ = [
    "ExternalSection",
    "digest_predictions",
    "find_external",
    "read_evaluations",
    "render_external",
]

SCORES = {
    "auroc": "AUROC",
    "average_precision": "Avg. precision",
    "accuracy": "Accuracy",
    "macro_f1": "Macro-F1",
    "kappa": "κ",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "brier": "Brier",
    "ece": "ECE",
}
LINE = {
    "slope": "Slope (1 is right)",
    "intercept": "Intercept (0 is right)",
    "mean_probability": "Mean probability",
    "share_abnormal": "Share {positive}",
    "observed_expected": "Observed / expected",
}
BASES = {
    "samples": "Differences: here less own test, with intervals from those of both (MOVER; Zou "
    "and Donner 2008). ECE has none: its noise is larger in the smaller sample.",
    "bootstrap": "Differences: here less own test; patients of both resampled independently.",
    "mover": "Differences: here less own test, with intervals from those on the model's card and "
    "those here (MOVER; Zou and Donner 2008).",
}


ACTIONS = {
    "none": "Nothing was changed: in the drawn patients, the model's slope and intercept do not "
    "differ significantly from 1 and 0.",
    "intercept": "Only the intercept was fitted: a slope needs 50 patients. Decisions stay.",
    "slope_and_intercept": "Slope, intercept and threshold were fitted.",
}


def render_external(scores: Mapping[str, Any], width: int = 80, target: str | None = None) -> str:
    """Return the scores of `prediction.external_validation.evaluate` as text.

    Parameters
    ----------
    scores : mapping
        The content of an evaluation's `scores.json`.
    width : int
        Columns of the terminal.
    target : str, optional
        What the model predicts, by default the label.

    Raises
    ------
    RunError
        The file is damaged.
    """
    with _reading(scores.get("run")):
        result = _as_comparison(scores)
        tables = [make_table(result)] if scores["rows"] else []
        own = {scores["rows"][0]["run"]: scores} if scores["rows"] else {}
        tables += tabulate_points(result, width)
        parts = [textwrap.fill(mask_controls(write_headline(result, own).text), width)]
        tables += _tabulate_external(scores, name_classes(target).positive)
        parts += [render_terminal(table, width) for table in tables]
        if not scores["rows"]:
            parts.append("\n".join(scores["notes"]))
        return "\n\n".join(parts)


def _as_comparison(scores: Mapping[str, Any]) -> ComparisonResult:
    """Return scores with a row, which hold all that a table of a comparison reads."""
    return cast("ComparisonResult", scores)


def _tabulate_external(
    scores: Mapping[str, Any], positive: str, *, full: bool = False
) -> list[Table]:
    """Return the available tables of drop, calibration, recalibration and drift.

    Parameters
    ----------
    scores : mapping
        See `render_external`.
    positive : str
        What the positive class is called.
    full : bool
        Include all available intervals, which makes the tables too wide for a terminal.
    """
    found = [
        _drop(scores.get("drop"), full=full),
        _drop_by_region(scores.get("drop"), full=full),
        _calibration(scores.get("calibration"), positive, full=full),
        _recalibrated(scores.get("recalibrated"), positive, full=full),
        _drift(scores, positive),
    ]
    return [table for table in found if table is not None]


@dataclass(frozen=True)
class ExternalSection:
    """What the page shows of a run that evaluates a model elsewhere.

    Attributes
    ----------
    name : str
        The run's.
    tables : list of Table
    """

    name: str
    tables: list[Table]


def find_external(runs: Sequence[Run]) -> list[ExternalSection]:
    """Return the page's section of each run that evaluates a model elsewhere.

    Raises
    ------
    RunError
        The `scores.json` of one is damaged.
    """
    return [
        ExternalSection(run.name, _tables_of(run)) for run in runs if run.info.kind == "evaluation"
    ]


def digest_predictions(run: Run) -> str:
    """Return the SHA-256 of `predictions.parquet`, from which scores are computed, in hex.

    Raises
    ------
    RunError
        The file cannot be read.
    """
    try:
        return hashlib.sha256(read_plain(run.path / "predictions.parquet")).hexdigest()
    except OSError as error:
        raise RunError(
            f"predictions of the run at {run.path} cannot be read ({error}). Delete the run and "
            "evaluate again."
        ) from None


def read_evaluations(runs: Sequence[Run], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the `scores.json` of each run that evaluates a model elsewhere, by the run's name.

    Raises
    ------
    RunError
        The `scores.json` of a run is damaged.
    """
    return {
        name: _scores_of(run)
        for run, name in zip(runs, names, strict=True)
        if run.info.kind == "evaluation"
    }


def _tables_of(run: Run) -> list[Table]:
    scores = _scores_of(run)
    with _reading(run.path):
        positive = name_classes(run.info.asked.target).positive
        return _tabulate_external(scores, positive, full=True)


def _scores_of(run: Run) -> dict[str, Any]:
    scores = run.scores()  # its own errors are clear
    digest = scores.get("predictions_sha256")  # missing in older runs
    if digest is not None and digest != digest_predictions(run):
        raise RunError(
            f"scores.json of the evaluation at {run.path} is not of the predictions.parquet beside "
            "it. Restore the two, or delete that directory and evaluate again."
        )
    return scores


@contextmanager
def _reading(path: Any) -> Iterator[None]:
    """Turn failures on missing or mistyped entries into one clear error."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"scores.json of the evaluation at {path} is damaged ({error!r}). Delete that "
            "directory and evaluate again."
        ) from error


def _drop(drop: Mapping[str, Any] | None, *, full: bool) -> Table | None:
    if drop is None:
        return None
    rows = [
        [SCORES[name], *_sides(entry, full=full)]
        for name, entry in drop["scores"].items()
        if name in SCORES
    ]
    notes = [drop["note"]] if drop["note"] else [BASES[drop["basis"]]]
    columns = ["Score", "Own test", "Here", "Difference [95 %]"]
    return Table("Against the model's own test", columns, 1, [rows], notes)


def _drop_by_region(drop: Mapping[str, Any] | None, *, full: bool) -> Table | None:
    if drop is None or not drop["regions"]:
        return None
    rows = [
        [region, *_sides(entries["auroc"], full=full)]
        for region, entries in drop["regions"].items()
        if "auroc" in entries
    ]
    columns = ["Region", "Own test", "Here", "Difference [95 %]"]
    return Table("AUROC against the model's own test, by region", columns, 1, [rows], [])


def _sides(entry: Mapping[str, Any], *, full: bool) -> list[str]:
    write = format_count if full else format_value
    return [write(entry["internal"]), write(entry["external"]), _signed(entry["difference"])]


def _calibration(found: Mapping[str, Any] | None, positive: str, *, full: bool) -> Table | None:
    if found is None:
        return None
    sides = {"Own test": found["internal"], "Here, raw": found["raw"]}
    sides = {name: own for name, own in sides.items() if own is not None}
    write, rows = format_interval if full else format_value, []
    for part, names in (("line", LINE), ("scores", {"brier": "Brier", "ece": "ECE"})):
        for name, title in names.items():
            cells = [write(own[part][name]) for own in sides.values()]
            told = format_interval(found["calibrated"][part][name])
            rows.append([title.format(positive=positive), *cells, told])
    note = (
        "Of the log-odds of the model's calibrated probabilities: a slope below 1 says that they "
        "are too extreme, an intercept below 0 that they are too high."
    )
    columns = ["", *sides, "Here, calibrated [95 %]"]
    return Table("Calibration", columns, 1, [rows], [note])


def _recalibrated(found: Mapping[str, Any] | None, positive: str, *, full: bool) -> Table | None:
    if found is None:
        return None
    title = f"Recalibrated on {found['n_patients']:,} patients, scored on all others"
    columns = ["", "Before", "After", "Change [95 %]"]
    if found["note"]:
        return Table(title, columns, 1, [[]], [found["note"]])
    write = format_count if full else format_value
    rows = []
    for part, names in (("line", LINE), ("scores", SCORES)):
        for name, heading in names.items():
            before, after = (found[side][part].get(name) for side in ("before", "after"))
            if before is None:
                continue
            change = found["change"].get(name) if part == "scores" else None
            cell = "" if change is None else _signed(change)
            title_of_row = heading.format(positive=positive)
            rows.append([title_of_row, write(before), write(after), cell])
    scored = found["scored"]
    note = (
        f"Drawn: {found['n']:,} studies ({found['n_abnormal']:,} {positive}). Scored: "
        f"{scored['n']:,} studies ({scored['n_abnormal']:,} {positive}) of "
        f"{scored['n_patients']:,} patients. Decisions before: the model's threshold; after: "
        f"{found['threshold']:.3f}. The order of studies, and so AUROC, stays."
    )
    action = ACTIONS.get(str(found.get("action")))
    return Table(title, columns, 1, [rows], [note] if action is None else [action, note])


def _drift(scores: Mapping[str, Any], positive: str) -> Table | None:
    drift, called = scores.get("drift"), scores.get("called_abnormal")
    if drift is None:
        return None
    rows = [
        [
            entry["region"],
            f"{entry['n_patients']:,}",
            f"{entry['training_share']:.0%}",
            f"{entry['share']:.0%}",
            MISSING if entry["shift"] is None else f"{entry['shift']:.2f}",
            MISSING if entry["outside_share"] is None else f"{entry['outside_share']:.0%}",
        ]
        for entry in drift.get("regions", [])
    ]
    notes = [drift["sentence"]]
    if drift.get("columns"):
        listed = ", ".join(f"{own['name']} {own['shift']:+.2f}" for own in drift["columns"])
        notes.append(f"Columns that differ most, in standard deviations: {listed}.")
    if drift.get("within_regions") is not None:
        notes.append(f"With the mix of regions set aside: {drift['within_regions']:.2f}.")
    if drift.get("far"):
        n, of = drift["far"]["n"], drift["far"]["of"]
        held = ": for those neither calibration nor prediction sets hold" if n else ""
        notes.append(f"Far from training, each by itself: {n:,} of {of:,} images{held}.")
    if "basis" in drift:
        notes.append(drift["basis"])
    if called is not None:
        notes.append(f"Called {positive}: {format_interval(called)} of all studies.")
    columns = ["Region", "Patients", "Training", "Here", "Shift", "Outside"]
    return Table("Drift of the embeddings, no label looked at", columns, 1, [rows], notes)


def _signed(found: Mapping[str, Any]) -> str:
    value = found["difference"] if "difference" in found else found["value"]
    if value is None:
        return MISSING
    if found["low"] is None:
        return f"{value:+.3f}"
    return f"{value:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
