"""One self-contained page about any number of runs, without network access, paths or names.

Its only script sorts and filters the leaderboard; the page is complete without it.
"""

import base64
import datetime as dt
import hashlib
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from medembed import __version__
from medembed.core.errors import RunError
from medembed.core.files import as_path, write_atomically
from medembed.core.text import to_html
from medembed.dataset.manifest import Manifest, read_manifest
from medembed.evaluation.thresholds import SHOWN, ThresholdRule, parse_rules
from medembed.report import page_tables as tables
from medembed.report.checklist import write_checklists
from medembed.report.checklist_answers import Study
from medembed.report.external import ExternalSection, find_external, read_evaluations
from medembed.report.figures import FIGURES, OPTIONAL_FORMATS, Plot, plot_all
from medembed.report.gallery import FindThumbnails, find_mistakes, show_mistakes
from medembed.report.group_tables import ColumnSections, tabulate_columns
from medembed.report.headline import Headline, write_headline
from medembed.report.run_section import RunSection, describe_run
from medembed.report.tables import make_table
from medembed.results.ablations import count_left_out
from medembed.results.alignment import TestSet, align_runs
from medembed.results.comparison import ComparisonOptions, compare_aligned, open_runs
from medembed.results.comparison_schema import ComparisonResult
from medembed.results.methods import DISCLAIMER
from medembed.results.runs import RunLike
from medembed.results.significance import describe_margins, find_non_inferior
from medembed.results.subgroups import explain_other_manifest

__all__ = ["WrittenReport", "write_report"]

METHOD_NOTES = (
    "A study's probability is the mean of its views' probabilities.",
    "Test was scored once per head. Configurations were chosen within the folds of train that are "
    "learnt from, calibration and thresholds on out-of-fold predictions, with no patient on both "
    "sides.",
    "Macro-F1 is the mean of F1 over both classes; κ is Cohen's; ECE is the calibration error over "
    "ten bins.",
    "p: DeLong's paired test with patients as clusters (Obuchowski) by Student's t, with Holm's "
    "correction where it says so; beside it the paired bootstrap over patients, and McNemar's, "
    "which takes rows as independent.",
    "Slope, intercept and Brier score say how calibrated probabilities fit. Noise alone makes ECE "
    "larger, so it has an upper bound and no lower one.",
    "Which method an interval or a test takes was chosen by simulation: bench/RESULTS.md.",
    "A score that its rows cannot give, such as AUROC of one class, is marked not estimable or –.",
)


class WrittenReport(TypedDict):
    """Paths of the files that `write_report` wrote."""

    page: str
    figures: list[str]
    checklist: NotRequired[list[dict[str, Any]]]


