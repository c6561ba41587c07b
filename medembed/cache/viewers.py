"""Export embeddings to programs that show them: TensorBoard's projector and FiftyOne.

Both get a directory in their documented layout. Images go by SHA-256, region, label and split;
names of images and studies, which may identify patients, come along only if they are asked for.
"""

import base64
import io
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medembed.cache.embeddings import find_rows
from medembed.cache.export import Export, ExportTable, describe_failure
from medembed.cache.store import Cache
from medembed.core.errors import CacheError
from medembed.core.files import sync_directory
from medembed.core.text import mask_controls, one_line
from medembed.dataset.manifest import Manifest, existing_root, image_path, require_hashes

__all__ = ["VIEWERS", "export_for_viewer"]

VIEWERS = ("tensorboard", "fiftyone")
SHOWN = ("sha256", "region", "label", "split")
NAMED = ("image", "study")
_LABELS = {0: "normal", 1: "abnormal"}


def export_for_viewer(
    cache: Cache,
    manifest: Manifest,
    path: str | os.PathLike[str],
    viewer: str,
    *,
    poolings: Sequence[str] | None = None,
    with_names: bool = False,
    image_root: str | os.PathLike[str] | None = None,
    name: str = "MANIFEST",
    progress: Callable[[int, int], None] | None = None,
) -> Export:
    """Write a manifest's rows and their embeddings as a new directory, complete or not at all.

    For TensorBoard: ``projector_config.pbtxt``, a table of tab-separated numbers per pooling, and
    ``metadata.tsv``. For FiftyOne: ``metadata.json`` and ``samples.json``, whose samples have the
    fields ``sha256``, ``region``, ``label`` (a classification), the split as a tag, and a vector
    ``embedding_<pooling>``. A sample's file is ``data/<sha256>`` with the image's suffix, which is
    not written, or with `image_root` the image itself.

    Parameters
    ----------
    cache, manifest : Cache, Manifest
        The cache and the manifest to join; images that failed are left out.
    path : path
        The directory to write; it must not exist.
    viewer : {"tensorboard", "fiftyone"}
    poolings : sequence of str, optional
        Poolings to write, by default all; a grid's cells are joined.
    with_names : bool
        Also write names of images and studies.
    image_root : path, optional
        Directory that the manifest's paths are relative to, for FiftyOne with names.
    name : str
        The manifest's name in the command that a message shows.
    progress : callable, optional
        Called as progress(done, total) with rows.

    Raises
    ------
    CacheError
        The viewer is unknown, `path` exists or cannot be written, a pooling is not in the cache, or
        `image_root` comes without names.
    MissingRowsError
        Rows are neither embedded nor known to have failed.
    """
    path = Path(path)
    write = {"tensorboard": _write_tensorboard, "fiftyone": _write_fiftyone}.get(viewer)
    if write is None:
        raise CacheError(f"viewer {viewer!r} is unknown; it is one of {', '.join(VIEWERS)}")
    if image_root is not None and not with_names:
        raise CacheError("paths of images may name patients: allow them with --names")
    if os.path.lexists(path):
        raise CacheError(f"{path} exists already; choose another directory")
    require_hashes(manifest)
    names = tuple(cache.spec.poolings) if poolings is None else tuple(poolings)
    cache.check_poolings(names)
    rows, keys, failed = find_rows(cache, manifest.rows, name)
    rows = rows.reset_index(drop=True)
    about = _describe(rows, image_root, with_names=with_names)
    table = ExportTable(cache, rows, keys, names, progress)
    try:
        size = _write_directory(path, lambda made: write(table, about, made))
    except OSError as error:
        if isinstance(error, CacheError):
            raise
        raise describe_failure(path, error) from error
    shapes = {pooling: cache.spec.poolings[pooling] for pooling in names}
    return Export(path, len(rows), len(failed), shapes, size)


