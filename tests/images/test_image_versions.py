"""Rows of an older images_version: which files may join them, and which are refused by name."""

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_dicom import DEEP, dataset, dicom, write
from made_extraction import HalvesEncoder, counts, extract_here, write_images
from made_images import COLOURS, NOISE, bmp_with_alpha, encode, tiff
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from medembed.cache.spec import CacheSpec, keys_from_hex
from medembed.cache.store import create_cache, open_cache
from medembed.core.errors import ImageError, SpecMismatchError
from medembed.dataset.manifest import Manifest
from medembed.extraction import spec_of
from medembed.extraction.job import HEAD
from medembed.images.decode import decode_image
from medembed.images.versions import IMAGES_VERSION, go_together, may_have_changed, why_changed
from medembed.prediction.decisions import check_spec

CLEAR = np.dstack([COLOURS[..., :3], np.zeros((40, 56), np.uint8)])


def in_functional_groups() -> bytes:
    made, group, item = dataset(DEEP, BitsStored=12), Dataset(), Dataset()
    item.WindowCenter, item.WindowWidth = 900, 500
    group.FrameVOILUTSequence = Sequence([item])
    made.SharedFunctionalGroupsSequence = Sequence([group])
    return write(made)


UNCHANGED = {
    "grey.png": encode(NOISE, "PNG"),
    "grey.jpg": encode(np.kron(NOISE, np.ones((3, 3), np.uint8)), "JPEG"),
    "colour.jpg": encode(COLOURS[..., :3], "JPEG"),
    "deep.png": encode(DEEP << 4, "PNG"),
    "alpha.png": encode(COLOURS, "PNG"),
    "film.tif": tiff(DEEP << 4),
    "film.bmp": encode(NOISE, "BMP"),
    "cr.dcm": dicom(DEEP, BitsStored=12, WindowCenter=900, WindowWidth=500),
}
NEWLY_REFUSED = {
    "black.png": encode(np.zeros((300, 200), np.uint8), "PNG"),
    "white.jpg": encode(np.full((300, 200), 255, np.uint8), "JPEG"),
    "black.bmp": encode(np.zeros((30, 20), np.uint8), "BMP"),
    "bits.dcm": dicom(DEEP, BitsStored=10),
}
CHANGED = {
    "clear.png": encode(CLEAR, "PNG"),
    "clear.bmp": bmp_with_alpha(NOISE, 0 * NOISE),
    "groups.dcm": in_functional_groups(),
}


def list_files(root: Path, files: dict[str, bytes]) -> Manifest:
    """Write the files, and list them."""
    root.mkdir(exist_ok=True)
    for name, data in files.items():
        (root / name).write_bytes(data)
    rows = pd.DataFrame({"image": list(files)})
    rows["sha256"] = [hashlib.sha256(data).hexdigest() for data in files.values()]
    rows["patient"] = rows["study"] = rows["image"]
    rows["region"], rows["split"] = "hand", "train"
    rows["label"] = pd.array([0] * len(files), dtype="Int8")
    return Manifest(rows, "study")


def old_cache(path: Path, version: Any = 1) -> CacheSpec:
    """Make a cache as an older release would have: the same spec but for the version."""
    encoder = HalvesEncoder()
    spec = spec_of(encoder, ("mean", "max"), "float32").as_dict()
    spec["preprocessing"]["images_version"] = version
    create_cache(path, CacheSpec.from_dict(spec), {"source": "halves"})
    return CacheSpec.from_dict(spec)


def put_rows(path: Path, manifest: Manifest) -> None:
    """Commit rows for all images of a manifest, whatever is in them."""
    keys = keys_from_hex(list(manifest.rows["sha256"]))
    values = np.zeros((len(keys), 2), np.float32)
    open_cache(path).commit(keys, {"mean": values, "max": values})


def test_versions_go_together_where_both_are_known() -> None:
    assert go_together(1, IMAGES_VERSION)
    assert go_together(IMAGES_VERSION, 1)
    for other in (0, IMAGES_VERSION + 1, None, "1", 1.0, True):
        assert not go_together(1, other)
        assert not go_together(other, 1)
    assert why_changed(1, 1, "it") == why_changed(2, 2, "it") == why_changed(2, None, "it") == ""
    assert why_changed(2, 1, "it") == (
        "is decoded differently since images_version 2, and it is of images_version 1"
    )


def test_since_says_which_pixels_version_1_gave() -> None:
    assert {name: decode_image(data).since for name, data in UNCHANGED.items()} == dict.fromkeys(
        UNCHANGED, 1
    )
    assert {decode_image(data).since for data in CHANGED.values()} == {2}
    for data in NEWLY_REFUSED.values():
        with pytest.raises(ImageError) as caught:
            decode_image(data)
        assert caught.value.since == 2
    with pytest.raises(ImageError) as caught:
        decode_image(UNCHANGED["grey.png"][:-9])  # version 1 refused it too
    assert caught.value.since == 1


def test_most_files_are_known_to_be_unchanged_by_their_first_bytes() -> None:
    """What is decoded otherwise is always suspected; a grey PNG and a JPEG never are."""
    suspects = {
        name
        for name, data in (UNCHANGED | NEWLY_REFUSED | CHANGED).items()
        if may_have_changed(data[:HEAD], len(data))
    }
    assert suspects >= {*NEWLY_REFUSED, *CHANGED}
    assert not suspects & {"grey.png", "grey.jpg", "colour.jpg", "deep.png"}
    assert may_have_changed(b"", 0)


