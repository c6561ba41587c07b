"""One self-contained page about any number of runs, without network access, paths or names.

Its script, whose source is in `web/`, makes figures, cases and the map answer; the page states the
results without it.
"""

import base64
import datetime as dt
import hashlib
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
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
from medembed.report.cases import (
    CASES_FILE,
    CaseSources,
    check_covariates,
    collect_films,
    list_cases,
)
from medembed.report.checklist import write_checklists
from medembed.report.checklist_answers import Study
from medembed.report.external import ExternalSection, find_external, read_evaluations
from medembed.report.figures import FIGURES, MAP, OPTIONAL_FORMATS, Plot, plot_all, plot_map
from medembed.report.figures.plotting import themed_svg
from medembed.report.gallery import FindThumbnails, find_mistakes, show_mistakes
from medembed.report.group_tables import ColumnSections, tabulate_columns
from medembed.report.headline import (
    Headline,
    describe_small_sample,
    describe_tiles,
    write_headline,
)
from medembed.report.layers import tabulate_layers
from medembed.report.measured import describe_measured, list_measured
from medembed.report.page_data import make_document
from medembed.report.page_schema import Cases, Films, PageDocument
from medembed.report.run_section import RunSection, describe_run
from medembed.report.tables import make_table
from medembed.results.ablations import count_left_out
from medembed.results.alignment import TestSet, align_runs
from medembed.results.comparison import ComparisonOptions, compare_aligned, open_runs
from medembed.results.comparison_schema import ComparisonResult
from medembed.results.embedding_map import first_map
from medembed.results.methods import DISCLAIMER, name_compared_classes
from medembed.results.runs import Run, RunLike
from medembed.results.significance import describe_margins, find_non_inferior
from medembed.results.subgroups import explain_other_manifest

__all__ = [
    "PageExtras",
    "Tab",
    "WrittenReport",
    "find_other_manifest",
    "make_environment",
    "read_formats",
    "write_page",
    "write_report",
]

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


CAPTIONS = {
    "roc": "Band: pointwise 95 % of the best head, by resamples of patients.",
    "precision_recall": "Band: pointwise 95 % of the best head, by resamples of patients.",
    "distribution": "Calibrated probabilities on test, of the head chosen above.",
    "calibration": "Of Platt's calibration, which decisions use; other calibrations stand in the "
    "details. Band and bars: 95 %.",
    "decision_curve": "Net benefit of acting on a probability above the threshold, against acting "
    "on everybody or nobody. Band: 95 % of the head chosen above.",
    "confusion": "Of the head and at the threshold chosen above.",
}
"""Of figures that answer; the static ones have captions of their own."""


@dataclass(frozen=True)
class Tab:
    """A link between the pages of a sweep's targets.

    Attributes
    ----------
    name : str
        The target.
    href : str
        The page, from the one that shows the link.
    is_open : bool
        Whether it is this page.
    """

    name: str
    href: str
    is_open: bool = False


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
    cases: CaseSources | None = None,
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
    cases : CaseSources, optional
        What each test study is shown with, such as the nearest films of train.

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
    formats = read_formats(figures)
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
    extras = PageExtras(
        known,
        find_thumbnails,
        command,
        checklists,
        date,
        progress,
        formats=formats,
        cases=cases or CaseSources(),
    )
    other = find_other_manifest(opened, test_set, extras)
    result = compare_aligned(
        opened, test_set, n_resamples=n_resamples, seed=seed, prevalence=prevalence
    )
    return write_page(opened, (result, test_set), out, asked, extras, other, external)


@dataclass(frozen=True)
class PageExtras:
    """What a page shows besides a comparison; see `write_report`."""

    manifest: Manifest | None = None
    find_thumbnails: FindThumbnails | None = None
    command: str | None = None
    checklists: Sequence[str] = ()
    date: dt.date | None = None
    progress: Callable[[int, int], None] | None = None
    tabs: Sequence[Tab] = ()
    formats: tuple[str, ...] = ()
    """Formats of figures besides SVG and CSV, see `read_formats`."""
    cases: CaseSources = field(default_factory=CaseSources)


def find_other_manifest(runs: Sequence[Run], test_set: TestSet, extras: PageExtras) -> str | None:
    """Return why columns of the manifest cannot be shown, or None; see `write_report`.

    Raises
    ------
    RunError
        A run was made from another manifest, and there are no thumbnails; or a covariate is not a
        column of the manifest.
    """
    check_covariates(extras.cases.covariates, extras.manifest)
    if extras.manifest is None:
        return None
    other = explain_other_manifest(runs, test_set, extras.manifest)
    if other is not None and extras.find_thumbnails is None:
        raise RunError(other)
    return other


