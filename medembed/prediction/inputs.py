"""Requests to a model: images by name, or the rows of a manifest."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from medembed.core.errors import ArgumentError, ManifestError, ModelError
from medembed.core.files import open_plain
from medembed.core.locations import Location
from medembed.dataset.manifest import Manifest, existing_images, image_path
from medembed.dataset.recipes.image_index import ImageIndex
from medembed.images.hashing import hash_or_explain
from medembed.results.model_card import Card

__all__ = ["Requests", "list_images", "request_images", "request_manifest"]


@dataclass(frozen=True, eq=False)
class Requests:
    """Images to be answered for, in order; all lists have one entry per image.

    Attributes
    ----------
    images : list of str
        Names used in the answers.
    places : list of Path
        Paths of the files, relative to `root` if it is set.
    digests : list of str
        SHA-256 of their bytes, "" if unknown.
    studies : int64 array (n,)
        Study numbers from 0.
    names : list of str
        Study names by number.
    regions : list of str
        Regions, "" if unknown.
    covariates : float32 array (n, k)
        Encoded covariates that the model reads.
    errors : dict of int to str
        Images known in advance to fail, and why.
    root : Path or BucketPath or None
        The image root of a manifest.
    has_files : bool
        Whether the paths of the images are known.
    """

    images: list[str]
    places: list[Path]
    digests: list[str]
    studies: np.ndarray
    names: list[str]
    regions: list[str]
    covariates: np.ndarray
    errors: dict[int, str] = field(default_factory=dict)
    root: Location | None = None
    has_files: bool = True

    def __len__(self) -> int:
        return len(self.images)

    def path(self, number: int) -> Location:
        """Return the file or object of an image.

        Raises
        ------
        ManifestError
            The path leads out of the image root.
        """
        if self.root is None:
            return self.places[number]
        return image_path(self.root, str(self.places[number]))


def list_images(names: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Return the files that are named, and of a directory the images below it, sorted.

    Files of a directory count by their suffix; where none has one, all that are DICOM count.

    Returns
    -------
    list of Path
    list of str
        What was not seen below a directory, in a sentence each.

    Raises
    ------
    ArgumentError
        A directory holds no image.
    """
    found, unseen = [], []
    for name in names:
        if not name.is_dir():
            found.append(name)
            continue
        root = Path(os.path.realpath(name))
        index = ImageIndex(root)
        paths = sorted(index.paths) or [
            path
            for path in sorted(ImageIndex(root, every_file=True).paths)
            if _is_dicom(root / path)
        ]
        if not paths:
            raise ArgumentError(
                f"{name} holds no image: no file below it has an image's suffix or is DICOM."
            )
        found += [name / path for path in paths]
        unseen += index.unseen
    return found, unseen


def _is_dicom(path: Path) -> bool:
    try:
        with open_plain(path) as file:
            return bool(file.read(132)[128:] == b"DICM")
    except OSError:
        return False


def request_images(
    images: Sequence[str | os.PathLike[str]],
    card: Card,
    progress: Callable[[int, int], None] | None = None,
) -> Requests:
    """Return requests for files, each a separate study of unknown region.

    Raises
    ------
    ModelError
        The model reads covariates, which only a manifest provides.
    """
    if card.covariates is not None:
        columns = [column.name for column in card.covariates.columns]
        raise ModelError(
            f"the model reads {', '.join(columns)} in addition to each image, which a file alone "
            "lacks. Write a manifest with these columns, and use --manifest M --image-root DIR."
        )
    paths = [Path(os.path.abspath(image)) for image in images]
    digests, errors = _hash(paths, progress)
    # A name that is not text in this machine's encoding is shown as bytes.
    names = [os.fspath(image).encode("utf-8", "backslashreplace").decode() for image in images]
    return Requests(
        images=names,
        places=paths,
        digests=digests,
        studies=np.arange(len(names)),
        names=names,
        regions=[""] * len(names),
        covariates=np.zeros((len(names), 0), np.float32),
        errors=errors,
    )


def request_manifest(
    manifest: Manifest,
    card: Card,
    image_root: str | os.PathLike[str] | None,
    progress: Callable[[int, int], None] | None = None,
) -> Requests:
    """Return requests for every row of a manifest, labelled or not.

    Parameters
    ----------
    image_root : path, optional
        Directory that the manifest's paths are relative to; without it only a cache can answer.

    Raises
    ------
    PathNotFoundError
        The image root does not exist.
    ManifestError
        The manifest has no SHA-256s, and there is no local image root to compute them from.
    TrainingDataError
        A covariate that the model reads is not a column, or has values that it cannot encode.
    """
    root = None if image_root is None else existing_images(image_root)
    rows = manifest.rows
    covariates = np.zeros((len(rows), 0), np.float32)
    if card.covariates is not None:
        covariates = card.covariates.transform(rows)
    images, digests = rows["image"].tolist(), rows["sha256"].tolist()
    names, codes = np.unique(rows["study"].to_numpy(str), return_inverse=True)
    requests = Requests(
        images=images,
        places=[Path(image) for image in images],
        digests=digests,
        studies=codes,
        names=names.tolist(),
        regions=rows["region"].tolist(),
        covariates=covariates,
        root=root,
        has_files=root is not None,
    )
    if "" in digests:
        if not isinstance(root, Path):
            raise ManifestError(
                "the manifest holds no sha256, by which a cache finds its images. Use "
                "--image-root DIR, a local one, or build the manifest again without "
                "--structure-only."
            )
        _find_hashes(requests, progress)
    return requests


def _find_hashes(requests: Requests, progress: Callable[[int, int], None] | None) -> None:
    numbers, paths = [], []
    for number, digest in enumerate(requests.digests):
        if digest:
            continue
        try:
            path = requests.path(number)
            assert isinstance(path, Path)
            paths.append(path)
            numbers.append(number)
        except ManifestError as error:
            requests.errors[number] = str(error)
    digests, errors = _hash(paths, progress)
    for place, number in enumerate(numbers):
        requests.digests[number] = digests[place]
        if place in errors:
            requests.errors[number] = errors[place]


def _hash(
    paths: Sequence[Path], progress: Callable[[int, int], None] | None
) -> tuple[list[str], dict[int, str]]:
    """Return the SHA-256 of each file, "" for failures, and the reasons of the failures."""
    errors = {}
    for number, path in enumerate(paths):
        # Reading a pipe could block, and its bytes can be read only once.
        if os.path.exists(path) and not os.path.isfile(path):
            errors[number] = "is a directory" if os.path.isdir(path) else "is not a file"
    plain = [number for number in range(len(paths)) if number not in errors]
    digests = [""] * len(paths)
    found = hash_or_explain([paths[number] for number in plain], progress)
    for number, outcome in zip(plain, found, strict=True):
        if isinstance(outcome, OSError):
            errors[number] = outcome.strerror or type(outcome).__name__
        else:
            digests[number] = outcome
    return digests, errors
