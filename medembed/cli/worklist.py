"""`medembed worklist`."""

from pathlib import Path

import click

from medembed.cli.commands import Command
from medembed.cli.console import print_json, say, suggest
from medembed.cli.options import (
    LOCATION,
    MANY,
    PATH,
    Finite,
    json_option,
    output_option,
    seed_option,
)
from medembed.core.locations import Location

__all__ = ["worklist_command"]


@click.command(
    "worklist",
    cls=Command,
    starting="Reading the cache",
    examples=[
        "medembed worklist cache mura.csv -n 200 -o worklist.csv",
        "medembed worklist cache mura.csv --run runs/sweep -n 200 -o worklist-2.csv",
    ],
)
@click.argument("cache_path", metavar="CACHE", type=LOCATION)
@click.argument("manifest_path", metavar="MANIFEST", type=PATH)
@click.option(
    "--run",
    "model_path",
    metavar="RUN",
    type=PATH,
    help="Choose what this run's best model is least sure of; also takes a packaged model. "
    "Without it, the list covers the data set.",
)
@click.option(
    "-n",
    "--studies",
    "n",
    type=click.IntRange(1, MANY),
    default=200,
    show_default=True,
    help="Studies to choose.",
)
@click.option(
    "--random",
    "random_share",
    metavar="SHARE",
    type=Finite(0, 1),
    default=0.2,
    show_default=True,
    help="Share that is drawn at random, so that it represents the data set.",
)
@click.option("--pool", help="Poolings that distances are measured in, joined by +.")
@click.option("--names", is_flag=True, help="Also write the names of images and studies.")
@output_option("The .csv file to write; an existing file is never overwritten.", "output")
@seed_option
@json_option
def worklist_command(
    cache_path: Location,
    manifest_path: Path,
    model_path: Path | None,
    n: int,
    random_share: float,
    pool: str | None,
    names: bool,
    output: Path,
    seed: int,
    as_json: bool,
) -> None:
    """Choose which unlabelled studies of the train split to label next.

    Without --run, the list covers the data set: studies that stand for many others, and are unlike
    those with a label. With --run it holds studies that the model is least sure of, and that
    differ from each other. Fill in the column new_label (0 normal, 1 abnormal), and apply it with
    `medembed manifest relabel`. The order is random: stop wherever you like.

    Only the studies marked "random" represent the data set. Estimate scores on these, or on a test
    split that was not chosen.
    """
    from medembed.prediction.worklist import check_target, make_worklist

    check_target(output)
    chosen = make_worklist(
        cache_path,
        manifest_path,
        n,
        model=model_path,
        random_share=random_share,
        pool=pool,
        seed=seed,
    )
    chosen.write(output, names=names)
    say(str(chosen))
    if as_json:
        print_json(chosen.as_dict(names=names))
    else:
        say(f"Worklist: {output}")
        suggest("manifest", "relabel", manifest_path, output, "-o",
                manifest_path.with_stem(f"{manifest_path.stem}-2"))  # fmt: skip
