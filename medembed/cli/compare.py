"""`medembed compare` and `medembed report`."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from medembed.cli.commands import Command
from medembed.cli.console import print_json, say, suggest
from medembed.cli.options import (
    PATH,
    Finite,
    json_option,
    operating_point_option,
    output_option,
    prevalence_option,
    seed_option,
    table_columns,
)

__all__ = [
    "compare_command",
    "hush_matplotlib",
    "is_public",
    "report_command",
    "show_comparison",
    "write_command",
]

PIPED_COLUMNS = 120  # of a table that goes to a file or another program
_SILENT = {"as_json"}
"""Parameters that change what is printed and not what is made."""
_NO_HOME = (
    "mkdir -p failed for path",
    "%s is not a writable directory",
    "Matplotlib created a temporary cache directory",
)
"""How matplotlib says that it keeps its font cache elsewhere, which changes nothing here."""

margin_option = click.option(
    "--margin",
    type=Finite(0, 0.5, min_open=True, max_open=True),
    help="Acceptable loss of AUROC; tests whether heads are non-inferior to the best.",
)


@click.command(
    "compare",
    cls=Command,
    examples=[
        "medembed compare runs/sweep",
        "medembed compare runs/sweep runs/depths --by age:0-18-65-120 --manifest mura.csv",
    ],
)
@click.argument("runs", metavar="RUN…", type=PATH, nargs=-1, required=True)
@click.option(
    "--level", type=click.Choice(["study", "image"]), default="study", show_default=True,
    help="Unit that is scored.",
)  # fmt: skip
@click.option(
    "--by",
    metavar="COLUMN[:BANDS]",
    help="Show scores by region, by number of views (views) or, with --manifest, by a column: "
    "age:0-5-10-18 has the bands [0, 5), [5, 10) and [10, 18]. Values outside the bands, empty "
    "fields and studies whose images differ form groups of their own.",
)
@click.option(
    "--manifest",
    "manifest_path",
    type=PATH,
    help="The runs' manifest; with --by, gaps between groups are tested too.",
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
    margin: float | None,
    table_format: str,
    tables: Path | None,
    operating_points: tuple[Any, ...],
    prevalence: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Compare the heads of one or more runs, with intervals and paired tests."""
    if manifest_path is None and by not in (None, "region", "views"):
        raise click.UsageError(f"--by {by} requires --manifest, which holds that column.")
    if manifest_path is not None and by is None:
        raise click.UsageError("--manifest requires --by, which names a column of it.")
    from medembed.results.comparison import compare

    result = compare(
        list(runs),
        level=level,
        seed=seed,
        by=by,
        manifest=_read(manifest_path),
        margin=margin,
        operating_points=operating_points,
        prevalence=prevalence,
    )
    if tables is not None:
        from medembed.report.comparison import write_tables

        write_tables(result, tables)
    if as_json:
        print_json(result)
    else:
        _show(result, by, table_format)
        suggest("report", *runs, "-o", "report")


def show_comparison(
    runs: list[Path], level: str, by: str | None, table_format: str, seed: int = 0, **shown: Any
) -> None:
    """Print the table of one or more runs, as wide as the terminal."""
    from medembed.results.comparison import compare

    _show(compare(runs, level=level, seed=seed, **shown), by, table_format)


def _show(result: dict[str, Any], by: str | None, table_format: str) -> None:
    from medembed.report.group_tables import render_comparison
    from medembed.report.operating_tables import asks_for_points

    if asks_for_points(result) and table_format == "csv":
        say("The CSV is of heads: operating points are in --json, and in the files of --tables.")
    click.echo(render_comparison(result, table_format, by, table_columns(PIPED_COLUMNS)))


def _read(manifest_path: Path | None) -> Any:
    if manifest_path is None:
        return None
    from medembed.dataset.manifest import read_manifest

    return read_manifest(manifest_path)


def hush_matplotlib() -> None:
    """Keep what matplotlib says of a home directory that cannot be written off stderr."""
    import logging

    logging.getLogger("matplotlib").addFilter(
        lambda record: not str(record.msg).startswith(_NO_HOME)
    )


