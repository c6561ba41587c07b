"""Train an autoencoder on the images of `train`, without labels, and write its encoder directory.

The directory is an ordinary checkpoint: pass it as `extract --encoder DIRECTORY`.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save

from medembed.autoencoder.checkpoint import CheckpointDir
from medembed.autoencoder.images import TrainingImages, read_images
from medembed.autoencoder.training import Training, TrainingConfig, mean_image_loss
from medembed.core.errors import DeviceMemoryError, EncoderError
from medembed.core.files import json_bytes
from medembed.core.system import library_versions
from medembed.dataset.manifest import Manifest, existing_images, require_hashes
from medembed.encoders.autoencoder import (
    Architecture,
    checkpoint_config,
    load_autoencoder,
    preprocessing_for,
    processor_config,
)
from medembed.encoders.loading import choose_device, choose_precision
from medembed.encoders.preprocessing import read_preprocessing
from medembed.images.load import DEFAULT_LIMITS, Limits

__all__ = ["TrainingReport", "train_autoencoder"]

Progress = Callable[[int, int], None]
OnStatus = Callable[[str], None]


@dataclass(frozen=True)
class TrainingReport:
    """Reports what was trained, and how well the autoencoder reconstructs images.

    Parameters
    ----------
    encoder : str
        The requested directory.
    fingerprint : str
        The encoder's fingerprint, which a cache will record.
    epochs, best_epoch : int
        Number of epochs run; the epoch whose weights were kept, counted from 1.
    loss, held_out_loss : float
        Mean squared error of grey levels from 0 to 1 in the best epoch, over the training images
        during the epoch, and over the held-out images after it.
    mean_image_loss : float
        `held_out_loss` of a model that always predicts the mean of the training images.
    images, held_out_images : int
        Distinct contents trained on, and held out.
    failures : list of dict
        `image`, `sha256`, `stage`, `reason` of each image left out.
    seconds : float
        From start to end, of this run.
    """

    encoder: str
    fingerprint: str
    epochs: int
    best_epoch: int
    loss: float
    held_out_loss: float
    mean_image_loss: float
    images: int
    held_out_images: int
    failures: list[dict[str, str]]
    seconds: float

    @property
    def failed(self) -> int:
        """Number of contents that were left out."""
        return len({failure["sha256"] for failure in self.failures})

    @property
    def has_collapsed(self) -> bool:
        """Whether the mean image does as well, so that the code carries no information."""
        return self.held_out_loss >= self.mean_image_loss

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON-able values."""
        return {**asdict(self), "failed": self.failed}


def train_autoencoder(
    manifest: Manifest,
    image_root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    size: int = 128,
    widths: Sequence[int] = (32, 64, 128, 256),
    latent_channels: int = 128,
    epochs: int = 40,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    device: str = "auto",
    precision: str = "auto",
    fit: str = "stretch",
    seed: int = 0,
    limits: Limits = DEFAULT_LIMITS,
    progress: Progress | None = None,
    on_status: OnStatus | None = None,
) -> TrainingReport:
    """Train an autoencoder on the images of `train`; write the directory that `extract` takes.

    A tenth of the patients of `train` is held out: training ends when the reconstruction of their
    images stops improving, and the best epoch's weights are kept. Neither labels nor images of
    `test` are used. The state of an interrupted training is kept beside `out`, and an identical
    call resumes after its last complete epoch. On a CPU equal arguments give equal weights, bit
    for bit.

    Parameters
    ----------
    manifest : Manifest
        Names the images, their SHA-256, patients and split.
    image_root : path
        Directory that the manifest's image paths are relative to.
    out : path
        The directory to write; it must not exist.
    size : int
        Side of the square that images are resized to, in pixels.
    widths : sequence of int
        Channels after each halving of the side.
    latent_channels : int
        Channels of the code, which is pooled into embeddings.
    epochs : int
        Maximum number of epochs.
    batch_size : int
        Images per step.
    learning_rate : float
        The maximum learning rate, reached after the warm-up.
    device : {"auto", "cpu", "cuda", "mps"}
    precision : {"auto", "fp32", "bf16"}
        Where and in which precision to train; see `load_encoder`.
    fit : {"stretch", "pad"}
        How an image that is not square is made square; use the same value for `extract`.
    seed : int
        Determines the held-out patients, the initial weights and the order of the images.
    limits : Limits
        Limits on size and time beyond which an image counts as failed.
    progress : callable, optional
        Called as progress(done, total) with images: first those read, then those trained on.
    on_status : callable, optional
        Called with a few words when a new step begins.

    Returns
    -------
    TrainingReport

    Raises
    ------
    EncoderError
        The architecture cannot be built, the device does not exist, a number is out of range; or
        training diverges.
    DeviceMemoryError
        A batch does not fit the device; completed epochs are kept.
    RunError
        `out` exists, or an unfinished training with other options lies beside it.
    PathNotFoundError
        The image root, all images below it, or the directory to write into is missing.
    ManifestError
        The manifest holds no SHA-256s, or files hold other bytes.
    TrainingDataError
        Too few patients in `train`, or too few images that can be read.
    MedembedError
        There is no room for the prepared images.
    """
    start, root, target = time.monotonic(), existing_images(image_root), Path(out)
    _check_numbers(epochs, batch_size, learning_rate)
    preprocessing = preprocessing_for(size, fit)
    chosen = choose_device(device)
    asked = TrainingConfig(
        architecture=Architecture(size, tuple(widths), latent_channels),
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        device=chosen,
        precision=choose_precision(precision, chosen),
        seed=seed,
    )
    require_hashes(manifest)
    question = _question(asked, fit, manifest)
    workplace = CheckpointDir(target, question)
    with workplace.locked():
        images = read_images(
            manifest,
            root,
            preprocessing,
            seed=seed,
            limits=limits,
            progress=progress,
            on_status=on_status,
        )
        training = _resume(
            partial(Training, asked, images, preprocessing), images, workplace, on_status
        )
        _run(training, asked, images, workplace, progress, on_status)
        facts = _facts(training, images, start)
        files = {
            "config.json": json_bytes(checkpoint_config(asked.architecture, fit)),
            "preprocessor_config.json": json_bytes(processor_config(preprocessing)),
            "model.safetensors": save(training.best, {"format": "pt"}),
            "training.json": json_bytes(_card(question, training, facts)),
        }
        fingerprint = workplace.finish(files, partial(_prove, fit=fit, source=target.name))
    return TrainingReport(
        encoder=str(out), fingerprint=fingerprint, failures=images.failures, **facts
    )


