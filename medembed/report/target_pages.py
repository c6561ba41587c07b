"""The page of a sweep's targets: an overview, and a page for each target, linked as tabs."""

import datetime as dt
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from medembed import __version__
from medembed.core.errors import RunError
from medembed.core.files import as_path, write_atomically
from medembed.report.cases import FOLDER
from medembed.report.measured import list_measured
from medembed.report.page import (
    PageExtras,
    Tab,
    find_other_manifest,
    make_environment,
    write_page,
)
from medembed.report.tables import Table, format_interval
from medembed.report.target_answers import read_answers
from medembed.report.target_tables import tabulate_means, tabulate_targets
from medembed.results.comparison import ComparisonOptions
from medembed.results.methods import DISCLAIMER
from medembed.results.target_comparison import (
    Compared,
    TargetsComparison,
    compare_each,
    summarise_targets,
)
from medembed.results.targets import TargetRuns

__all__ = ["WrittenTargets", "write_target_report"]

PAGE = "index.html"


class WrittenTargets(TypedDict):
    """Paths of the files that `write_target_report` wrote."""

    page: str
    figures: list[str]
    targets: dict[str, str]


def write_target_report(
    runs: TargetRuns, out: str | Path, options: ComparisonOptions, extras: PageExtras
) -> WrittenTargets:
    """Write ``index.html`` with the targets side by side, and a page for each below its name.

    Each page shows all of them as tabs. Paired tests are corrected over all targets.

    Parameters
    ----------
    runs : TargetRuns
        All runs complete.
    out : str or Path
        Directory of the pages, created if missing.
    options : ComparisonOptions
        What `target_comparison.compare_targets` takes.
    extras : PageExtras
        What the pages of targets show besides.

    Returns
    -------
    WrittenTargets
        A dict: ``page`` (path of the overview), ``figures`` (of all targets), and ``targets``: the
        path of each target's page.

    Raises
    ------
    RunError
        A run is missing or unfinished or was made from another manifest, or `out` is a file.
    """
    out = as_path(out, "the directory of the page")
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file. Choose a directory for the page.")
    opened = runs.runs()
    found = compare_each(runs, options)
    others = {
        name: find_other_manifest([opened[name]], test_set, extras)
        for name, (_, test_set) in found.items()
    }
    written = WrittenTargets(page=str(out / PAGE), figures=[], targets={})
    answers = read_answers(opened)
    for name, compared in found.items():
        films = extras.cases.films or out / FOLDER
        sources = replace(extras.cases, films=films, answers=answers)
        own = replace(extras, tabs=_tabs(list(found), name), cases=sources)
        page = write_page([opened[name]], compared, out / name, options, own, others[name])
        written["targets"][name] = page["page"]
        written["figures"] += page["figures"]
    result = summarise_targets(runs, found)
    text = (
        make_environment()
        .get_template("targets.html.j2")
        .render(
            tabs=_tabs(list(found)),
            title=f"{len(found)} targets of one cache",
            subject=list_measured(opened.values(), _regions(found)),
            summary=_summarise(result),
            synthetic=any(own["synthetic"] for own in result["targets"].values()),
            by_target=tabulate_targets(result),
            means=tabulate_means(result),
            answers=_tabulate_answers(runs),
            command=extras.command or "medembed report",
            sweep=runs.content.command,
            notes=result["notes"],
            disclaimer=DISCLAIMER,
            date=(extras.date or dt.datetime.now(dt.UTC).date()).isoformat(),
            version=__version__,
        )
    )
    write_atomically(out / PAGE, text.encode())
    return written


def _regions(found: Compared) -> set[str]:
    """Return the body regions of the test rows of all targets."""
    return {name for _, test_set in found.values() for name in test_set.units["region"]}


def _tabs(names: Sequence[str], current: str | None = None) -> list[Tab]:
    """Return the links of the overview, or of the page of the target `current`."""
    up = "" if current is None else "../"
    every = Tab("All targets", f"{up}{PAGE}", current is None)
    return [every, *(Tab(name, f"{up}{name}/{PAGE}", name == current) for name in names)]


def _summarise(result: TargetsComparison) -> str:
    best = next(row for row in result["macro"] if not row["baseline"])
    n = len(best["targets"])
    return (
        f"{best['head']} has the highest mean AUROC over {n} {'target' if n == 1 else 'targets'}: "
        f"{format_interval(best['scores']['auroc'])}. Whether heads differ is tested within each "
        "target."
    )


def _tabulate_answers(runs: TargetRuns) -> Table:
    rows = [
        [own.name, f"{own.positive:,}", f"{own.negative:,}", f"{own.unknown:,}",
         "yes" if own.reason is None else "no"]
        for own in runs.content.targets
    ]  # fmt: skip
    columns = ["Target", "Positive", "Negative", "Unknown", "Estimable"]
    return Table("Images of the manifest by answer", columns, 1, [rows])
