"""`medembed finetune`."""

from pathlib import Path
from typing import Any

import click

from medembed.cli.compare import show_comparison
from medembed.cli.console import print_json
from medembed.cli.options import (
    MANY,
    MAX_BATCH,
    MAX_SEED,
    PATH,
    Finite,
    device_option,
    encoder_option,
    fit_option,
    image_root_option,
    json_option,
    limit_options,
    operating_point_option,
    precision_option,
    seed_option,
    split_names,
)
from medembed.cli.progress import showing_progress

__all__ = ["finetune_command"]

_ABOVE_ZERO = Finite(min=0, min_open=True)


@click.command("finetune")
@click.argument("manifest_path", metavar="MANIFEST", type=PATH)
@image_root_option
@encoder_option
@click.option(
    "--unfreeze",
    callback=split_names,
    default="0,1,2,4",
    show_default=True,
    help="Depths: so many last blocks train with the head; 0 the head alone; all everything.",
)
@click.option(
    "--lora", type=click.IntRange(1, MANY), metavar="RANK",
    help="Train adapters of this rank in those blocks, not the blocks; wants peft.",
)  # fmt: skip
@click.option("--out", type=PATH, required=True, help="The run directory to write.")
@click.option(
    "--from-run", type=PATH, help="Begin with the best MLP or logistic head of this sweep."
)
@click.option(
    "--pool",
    callback=split_names,
    help="What the head reads, side by side; without it mean,max, or what --from-run has.",
)
@click.option(
    "--trunk-cache", type=PATH,
    help="Keep here what comes out of the frozen blocks; wants --no-augment.",
)  # fmt: skip
@click.option(
    "--trunk-dtype", type=click.Choice(["float32", "float16"]), default="float32",
    show_default=True, help="How it is kept.",
)  # fmt: skip
@click.option(
    "--seeds", "n_seeds", type=click.IntRange(1, MANY), default=1, show_default=True,
    help="Train every depth with so many seeds, from --seed on.",
)  # fmt: skip
@click.option(
    "--folds", "n_folds", type=click.IntRange(2, MANY), default=5, show_default=True,
    help="One of so many folds of train patients is held out to stop early.",
)  # fmt: skip
@click.option("--epochs", type=click.IntRange(1, MANY), default=20, show_default=True)
@click.option("--patience", type=click.IntRange(1, MANY), default=5, show_default=True)
@click.option("--batch-size", type=click.IntRange(1, MAX_BATCH), default=32, show_default=True)
@click.option(
    "--accumulate", type=click.IntRange(1, MAX_BATCH), default=1, show_default=True,
    help="Send a batch through the tower in so many parts: less memory.",
)  # fmt: skip
@click.option(
    "--checkpointing", is_flag=True, help="Compute activations twice instead of keeping them."
)
@click.option(
    "--lr", type=_ABOVE_ZERO, default=1e-3, show_default=True, help="The head's learning rate."
)
@click.option(
    "--encoder-share", type=_ABOVE_ZERO, default=0.1, show_default=True,
    help="The last block's learning rate, as a share of the head's.",
)  # fmt: skip
@click.option(
    "--decay", type=_ABOVE_ZERO, default=0.75, show_default=True,
    help="Each earlier block's learning rate, as a share of the next one's.",
)  # fmt: skip
@click.option("--weight-decay", type=Finite(min=0), default=0.01, show_default=True)
@click.option("--no-augment", is_flag=True, help="Train on the images as they are.")
@click.option("--flips", is_flag=True, help="Also mirror images, left and right.")
@click.option(
    "--from-scratch", is_flag=True, help="Begin with random weights, drawn by its config."
)
@operating_point_option("Also package this operating point with every model:")
@limit_options
@device_option
@precision_option
@fit_option
@seed_option
@json_option
def finetune_command(
    manifest_path: Path,
    image_root: Path,
    reference: str,
    unfreeze: tuple[str, ...],
    out: Path,
    from_run: Path | None,
    pool: tuple[str, ...] | None,
    trunk_cache: Path | None,
    trunk_dtype: str,
    n_seeds: int,
    n_folds: int,
    no_augment: bool,
    operating_points: tuple[Any, ...],
    max_bytes: int,
    max_seconds: float,
    device: str,
    precision: str,
    fit: str,
    seed: int,
    as_json: bool,
    **numbers: Any,
) -> None:
    """Train an encoder's last blocks with a head, at several depths, on MANIFEST."""
    from medembed.finetuning import Hyperparameters, finetune
    from medembed.images.load import Limits

    if seed + n_seeds - 1 > MAX_SEED:
        raise click.UsageError(f"--seed {seed} and --seeds {n_seeds} go beyond {MAX_SEED}")

    with showing_progress("Training", "images") as progress:
        run = finetune(
            manifest_path,
            image_root,
            reference,
            out,
            unfreeze=unfreeze,
            from_run=from_run,
            trunk_cache=trunk_cache,
            trunk_dtype=trunk_dtype,
            n_seeds=n_seeds,
            n_folds=n_folds,
            pool=pool,
            config=Hyperparameters(augment=not no_augment, **numbers),
            device=device,
            precision=precision,
            fit=fit,
            seed=seed,
            operating_points=operating_points,
            limits=Limits(max_bytes, max_seconds),
            progress=progress,
            tell=progress.tell,
        )
    if as_json:
        print_json(run.as_dict())
    else:
        show_comparison([out], "study", None, "table", operating_points=operating_points)
