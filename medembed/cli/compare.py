"""`medembed compare`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medembed.cli.commands import Command
from medembed.cli.console import print_json, say, suggest
from medembed.cli.options import (
    PATH,
    json_option,
    level_option,
    margin_option,
    operating_point_option,
    prevalence_option,
    seed_option,
    table_columns,
)

if TYPE_CHECKING:
    from medembed.results.comparison_schema import ComparisonResult
    from medembed.results.runs import Run
    from medembed.results.target_comparison import TargetsComparison

__all__ = ["compare_command", "read_given", "show_comparison", "show_run", "show_targets"]

BY_TARGET = "target"
PIPED_COLUMNS = 120  # width of a table that goes to a file or another program


@click.command(
    "compare",
    cls=Command,
    starting="Reading the runs",
    examples=[
        "medembed compare runs/sweep",
        "medembed compare runs/sweep runs/depths --by age:0-18-65-120 --manifest mura.csv",
        "medembed compare runs/wrist --by target",
    ],
)
@click.argument("runs", metavar="RUN…", type=PATH, nargs=-1, required=True)
@level_option
@click.option(
    "--by",
    metavar="COLUMN[:BANDS]",
    help="Show scores by region, by number of views (views), by target of a sweep of several "
    "(target) or, with --manifest, by a column: "
    "age:0-5-10-18 has the bands [0, 5), [5, 10) and [10, 18]. Values outside the bands, empty "
    "fields and studies whose images differ form groups of their own.",
)
@click.option(
    "--manifest",
    "manifest_path",
    type=PATH,
    help="The runs' manifest, for --by a column of it; gaps between groups are then tested too.",
)
@click.option(
    "--retrieval",
    "retrieval_path",
    type=PATH,
    metavar="CACHE",
    help="Also show how well films of the same label and region are found in this cache, by "
    "precision at k and mean average precision; requires --manifest.",
)
@margin_option
@click.option(
    "--format",
    "table_format",
    type=click.Choice(["table", "markdown", "csv", "latex"]),
    default="table",
    show_default=True,
    help="How the table is printed.",
)
@click.option(
    "--tables",
    type=PATH,
    help="Directory to write all tables to, as .csv and .tex.",
)
@operating_point_option("Operating point to show:")
@prevalence_option
@seed_option
@json_option
def compare_command(
    runs: tuple[Path, ...],
    level: str,
    by: str | None,
    manifest_path: Path | None,
    retrieval_path: Path | None,
    margin: float | None,
    table_format: str,
    tables: Path | None,
    operating_points: tuple[Any, ...],
    prevalence: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Compare the heads of one or more runs, with intervals and paired tests."""
    if by == BY_TARGET and manifest_path is None:
        if len(runs) > 1 or margin is not None:
            raise click.UsageError("--by target takes one directory of targets, and no --margin.")
        _compare_targets(
            runs[0],
            table_format,
            tables,
            as_json,
            level=level,
            seed=seed,
            operating_points=operating_points,
            prevalence=prevalence,
        )
        return
    if manifest_path is None and by not in (None, "region", "views"):
        raise click.UsageError(f"--by {by} requires --manifest, which holds that column.")
    if manifest_path is None and retrieval_path is not None:
        raise click.UsageError("--retrieval requires --manifest, which says what a film shows.")
    if manifest_path is not None and by is None and retrieval_path is None:
        raise click.UsageError("--manifest requires --by, which names a column of it.")
    from medembed.results.comparison import ComparisonOptions, compare_opened, open_runs

    asked = ComparisonOptions(
        level=level,
        seed=seed,
        by=by,
        manifest=read_given(manifest_path),
        margin=margin,
        operating_points=operating_points,
        prevalence=prevalence,
    )
    opened = open_runs(list(runs))
    result, test_set = compare_opened(opened, asked)
    if retrieval_path is not None and asked.manifest is not None:
        from medembed.report.retrieval import find_retrieval

        found = find_retrieval(opened, test_set, retrieval_path, asked.manifest, seed)
        result["retrieval"] = found
    if tables is not None:
        from medembed.report.comparison import write_tables

        write_tables(result, tables)
    if as_json:
        print_json(result)
    else:
        _show(result, by, table_format)
        suggest("report", *runs, "-o", "report")


def _compare_targets(
    path: Path, table_format: str, tables: Path | None, as_json: bool, **asked: Any
) -> None:
    from medembed.results.comparison import ComparisonOptions
    from medembed.results.target_comparison import compare_targets
    from medembed.results.targets import open_targets

    result = compare_targets(open_targets(path), ComparisonOptions(**asked))
    if tables is not None:
        from medembed.report.target_tables import write_target_tables

        write_target_tables(result, tables)
    if as_json:
        print_json(result)
    else:
        _show_targets(result, table_format)
        suggest("report", path, "-o", "report")


def show_targets(runs: Any, **shown: Any) -> None:
    """Print the tables of a sweep's targets, an opened `TargetRuns`, side by side."""
    from medembed.results.comparison import ComparisonOptions
    from medembed.results.target_comparison import compare_targets

    _show_targets(compare_targets(runs, ComparisonOptions(**shown)), "table")


def _show_targets(result: "TargetsComparison", table_format: str) -> None:
    from medembed.report.target_tables import render_targets

    click.echo(render_targets(result, table_format, table_columns(PIPED_COLUMNS)))


def show_run(run: "Run", operating_points: Any) -> None:
    """Print the table of a run that has just ended, or had ended before."""
    if run.comparison is None:
        show_comparison([run.path], "study", None, "table", operating_points=operating_points)
    else:
        _show(run.comparison, None, "table")


def show_comparison(
    runs: list[Path], level: str, by: str | None, table_format: str, seed: int = 0, **shown: Any
) -> None:
    """Print the table of one or more runs, as wide as the terminal."""
    from medembed.results.comparison import compare

    _show(compare(runs, level=level, seed=seed, **shown), by, table_format)


def _show(result: "ComparisonResult", by: str | None, table_format: str) -> None:
    from medembed.report.group_tables import render_comparison
    from medembed.report.operating_tables import asks_for_points

    if asks_for_points(result) and table_format == "csv":
        say("The CSV lists heads; operating points are in --json and in the files of --tables.")
    if "retrieval" in result and table_format == "csv":
        say("The CSV lists heads; retrieval is in --json and in the files of --tables.")
    click.echo(render_comparison(result, table_format, by, table_columns(PIPED_COLUMNS)))


def read_given(manifest_path: Path | None) -> Any:
    """Return the manifest at a path, or None if there is no path."""
    if manifest_path is None:
        return None
    from medembed.dataset.manifest import read_manifest

    return read_manifest(manifest_path)
