"""`medembed evaluate`."""

from pathlib import Path
from typing import Any

import click

from medembed.cli.console import print_json, say
from medembed.cli.options import (
    MANY,
    PATH,
    json_option,
    operating_point_option,
    prevalence_option,
    seed_option,
    table_columns,
)

__all__ = ["evaluate_command"]

PIPED_COLUMNS = 80


@click.command("evaluate")
@click.argument("model_path", metavar="MODEL", type=PATH)
@click.argument("cache_path", metavar="CACHE", type=PATH)
@click.argument("manifest_path", metavar="MANIFEST", type=PATH)
@click.option("--out", type=PATH, required=True, help="The run directory to write.")
@click.option(
    "--split",
    type=click.Choice(["train", "test"]),
    help="Score these rows of the manifest only, in place of all.",
)
@click.option(
    "--recalibrate",
    metavar="N",
    type=click.IntRange(1, MANY),
    help="Calibrate anew on N labelled patients, drawn by seed, and score the others.",
)
@operating_point_option("Also show this operating point of the model:")
@prevalence_option
@seed_option
@json_option
def evaluate_command(
    model_path: Path,
    cache_path: Path,
    manifest_path: Path,
    out: Path,
    split: str | None,
    recalibrate: int | None,
    operating_points: tuple[Any, ...],
    prevalence: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Try MODEL, such as RUN/models/mlp, on images of another institution.

    Says how its scores, its calibration and the embeddings differ from those it was trained and
    tested on. Images that it was trained on are refused.
    """
    from medembed.prediction.external_validation import evaluate
    from medembed.report.external import render_external

    run = evaluate(
        model_path,
        cache_path,
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
        click.echo(render_external(found, table_columns(PIPED_COLUMNS)))
        say(f"Run: {out}")
