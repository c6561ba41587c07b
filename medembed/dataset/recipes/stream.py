"""A manifest of images in a stream, from one pass over it: tar files, or a dataset of the hub.

Beside each image in a tar file, `0007.png`, its sample has `0007.json` with `patient`, `study`,
`region`, `label` (0, 1 or null) and `split` (train or test), and further values, which become
covariates. `0007.cls` may stand for `label`. Of a dataset of the hub, and where columns are named,
`stream_columns` settles which are which; of Parquet files that happens before images are fetched.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import NoReturn

import pandas as pd

from medembed.core.errors import ManifestError
from medembed.dataset.checks import find_warnings
from medembed.dataset.manifest import Manifest, make_manifest
from medembed.dataset.recipes.build import BuildReport
from medembed.dataset.recipes.choices import Choices
from medembed.dataset.recipes.stream_columns import SettledRows, settle_rows
from medembed.dataset.recipes.stream_samples import Sample, preview_samples, read_samples
from medembed.dataset.split_counts import find_gaps, find_small_parts
from medembed.images.hub_dataset import HubRoot, list_data_files
from medembed.images.load import DEFAULT_LIMITS
from medembed.images.streams import StreamRoot, settle_stream
from medembed.images.tar_stream import TarRoot

__all__ = ["build_from_stream"]

ASKED = ("patient", "study", "region", "split")
N_NAMED = 20


@dataclass
class _Collected:
    """What was read of a stream: lists of equal length, and what cannot be used."""

    images: list[dict[str, str]] = field(default_factory=list)
    values: list[dict[str, str]] = field(default_factory=list)
    excluded: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, sample: Sample, *, hashed: bool = True) -> None:
        """Add the images of a sample."""
        if sample.problem:
            self.problems.append(sample.problem)
        for name, data in sample.images.items():
            if isinstance(data, str):
                self.excluded.append((name, data))
                continue
            sha256 = hashlib.sha256(data).hexdigest() if hashed else name
            about = {"place": sample.place, "split": sample.split}
            self.images.append({"image": name, "sha256": sha256, **about})
            self.values.append(sample.values)

    def settle(self, choices: Choices, source: str) -> SettledRows:
        """Return the rows of a manifest; raises as `settle_rows`."""
        images = pd.DataFrame(self.images)
        values = pd.DataFrame(self.values, index=images.index).fillna("").astype(str)
        return settle_rows(images, values, choices, source)


def build_from_stream(
    root: StreamRoot,
    label_level: str = "study",
    *,
    choices: Choices | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BuildReport:
    """Return a report with the manifest of all images in a stream, hashed on the way.

    Parameters
    ----------
    root : TarRoot or HubRoot
        Its files are each read once from front to back. A dataset of the hub is read at one commit.
    label_level : {"study", "image"}
        Whether all images of a study share its label; settled from the rows where `choices` are.
    choices : Choices, optional
        Which columns hold what, as `settle_rows` takes them. Without them, the samples of tar files
        have the names of a manifest, and the columns of a dataset are found by their names.
    progress : callable, optional
        Called as progress(done, total) with images; until the end, one more is to come.

    Raises
    ------
    PathNotFoundError
        There is no tar file, or no such data in the dataset.
    ImageError
        A file is damaged, or holds no images.
    RecipeError
        A column that was named does not exist, or the meaning of one is not clear.
    ManifestError
        A sample lacks what a manifest needs, or the rows break a manifest's rules; all problems
        are listed.
    StorageError
        The bucket or the hub refuses, or cannot be reached.
    """
    root = settle_stream(root)
    source, n_images = _name(root), 0
    is_open = choices is None and isinstance(root, TarRoot)
    choices = choices or Choices()
    if (preview := preview_samples(root, choices.image)) is not None:
        n_images = _check_preview(preview, choices, root)
    found = _Collected()
    for sample in read_samples(root, DEFAULT_LIMITS.max_bytes, choices.image):
        found.add(sample)
        if is_open and not sample.problem:
            _note_lacking(sample, found.problems)
        if progress:
            progress(len(found.images), max(n_images, len(found.images) + 1))
    if progress:
        progress(len(found.images), len(found.images))
    if found.problems:
        _refuse_samples(found.problems, root)
    if not found.images:
        _refuse_empty(found.excluded, source)
    settled = _name_plainly(found, label_level) if is_open else found.settle(choices, source)
    manifest = _make_manifest(settled, source)
    is_labelled = bool(manifest.rows["label"].notna().any())
    warnings = [*_doubt_card(root), *settled.warnings]
    warnings += [*find_gaps(manifest.rows, is_labelled=is_labelled), *find_warnings(manifest.rows)]
    notices = [*settled.notices, *find_small_parts(manifest.rows, is_labelled=is_labelled)]
    return BuildReport(manifest, sorted(found.excluded), warnings, notices)


def _name(root: StreamRoot) -> str:
    """Return the name of a stream in messages."""
    if isinstance(root, HubRoot):
        root = replace(root, revision=root.revision[:12])
    return str(root)


def _check_preview(preview: Iterable[Sample], choices: Choices, root: StreamRoot) -> int:
    """Refuse before the images are fetched what their values show; return the images' number."""
    found = _Collected()
    for sample in preview:
        found.add(sample, hashed=False)
    if found.problems:
        _refuse_samples(found.problems, root)
    if found.images:
        found.settle(choices, _name(root))
    return len(found.images)