def write_report(
    runs: RunLike | Sequence[RunLike],
    out: str | Path,
    *,
    level: str = "study",
    n_resamples: int = 2000,
    seed: int = 0,
    date: dt.date | None = None,
    find_thumbnails: FindThumbnails | None = None,
    manifest: Manifest | str | os.PathLike[str] | None = None,
    margin: float | None = None,
    command: str | None = None,
    checklists: Sequence[str] = (),
    operating_points: Sequence[str | ThresholdRule] = (),
    prevalence: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    figures: str | Sequence[str] = (),
) -> WrittenReport:
    """Write ``index.html`` and ``figures/`` about complete runs.

    Parameters
    ----------
    runs : Run, path, or sequence of them
        Run directories.
    out : str or Path
        Directory of the page, created if missing. Files of an earlier page are replaced, and
        figures that no longer apply are removed.
    level : {"study", "image"}
        The unit that is scored.
    n_resamples, seed : int
        Bootstrap resamples of patients, and their seed.
    date : date, optional
        Date shown on the page, by default today. Everything else depends only on the runs.
    find_thumbnails : callable, optional
        Returns the images of the gallery, see `report.gallery`; by default images are named by
        their hash.
    manifest : Manifest or path, optional
        The manifest that the runs were made from: adds a section for each of its columns that can
        be grouped. If a run was made from another one and there are thumbnails, the page notes it.
    margin : float, optional
        Acceptable loss of AUROC: adds tests of non-inferiority.
    command : str, optional
        The command shown for reproducing the page; by default with run names, level and seed.
    checklists : sequence of str
        Names from `checklist.CHECKLISTS`, to be filled in and written beside the page.
    operating_points, prevalence
        See `comparison.compare`.
    progress : callable, optional
        Called as progress(done, total) with figures while they are drawn.
    figures : sequence of {"png", "pdf"}, or str
        Formats to write each figure in besides SVG and CSV, also as "png,pdf".

    Returns
    -------
    WrittenReport
        A dict: ``page`` (path), ``figures`` (paths of their files), and
        ``checklist`` if any are requested, see `checklist.write_checklists`.

    Raises
    ------
    PathNotFoundError
        A run does not exist.
    RunError
        A run is unfinished or was made from another manifest, the runs share no test rows, the
        margin is out of range, a format of figures is unknown, or `out` is a file.
    """
    out = as_path(out, "the directory of the page")
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file. Choose a directory for the page.")
    formats = _read_formats(figures)
    asked = ComparisonOptions(
        level=level,
        n_resamples=n_resamples,
        seed=seed,
        margin=margin,
        operating_points=operating_points,
        prevalence=prevalence,
    )
    opened = open_runs(runs)
    known = None if manifest is None else read_manifest(manifest)
    external = find_external(opened)  # damage is reported before seconds are spent on figures
    test_set = align_runs(opened, level, parse_rules(operating_points))
    other = None if known is None else explain_other_manifest(opened, test_set, known)
    if other is not None and find_thumbnails is None:
        raise RunError(other)
    result = compare_aligned(
        opened, test_set, n_resamples=n_resamples, seed=seed, prevalence=prevalence
    )
    names = [about["name"] for about in result["runs"]]
    elsewhere = read_evaluations(opened, names)
    columns = None if known is None or other else tabulate_columns(result, test_set, known)
    if find_thumbnails is not None and columns and not (columns.sections or columns.notes):
        columns = None  # nobody asked for them
    plots = plot_all(result, test_set, progress, formats)
    page = _Page(
        result=result,
        headline=write_headline(result, elsewhere),
        left_out=count_left_out(opened),
        margins=_test_margin(result, test_set, asked),
        columns=columns,
        other_manifest=other,
        plots=plots,
        formats=formats,
        gallery=show_mistakes(find_mistakes(result, test_set), find_thumbnails),
        external=external,
        runs=[
            describe_run(run, about["name"], about["left_out_of"])
            for run, about in zip(opened, result["runs"], strict=True)
        ],
        command=command or _command(result, asked, formats, has_manifest=known is not None),
        date=date or dt.datetime.now(dt.UTC).date(),
    ).render()
    figures_path = out / "figures"
    figures_path.mkdir(parents=True, exist_ok=True)
    written = [path for plot in plots for path in _write_plot(plot, figures_path, formats)]
    write_atomically(out / "index.html", page.encode())
    _remove_old(figures_path, written)
    study = Study(dict(zip(names, opened, strict=True)), result, elsewhere)
    filled = write_checklists(checklists, study, out)
    paths = WrittenReport(page=str(out / "index.html"), figures=[str(path) for path in written])
    if filled:
        paths["checklist"] = filled
    return paths


def _test_margin(
    result: ComparisonResult, test_set: TestSet, asked: ComparisonOptions
) -> Sequence[str]:
    if asked.margin is None:
        return ()
    return describe_margins(find_non_inferior(result["rows"], test_set, asked.margin), asked.margin)


