"""One self-contained page about any number of runs: no network, no scripts, no machine's paths."""

import base64
import datetime as dt
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from medembed.errors import RunError
from medembed.files import write_atomically
from medembed.results.alignment import align_runs
from medembed.results.comparison import DISCLAIMER, compare_runs, open_runs, row_name
from medembed.results.figures import Plot, plot_regions, plot_roc
from medembed.results.provenance import describe_run
from medembed.results.tables import format_interval, format_value, make_table

__all__ = ["write_report"]

LEADERBOARD = {
    "auroc": "AUROC [95 %]",
    "average_precision": "Average precision [95 %]",
    "kappa": "κ [95 %]",
    "brier": "Brier",
    "ece": "ECE",
}
DECISIONS = {
    "accuracy": "Accuracy [95 %]",
    "macro_f1": "F1 [95 %]",
    "sensitivity": "Sensitivity [95 %]",
    "specificity": "Specificity [95 %]",
    "kappa": "κ [95 %]",
}
METHOD_NOTES = (
    "A study's probability is the mean of its views' probabilities.",
    "Test was scored once per head; configurations, calibration and thresholds were chosen on "
    "out-of-fold predictions of train, with no patient on both sides.",
    "F1 is the mean over both classes; κ is Cohen's; ECE is the calibration error over ten bins.",
    "A score that its rows cannot give, such as AUROC of one class, is marked not estimable or –.",
)


