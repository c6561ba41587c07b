"""`medembed sweep`."""

from pathlib import Path
from typing import Any

import click

from medembed.cli.compare import show_comparison
from medembed.cli.console import print_json
from medembed.cli.options import (
    MANY,
    PATH,
    Finite,
    json_option,
    operating_point_option,
    seed_option,
    split_names,
)
from medembed.cli.progress import showing_leaderboard

__all__ = ["sweep_command"]


@click.command("sweep")
@click.argument("cache_path", metavar="CACHE", type=PATH)
@click.argument("manifest_path", metavar="MANIFEST", type=PATH)
@click.option("--out", "out", type=PATH, required=True, help="The run directory to write.")
@click.option(
    "--heads",
    callback=split_names,
    default="logistic,mlp,lightgbm",
    show_default=True,
    help="Kinds of classifiers; logistic is always among them.",
)
@click.option(
    "--pool",
    callback=split_names,
    help="What heads are tried on, such as mean,max,mean+max,grid4; without it all single-vector "
    "poolings side by side.",
)
@click.option("--space", type=PATH, help="A search space (TOML) in place of the default one.")
@click.option(
    "--configs", "n_configs", type=click.IntRange(1, MANY),
    help="Configurations tried per head and pooling, in place of the space's number.",
)  # fmt: skip
@click.option("--folds", "n_folds", type=click.IntRange(2, MANY), default=5, show_default=True)
@click.option("--metric", default="auroc", show_default=True, help="What chooses the winners.")
@click.option(
    "--covariates",
    callback=split_names,
    help="Columns of the manifest, such as region,age,sex, that are appended to the embedding.",
)
@click.option(
    "--train-fraction", type=Finite(0, 1, min_open=True), default=1.0, show_default=True,
    help="Share of the training patients to learn from, nested: for label-efficiency curves.",
)  # fmt: skip
@operating_point_option("Also package this operating point with every model:")
@click.option("--jobs", type=click.IntRange(min=1), help="Processes; without it one per core.")
@click.option(
    "--backend", type=click.Choice(["loky", "ray"]), default="loky", show_default=True,
    help="Processes of this machine, or of a Ray cluster.",
)  # fmt: skip
@seed_option
@json_option
def sweep_command(
    cache_path: Path,
    manifest_path: Path,
    out: Path,
    heads: tuple[str, ...],
    pool: tuple[str, ...] | None,
    space: Path | None,
    n_configs: int | None,
    n_folds: int,
    metric: str,
    covariates: tuple[str, ...] | None,
    train_fraction: float,
    operating_points: tuple[Any, ...],
    jobs: int | None,
    backend: str,
    seed: int,
    as_json: bool,
) -> None:
    """Cross-validate heads on CACHE, refit the winners and score them once on test."""
    from medembed import sweeps

    with showing_leaderboard("Training", "fits", metric) as progress:
        run = sweeps.sweep(
            cache_path,
            manifest_path,
            out,
            heads=heads,
            pool=pool,
            space=space,
            n_configs=n_configs,
            n_folds=n_folds,
            metric=metric,
            covariates=covariates or (),
            train_fraction=train_fraction,
            operating_points=operating_points,
            seed=seed,
            jobs=jobs,
            backend=backend,
            progress=progress,
            board=progress.board,
        )
    if as_json:
        print_json(run.as_dict())
    else:
        show_comparison([out], "study", None, "table", operating_points=operating_points)
