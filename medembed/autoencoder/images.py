"""Read, hash and prepare the images of `train`, never of `test`, and split them by patient."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from medembed.core.errors import TrainingDataError
from medembed.core.locations import Location
from medembed.dataset.identities import name_persons
from medembed.dataset.manifest import Manifest
from medembed.dataset.splits import split_patients
from medembed.encoders.preprocessing import Preprocessing
from medembed.extraction.image_store import PreparedImages, read_rows, refuse_empty_root
from medembed.images.load import DEFAULT_LIMITS, Limits

__all__ = ["HELD_OUT", "TrainingImages", "draw_held_out", "read_images"]

HELD_OUT = 0.1
"""Share of the studies of `train` held out for early stopping and not used for learning."""


@dataclass(frozen=True, eq=False)
class TrainingImages:
    """Prepared images, each content once.

    Parameters
    ----------
    pixels : ndarray
        uint8 (n, height, width), see `extraction.image_store`.
    learned, held_out : ndarray
        int, disjoint and neither empty: the images to learn from, and those of other patients.
    failures : list of dict
        `image`, `sha256`, `stage`, `reason` of each row whose image could not be read or decoded.
    digest : str
        SHA-256 (hex) over the hashes of both parts, equal for equal images.
    """

    pixels: np.ndarray
    learned: np.ndarray
    held_out: np.ndarray
    failures: list[dict[str, str]]
    digest: str


def draw_held_out(rows: pd.DataFrame, seed: int) -> np.ndarray:
    """Return the patients held out for early stopping, drawn as by `split_patients`, unstratified.

    Parameters
    ----------
    rows : pandas.DataFrame
        The rows of `train`, with columns `patient` and `study`.

    Returns
    -------
    ndarray of bool, (n_rows,)
        Whether the row's patient is held out: about `HELD_OUT` of the studies, from at least one
        patient.

    Raises
    ------
    TrainingDataError
        There are fewer than two patients.
    """
    n_patients = name_persons(rows).nunique()
    if n_patients < 2:
        raise TrainingDataError(
            f"split train holds {len(rows)} images of {n_patients} patients, and an autoencoder "
            "needs two patients: one to learn from and one to stop by. Add patients to split "
            "train, or correct the manifest's split column."
        )
    blind = rows.assign(label=pd.array([pd.NA] * len(rows), dtype="Int8"), region="")
    parts = split_patients(blind, fraction=max(HELD_OUT, 1 / n_patients), seed=seed)
    held_out: np.ndarray = parts == "test"
    return held_out


def read_images(
    manifest: Manifest,
    image_root: Location,
    preprocessing: Preprocessing,
    *,
    seed: int,
    limits: Limits = DEFAULT_LIMITS,
    progress: Callable[[int, int], None] | None = None,
    on_status: Callable[[str], None] | None = None,
) -> TrainingImages:
    """Return the images of `train`, read and prepared as by `extract`, in a temporary file.

    A content that belongs to several rows is held out only if all their patients are.

    Parameters
    ----------
    progress : callable, optional
        Called as progress(done, total) with distinct contents.
    on_status : callable, optional
        Called with a message for each step and with the size of the temporary file.

    Raises
    ------
    PathNotFoundError
        None of the images is below the root.
    ManifestError
        Files whose bytes differ from the manifest's, all listed at once.
    TrainingDataError
        Too few patients, or no image of one of the two parts could be read.
    MedembedError
        There is no room for the temporary file.
    """
    rows = manifest.rows[manifest.rows["split"] == "train"]
    held_out = draw_held_out(rows, seed)
    refuse_empty_root(image_root, rows["image"], rows["sha256"].nunique(), "of split train")
    read = read_rows(
        rows,
        image_root,
        preprocessing,
        limits=limits,
        remedy="Set TMPDIR to a larger disk, or give a smaller --size.",
        progress=progress,
        on_status=on_status,
    )
    return _part(read, held_out)


def _part(read: PreparedImages, held_out: np.ndarray) -> TrainingImages:
    is_held_out = ~np.isin(np.arange(len(read.sha256)), read.places[~held_out])
    is_read = read.is_read
    parts = {"learn from": is_read & ~is_held_out, "stop by": is_read & is_held_out}
    for purpose, chosen in parts.items():
        if not chosen.any():
            raise TrainingDataError(
                f"no image could be read of the patients of split train to {purpose}: "
                f"{np.sum(~is_read)} of {len(is_read)} images failed, the first "
                f"{_describe(read.failures)}. Repair these files, or add patients."
            )
    digest = hashlib.sha256()
    for place in np.flatnonzero(is_read).tolist():
        digest.update(f"{read.sha256[place]} {is_held_out[place]}\n".encode())
    return TrainingImages(
        read.pixels,
        np.flatnonzero(parts["learn from"]),
        np.flatnonzero(parts["stop by"]),
        read.failures,
        digest.hexdigest(),
    )


def _describe(failures: list[dict[str, str]]) -> str:
    if not failures:
        return "none"
    first = failures[0]
    return f"{first['image']} ({first['stage']}: {first['reason']})"