def _note_lacking(sample: Sample, problems: list[str]) -> None:
    lacking = [name for name in ASKED if not sample.values.get(name)]
    if lacking:
        problems.append(f"{sample.place}: no {', '.join(lacking)}")


def _name_plainly(found: _Collected, label_level: str) -> SettledRows:
    """Return rows whose values have the names of a manifest already."""
    rows = [
        {"label": "", **values, "image": image["image"], "sha256": image["sha256"]}
        for image, values in zip(found.images, found.values, strict=True)
    ]
    return SettledRows(pd.DataFrame(rows), label_level)


def _make_manifest(settled: SettledRows, source: str) -> Manifest:
    """Return the manifest; a stream has no recipe in which images could be excluded."""
    try:
        return make_manifest(settled.rows.fillna(""), settled.label_level, source=source)
    except ManifestError as error:
        raise ManifestError(
            f"the images of {source} break the rules of a manifest (row 2 is the first image). "
            "If the dataset's own split is at fault, draw another with --test-fraction 0.2, and "
            "add --patient '' if copies of an image have different patients; otherwise correct "
            "the images or remove them from the dataset:",
            error.problems,
        ) from error


def _refuse_samples(problems: list[str], root: StreamRoot) -> NoReturn:
    way_out = (
        "Write a .json beside each image with patient, study, region, label and split, or name "
        "what stands for them with --patient, --study, --region, --label and --split"
        if isinstance(root, TarRoot)
        else "Name a folder or configuration whose samples are complete after the dataset's name"
    )
    more = [f"and {len(problems) - N_NAMED} more"] if len(problems) > N_NAMED else []
    raise ManifestError(
        f"{len(problems)} sample(s) of {_name(root)} lack what a manifest needs. {way_out}:",
        [*problems[:N_NAMED], *more],
    )


def _refuse_empty(excluded: list[tuple[str, str]], source: str) -> NoReturn:
    if not excluded:
        raise ManifestError(f"no image in {source}: no member has an image's suffix.")
    name, reason = excluded[0]
    raise ManifestError(
        f"no image in {source} can be read; for example, {name}: {reason}. Choose another column "
        "with --image, or download the images and build the manifest with --from-table."
    )


def _doubt_card(root: StreamRoot) -> list[str]:
    """Return a warning if a dataset's card, which may name its classes, cannot be read."""
    problem = list_data_files(root).problem if isinstance(root, HubRoot) else ""
    return [f"class and split names may be missing: {problem}"] if problem else []
