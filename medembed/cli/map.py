"""`medembed map`: the images of a run in two dimensions."""

from pathlib import Path

import click

from medembed.cli.commands import Command
from medembed.cli.console import print_json, say, suggest
from medembed.cli.options import LOCATION, PATH, json_option, seed_option, split_names
from medembed.cli.progress import showing_progress
from medembed.core.locations import Location

__all__ = ["map_command"]


@click.command(
    "map",
    cls=Command,
    starting="Reading run, cache and manifest",
    examples=[
        "medembed map runs/sweep cache mura.csv",
        "medembed map runs/sweep cache mura.csv --method tsne --pool mean",
    ],
)
@click.argument("run_path", metavar="RUN", type=PATH)
@click.argument("cache_path", metavar="CACHE", type=LOCATION)
@click.argument("manifest_path", metavar="MANIFEST", type=PATH)
@click.option(
    "--method",
    type=click.Choice(["pca", "tsne"]),
    default="pca",
    show_default=True,
    help="Principal components, or t-SNE, which needs the extra [map].",
)
@click.option(
    "--pool",
    "poolings",
    callback=split_names,
    metavar="NAMES",
    help="Poolings to map, such as mean,max; by default all with one vector per image.",
)
@seed_option
@json_option
def map_command(
    run_path: Path,
    cache_path: Location,
    manifest_path: Path,
    method: str,
    poolings: tuple[str, ...] | None,
    seed: int,
    as_json: bool,
) -> None:
    """Lay out the images of RUN in two dimensions, and keep the map in the run.

    RUN/map.parquet then has a row per image and pooling, named by hash, and `medembed report` draws
    it. Labels have no influence on the coordinates.
    """
    from medembed.report.embedding_map import map_run

    with showing_progress("Mapping", "poolings") as progress:
        found = map_run(
            run_path,
            cache_path,
            manifest_path,
            method=method,
            poolings=poolings,
            seed=seed,
            progress=progress,
        )
    path = run_path / "map.parquet"
    images = int(found.rows["sha256"].nunique())
    if as_json:
        explained = found.info.explained
        print_json(
            {"map": str(path), "images": images, "method": method, "seed": seed,
             "explained": explained}
        )  # fmt: skip
    say(f"{path}: {images:,} images, {', '.join(dict.fromkeys(found.rows['pooling']))}")
    suggest("report", run_path, "-o", "report")
