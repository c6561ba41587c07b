"""`medembed autoencoder`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medembed.cli.commands import Command
from medembed.cli.console import print_json, say, suggest
from medembed.cli.options import (
    MANY,
    MAX_BATCH,
    PATH,
    Finite,
    device_option,
    fit_option,
    image_root_option,
    json_option,
    limit_options,
    output_option,
    precision_option,
    seed_option,
    split_names,
)
from medembed.cli.progress import showing_progress
from medembed.core.locations import Location

if TYPE_CHECKING:
    from medembed.autoencoder import TrainingReport

__all__ = ["autoencoder_command"]

MAX_SIDE = 8192
"""The largest side in pixels of the square that images are resized to; no encoder's is larger."""
MAX_CHANNELS = 65_536


def _split_numbers(context: click.Context, option: click.Parameter, value: str) -> tuple[int, ...]:
    names: Any = split_names(context, option, value)
    if not all(name.isascii() and name.isdecimal() for name in names):
        raise click.BadParameter(f"{value!r} is not a list of whole numbers", context, option)
    if any(len(name) > 9 or not 1 <= int(name) <= MAX_CHANNELS for name in names):
        raise click.BadParameter(f"{value!r} is not from 1 to {MAX_CHANNELS}", context, option)
    return tuple(map(int, names))


@click.command(
    "autoencoder",
    cls=Command,
    starting="Reading the manifest",
    examples=[
        "medembed autoencoder mura.csv --image-root MURA-v1.1 -o autoencoder",
    ],
    sections={
        "Network": ["size", "widths", "latent-channels"],
        "Training": ["epochs", "batch-size", "lr", "seed", "device", "precision"],
        "Images": ["fit", "max-bytes", "max-seconds"],
    },
)
@click.argument("manifest_path", metavar="MANIFEST", type=PATH)
@image_root_option
@output_option("The encoder directory to write.")
@click.option(
    "--size", type=click.IntRange(2, MAX_SIDE), default=128, show_default=True,
    help="Side of the square that images are resized to, in pixels.",
)  # fmt: skip
@click.option(
    "--widths", callback=_split_numbers, default="32,64,128,256", show_default=True,
    help="Channels after each halving of the side.",
)  # fmt: skip
@click.option(
    "--latent-channels", type=click.IntRange(1, MAX_CHANNELS), default=128, show_default=True,
    help="Channels of the code, which are the columns of each pooling.",
)  # fmt: skip
@click.option(
    "--epochs", type=click.IntRange(1, MANY), default=40, show_default=True,
    help="Maximum number; training stops early when held-out images no longer improve.",
)  # fmt: skip
@click.option(
    "--batch-size", type=click.IntRange(1, MAX_BATCH), default=64, show_default=True,
    help="Images per step.",
)  # fmt: skip
@click.option(
    "--lr", "learning_rate", type=Finite(min=0, min_open=True), default=2e-3, show_default=True,
    help="Peak learning rate.",
)  # fmt: skip
@limit_options
@device_option
@precision_option
@fit_option
@seed_option
@json_option
def autoencoder_command(
    manifest_path: Path,
    image_root: Location,
    out: Path,
    size: int,
    widths: tuple[int, ...],
    latent_channels: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    max_bytes: int,
    max_seconds: float,
    device: str,
    precision: str,
    fit: str,
    seed: int,
    as_json: bool,
) -> None:
    """Train an autoencoder on MANIFEST's training images, for `extract` to use as an encoder.

    This is the baseline that uses neither labels nor other data.
    """
    from medembed import autoencoder
    from medembed.dataset.manifest import read_manifest
    from medembed.images.load import Limits

    with showing_progress("Reading", "images") as progress:
        report = autoencoder.train_autoencoder(
            read_manifest(manifest_path),
            image_root,
            out,
            size=size,
            widths=widths,
            latent_channels=latent_channels,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            device=device,
            precision=precision,
            fit=fit,
            seed=seed,
            limits=Limits(max_bytes, max_seconds),
            progress=progress,
            on_status=progress.show_status,
        )
    _say_training(report)
    if as_json:
        print_json(report.as_dict())
        return
    padded = () if fit == "stretch" else ("--fit", fit)
    suggest(
        *("extract", manifest_path, "--image-root", image_root),
        *("--encoder", report.encoder, *padded, "--cache", "cache-autoencoder"),
    )


def _say_training(report: "TrainingReport") -> None:
    for failure in report.failures:
        say(f"Failed ({failure['stage']}): {failure['image']}: {failure['reason']}")
    say(
        f"{report.encoder}: {report.epochs} epochs on {report.images} images of train, the best "
        f"{report.best_epoch}; {report.held_out_images} images of other patients held out, "
        f"{report.failed} failed; {report.seconds:.1f} s"
    )
    say(
        f"Mean squared error of held-out images: {report.held_out_loss:.5f}; of the mean image: "
        f"{report.mean_image_loss:.5f}"
    )
    if report.has_collapsed:
        say(
            "The autoencoder reconstructs images no better than the mean image, so its embeddings "
            "carry almost no information. Try more --epochs or another --lr."
        )
