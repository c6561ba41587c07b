"""The layout of MURA v1.1 (https://stanfordmlgroup.github.io/competitions/mura/).

`MURA-v1.1/{train,valid}/XR_ELBOW/patient00011/study1_negative/image1.png`, with tables of image
paths and of labelled studies for each split, without a header. Only images in the tables count.
"""

import re
from pathlib import Path

import pandas as pd

from medembed.core.errors import PathNotFoundError, RecipeError
from medembed.dataset.foreign_tables import TableFormat, read_foreign_table
from medembed.dataset.recipes.image_index import ImageIndex, plain_path
from medembed.dataset.recipes.listing import Listing, first_names, merge_rows, refuse
from medembed.dataset.tables import normalise_columns

__all__ = ["read_mura"]

MURA_SPLITS = ("train", "valid")
MURA_IMAGE = re.compile(
    r"[^/]+/(?P<split>[^/]+)/XR_(?P<region>[^/]+)/(?P<patient>[^/]+)/"
    r"(?P<study>study\d+)_(?P<sign>negative|positive)/(?P<name>[^/]+)"
)


def read_mura(root: Path) -> Listing:
    """Return the images of MURA v1.1, whose tables' paths begin with the dataset's own folder."""
    base = _find_mura(root)
    prefix = "" if base == root else f"{base.name}/"
    paths = pd.concat([_mura_table(base, split, "image_paths", ["image"]) for split in MURA_SPLITS])
    studies = pd.concat(
        [_mura_table(base, split, "labeled_studies", ["study", "label"]) for split in MURA_SPLITS]
    )
    paths = paths.reset_index(drop=True)
    paths["image"] = paths["image"].map(plain_path)
    studies["study"] = studies["study"].map(plain_path)
    fields = paths["image"].str.extract(f"^{MURA_IMAGE.pattern}$")
    odd = paths["image"][fields["name"].isna()].tolist()
    refuse(odd, str(base), "paths that are not MURA's (XR_REGION/PATIENT/studyN_SIGN/FILE):")
    fields = normalise_columns(fields, ("name",))
    folder = paths["image"].str.rpartition("/")[0]
    label = folder.map(_mura_labels(studies, base))
    refuse(
        sorted(folder[label.isna()].unique()), str(base), "studies with images but without label:"
    )
    signs = label.map({"0": "negative", "1": "positive"})
    refuse(
        sorted(folder[signs != fields["sign"]].unique()),
        str(base),
        "studies whose label in the table is not that of their folder:",
    )
    index = ImageIndex(root, (base.name,) if prefix else ())
    names = prefix + paths["image"].str.partition("/")[2]
    found = [index.find_path(name) for name in names]
    is_found = pd.Series([len(files) == 1 for files in found])
    rows = pd.DataFrame({"image": names.where(~is_found, [(*f, "")[0] for f in found])})
    rows["name"] = names
    rows["patient"] = fields["patient"]
    rows["region"] = fields["region"].str.lower()
    rows["study"] = rows["region"] + "/" + rows["patient"] + "/" + fields["study"]
    rows["label"] = label
    rows["split"] = fields["split"]
    rows, notices = merge_rows(rows, "image", source="MURA's tables")
    return Listing(
        rows,
        is_found,
        [*index.unlisted(rows["image"], "MURA's tables"), *_without_images(studies, folder)],
        notices=notices,
        unseen=index.unseen,
        files=index.paths.difference(rows["image"]),
    )


def _find_mura(root: Path) -> Path:
    """Return MURA's own folder: `root`, or the one folder in it that holds the tables."""
    table = "train_image_paths.csv"
    bases = (
        [root] if (root / table).is_file() else [p.parent for p in sorted(root.glob(f"*/{table}"))]
    )
    if len(bases) == 1:
        return bases[0]
    if bases:
        raise RecipeError(
            f"{root} holds several MURAs: {first_names([b.name for b in bases])}. Name one."
        )
    raise PathNotFoundError(
        f"no {table} in {root} or in a folder of it. Give --image-root the folder MURA-v1.1 or the "
        "one that holds it."
    )


def _mura_table(base: Path, split: str, kind: str, columns: list[str]) -> pd.DataFrame:
    path = base / f"{split}_{kind}.csv"
    if not path.exists():
        raise PathNotFoundError(
            f"no table {path}. Unpack MURA-v1.1 again, or copy the table there."
        )
    known, paths = TableFormat("utf-8", ","), ("image", "study")
    table = read_foreign_table(path, RecipeError, columns=columns, as_written=paths, known=known)
    return table.rows


def _mura_labels(studies: pd.DataFrame, base: Path) -> "pd.Series[str]":
    folder = studies["study"]
    refuse(sorted(folder[folder.duplicated()].unique()), str(base), "studies labelled twice:")
    odd = studies["study"][~studies["label"].isin(["0", "1"])].tolist()
    refuse(odd, str(base), "studies whose label is neither 0 nor 1:")
    return pd.Series(studies["label"].to_numpy(), index=folder)


def _without_images(studies: pd.DataFrame, folder: "pd.Series[str]") -> list[str]:
    bare = sorted(set(studies["study"]) - set(folder))
    return [f"{len(bare)} labelled studies have no images: {first_names(bare)}"] if bare else []
