"""`medembed finetune`."""

from pathlib import Path
from typing import Any

import click

from medembed.cli.commands import Command
from medembed.cli.compare import show_run
from medembed.cli.console import print_json, suggest
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
    output_option,
    precision_option,
    seed_option,
    split_names,
)
from medembed.cli.progress import showing_progress
from medembed.core.locations import Location

__all__ = ["finetune_command"]

_ABOVE_ZERO = Finite(min=0, min_open=True)


@click.command(
    "finetune",
    cls=Command,
    starting="Loading the encoder",
    examples=[
        "medembed finetune mura.csv --image-root MURA-v1.1 --encoder google/medgemma-4b-pt "
        "--from-run runs/sweep -o runs/depths",
    ],
    sections={
        "What is trained": ["unfreeze", "lora", "from-run", "from-scratch", "pool"],
        "Training": [
            "seeds",
            "folds",
            "epochs",
            "patience",
            "batch-size",
            "accumulate",
            "checkpointing",
            "lr",
            "encoder-share",
            "decay",
            "weight-decay",
            "no-augment",
            "flips",
            "seed",
        ],
        "Frozen blocks": ["trunk-cache", "trunk-dtype"],
        "Images": ["fit", "max-bytes", "max-seconds"],
        "Results": ["operating-point"],
        "Device": ["device", "precision"],
    },
)
@click.argument("manifest_path", metavar="MANIFEST", type=PATH)
@image_root_option
@encoder_option
@click.option(
    "--unfreeze",
    callback=split_names,
    default="0,1,2,4",
    show_default=True,
    help="Depths to train: the number of last blocks; 0 is only the head, all is everything.",
)
@click.option(
    "--lora", type=click.IntRange(1, MANY), metavar="RANK",
    help="Train LoRA adapters of this rank instead of the blocks; requires peft.",
)  # fmt: skip
@output_option("The run directory to write.")
@click.option(
    "--from-run", type=PATH, help="Start from the best MLP or logistic head of this sweep."
)
@click.option(
    "--pool",
    callback=split_names,
    help="Poolings joined as the head's input; mean,max by default, or those of --from-run.",
)
@click.option(
    "--trunk-cache", type=PATH,
    help="Directory to cache the frozen blocks' output in; requires --no-augment.",
)  # fmt: skip
@click.option(
    "--trunk-dtype", type=click.Choice(["float32", "float16"]), default="float32",
    show_default=True, help="Type of the cached output.",
)  # fmt: skip
@click.option(
    "--seeds", "n_seeds", type=click.IntRange(1, MANY), default=1, show_default=True,
    help="Seeds per depth, counted from --seed.",
)  # fmt: skip
@click.option(
    "--folds", "n_folds", type=click.IntRange(2, MANY), default=5, show_default=True,
    help="Hold out one of N folds of training patients for early stopping.",
)  # fmt: skip
@click.option(
    "--epochs", type=click.IntRange(1, MANY), default=20, show_default=True, help="At most."
)
@click.option(
    "--patience", type=click.IntRange(1, MANY), default=5, show_default=True,
    help="Epochs without improvement before training stops.",
)  # fmt: skip
@click.option(
    "--batch-size", type=click.IntRange(1, MAX_BATCH), default=32, show_default=True,
    help="Images per step.",
)  # fmt: skip
@click.option(
    "--accumulate", type=click.IntRange(1, MAX_BATCH), default=1, show_default=True,
    help="Split each batch into N parts to save memory.",
)  # fmt: skip
@click.option("--checkpointing", is_flag=True, help="Recompute activations to save memory.")
@click.option(
    "--lr", type=_ABOVE_ZERO, default=1e-3, show_default=True, help="Learning rate of the head."
)
@click.option(
    "--encoder-share", type=_ABOVE_ZERO, default=0.1, show_default=True,
    help="Learning rate of the last block, as a share of the head's.",
)  # fmt: skip
@click.option(
    "--decay", type=_ABOVE_ZERO, default=0.75, show_default=True,
    help="Learning rate of each earlier block, as a share of the next one's.",
)  # fmt: skip
@click.option(
    "--weight-decay", type=Finite(min=0), default=0.01, show_default=True, help="AdamW's decay."
)
@click.option("--no-augment", is_flag=True, help="Do not vary the images during training.")
@click.option("--flips", is_flag=True, help="Also mirror images left to right.")
@click.option(
    "--from-scratch", is_flag=True, help="Start from random weights of the encoder's architecture."
)
@operating_point_option("Operating point to store with every model:")
@limit_options
@device_option
@precision_option
@fit_option
@seed_option
@json_option
def finetune_command(
    manifest_path: Path,
    image_root: Location,
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
    """Train an encoder's last blocks together with a head, at several depths.

    The result is a run that `compare` and `report` can show beside runs of sweeps.
    """
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
            on_status=progress.show_status,
        )
    if as_json:
        print_json(run.as_dict())
    else:
        show_run(run, operating_points)
        suggest("report", *([from_run] if from_run else []), out, "-o", "report")
