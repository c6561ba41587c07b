"""A comparison of runs, presented as a table, a data frame or figures."""

import copy
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from medembed.core.errors import ArgumentError, RunError
from medembed.core.files import write_atomically
from medembed.core.text import to_html_cell
from medembed.dataset.manifest import Manifest, read_manifest
from medembed.evaluation.scores import SCORES
from medembed.report.group_tables import render_comparison, write_group_tables
from medembed.report.operating_tables import points_csv, tabulate_points
from medembed.report.tables import Table, make_tables, render, render_table
from medembed.results.alignment import TestSet
from medembed.results.comparison import ComparisonOptions, compare_opened, open_runs
from medembed.results.comparison_schema import ComparedHead, ComparisonResult, Pair
from medembed.results.runs import RunLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TABLES", "Comparison", "Plots", "compare", "write_tables"]

TABLES: dict[str, str | None] = {"heads": None, "regions": "region"}
"""Names of the tables, and the grouping of each."""
_ENDINGS = {"csv": "csv", "latex": "tex"}


def write_tables(result: ComparisonResult, directory: str | Path) -> list[Path]:
    """Write ``heads``, ``regions`` and ``operating_points``, each as ``.csv`` and ``.tex``.

    A comparison by a column also has ``groups`` and ``gaps``.

    Parameters
    ----------
    result : dict
        A comparison, `Comparison.result`.
    directory : str or Path
        Created if missing; tables of an earlier comparison are replaced.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    RunError
        `directory` is a file.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise RunError(f"{directory} is a file. Choose a directory for the tables.")
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, by in TABLES.items():
        for table_format, ending in _ENDINGS.items():
            path = directory / f"{name}.{ending}"
            text = render(result, table_format=table_format, by=by)
            write_atomically(path, f"{text}\n".encode())
            written.append(path)
    latex = "\n\n".join(render_table(table, "latex") for table in tabulate_points(result))
    for ending, text in {"csv": points_csv(result), "tex": latex}.items():
        path = directory / f"operating_points.{ending}"
        write_atomically(path, f"{text}\n".encode())
        written.append(path)
    return written + (write_group_tables(result, directory) if "groups" in result else [])


ABOUT = ("run", "head", "baseline", "pooling", "cv", "train_fraction", "depth", "seed", "threshold")
NUMBER = ' style="text-align: right"'
NAME = ' style="text-align: left"'


def compare(
    *runs: RunLike,
    level: str = "study",
    n_resamples: int = 2000,
    seed: int = 0,
    by: str | None = None,
    manifest: Manifest | str | os.PathLike[str] | None = None,
    margin: float | None = None,
    operating_points: Sequence[str] = (),
    prevalence: float | None = None,
) -> "Comparison":
    """Score every head of the runs on their common test rows, with intervals and paired tests.

    Parameters
    ----------
    *runs : Run or path
        Complete runs of sweeps, fine-tuning and evaluations; at least one.
    level : {"study", "image"}
        The unit that is scored. A study's probability is the mean over its views.
    n_resamples : int
        Bootstrap resamples of patients.
    seed : int
        Seed of the bootstrap.
    by, manifest : str and Manifest or path, optional
        A column of the runs' manifest, with bands if it holds numbers, such as
        ``"age:0-18-65-120"``: also scores its groups and tests the gaps between them.
    margin : float, optional
        Acceptable loss of AUROC: adds tests of non-inferiority to the best head.
    operating_points : sequence of str
        Operating points to show in addition to the default ones, such as ``"sensitivity=0.95"`` or
        ``"threshold=0.3"``.
    prevalence : float, optional
        A share of abnormal studies, in (0, 1), at which predictive values are also computed.

    Raises
    ------
    PathNotFoundError
        A run does not exist.
    RunError
        No run is given, one is unfinished or not a run, they share no test rows, the margin is out
        of range, or a run was made from another manifest.
    ManifestError
        The manifest lacks the column, or it cannot be grouped as requested.
    TrainingDataError
        An operating point or the prevalence is invalid.
    ArgumentError
        An argument is neither a run nor a path.
    """
    if (by is None) != (manifest is None):
        raise ArgumentError("by and manifest go together: name a column, and the manifest it is in")
    asked = ComparisonOptions(
        level=level,
        n_resamples=n_resamples,
        seed=seed,
        by=by,
        margin=margin,
        operating_points=operating_points,
        prevalence=prevalence,
    )
    opened = open_runs(runs)
    if manifest is not None:
        asked = replace(asked, manifest=read_manifest(manifest))
    return Comparison(*compare_opened(opened, asked))


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """The heads of one or more runs on the test rows that they share; prints as its table.

    Attributes
    ----------
    result : dict
        JSON values, see `results.comparison.compare_runs`.
    test_set : TestSet
        The test rows that were compared.
    """

    result: ComparisonResult
    test_set: TestSet

    @property
    def level(self) -> str:
        """The unit of a test row: "study" or "image"."""
        return str(self.result["level"])

    @property
    def rows(self) -> list[ComparedHead]:
        """A dict per head, best AUROC first; see `results.comparison.compare_runs`."""
        return list(self.as_dict()["rows"])

    @property
    def paired(self) -> list[Pair]:
        """A dict per pair of heads: the difference in AUROC, its interval and tests."""
        return list(self.as_dict()["paired"])

    @property
    def notes(self) -> list[str]:
        """The sentences that belong under every table."""
        return list(self.result["notes"])

    def as_dict(self) -> ComparisonResult:
        """Return a copy of the document that `medembed compare --json` prints."""
        return copy.deepcopy(self.result)

    def to_json(self) -> str:
        """Return the document of `as_dict` as JSON text."""
        return json.dumps(self.result, indent=2, ensure_ascii=False, allow_nan=False)

    def to_frame(self) -> pd.DataFrame:
        """Return a row per head, best AUROC first.

        Columns: the head's run, name and configuration; every score with its 95 % interval, as
        ``auroc``, ``auroc_low``, ``auroc_high``, or NaN if it cannot be estimated; slope and
        intercept of calibrated probabilities likewise; ``p_holm`` against the best head, NaN for
        the best itself.
        """
        return pd.DataFrame([_flatten(row) for row in self.result["rows"]])

    def render(self, table_format: str = "table", *, by: str | None = None, width: int = 80) -> str:
        """Return the output of `medembed compare`, as "table", "markdown", "csv" or "latex"."""
        return render_comparison(self.result, table_format, by, width)

    @cached_property
    def plot(self) -> "Plots":
        """The figures of the page: ``plot.roc()``, ``plot.calibration()``, …."""
        return Plots(self)

    def __repr__(self) -> str:
        return self.render(width=shutil.get_terminal_size().columns)

    def _repr_html_(self) -> str:
        notes = make_tables(self.result)[-1].notes
        listed = "".join(f"<li>{to_html_cell(note)}</li>" for note in notes)
        return f"{''.join(map(_write_html, make_tables(self.result)))}<ul>{listed}</ul>"


@dataclass(frozen=True, eq=False)
class Plots:
    """The figures of a comparison, as matplotlib figures; each call returns a new one.

    Raises
    ------
    RunError
        There is nothing to draw, such as a curve of test rows of one class.
    """

    comparison: Comparison

    def roc(self) -> "Figure":
        """Draw ROC curves of the trained heads, with a 95 % band around the best."""
        return self._draw("roc")

    def precision_recall(self) -> "Figure":
        """Draw precision over recall, with a 95 % band around the best."""
        return self._draw("precision_recall")

    def calibration(self) -> "Figure":
        """Draw the reliability of the best head's probabilities, before and after calibration."""
        return self._draw("calibration")

    def confusion(self) -> "Figure":
        """Draw confusion matrices at each operating point."""
        return self._draw("confusion")

    def decision_curve(self) -> "Figure":
        """Draw net benefit over thresholds, with a 95 % band around the best head's."""
        return self._draw("decision_curve")

    def flow(self) -> "Figure":
        """Draw the flow of images, studies and patients, from what was found to what was used."""
        return self._draw("flow")

    def regions(self) -> "Figure":
        """Draw AUROC within each region."""
        return self._draw("regions")

    def views(self) -> "Figure":
        """Draw AUROC by the study's number of views."""
        return self._draw("views")

    def deferral(self) -> "Figure":
        """Draw coverage and error against the share deferred."""
        return self._draw("deferral")

    def cost(self) -> "Figure":
        """Draw AUROC over the seconds of training."""
        return self._draw("cost")

    def depths(self) -> "Figure":
        """Draw AUROC over the depth of fine-tuning."""
        return self._draw("depths")

    def efficiency(self) -> "Figure":
        """Draw AUROC over the number of training patients."""
        return self._draw("efficiency")

    def _draw(self, name: str) -> "Figure":
        from medembed.report.figures import draw_figure

        figure = draw_figure(name, self.comparison.result, self.comparison.test_set)
        if figure is None:
            raise RunError(
                f"this comparison has nothing for the figure {name!r}: its test rows are of one "
                "class, or its runs do not tell what the figure shows."
            )
        return figure

    def __repr__(self) -> str:
        names = [name for name in vars(Plots) if not name.startswith("_")]
        return f"Figures: {', '.join(f'.{name}()' for name in names)}"


def _flatten(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return one head's row of `Comparison.to_frame`."""
    fit = {name: own for name, own in (row.get("fit") or {}).items() if name not in SCORES}
    numbers = {
        f"{name}{ending}": score[part]
        for name, score in {**{name: row["scores"][name] for name in SCORES}, **fit}.items()
        for ending, part in (("", "value"), ("_low", "low"), ("_high", "high"))
    }
    numbers["p_holm"] = (row["versus_best"] or {}).get("p_holm")
    plain = {name: float("nan") if n is None else float(n) for name, n in numbers.items()}
    return {**{name: row[name] for name in ABOUT}, **plain}


def _write_html(table: Table) -> str:
    ends = [NAME] * table.n_names + [NUMBER] * (len(table.columns) - table.n_names)
    cells = zip(map(to_html_cell, table.columns), ends, strict=True)
    head = "".join(f"<th{end}>{cell}</th>" for cell, end in cells)
    rows = [
        "".join(f"<td{end}>{to_html_cell(cell)}</td>" for cell, end in zip(row, ends, strict=True))
        for row in table.rows
    ]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    title = f"<caption>{to_html_cell(table.title)}</caption>"
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
