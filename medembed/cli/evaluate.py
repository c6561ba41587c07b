"""`medembed evaluate`."""

from pathlib import Path
from typing import Any

import click

from medembed.cli.commands import Command
from medembed.cli.console import print_json, say, suggest
from medembed.cli.options import (
    LOCATION,
    MANY,
    PATH,
    json_option,
    operating_point_option,
    output_option,
    prevalence_option,
    seed_option,
    table_columns,
)
from medembed.core.locations import Location

__all__ = ["evaluate_command"]

PIPED_COLUMNS = 80


@click.command(
    "evaluate",
    cls=Command,
    starting="Loading the model",
    examples=[
        "medembed evaluate runs/sweep/models/mlp cache-elsewhere elsewhere.csv -o runs/elsewhere",
    ],
)
@click.argument("model_path", metavar="MODEL", type=PATH)
@click.argument("cache_path", metavar="CACHE", type=LOCATION)
@click.argument("manifest_path", metavar="MANIFEST", type=PATH)
@output_option("The run directory to write.")
@click.option(
    "--cache", "others", type=LOCATION, multiple=True,
    help="A further cache, of an ensemble's next encoder; repeatable.",
)  # fmt: skip
@click.option(
    "--split",
    type=click.Choice(["train", "test"]),
    help="Score only this split of the manifest.",
)
@click.option(
    "--recalibrate",
    metavar="N",
    type=click.IntRange(1, MANY),
    help="Recalibrate on N labelled patients, drawn at random, and score the others.",
)
@operating_point_option("Operating point of the model to show:")
@prevalence_option
@seed_option
@json_option
def evaluate_command(
    model_path: Path,
    cache_path: Location,
    manifest_path: Path,
    out: Path,
    others: tuple[Location, ...],
    split: str | None,
    recalibrate: int | None,
    operating_points: tuple[Any, ...],
    prevalence: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Validate MODEL, such as RUN/models/mlp, on images of another institution.

    The report shows how scores, calibration and embeddings differ from those of the model's own
    test and training data. Images that the model was trained on are refused.
    """
    from medembed.prediction.external_validation import evaluate
    from medembed.report.external import render_external

    run = evaluate(
        model_path,
        (cache_path, *others),
        manifest_path,
        out,
        split=split,
        recalibrate=recalibrate,
        seed=seed,
        operating_points=operating_points,
        prevalence=prevalence,
    )
    found = {"run": str(run.path), **run.scores()}
    if as_json:
        print_json(found)
    else:
        target = run.info.asked.target
        click.echo(render_external(found, table_columns(PIPED_COLUMNS), target))
        say(f"Run: {out}")
        suggest("report", out, "-o", "report-elsewhere")
