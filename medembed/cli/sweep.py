"""`medembed sweep`."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from medembed.cli.commands import Command
from medembed.cli.compare import show_run, show_targets
from medembed.cli.console import print_json, say, suggest
from medembed.cli.options import (
    LOCATION,
    MANY,
    PATH,
    Finite,
    json_option,
    operating_point_option,
    output_option,
    seed_option,
    split_names,
)
from medembed.cli.progress import showing_leaderboard
from medembed.core.locations import Location

__all__ = ["sweep_command"]

METRICS = (
    *("auroc", "average_precision", "accuracy", "macro_f1", "kappa", "sensitivity"),
    *("specificity", "brier", "ece"),
)
"""The names of `evaluation.scores.SCORES`, whose import takes seconds."""


class _Backend(click.Choice[str]):
    """A choice that also accepts loky, the former name of local."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return "local" or "ray"."""
        return super().convert("local" if value == "loky" else value, param, ctx)


@click.command(
    "sweep",
    cls=Command,
    starting="Reading cache and manifest",
    examples=[
        "medembed sweep cache mura.csv -o runs/sweep",
        "medembed sweep cache mura.csv -o runs/pools --pool mean,max,mean+max --covariates region",
        "medembed sweep layers mura.csv -o runs/layers --pool mean@all --heads logistic",
        "medembed sweep cache grazpedwri.csv -o runs/wrist --target fracture,metal,cast",
        "medembed sweep cache mura.csv -o runs/words --prompts prompts.safetensors",
        "medembed sweep cache mura.csv -o runs/baselines --heads logistic,metadata "
        "--covariates age,sex --image-root MURA-v1.1",
    ],
    sections={
        "What is tried": [
            *("target", "heads", "pool", "space", "configs", "covariates", "prompts"),
            *("image-root", "without-suspects", "train-fraction"),
        ],
        "How it is judged": ["folds", "metric", "operating-point"],
        "Speed": ["jobs", "backend"],
    },
)
@click.argument("cache_path", metavar="CACHE", type=LOCATION)
@click.argument("manifest_path", metavar="MANIFEST", type=PATH)
@output_option("The run directory to write; with --target it holds a run for each target.")
@click.option(
    "--target",
    "targets",
    callback=split_names,
    help="Targets to train on, such as fracture,metal: columns target_NAME of the manifest, or "
    "label. Each gets a run of its own, RUN/NAME, with the same folds.",
)
@click.option(
    "--heads",
    callback=split_names,
    default="logistic,mlp,lightgbm",
    show_default=True,
    help="Classifiers: logistic (always included), mlp, lightgbm, attention, knn; with --prompts "
    "also zero-shot and text-logistic. Baselines: metadata, the covariates alone; imagestats, the "
    "film's brightness, size, sharpness and border alone.",
)
@click.option(
    "--pool",
    callback=split_names,
    help="Inputs to try: a comma separates alternatives, + joins poolings side by side "
    "(mean,max,mean+max); mean@6,mean@12 or mean@all compares layers. By default all poolings "
    "with one vector per image are joined, those of blocks aside.",
)
@click.option("--space", type=PATH, help="A search space (TOML) instead of the default one.")
@click.option(
    "--configs", "n_configs", type=click.IntRange(1, MANY),
    help="Configurations per head and pooling, instead of the search space's number.",
)  # fmt: skip
@click.option(
    "--folds", "n_folds", type=click.IntRange(2, MANY), default=5, show_default=True,
    help="Folds of cross-validation, by patient.",
)  # fmt: skip
@click.option(
    "--metric",
    default="auroc",
    show_default=True,
    help=f"Score that chooses the winners: {', '.join(METRICS)}.",
)
@click.option(
    "--covariates",
    callback=split_names,
    help="Columns of the manifest to append to the embedding, such as region,age,sex.",
)
@click.option(
    "--prompts",
    type=PATH,
    help="A file of `medembed prompts`: adds the classifiers zero-shot and text-logistic, on the "
    "pooling pooler.",
)
@click.option(
    "--image-root",
    type=LOCATION,
    help="Directory or bucket that the manifest's paths are relative to: adds the baseline "
    "imagestats, measured on the files unless CACHE holds its pooling.",
)
@click.option(
    "--without-suspects",
    type=PATH,
    metavar="REVIEW",
    help="A directory of `medembed audit labels`, or its audit.json: do not train on its suspects. "
    "Test stays as it is.",
)
@click.option(
    "--train-fraction", type=Finite(0, 1, min_open=True), default=1.0, show_default=True,
    help="Share of the training patients to train on, for label-efficiency curves.",
)  # fmt: skip
@operating_point_option("Operating point to store with every model:")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    help="Processes; by default one per core, or as many as fit into memory.",
)
@click.option(
    "--backend", type=_Backend(["local", "ray"]), default="local", show_default=True,
    help="Where processes run: this machine, or the Ray cluster at RAY_ADDRESS.",
)  # fmt: skip
@seed_option
@json_option
def sweep_command(
    cache_path: Location,
    manifest_path: Path,
    out: Path,
    targets: tuple[str, ...] | None,
    heads: tuple[str, ...],
    pool: tuple[str, ...] | None,
    space: Path | None,
    n_configs: int | None,
    n_folds: int,
    metric: str,
    covariates: tuple[str, ...] | None,
    prompts: Path | None,
    image_root: Location | None,
    without_suspects: Path | None,
    train_fraction: float,
    operating_points: tuple[Any, ...],
    jobs: int | None,
    backend: str,
    seed: int,
    as_json: bool,
) -> None:
    """Train and tune classifiers on CACHE, and score the winners once on the test split.

    Configurations are judged by cross-validation on training patients. The best of each head is
    refitted on all of them and packaged as RUN/models/HEAD.
    """
    from medembed.sweeps.processes import start_early

    options: dict[str, Any] = {
        "heads": heads,
        "pool": pool,
        "space": space,
        "n_configs": n_configs,
        "n_folds": n_folds,
        "metric": metric,
        "covariates": covariates or (),
        "prompts": prompts,
        "image_root": image_root,
        "without_suspects": without_suspects,
        "train_fraction": train_fraction,
        "operating_points": operating_points,
        "seed": seed,
        "jobs": jobs,
        "backend": "loky" if backend == "local" else backend,
    }
    if targets:
        _sweep_targets(cache_path, manifest_path, out, targets, as_json, options)
        return
    with ExitStack() as stack:
        if backend == "local" and _may_be_cache(cache_path) and manifest_path.is_file():
            stack.enter_context(start_early(jobs))
        from medembed import sweeps

        progress = stack.enter_context(showing_leaderboard("Training", "fits", metric))
        run = sweeps.sweep(
            cache_path,
            manifest_path,
            out,
            **options,
            progress=progress,
            board=progress.board,
            announce=say,
        )
    if as_json:
        print_json(run.as_dict())
    else:
        from medembed.report.layers import describe_layers

        show_run(run, operating_points)
        for series in run.info.layers or ():
            say(describe_layers(series))
        suggest("report", out, "-o", "report")


def _may_be_cache(location: Location) -> bool:
    return location.is_dir() if isinstance(location, Path) else True


def _sweep_targets(
    cache_path: Location,
    manifest_path: Path,
    out: Path,
    targets: tuple[str, ...],
    as_json: bool,
    options: dict[str, Any],
) -> None:
    """Sweep each target into a run of its own, and print their tables side by side."""
    from medembed.sweeps.targets import prepare_targets

    prepared = prepare_targets(cache_path, manifest_path, out, targets, **options)
    runs = prepared.runs
    for name, reason in runs.not_estimable.items():
        say(f"Target {name} is not estimable: {reason}")
    for name in runs.names:
        label = f"Training {name}"
        with showing_leaderboard(label, "fits", options["metric"]) as progress:
            prepared.sweep(name, progress=progress, board=progress.board)
    if as_json:
        print_json(runs.as_dict())
        return
    show_targets(runs, operating_points=options["operating_points"])
    suggest("report", out, "-o", "report")
