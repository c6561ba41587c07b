"""`medembed sweep`."""

from pathlib import Path

import click

from medembed.commands.comparing import show_comparison
from medembed.commands.options import PATH, json_option, seed_option, split_names
from medembed.console import print_json, showing_progress

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
@click.option("--pool", help="mean, max or mean+max; without it all poolings side by side.")
@click.option(
    "--configs", "n_configs", type=click.IntRange(min=1), default=8, show_default=True,
    help="Configurations tried per head.",
)  # fmt: skip
@click.option("--folds", "n_folds", type=click.IntRange(min=2), default=5, show_default=True)
@click.option("--metric", default="auroc", show_default=True, help="What chooses the winners.")
@click.option("--jobs", type=click.IntRange(min=1), help="Processes; without it one per core.")
@seed_option
@json_option
def sweep_command(
    cache_path: Path,
    manifest_path: Path,
    out: Path,
    heads: tuple[str, ...],
    pool: str | None,
    n_configs: int,
    n_folds: int,
    metric: str,
    jobs: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Cross-validate heads on CACHE, refit the winners and score them once on test."""
    from medembed import sweeps

    with showing_progress("Training", "fits") as progress:
        result = sweeps.sweep(
            cache_path,
            manifest_path,
            out,
            heads=heads,
            pool=pool,
            n_configs=n_configs,
            n_folds=n_folds,
            metric=metric,
            seed=seed,
            jobs=jobs,
            progress=progress,
        )
    if as_json:
        print_json(result)
    else:
        show_comparison([out], "study", None, "table")