def _describe(
    rows: pd.DataFrame, image_root: str | os.PathLike[str] | None, *, with_names: bool
) -> pd.DataFrame:
    """Return what is written of each row, as text, and its file."""
    about = rows[[*SHOWN, *(NAMED if with_names else ())]].copy()
    about["label"] = rows["label"].map(_LABELS).astype(object).fillna("unlabelled")
    if image_root is not None:
        root = existing_root(image_root)
        about["file"] = [str(image_path(root, image)) for image in rows["image"]]
    else:
        suffixes = (PurePosixPath(image).suffix for image in rows["image"])
        about["file"] = [f"data/{s}{end}" for s, end in zip(rows["sha256"], suffixes, strict=True)]
    return about


def _write_tensorboard(table: ExportTable, about: pd.DataFrame, made: Path) -> None:
    columns = [column for column in about.columns if column != "file"]
    lines = [columns, *about[columns].itertuples(index=False)]
    text = "\n".join("\t".join(_one_cell(cell) for cell in line) for line in lines)
    (made / "metadata.tsv").write_text(f"{text}\n", encoding="utf-8")
    entries = []
    for pooling in table.poolings:
        file_name = f"{pooling}.tsv"
        with (made / file_name).open("w", encoding="ascii") as file:
            for start, end, read in table.blocks([pooling], np.float32):
                np.savetxt(file, read[pooling].reshape(end - start, -1), "%.6g", "\t")
        entries.append(
            "embeddings {\n"
            f"  tensor_name: {json.dumps(pooling)}\n"
            f"  tensor_path: {json.dumps(file_name)}\n"
            '  metadata_path: "metadata.tsv"\n'
            "}\n"
        )
    (made / "projector_config.pbtxt").write_text("".join(entries), encoding="ascii")


def _one_cell(value: Any) -> str:
    """Return text without tabs and line breaks, which separate cells and rows."""
    return mask_controls(one_line(value))


def _write_fiftyone(table: ExportTable, about: pd.DataFrame, made: Path) -> None:
    (made / "metadata.json").write_text(json.dumps({"name": "medembed"}), encoding="ascii")
    with (made / "samples.json").open("w", encoding="utf-8") as file:
        file.write('{"samples": [')
        for start, end, read in table.blocks(table.poolings, np.float32):
            for row in range(start, end):
                sample = _sample(about.iloc[row])
                for pooling in table.poolings:
                    vector = read[pooling][row - start].ravel()
                    sample[f"embedding_{_field(pooling)}"] = _binary(vector)
                file.write((",\n" if row else "\n") + json.dumps(sample, ensure_ascii=False))
        file.write("\n]}\n")


def _sample(row: "pd.Series[Any]") -> dict[str, Any]:
    names = {name: str(row[name]) for name in (*SHOWN[:2], *NAMED) if name in row.index}
    label = {"_cls": "Classification", "label": row["label"]}
    known = label if row["label"] in _LABELS.values() else None
    tags = [str(row["split"])]
    return {"filepath": row["file"], "tags": tags, "metadata": None, **names, "label": known}


def _field(pooling: str) -> str:
    """Return a pooling as part of a field's name: letters, digits and underscores."""
    return "".join(c if c.isalnum() else "_" for c in pooling)


def _binary(vector: NDArray[np.float32]) -> dict[str, Any]:
    """Return a vector as FiftyOne keeps one in JSON: a compressed .npy in MongoDB's notation."""
    content = io.BytesIO()
    np.save(content, vector, allow_pickle=False)
    text = base64.b64encode(zlib.compress(content.getvalue())).decode()
    return {"$binary": {"base64": text, "subType": "00"}}


def _write_directory(path: Path, write: Callable[[Path], None]) -> int:
    """Write beside the target, sync and rename; return the number of bytes."""
    made = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        made.chmod(0o755)
        write(made)
        files = [file for file in made.iterdir() if file.is_file()]
        for file in files:
            with file.open("rb") as written:
                os.fsync(written.fileno())
        size = sum(file.stat().st_size for file in files)
        os.rename(made, path)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    sync_directory(path.parent)
    return size
