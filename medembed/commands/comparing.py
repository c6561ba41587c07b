"""`medembed compare` and `medembed report`."""

import shutil
import sys
from pathlib import Path

import click

from medembed.commands.options import PATH, json_option, seed_option
from medembed.console import print_json, say

__all__ = ["compare_command", "report_command", "show_comparison"]

PIPED_COLUMNS = 120  # of a table that goes to a file or another program


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
@seed_option
@json_option
def compare_command(
    runs: tuple[Path, ...], level: str, by: str | None, table_format: str, seed: int, as_json: bool
) -> None:
    """Compare the heads of one or more runs, with intervals and paired tests."""
    if as_json:
        from medembed.results.comparison import compare

        print_json(compare(list(runs), level=level, seed=seed))
    else:
        show_comparison(list(runs), level, by, table_format, seed)


def show_comparison(
    runs: list[Path], level: str, by: str | None, table_format: str, seed: int = 0
) -> None:
    """Print the table of one or more runs, as wide as the terminal."""
    from medembed.results.comparison import compare
    from medembed.results.tables import render

    result = compare(runs, level=level, seed=seed)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPED_COLUMNS
    click.echo(render(result, table_format=table_format, by=by, width=width))


@click.command("report")
@click.argument("runs", metavar="RUN…", type=PATH, nargs=-1, required=True)
@click.option("-o", "--output", type=PATH, required=True, help="Directory of the page.")
@json_option
def report_command(runs: tuple[Path, ...], output: Path, as_json: bool) -> None:
    """Write a page with the leaderboard, ROC curves and scores per region."""
    from medembed.results.page import write_report

    written = write_report(list(runs), output)
    say(f"Page: {written['page']}")
    if as_json:
        print_json(written)