def test_real_radiographs_need_not_be_decoded_again(shared_data: Path) -> None:
    paths = [p for p in shared_data.rglob("*") if p.suffix in (".png", ".jpg")]
    assert len(paths) > 50
    for path in paths:
        data = path.read_bytes()
        assert not may_have_changed(data[:HEAD], len(data)), path


def test_what_is_unchanged_joins_an_older_cache_and_the_rest_is_refused_by_name(
    tmp_path: Path,
) -> None:
    old_cache(tmp_path / "cache")
    before = (tmp_path / "cache" / "cache.json").read_bytes()
    manifest = list_files(tmp_path / "images", UNCHANGED | CHANGED | NEWLY_REFUSED)
    report = extract_here(tmp_path, manifest)
    assert counts(report) == (15, 0, 8, 7, 0)
    reasons = {failure["image"]: failure["reason"] for failure in report.failures}
    assert reasons.keys() == {*CHANGED, *NEWLY_REFUSED}
    for name in CHANGED:
        assert reasons[name] == (
            "the image is decoded differently since images_version 2, and this cache is of "
            "images_version 1. Extract into a new --cache"
        )
    cache = open_cache(tmp_path / "cache")
    assert (tmp_path / "cache" / "cache.json").read_bytes() == before
    assert cache.spec.images_version == 1
    assert cache.verify() == []
    assert counts(extract_here(tmp_path, manifest)) == (15, 8, 0, 7, 0)
    # A cache of this version takes them.
    shutil.rmtree(tmp_path / "cache")
    report = extract_here(tmp_path, manifest)
    assert counts(report) == (15, 0, 11, 4, 0)
    assert report.notes == {"an alpha channel that is 0 everywhere is ignored": 2}
    assert open_cache(tmp_path / "cache").spec.images_version == IMAGES_VERSION


def test_rows_that_are_not_what_their_images_are_now_are_named(tmp_path: Path) -> None:
    old_cache(tmp_path / "cache")
    manifest = list_files(tmp_path / "images", UNCHANGED | CHANGED | NEWLY_REFUSED)
    put_rows(tmp_path / "cache", manifest)
    more = list_files(tmp_path / "images", {"new.png": encode(NOISE[::-1], "PNG")})
    both = Manifest(pd.concat([manifest.rows, more.rows], ignore_index=True), "study")
    assert counts(extract_here(tmp_path, both, dry_run=True)) == (16, 15, 1, 0, 0)
    for asked in (both, manifest):  # with something to embed, and without
        with pytest.raises(SpecMismatchError) as caught:
            extract_here(tmp_path, asked)
        said = str(caught.value)
        assert "7 row(s) of the cache" in said
        assert all(f"\n  - {name}: " in said for name in {**CHANGED, **NEWLY_REFUSED})
        assert "black.png: is refused since images_version 2 (all pixels have the same" in said
        assert "clear.png: is decoded differently since images_version 2, and its row is of" in said
        assert "Extract into a new --cache, or leave these images out" in said
    assert len(open_cache(tmp_path / "cache").keys()) == 16
    (tmp_path / "images" / "black.png").unlink()  # not at hand: nobody can tell
    with pytest.raises(SpecMismatchError, match=r"6 row\(s\)"):
        extract_here(tmp_path, manifest)
    kept = manifest.rows["image"].isin(list(UNCHANGED))
    plain = Manifest(manifest.rows[kept].reset_index(drop=True), "study")
    assert counts(extract_here(tmp_path, plain)) == (8, 8, 0, 0, 0)


def test_many_outdated_rows_are_counted_and_some_are_named(tmp_path: Path) -> None:
    old_cache(tmp_path / "cache")
    films = {f"{n:02d}.png": encode(np.full((60, 60 + n), 9, np.uint8), "PNG") for n in range(25)}
    manifest = list_files(tmp_path / "images", films)
    put_rows(tmp_path / "cache", manifest)
    with pytest.raises(SpecMismatchError, match=r"25 row\(s\)") as caught:
        extract_here(tmp_path, manifest)
    assert str(caught.value).endswith("- and 5 more")


@pytest.mark.parametrize("version", [None, IMAGES_VERSION + 1, "1"])
def test_an_unknown_version_is_another_spec(tmp_path: Path, version: Any) -> None:
    old_cache(tmp_path / "cache", version)
    manifest = write_images(tmp_path / "images", 2)
    with pytest.raises(SpecMismatchError, match=f"with images_version={version}; this run asks"):
        extract_here(tmp_path, manifest)


def test_a_model_of_one_version_reads_rows_of_the_other(tmp_path: Path) -> None:
    """Rows of a cache go together among themselves; the file that would tell is not at hand."""
    old = old_cache(tmp_path / "old")
    new = spec_of(HalvesEncoder(), ("mean", "max"), "float32")
    for of_model, of_cache in ((old, new), (new, old), (old, old)):
        card: Any = SimpleNamespace(spec=of_model.as_dict(), pooling="mean", encoder={})
        check_spec(card, of_cache)