def write_report(
    run_paths: Sequence[str | Path],
    out: str | Path,
    *,
    level: str = "study",
    n_resamples: int = 2000,
    seed: int = 0,
    date: dt.date | None = None,
) -> dict[str, Any]:
    """Write ``index.html`` and ``figures/`` about complete runs.

    Parameters
    ----------
    run_paths : sequence of str or Path
        Run directories.
    out : str or Path
        Directory of the page; made where it is missing, files of an earlier page are replaced.
    level : {"study", "image"}
        What is scored.
    n_resamples, seed : int
        Bootstrap resamples of patients, and their seed.
    date : date, optional
        What the page says as its date; today by default. All else depends on the runs alone.

    Returns
    -------
    dict
        ``page`` (path) and ``figures`` (paths of PNG, SVG and CSV files).

    Raises
    ------
    PathNotFoundError
        A run does not exist.
    RunError
        A run is unfinished, the runs have no test rows in common, or `out` is a file.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file. Choose a directory for the page.")
    runs = open_runs(run_paths)
    result = compare_runs(runs, level=level, n_resamples=n_resamples, seed=seed)
    plots = [plot_roc(result, align_runs(runs, level)), plot_regions(result)]
    abouts = [
        describe_run(run, about["name"]) for run, about in zip(runs, result["runs"], strict=True)
    ]
    page = _render(result, plots, abouts, date or dt.datetime.now(dt.UTC).date())
    figures_path = out / "figures"
    figures_path.mkdir(parents=True, exist_ok=True)
    written = [path for plot in plots if plot for path in _write_plot(plot, figures_path)]
    write_atomically(out / "index.html", page.encode())
    return {"page": str(out / "index.html"), "figures": [str(path) for path in written]}


def _render(
    result: dict[str, Any], plots: list[Plot | None], abouts: list[dict[str, Any]], date: dt.date
) -> str:
    environment = Environment(
        loader=PackageLoader("medembed", "results/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    roc, region_plot = (_embed(plot) if plot else None for plot in plots)
    return environment.get_template("page.html.j2").render(
        title="Classifying radiographs: which head is best?",
        result=result,
        summary=_summarise(result),
        facts=_facts(result),
        leaderboard=_leaderboard(result),
        decisions=_decisions(result),
        by_region=_grouped(result, "region"),
        by_views=_grouped(result, "views"),
        roc=roc,
        region_plot=region_plot,
        runs=abouts,
        notes=[*result["notes"][:-1], *METHOD_NOTES, DISCLAIMER],
        disclaimer=DISCLAIMER,
        date=date.isoformat(),
        version=version("medembed"),
    )


def _summarise(result: dict[str, Any]) -> str:
    """Say in words who won, by how much, and who may be as good."""
    trained = [row for row in result["rows"] if not row["baseline"]]
    best = trained[0] if trained else result["rows"][0]
    auroc = best["scores"]["auroc"]
    if auroc["value"] is None:
        return "The test rows are of one class, so AUROC is not estimable and no head is best."
    interval = (
        f" (95 % interval {auroc['low']:.3f} to {auroc['high']:.3f})"
        if auroc["low"] is not None
        else ""
    )
    tied = [row for row in trained if row is not best and (row["versus_best"] or {}).get("tied")]
    names = ", ".join(_name(result, row) for row in tied)
    if names:
        ending = f"These are not distinguishable from it: {names}."
    elif len(trained) > 1:
        ending = "Every other head is worse, by the paired test."
    else:
        ending = "It is the only trained head."
    return f"{_name(result, best)} has the highest AUROC, {auroc['value']:.3f}{interval}. {ending}"


def _facts(result: dict[str, Any]) -> list[dict[str, str]]:
    test = result["test"]
    plural = "studies" if result["level"] == "study" else "images"
    n_left_out = sum(run["left_out"] for run in result["runs"])
    n_heads = sum(not row["baseline"] for row in result["rows"])
    facts = {
        f"Test {plural}": f"{test['n']:,}",
        "of these abnormal": f"{test['n_abnormal']:,}",
        "Test patients": f"{test['n_patients']:,}",
        "Trained heads": f"{n_heads:,}",
        "Images left out": f"{n_left_out:,}",
    }
    return [{"name": name, "value": value} for name, value in facts.items()]


def _leaderboard(result: dict[str, Any]) -> dict[str, Any]:
    main = make_table(result)
    rows = [
        {
            "cells": [
                _name(result, row),
                *(
                    format_interval(row["scores"][score])
                    if "[" in heading
                    else format_value(row["scores"][score])
                    for score, heading in LEADERBOARD.items()
                ),
                line[-1],
            ],
            "kind": "baseline" if row["baseline"] else "",
        }
        for row, line in zip(result["rows"], main.rows, strict=True)
    ]
    return {
        "title": f"{main.title}, best AUROC first",
        "columns": ["Head", *LEADERBOARD.values(), "p"],
        "rows": rows,
        "legend": main.notes[0],
    }


def _decisions(result: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for row in result["rows"]:
        if row["baseline"]:
            continue
        cuts = ((f"Youden, {row['threshold']:.3f}", "scores"), ("0.5", "at_half"))
        for i, (cut, field) in enumerate(cuts):
            cells = [format_interval(row[field][score]) for score in DECISIONS]
            spanned = {"n_spanning": 1, "span": len(cuts) if i == 0 else 0}
            rows.append({"cells": [_name(result, row), cut, *cells], **spanned})
    return {
        "title": "Decisions at two thresholds on the calibrated probability",
        "columns": ["Head", "Threshold", *DECISIONS.values()],
        "rows": rows,
    }


def _grouped(result: dict[str, Any], by: str) -> dict[str, Any]:
    table = make_table(result, by)
    rows = [
        {"cells": row, "n_spanning": 2, "span": len(section) if row is section[0] else 0}
        for section in table.sections
        for row in section
    ]
    return {"title": table.title, "columns": table.columns, "rows": rows}


def _name(result: dict[str, Any], row: dict[str, Any]) -> str:
    return row_name(row, several=len(result["runs"]) > 1)


def _embed(plot: Plot) -> dict[str, Any]:
    width, height = _svg_size(plot.light_svg)
    return {
        "name": plot.name,
        "alt": plot.alt,
        "caption": plot.caption,
        "light": _data_uri(plot.light_svg),
        "dark": _data_uri(plot.dark_svg),
        "width": width,
        "height": height,
    }


def _data_uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _svg_size(svg: bytes) -> tuple[int, int]:
    """Read the size in points, which holds the place of the figure while the page loads."""
    found = re.search(rb'viewBox="0 0 ([0-9.]+) ([0-9.]+)"', svg)
    return (round(float(found[1])), round(float(found[2]))) if found else (0, 0)


def _write_plot(plot: Plot, directory: Path) -> list[Path]:
    contents = {".png": plot.png, ".svg": plot.light_svg, ".csv": plot.csv.encode()}
    for suffix, content in contents.items():
        write_atomically(directory / f"{plot.name}{suffix}", content)
    return [directory / f"{plot.name}{suffix}" for suffix in contents]