@dataclass(frozen=True, kw_only=True)
class _Page:
    """All that the page shows; its template is `page.html.j2`."""

    result: ComparisonResult
    headline: Headline
    left_out: tuple[int, bool]
    margins: Sequence[str]
    columns: ColumnSections | None
    other_manifest: str | None
    plots: list[Plot]
    formats: Sequence[str]
    gallery: dict[str, Any]
    external: list[ExternalSection]
    runs: list[RunSection]
    command: str
    date: dt.date

    def render(self) -> str:
        environment = Environment(
            loader=PackageLoader("medembed", "report/templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            finalize=_show,
        )
        script = environment.get_template("page.js").render()
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        trusted = Markup(script)  # nosec B704 # ours, and none of it comes from a run
        return environment.get_template("page.html.j2").render(
            asked=self,
            title=self.headline.title,
            result=self.result,
            summary=self.headline.text,
            facts=_facts(self.result, self.left_out, is_elsewhere=bool(self.external)),
            **_tabulate(self.result),
            plots={plot.name: _embed(plot) for plot in self.plots},
            suffixes=_join([f".{name}" for name in ("svg", "csv", *self.formats)]),
            gallery=self.gallery,
            external=self.external,
            runs=self.runs,
            command=self.command,
            notes=[*self.result["notes"][:-1], *METHOD_NOTES, DISCLAIMER],
            disclaimer=DISCLAIMER,
            date=self.date.isoformat(),
            version=__version__,
            script=trusted,
            script_digest=digest,
        )


def _tabulate(result: ComparisonResult) -> dict[str, Any]:
    """Return the tables, by the names that the template has for them."""
    return {
        "leaderboard": tables.tabulate_heads(result),
        "pairs": tables.tabulate_pairs(result),
        "decisions": tables.tabulate_decisions(result),
        "calibrations": tables.tabulate_calibrations(result),
        "deferrals": tables.tabulate_deferrals(result),
        "coverage": tables.tabulate_coverage(result),
        "seeds": tables.tabulate_seeds(result),
        "by_region": make_table(result, "region", with_counts=True),
        "by_views": make_table(result, "views", with_counts=True),
    }


def _show(value: Any) -> Any:
    """Return text from data escaped for HTML, with bidirectional controls made visible."""
    if type(value) is not str:
        return value
    return Markup(to_html(value))


def _command(
    result: ComparisonResult,
    asked: ComparisonOptions,
    formats: Sequence[str],
    *,
    has_manifest: bool,
) -> str:
    """Return a command that makes a page of these runs."""
    names = [run["name"] for run in result["runs"]]
    words = ["medembed", "report", *names, "-o", "report", "--level", result["level"]]
    usual = [rule.name for rule in SHOWN]
    for name in result["operating_points"]:
        words += [] if name in usual else ["--operating-point", name]
    words += [] if result["prevalence"] is None else ["--prevalence", str(result["prevalence"])]
    words += ["--seed", str(result["seed"])]
    words += [] if asked.margin is None else ["--margin", f"{asked.margin:g}"]
    words += ["--figures", ",".join(formats)] if formats else []
    return shlex.join([*words, *(["--manifest", "MANIFEST"] if has_manifest else [])])


def _facts(
    result: ComparisonResult, left_out: tuple[int, bool], *, is_elsewhere: bool
) -> dict[str, str]:
    test = result["test"]
    plural = "studies" if result["level"] == "study" else "images"
    title = "Heads" if is_elsewhere else "Trained heads"
    n_heads = sum(not row["baseline"] for row in result["rows"])
    return {
        f"Test {plural}": f"{test['n']:,}",
        "of these abnormal": f"{test['n_abnormal']:,}",
        "Test patients": f"{test['n_patients']:,}",
        title: f"{n_heads:,}",
        "Images left out": f"{'' if left_out[1] else '≥ '}{left_out[0]:,}",
    }


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
    """Return the size in points, which reserves the figure's space while the page loads."""
    found = re.search(rb'viewBox="0 0 ([0-9.]+) ([0-9.]+)"', svg)
    return (round(float(found[1])), round(float(found[2]))) if found else (0, 0)


def _read_formats(given: str | Sequence[str]) -> tuple[str, ...]:
    formats = [name.strip() for name in given.split(",")] if isinstance(given, str) else given
    for name in formats:
        if name not in OPTIONAL_FORMATS:
            raise RunError(
                f"figures are not written as {name!r}. Choose from {', '.join(OPTIONAL_FORMATS)}; "
                "SVG and CSV are always written."
            )
    return tuple(dict.fromkeys(formats))


def _join(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _write_plot(plot: Plot, directory: Path, formats: Sequence[str]) -> list[Path]:
    contents = {**plot.save(("svg", *formats)), "csv": plot.csv.encode()}
    paths = {name: directory / f"{plot.name}.{name}" for name in contents}
    for name, path in paths.items():
        write_atomically(path, contents[name])
    return list(paths.values())


def _remove_old(directory: Path, written: list[Path]) -> None:
    """Remove only those figures of an earlier page that this one does not have."""
    suffixes = ("svg", "csv", *OPTIONAL_FORMATS)
    ours = {directory / f"{name}.{suffix}" for name in FIGURES for suffix in suffixes}
    for path in ours.difference(written):
        path.unlink(missing_ok=True)
