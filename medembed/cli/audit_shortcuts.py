"""`medembed audit shortcuts`."""

from pathlib import Path

import click

from medembed.cli.commands import Command
from medembed.cli.console import print_json, say, suggest
from medembed.cli.options import (
    LOCATION,
    MANY,
    PATH,
    json_option,
    seed_option,
    split_names,
    table_columns,
)
from medembed.cli.progress import showing_progress
from medembed.core.locations import Location

__all__ = ["shortcuts_command"]


@click.command(
    "shortcuts",
    cls=Command,
    starting="Reading the cache",
    examples=[
        "medembed audit shortcuts cache mura.csv --columns region,cast",
        "medembed audit shortcuts cache films.csv --columns device,sex,age:0-18-65-120 -o audit",
        "medembed audit shortcuts cache mura.csv --columns region --image-root MURA-v1.1",
    ],
)
@click.argument("cache_path", metavar="CACHE", type=LOCATION)
@click.argument("manifest_path", metavar="MANIFEST", type=PATH)
@click.option(
    "--columns",
    metavar="A,B",
    required=True,
    callback=split_names,
    help="Columns of the manifest, as NAME or, for numbers, NAME:BANDS such as age:0-18-65; many "
    "numbers without bands are split at their median.",
)
@click.option("--pool", metavar="NAMES", help="Poolings to read, joined by +; by default all.")
@click.option(
    "--folds",
    "n_folds",
    type=click.IntRange(2, MANY),
    default=5,
    show_default=True,
    help="Folds of cross-validation, disjoint in patients.",
)
@click.option(
    "--image-root",
    type=LOCATION,
    help="Directory or bucket that the manifest's paths are relative to: the films' brightness, "
    "size, sharpness and border are measured there, unless CACHE holds the pooling imagestats.",
)
@click.option(
    "-o",
    "--output",
    type=PATH,
    metavar="DIR",
    help="Also write shortcuts.csv and groups.csv into this directory.",
)
@seed_option
@json_option
def shortcuts_command(
    cache_path: Location,
    manifest_path: Path,
    columns: tuple[str, ...],
    pool: str | None,
    n_folds: int,
    image_root: Location | None,
    output: Path | None,
    seed: int,
    as_json: bool,
) -> None:
    """Ask whether a classifier may read the cast, the device or the hospital instead of disease.

    For each column of MANIFEST: how well it can be read from the embedding; how much of the
    label's AUROC is lost without it; and how far that AUROC differs between its groups. Scores are
    of logistic regressions on the labelled images of train, out of fold; test images are not used.
    """
    from medembed.prediction.shortcuts import audit_shortcuts
    from medembed.report.shortcuts import check_output, tabulate_shortcuts, write_shortcuts
    from medembed.report.tables import render_terminal

    if output is not None:
        check_output(output)
    with showing_progress("Auditing", "columns") as progress:
        found = audit_shortcuts(
            cache_path,
            manifest_path,
            columns,
            pool=pool,
            n_folds=n_folds,
            seed=seed,
            image_root=image_root,
            progress=progress,
        )
    document = found.as_dict()
    written = [] if output is None else write_shortcuts(document, output)
    if as_json:
        print_json(document)
    else:
        click.echo(render_terminal(tabulate_shortcuts(document), table_columns(piped=100)))
    for path in written:
        say(f"Written: {path}")
    if not as_json:
        suggest("compare", "RUN", "--manifest", manifest_path, "--by", columns[0])
