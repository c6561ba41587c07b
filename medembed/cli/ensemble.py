"""`medembed ensemble`."""

from pathlib import Path
from typing import Any

import click

from medembed.cli.commands import Command
from medembed.cli.compare import show_comparison
from medembed.cli.console import print_json, say, suggest
from medembed.cli.options import (
    PATH,
    json_option,
    operating_point_option,
    output_option,
    split_names,
)

__all__ = ["ensemble_command"]


@click.command(
    "ensemble",
    cls=Command,
    starting="Reading runs",
    examples=[
        "medembed ensemble runs/medgemma runs/medsiglip -o runs/both",
        "medembed ensemble runs/medgemma runs/medsiglip --heads logistic,mlp -o runs/both",
    ],
)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=PATH)
@output_option("The run directory to write.")
@click.option(
    "--heads",
    callback=split_names,
    help="Classifiers to take of each run that has them; all by default.",
)
@operating_point_option("Operating point to store with the models:")
@json_option
def ensemble_command(
    runs: tuple[Path, ...],
    out: Path,
    heads: tuple[str, ...] | None,
    operating_points: tuple[Any, ...],
    as_json: bool,
) -> None:
    """Average the classifiers of sweeps, also over different encoders, with fitted weights.

    Each RUN is a complete sweep; all have one manifest and equal folds, and their caches may
    differ. Weights are not negative, sum to 1 and fit the out-of-fold predictions; equal weights
    stand beside them as `mean`. Scores and calibration come from weights that were fitted without
    the fold. RUN/models/ensemble is one model, for which `predict` runs every encoder it needs.
    """
    from medembed import sweeps

    run = sweeps.ensemble(runs, out, heads=heads, operating_points=operating_points)
    if as_json:
        print_json(run.as_dict())
        return
    for name, weight in (run.info.winner("ensemble").params or {})["weights"].items():
        say(f"{weight:6.3f}  {name}")
    show_comparison([*runs, out], "study", None, "table", operating_points=operating_points)
    suggest("report", *runs, out, "-o", "report")