def write_page(
    runs: Sequence[Run],
    compared: tuple[ComparisonResult, TestSet],
    out: Path,
    asked: ComparisonOptions,
    extras: PageExtras,
    other: str | None = None,
    external: Sequence[ExternalSection] = (),
) -> WrittenReport:
    """Write the page of a comparison, its figures and checklists; see `write_report`.

    Parameters
    ----------
    runs : sequence of Run
    compared : tuple of dict and TestSet
        What `comparison.compare_opened` returned for these runs.
    out : Path
        The directory of the page.
    asked : ComparisonOptions
    extras : PageExtras
    other : str, optional
        Why columns of the manifest are not shown, see `find_other_manifest`.
    external : sequence of ExternalSection
        What the page shows of evaluations.
    """
    result, test_set = compared
    names = [about["name"] for about in result["runs"]]
    elsewhere = read_evaluations(runs, names)
    known, find_thumbnails, formats = extras.manifest, extras.find_thumbnails, extras.formats
    columns = None if known is None or other else tabulate_columns(result, test_set, known)
    if find_thumbnails is not None and columns and not (columns.sections or columns.notes):
        columns = None  # nobody asked for them
    found_map, classes = first_map(runs, names), name_compared_classes(result)
    plots = [
        *plot_all(result, test_set, extras.progress, formats),
        *([] if found_map is None else [plot_map(*found_map, classes)]),
    ]
    by_name = {plot.name: plot for plot in plots}
    sources = replace(extras.cases, find_thumbnails=find_thumbnails)
    cases = list_cases(runs, result, test_set, None if other else known, sources)
    document = make_document(result, test_set, by_name, cases, found_map)
    out.mkdir(parents=True, exist_ok=True)
    films = collect_films(cases, out, sources)
    page = _Page(
        document=document,
        films=films,
        result=result,
        headline=write_headline(result, elsewhere),
        measured=describe_measured(result, test_set),
        subject=list_measured(runs, test_set.units["region"]),
        left_out=count_left_out(runs),
        margins=_test_margin(result, test_set, asked),
        columns=columns,
        other_manifest=other,
        plots=plots,
        formats=formats,
        gallery=show_mistakes(find_mistakes(result, test_set), find_thumbnails, classes),
        external=list(external),
        runs=[
            describe_run(run, about["name"], about["left_out_of"])
            for run, about in zip(runs, result["runs"], strict=True)
        ],
        command=extras.command or _command(result, asked, formats, has_manifest=known is not None),
        date=extras.date or dt.datetime.now(dt.UTC).date(),
        tabs=extras.tabs,
    ).render()
    figures_path = out / "figures"
    figures_path.mkdir(parents=True, exist_ok=True)
    written = [path for plot in plots for path in _write_plot(plot, figures_path, formats)]
    if cases.whole is None:
        (out / CASES_FILE).unlink(missing_ok=True)
    else:
        script = f"medembedCases({_as_json(cases.whole)})"
        write_atomically(out / CASES_FILE, script.encode())
    write_atomically(out / "index.html", page.encode())
    _remove_old(figures_path, written)
    study = Study(dict(zip(names, runs, strict=True)), result, elsewhere)
    filled = write_checklists(extras.checklists, study, out)
    paths = WrittenReport(page=str(out / "index.html"), figures=[str(path) for path in written])
    if filled:
        paths["checklist"] = filled
    return paths


def _test_margin(
    result: ComparisonResult, test_set: TestSet, asked: ComparisonOptions
) -> Sequence[str]:
    if asked.margin is None:
        return ()
    tests = find_non_inferior(result["rows"], test_set, asked.margin)
    return describe_margins(tests, asked.margin, name_compared_classes(result))


