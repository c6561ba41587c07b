"""A manifest of images in tar files, from one pass over them: WebDataset's layout.

Beside each image, `0007.png`, its sample has `0007.json` with `patient`, `study`, `region`, `label`
(0, 1 or null) and `split` (train or test), and further values, which become covariates. `0007.cls`
may stand for `label`.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import pandas as pd

from medembed.core.errors import ManifestError
from medembed.dataset.checks import find_warnings
from medembed.dataset.manifest import make_manifest
from medembed.dataset.recipes.build import BuildReport
from medembed.dataset.recipes.image_index import SUFFIXES
from medembed.dataset.split_counts import find_gaps, find_small_parts
from medembed.images.load import DEFAULT_LIMITS
from medembed.images.tar_stream import TarRoot, read_members

__all__ = ["build_from_stream"]

ASKED = ("patient", "study", "region", "split")
N_NAMED = 20


def build_from_stream(
    root: TarRoot,
    label_level: str = "study",
    *,
    progress: Callable[[int, int], None] | None = None,
) -> BuildReport:
    """Return a report with the manifest of all images in tar files, hashed on the way.

    Parameters
    ----------
    root : TarRoot
        The tar files, each read once from front to back.
    label_level : {"study", "image"}
        Whether all images of a study share its label.
    progress : callable, optional
        Called as progress(done, done) with images: how many there are is known at the end.

    Raises
    ------
    PathNotFoundError
        There is no tar file.
    ImageError
        A tar file is damaged.
    ManifestError
        A sample lacks what a manifest needs, or the rows break a manifest's rules; all problems
        are listed.
    """
    rows: list[dict[str, str]] = []
    excluded: list[tuple[str, str]] = []
    problems: list[str] = []
    for key, members in _samples(root):
        images = {name: data for name, data in members.items() if _suffix(name) in SUFFIXES}
        about = _read_about(key, members, problems) if images else {}
        for name, data in images.items():
            if data is None:
                excluded.append((name, "it is larger than --max-bytes"))
                continue
            rows.append({"image": name, "sha256": hashlib.sha256(data).hexdigest(), **about})
        if progress:
            progress(len(rows), len(rows))
    if problems:
        more = [f"and {len(problems) - N_NAMED} more"] if len(problems) > N_NAMED else []
        raise ManifestError(
            f"{len(problems)} sample(s) of {root} lack what a manifest needs. Write a .json beside "
            "each image with patient, study, region, label and split:",
            [*problems[:N_NAMED], *more],
        )
    if not rows:
        raise ManifestError(f"no image in {root}: no member has an image's suffix.")
    manifest = make_manifest(pd.DataFrame(rows).fillna(""), label_level, source=str(root))
    is_labelled = bool(manifest.rows["label"].notna().any())
    warnings = [*find_gaps(manifest.rows, is_labelled=is_labelled), *find_warnings(manifest.rows)]
    notices = find_small_parts(manifest.rows, is_labelled=is_labelled)
    return BuildReport(manifest, sorted(excluded), warnings, list(notices))


def _samples(root: TarRoot) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """Yield each sample's name and its members."""
    members = read_members(root, DEFAULT_LIMITS.max_bytes)
    for key, run in groupby(members, key=lambda member: _key(member[0])):
        yield key, dict(run)


def _key(name: str) -> str:
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _suffix(name: str) -> str:
    last = name.rpartition("/")[2]
    return f".{last.rpartition('.')[2].lower()}" if "." in last else ""


def _read_about(key: str, members: dict[str, bytes | None], problems: list[str]) -> dict[str, str]:
    """Return the columns of a sample's images; add to `problems` what is missing or odd."""
    try:
        found = json.loads(members.get(f"{key}.json") or b"{}")
    except (ValueError, RecursionError):
        problems.append(f"{key}.json is not JSON")
        return {}
    if not isinstance(found, dict):
        problems.append(f"{key}.json is not a table of values")
        return {}
    scalars = {str(name): _as_text(value) for name, value in found.items()}
    about = {name: text for name, text in scalars.items() if text is not None}
    if (label := members.get(f"{key}.cls")) is not None:
        about.setdefault("label", label.decode(errors="replace").strip())
    about.setdefault("label", "")
    lacking = [name for name in ASKED if not about.get(name)]
    if lacking:
        problems.append(f"{key}: no {', '.join(lacking)}")
    return {name: text for name, text in about.items() if name not in ("image", "sha256")}


def _as_text(value: Any) -> str | None:
    """Return a JSON value as a cell's text; None for what is no single value."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    return str(value) if isinstance(value, str | int | float) else None