def _check_numbers(epochs: int, batch_size: int, learning_rate: float) -> None:
    for name, number in (("epochs", epochs), ("batch_size", batch_size)):
        if number < 1:
            raise EncoderError(f"{name} is {number}; it must be at least 1.")
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise EncoderError(f"--lr is {learning_rate}; it must be a positive number.")


def _question(asked: TrainingConfig, fit: str, manifest: Manifest) -> dict[str, Any]:
    """Return everything that determines the result, by the names of the command's options."""
    architecture = asked.architecture
    return {
        "size": architecture.image_size,
        "widths": list(architecture.widths),
        "latent_channels": architecture.latent_channels,
        "epochs": asked.epochs,
        "batch_size": asked.batch_size,
        "lr": asked.learning_rate,
        "device": asked.device,
        "precision": asked.precision,
        "fit": fit,
        "seed": asked.seed,
        "manifest": manifest.digest(),
    }


def _resume(
    begin: Callable[[], Training],
    images: TrainingImages,
    workplace: CheckpointDir,
    on_status: OnStatus | None,
) -> Training:
    """Resume an unfinished training if its images are equal, or begin one."""
    training, kept = begin(), workplace.load()
    if kept and kept.images == images.digest:
        try:
            training.restore(kept)
        except (KeyError, RuntimeError):  # damaged
            training = begin()
    if on_status:
        n_done = len(training.epochs)
        on_status(f"Training on from epoch {n_done}" if n_done else "Training")
    return training


def _run(
    training: Training,
    asked: TrainingConfig,
    images: TrainingImages,
    workplace: CheckpointDir,
    progress: Progress | None,
    on_status: OnStatus | None,
) -> None:
    n_images = len(images.learned)

    def tick(n_seen: int) -> None:
        if progress:
            progress(len(training.epochs) * n_images + n_seen, asked.epochs * n_images)

    try:
        while not training.is_over:
            training.run_epoch(tick)
            workplace.save(
                training.tensors(),
                epochs=training.epochs,
                n_steps=training.n_steps,
                images=images.digest,
            )
            if on_status:
                loss = training.epochs[-1]["held_out_loss"]
                on_status(f"Training, held-out loss {loss:.5f}")
    except DeviceMemoryError:  # the memory may be free the next time
        raise
    except EncoderError:
        workplace.discard()
        raise
    except KeyboardInterrupt as error:
        error.add_note(f"{len(training.epochs)} epochs of this training are kept.")
        raise


def _facts(training: Training, images: TrainingImages, start: float) -> dict[str, Any]:
    best = training.best_epoch
    return {
        "epochs": len(training.epochs),
        "best_epoch": best,
        **training.epochs[best - 1],
        "mean_image_loss": mean_image_loss(images),
        "images": len(images.learned),
        "held_out_images": len(images.held_out),
        "seconds": time.monotonic() - start,
    }


def _card(question: dict[str, Any], training: Training, facts: dict[str, Any]) -> dict[str, Any]:
    """Return `training.json`: options and results, without paths or patients' names."""
    return {
        "format": "medembed-autoencoder-training",
        "version": 1,
        "asked": question,
        "versions": library_versions("autoencoder"),
        **facts,
        "epochs": training.epochs,
    }


def _prove(directory: Path, *, fit: str, source: str) -> str:
    """Load the written encoder as `extract` will, and return its fingerprint."""
    preprocessing = read_preprocessing(directory, fit)
    return load_autoencoder(directory, preprocessing, source=source).fingerprint