@dataclass(frozen=True, kw_only=True)
class _Page:
    """All that the page shows; its template is `page.html.j2`."""

    document: PageDocument
    films: Films
    result: ComparisonResult
    headline: Headline
    measured: str
    subject: Mapping[str, str]
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
    tabs: Sequence[Tab] = ()

    def render(self) -> str:
        script, style = _read_asset("page.js"), _read_asset("page.css")
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        tabulated = _tabulate(self.result)
        plots = {plot.name: _embed(plot) for plot in self.plots}
        return (
            make_environment()
            .get_template("page.html.j2")
            .render(
                asked=self,
                title=self.headline.title,
                result=self.result,
                summary=self.headline.text,
                measured=self.measured,
                classes=name_compared_classes(self.result),
                captions=CAPTIONS,
                tiles=describe_tiles(self.result),
                small_sample=describe_small_sample(self.result),
                subject=self.subject,
                facts=_facts(self.result, self.left_out, is_elsewhere=bool(self.external)),
                plural="studies" if self.result["level"] == "study" else "images",
                lower_is_better=tables.LOWER_IS_BETTER,
                n_heads=len(self.document.heads),
                sections=self._sections(plots),
                **tabulated,
                plots=plots,
                suffixes=_join([f".{name}" for name in ("svg", "csv", *self.formats)]),
                gallery=self.gallery,
                external=self.external,
                runs=self.runs,
                command=self.command,
                notes=[*self.result["notes"][:-1], *METHOD_NOTES, DISCLAIMER],
                disclaimer=DISCLAIMER,
                date=self.date.isoformat(),
                version=__version__,
                has_folder=bool(self.films.beside),
                has_file=self.document.cases_file is not None,
                data=_unescaped(_as_json(self.document)),
                films=_unescaped(_as_json(self.films)),
                style=_unescaped(style),
                script=_unescaped(script),
                script_digest=digest,
            )
        )

    def _sections(self, plots: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Return the page's sections, by id and name, in their order."""
        known = [
            ("threshold", "At a threshold", True),
            ("leaderboard", "Leaderboard", True),
            ("mistakes", "Cases", True),
            ("map", "Map", "map" in plots),
            ("groups", "Groups", True),
            ("two-heads", "Two heads", len(self.document.heads) > 1),
            ("external", "Elsewhere", bool(self.external)),
            ("details", "Details", True),
            ("runs", "What was run", True),
        ]
        return [(name, title) for name, title, is_there in known if is_there]


def _read_asset(name: str) -> str:
    """Return a file of the page that was built from `web/`."""
    return (resources.files("medembed") / "report" / "templates" / name).read_text("utf-8")


def _as_json(document: PageDocument | Films | Cases) -> str:
    """Return a document as JSON that can stand within a script: nothing in it ends the element."""
    text = document.model_dump_json()
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _unescaped(text: str) -> Markup:
    """Return text that the page takes as it is: its own script and style, and `_as_json`'s."""
    return Markup(text)  # nosec B704 # nothing in it comes from a run, or it has no <


def make_environment() -> Environment:
    """Return the environment of the templates, in which text from data is escaped."""
    return Environment(
        loader=PackageLoader("medembed", "report/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=_show,
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
        "layers": tabulate_layers(result),
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
    title = "Heads" if is_elsewhere else "Trained heads"
    n_heads = sum(not row["baseline"] for row in result["rows"])
    return {
        title: f"{n_heads:,}",
        "Images left out": f"{'' if left_out[1] else '≥ '}{left_out[0]:,}",
    }


def _embed(plot: Plot) -> dict[str, Any]:
    """Return a figure as the page shows it: without its own title and caption, in both themes."""
    themed = themed_svg(plot.light_svg)
    light = plot.light_svg if themed is None else themed
    width, height = _svg_size(light)
    return {
        "name": plot.name,
        "title": plot.title,
        "alt": plot.alt,
        "caption": plot.caption,
        "light": _data_uri(light),
        "dark": _data_uri(plot.dark_svg) if themed is None else None,
        "width": width,
        "height": height,
    }


def _data_uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _svg_size(svg: bytes) -> tuple[int, int]:
    """Return the size in points, which reserves the figure's space while the page loads."""
    found = re.search(rb'viewBox="0 [0-9.]+ ([0-9.]+) ([0-9.]+)"', svg)
    return (round(float(found[1])), round(float(found[2]))) if found else (0, 0)


def read_formats(given: str | Sequence[str]) -> tuple[str, ...]:
    """Return the formats of figures besides SVG and CSV, or raise RunError if one is unknown."""
    formats = [name.strip() for name in given.split(",")] if isinstance(given, str) else given
    for name in formats:
        if name not in OPTIONAL_FORMATS:
            raise RunError(
                f"figures are not written as {name!r}. Choose from {', '.join(OPTIONAL_FORMATS)}; "
                "SVG and CSV are always written."
            )
    return tuple(dict.fromkeys(formats))


def _join(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def _write_plot(plot: Plot, directory: Path, formats: Sequence[str]) -> list[Path]:
    contents = {**plot.save(("svg", *formats)), "csv": plot.csv.encode()}
    paths = {name: directory / f"{plot.name}.{name}" for name in contents}
    for name, path in paths.items():
        write_atomically(path, contents[name])
    return list(paths.values())


def _remove_old(directory: Path, written: list[Path]) -> None:
    """Remove only those figures of an earlier page that this one does not have."""
    suffixes = ("svg", "csv", *OPTIONAL_FORMATS)
    ours = {directory / f"{name}.{suffix}" for name in (*FIGURES, MAP) for suffix in suffixes}
    for path in ours.difference(written):
        path.unlink(missing_ok=True)
