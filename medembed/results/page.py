"""One self-contained page about any number of runs: no network, no machine's paths, no names.

Its only script sorts and filters the leaderboard; without it the page is whole.
"""

import base64
import datetime as dt
import hashlib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from medembed import __version__
from medembed.errors import RunError
from medembed.files import write_atomically
from medembed.results import page_tables as tables
from medembed.results.alignment import align_runs
from medembed.results.comparison import DISCLAIMER, compare_aligned, open_runs
from medembed.results.external import find_external
from medembed.results.figures import FIGURES, Plot, plot_all
from medembed.results.gallery import FindThumbnails, find_mistakes, show_mistakes
from medembed.results.pairing import row_name
from medembed.results.provenance import describe_run
from medembed.text import to_html

__all__ = ["write_report"]

_SUFFIXES = (".png", ".pdf", ".svg", ".csv")
METHOD_NOTES = (
    "A study's probability is the mean of its views' probabilities.",
    "Test was scored once per head. Configurations were chosen within the folds of train that are "
    "learnt from, calibration and thresholds on out-of-fold predictions, with no patient on both "
    "sides.",
    "F1 is the mean over both classes; κ is Cohen's; ECE is the calibration error over ten bins.",
    "p: DeLong's paired test with patients as clusters (Obuchowski) by Student's t, with Holm's "
    "correction where it says so; beside it the paired bootstrap over patients, and McNemar's, "
    "which takes rows as independent.",
    "Slope, intercept and Brier score say how calibrated probabilities fit. Noise alone makes ECE "
    "larger, so it has an upper bound and no lower one.",
    "Which method an interval or a test takes was chosen by simulation: bench/RESULTS.md.",
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
    find_thumbnails: FindThumbnails | None = None,
) -> dict[str, Any]:
    """Write ``index.html`` and ``figures/`` about complete runs.

    Parameters
    ----------
    run_paths : sequence of str or Path
        Run directories.
    out : str or Path
        Directory of the page; made where it is missing. Files of an earlier page are replaced,
        and figures removed that no longer apply.
    level : {"study", "image"}
        What is scored.
    n_resamples, seed : int
        Bootstrap resamples of patients, and their seed.
    date : date, optional
        What the page says as its date; today by default. All else depends on the runs alone.
    find_thumbnails : callable, optional
        Gives the images of the gallery, see `results.gallery`; without it they go by their hash.

    Returns
    -------
    dict
        ``page`` (path) and ``figures`` (paths of PNG, PDF, SVG and CSV files).

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
    external = find_external(runs)  # what is damaged is told before seconds go into figures
    test_set = align_runs(runs, level)
    result = compare_aligned(runs, test_set, n_resamples=n_resamples, seed=seed)
    plots = plot_all(result, test_set)
    abouts = [
        describe_run(run, about["name"]) for run, about in zip(runs, result["runs"], strict=True)
    ]
    gallery = show_mistakes(find_mistakes(result, test_set), find_thumbnails)
    date = date or dt.datetime.now(dt.UTC).date()
    page = _render(result, plots, abouts, gallery, external, date)
    figures_path = out / "figures"
    figures_path.mkdir(parents=True, exist_ok=True)
    written = [path for plot in plots for path in _write_plot(plot, figures_path)]
    write_atomically(out / "index.html", page.encode())
    _remove_old(figures_path, written)
    return {"page": str(out / "index.html"), "figures": [str(path) for path in written]}


def _render(
    result: dict[str, Any],
    plots: list[Plot],
    abouts: list[dict[str, Any]],
    gallery: dict[str, Any],
    external: list[dict[str, Any]],
    date: dt.date,
) -> str:
    environment = Environment(
        loader=PackageLoader("medembed", "results/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=_show,
    )
    script = environment.get_template("page.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    trusted = Markup(script)  # nosec B704 # ours, and none of it comes from a run
    return environment.get_template("page.html.j2").render(
        title="Classifying radiographs: which head is best?",
        result=result,
        summary=_summarise(result),
        facts=_facts(result),
        leaderboard=tables.tabulate_heads(result),
        pairs=tables.tabulate_pairs(result),
        decisions=tables.tabulate_decisions(result),
        calibrations=tables.tabulate_calibrations(result),
        deferrals=tables.tabulate_deferrals(result),
        coverage=tables.tabulate_coverage(result),
        seeds=tables.tabulate_seeds(result),
        by_region=tables.tabulate_groups(result, "region"),
        by_views=tables.tabulate_groups(result, "views"),
        plots={plot.name: _embed(plot) for plot in plots},
        gallery=gallery,
        external=external,
        runs=abouts,
        command=_command(result),
        notes=[*result["notes"][:-1], *METHOD_NOTES, DISCLAIMER],
        disclaimer=DISCLAIMER,
        date=date.isoformat(),
        version=__version__,
        script=trusted,
        script_digest=digest,
    )


def _show(value: Any) -> Any:
    """Let text from data be text in HTML, and what would turn its direction a visible mark."""
    if type(value) is not str:
        return value
    return Markup(to_html(value))  # nosec B704 # escaped there


def _command(result: dict[str, Any]) -> str:
    """Write the command that makes this page again."""
    names = [run["name"] for run in result["runs"]]
    words = ["medembed", "report", *names, "-o", "report", "--level", result["level"]]
    return shlex.join([*words, "--seed", str(result["seed"])])


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
    contents = (plot.png, plot.pdf, plot.light_svg, plot.csv.encode())
    paths = [directory / f"{plot.name}{suffix}" for suffix in _SUFFIXES]
    for path, content in zip(paths, contents, strict=True):
        write_atomically(path, content)
    return paths


def _remove_old(directory: Path, written: list[Path]) -> None:
    """Remove figures of an earlier page that this one does not have, and nothing else."""
    ours = {directory / f"{name}{suffix}" for name in FIGURES for suffix in _SUFFIXES}
    for path in ours.difference(written):
        path.unlink(missing_ok=True)