@click.command(
    "report",
    cls=Command,
    examples=[
        "medembed report runs/sweep -o report",
        "medembed report runs/sweep -o report --manifest mura.csv --image-root MURA-v1.1",
    ],
)
@click.argument("runs", metavar="RUN…", type=PATH, nargs=-1, required=True)
@output_option("Directory of the page.", "output")
@click.option(
    "--level", type=click.Choice(["study", "image"]), default="study", show_default=True,
    help="Unit that is scored.",
)  # fmt: skip
@click.option(
    "--manifest",
    "manifest_path",
    type=PATH,
    help="The runs' manifest; adds scores by its columns and, with --image-root, thumbnails.",
)
@click.option(
    "--image-root", type=PATH, help="Directory that the manifest's paths are relative to."
)
@margin_option
@click.option(
    "--names", is_flag=True, help="Show the paths of these images, which may identify a patient."
)
@click.option(
    "--checklist",
    "checklists",
    type=click.Choice(["tripod-ai", "claim"]),
    multiple=True,
    help="Reporting checklist to fill in beside the page; repeatable.",
)
@operating_point_option("Operating point to show:")
@prevalence_option
@seed_option
@json_option
def report_command(
    runs: tuple[Path, ...],
    output: Path,
    level: str,
    manifest_path: Path | None,
    image_root: Path | None,
    margin: float | None,
    names: bool,
    checklists: tuple[str, ...],
    operating_points: tuple[Any, ...],
    prevalence: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Write a self-contained page that compares runs, with figures and their data."""
    if image_root is not None and manifest_path is None:
        raise click.UsageError("--image-root requires --manifest, whose paths are relative to it.")
    if names and image_root is None:
        raise click.UsageError("--names requires --manifest and --image-root.")
    hush_matplotlib()
    from medembed.report.page import write_report

    manifest, find_thumbnails = _read(manifest_path), None
    if image_root is not None:
        find_thumbnails = _thumbnail_finder(manifest, image_root, names)
    written = write_report(
        list(runs),
        output,
        level=level,
        seed=seed,
        find_thumbnails=find_thumbnails,
        manifest=manifest,
        margin=margin,
        command=write_command(click.get_current_context()),
        checklists=checklists,
        operating_points=operating_points,
        prevalence=prevalence,
    )
    say(f"Page: {written['page']}")
    for filled in written.get("checklist", []):
        counts = ", ".join(f"{n} {status}" for status, n in filled["counts"].items())
        say(f"Checklist: {filled['path']} ({counts})")
    if as_json:
        print_json(written)
    else:
        suggest("predict", runs[0], "IMAGE")


def _thumbnail_finder(manifest: Any, image_root: Path, names: bool) -> Any:
    from medembed.dataset.manifest import existing_root
    from medembed.report.gallery import make_thumbnails

    root = existing_root(image_root)
    return lambda wanted: make_thumbnails(manifest, root, wanted, with_names=names)


def write_command(context: click.Context) -> str:
    """Write the command of a context again, with every option that has a value.

    Relative paths stand as they were given. Of a path that says where on the machine it lies
    (absolute, from home, or upwards) the last part stands; of several arguments, as much of their
    ends as tells them apart. So the command works from the directory that holds what it names.
    """
    words, given = context.command_path.split()[1:], context.params
    arguments, options = [], []
    for parameter in context.command.params:
        value = given.get(parameter.name or "")
        if parameter.name in _SILENT or value is None or value is False or value == ():
            continue
        if isinstance(parameter, click.Argument):
            several = value if isinstance(value, tuple) else (value,)
            arguments += _name_all(several)
        else:
            options += list(_option(parameter, value))
    return shlex.join(["medembed", *words, *arguments, *options])


def is_public(path: Path) -> bool:
    """Tell whether a path says nothing of the machine: relative, and neither from home nor up."""
    return not (path.is_absolute() or ".." in path.parts or str(path).startswith(("~", ".")))


def _option(parameter: click.Parameter, value: Any) -> Iterator[str]:
    name = parameter.opts[0]
    for own in value if isinstance(value, tuple) else (value,):
        yield name
        if own is not True:
            yield _name_all([own])[0]


def _name_all(values: Sequence[Any]) -> list[str]:
    """Return values as words; paths as they are where all are public, else the ends of all."""
    paths = [value for value in values if isinstance(value, Path)]
    if len(paths) < len(values) or all(map(is_public, paths)):
        words = [str(value) for value in values]
    else:
        words = _shortest_ends([path.expanduser().resolve() for path in paths])
    return [f"./{word}" if word.startswith("-") and paths else word for word in words]


def _shortest_ends(paths: Sequence[Path]) -> list[str]:
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names
