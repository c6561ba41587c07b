"""The most confident mistakes of the best head, with thumbnails of the available images."""

import base64
import io
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from medembed.core.errors import ManifestError
from medembed.core.files import read_plain
from medembed.dataset.manifest import Manifest, existing_images, image_path
from medembed.dataset.targets import ClassNames, name_classes
from medembed.evaluation.calibration import log_odds
from medembed.images.load import read_content, read_contents
from medembed.results.alignment import TestSet
from medembed.results.comparison_schema import ComparisonResult
from medembed.results.methods import name_compared_classes

if TYPE_CHECKING:
    from medembed.core.locations import Location

__all__ = [
    "CODE_DIGITS",
    "FILM_DIGITS",
    "FILM_SIDE",
    "SIDE",
    "FindThumbnails",
    "Mistake",
    "Thumbnail",
    "film_name",
    "find_mistakes",
    "make_thumbnail",
    "make_thumbnails",
    "show_mistakes",
]

N_PER_KIND = 6
CODE_DIGITS = 12
"""Digits of an image's SHA-256 shown in place of its name."""
FILM_DIGITS = 16
"""Digits that name a film beside the page."""


@dataclass(frozen=True)
class Thumbnail:
    """A small JPEG of an image, its size in pixels, and the image's name if it may be shown."""

    jpeg: bytes
    width: int
    height: int
    name: str | None = None


FindThumbnails = Callable[[Sequence[str]], Mapping[str, Thumbnail]]
"""Takes SHA-256 hashes and returns the thumbnails of the available images."""


@dataclass(frozen=True)
class Mistake:
    """A test row on the wrong side of the threshold.

    Attributes
    ----------
    called : str
        What its class is called, the opposite of its label; see `targets.ClassNames`.
    probability : float
        Calibrated probability of abnormal, in [0, 1].
    region : str
    images : list of str
        SHA-256 of the row's images.
    """

    called: str
    probability: float
    region: str
    images: list[str]


def find_mistakes(result: ComparisonResult, test_set: TestSet) -> list[Mistake]:
    """Return the best trained head's mistakes furthest from its threshold, most confident first.

    At most six of each kind, false positives first; the distance is in log-odds.
    """
    best = next((row for row in result["rows"] if not row["baseline"]), None)
    if best is None:
        return []
    own = {(contender.run, contender.head): contender for contender in test_set.contenders}
    contender = own[best["run"], best["head"]]
    distance = log_odds(contender.probability) - log_odds(np.array(contender.threshold))
    found = []
    classes = name_compared_classes(result)
    for sign, label in ((1, 0), (-1, 1)):
        is_called = (contender.probability >= contender.threshold) == (label == 0)
        wrong = np.flatnonzero(is_called & (test_set.y == label))
        worst = wrong[np.argsort(-sign * distance[wrong], kind="stable")][:N_PER_KIND]
        for k in worst:
            unit = test_set.units.iloc[k]
            images = unit["images"].split(" ")
            probability, called = float(contender.probability[k]), classes[1 - label]
            found.append(Mistake(called, probability, unit["region"], images))
    return found


def show_mistakes(
    mistakes: Sequence[Mistake],
    find_thumbnails: FindThumbnails | None,
    classes: ClassNames | None = None,
) -> dict[str, Any]:
    """Return the page's gallery: cards of text and data URIs, and how many lack images.

    `classes` are those of the comparison, by default normal and abnormal.
    """
    negative, positive = classes or name_classes(None)
    wanted = [image for mistake in mistakes for image in mistake.images]
    thumbnails = find_thumbnails(wanted) if find_thumbnails and wanted else {}
    return {
        "kinds": [
            {
                "title": f"Called {called}, labelled {other}",
                "cards": [_card(own, thumbnails) for own in mistakes if own.called == called],
            }
            for called, other in ((positive, negative), (negative, positive))
        ],
        "n": len(mistakes),
        "n_images": len(wanted),
        "n_shown": sum(image in thumbnails for image in wanted),
        "asked_for_images": find_thumbnails is not None,
    }


