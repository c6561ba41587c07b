"""`medembed compare` and `medembed report`."""

from pathlib import Path
from typing import Any

import click

from medembed.commands.options import (
    PATH,
    json_option,
    operating_point_option,
    prevalence_option,
    seed_option,
    table_columns,
)
from medembed.console import print_json, say

__all__ = ["compare_command", "hush_matplotlib", "report_command", "show_comparison"]

PIPED_COLUMNS = 120  # of a table that goes to a file or another program
_NO_HOME = (
    "mkdir -p failed for path",
    "%s is not a writable directory",
    "Matplotlib created a temporary cache directory",
)
"""How matplotlib says that it keeps its font cache elsewhere, which changes nothing here."""


@click.command("compare")
@click.argument("runs", metavar="RUN…", type=PATH, nargs=-1, required=True)
@click.option("--level", type=click.Choice(["study", "image"]), default="study", show_default=True)
@click.option("--by", type=click.Choice(["region", "views"]), help="A block of rows for each.")
@click.option(
    "--format",
    "table_format",
    type=click.Choice(["table", "markdown", "csv", "latex"]),
    default="table",
    show_default=True,
)
@click.option(
    "--tables", type=PATH,
    help="Also write heads, regions and operating points there, each as .csv and .tex.",
)  # fmt: skip
@operating_point_option("Also show this operating point:")
@prevalence_option
@seed_option
@json_option
def compare_command(
    runs: tuple[Path, ...],
    level: str,
    by: str | None,
    table_format: str,
    tables: Path | None,
    operating_points: tuple[Any, ...],
    prevalence: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Compare the heads of one or more runs, with intervals and paired tests."""
    from medembed.results.comparison import compare

    shown: dict[str, Any] = {"operating_points": operating_points, "prevalence": prevalence}
    result = compare(list(runs), level=level, seed=seed, **shown)
    if tables is not None:
        from medembed.results.table_files import write_tables

        write_tables(result, tables)
    if as_json:
        print_json(result)
    else:
        _show(result, by, table_format)


def show_comparison(
    runs: list[Path], level: str, by: str | None, table_format: str, seed: int = 0, **shown: Any
) -> None:
    """Print the table of one or more runs, as wide as the terminal."""
    from medembed.results.comparison import compare

    _show(compare(runs, level=level, seed=seed, **shown), by, table_format)


def _show(result: dict[str, Any], by: str | None, table_format: str) -> None:
    from medembed.results.operating_tables import asks_for_points, tabulate_points
    from medembed.results.tables import render

    width = table_columns(PIPED_COLUMNS)
    is_asked = asks_for_points(result)
    if is_asked and table_format == "csv":
        say("The CSV is of heads: operating points are in --json, and in the files of --tables.")
    more = tabulate_points(result, width if table_format == "table" else None)
    more = more if is_asked or not by else []
    click.echo(render(result, table_format=table_format, by=by, width=width, more=more))


def hush_matplotlib() -> None:
    """Keep what matplotlib says of a home directory that cannot be written off stderr."""
    import logging

    logging.getLogger("matplotlib").addFilter(
        lambda record: not str(record.msg).startswith(_NO_HOME)
    )


@click.command("report")
@click.argument("runs", metavar="RUN…", type=PATH, nargs=-1, required=True)
@click.option("-o", "--output", type=PATH, required=True, help="Directory of the page.")
@click.option("--level", type=click.Choice(["study", "image"]), default="study", show_default=True)
@click.option(
    "--manifest", "manifest_path", type=PATH, help="Of the images, for thumbnails of mistakes."
)
@click.option("--image-root", type=PATH, help="Directory that the manifest's paths start from.")
@click.option(
    "--names", is_flag=True, help="Name those images by their paths, which may tell who it is."
)
@operating_point_option("Also show this operating point:")
@prevalence_option
@seed_option
@json_option
def report_command(
    runs: tuple[Path, ...],
    output: Path,
    level: str,
    manifest_path: Path | None,
    image_root: Path | None,
    names: bool,
    operating_points: tuple[Any, ...],
    prevalence: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Write a page that compares the heads of one or more runs, with figures and their data."""
    if (manifest_path is None) != (image_root is None):
        raise click.UsageError("--manifest and --image-root go together: both, or neither.")
    if names and manifest_path is None:
        raise click.UsageError("--names wants --manifest and --image-root.")
    hush_matplotlib()
    from medembed.results.page import write_report

    find_thumbnails = None
    if manifest_path is not None and image_root is not None:
        find_thumbnails = _thumbnail_finder(manifest_path, image_root, names)
    written = write_report(
        list(runs),
        output,
        level=level,
        seed=seed,
        find_thumbnails=find_thumbnails,
        operating_points=operating_points,
        prevalence=prevalence,
    )
    say(f"Page: {written['page']}")
    if as_json:
        print_json(written)


def _thumbnail_finder(manifest_path: Path, image_root: Path, names: bool) -> Any:
    from medembed.dataset.manifest import existing_root, read_manifest
    from medembed.thumbnails import make_thumbnails

    manifest, root = read_manifest(manifest_path), existing_root(image_root)
    return lambda wanted: make_thumbnails(manifest, root, wanted, with_names=names)