def _card(mistake: Mistake, thumbnails: Mapping[str, Thumbnail]) -> dict[str, Any]:
    views = []
    for number, image in enumerate(mistake.images, start=1):
        thumbnail = thumbnails.get(image)
        name = thumbnail.name if thumbnail and thumbnail.name else image[:CODE_DIGITS]
        view: dict[str, Any] = {"name": name, "data": None}
        if thumbnail:
            view["data"] = f"data:image/jpeg;base64,{base64.b64encode(thumbnail.jpeg).decode()}"
            view |= {"width": thumbnail.width, "height": thumbnail.height}
            view["alt"] = (
                f"Radiograph, {mistake.region}, view {number} of {len(mistake.images)}, called "
                f"{mistake.called} with probability {mistake.probability:.3f}"
            )
        views.append(view)
    return {
        "region": mistake.region,
        "probability": f"{mistake.probability:.3f}",
        "views": views,
    }


SIDE, FILM_SIDE = 320, 512
"""Pixels of the longer side: of a thumbnail, and of a film that a page enlarges."""
QUALITY = 85


def make_thumbnails(
    manifest: Manifest,
    image_root: str | os.PathLike[str],
    wanted: Sequence[str],
    *,
    with_names: bool = False,
    side: int = SIDE,
    made: Path | None = None,
) -> dict[str, Thumbnail]:
    """Return grey JPEG thumbnails by SHA-256 of the images that exist and are unchanged.

    Several are decoded at once; those of a bucket are fetched ahead.

    Parameters
    ----------
    manifest : Manifest
        Maps hashes to image paths.
    image_root : path
        Directory, or bucket's prefix, that the manifest's paths are relative to.
    wanted : sequence of str
        SHA-256 of the files' bytes, hex.
    with_names : bool
        Whether a thumbnail carries the path of its image, which may name a patient.
    side : int
        Pixels of the longer side; a smaller image is left as it is.
    made : Path, optional
        A directory with thumbnails of an earlier call, named by `film_name`, which are not decoded
        again.

    Raises
    ------
    PathNotFoundError
        `image_root` is not a directory, or there is nothing below the prefix.
    ArgumentError
        It is a stream, such as tar files, in which no image can be looked up.
    StorageError
        The bucket refuses, or keeps failing.

    Notes
    -----
    An image is left out if it is not in the manifest, lies outside the root, cannot be read or
    decoded, or differs from the manifest's bytes: the page counts the images that it shows.
    """
    root, rows = existing_images(image_root), manifest.rows
    rows = rows[rows["sha256"].isin(list(wanted))].drop_duplicates("sha256")
    shown: dict[str, str | None] = {}
    found: dict[str, Thumbnail | None] = {}
    paths: dict[str, Location] = {}
    for sha256, name in zip(rows["sha256"], rows["image"], strict=True):
        shown[sha256] = name if with_names else None
        known = None if made is None else _read_made(made / film_name(sha256), shown[sha256])
        found[sha256] = known
        if known is None:
            with suppress(ManifestError):  # leads out of the root
                paths[sha256] = image_path(root, name)
    readings = read_contents([*paths.values()], [*paths], partial(_shrink, side=side))
    for sha256, reading in zip(paths, readings, strict=True):
        if reading.pixels is not None:
            found[sha256] = _encode(reading.pixels, shown[sha256])
    return {sha256: own for sha256, own in found.items() if own}


def film_name(sha256: str) -> str:
    """Return the name of a film beside a page, from the first 16 digits of its SHA-256."""
    return f"{sha256[:FILM_DIGITS]}.jpg"


def _read_made(path: Path, name: str | None) -> Thumbnail | None:
    """Return a thumbnail that was made before, or None if there is none that can be read."""
    try:
        data = read_plain(path)
        with Image.open(io.BytesIO(data)) as picture:
            picture.verify()
            width, height = picture.size
    except (OSError, ValueError, SyntaxError):
        return None
    return Thumbnail(data, width, height, name)


def make_thumbnail(path: Path, sha256: str) -> Thumbnail | None:
    """Return the thumbnail of a file, without its name; None if it cannot be read or changed."""
    reading = read_content([path], sha256, _shrink)
    return None if reading.pixels is None else _encode(reading.pixels, None)


def _shrink(pixels: np.ndarray, side: int = SIDE) -> np.ndarray:
    picture = Image.fromarray(pixels)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def _encode(pixels: np.ndarray, name: str | None) -> Thumbnail:
    output = io.BytesIO()
    Image.fromarray(pixels).save(output, "JPEG", quality=QUALITY)
    height, width = pixels.shape
    return Thumbnail(output.getvalue(), width, height, name)
