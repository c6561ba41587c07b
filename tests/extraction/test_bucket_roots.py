"""Image roots in a bucket where images are looked up: checked, measured, and shown on pages."""

import itertools
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from made_extraction import HalvesEncoder, with_both_classes, write_images
from s3_server import S3, SECRET

from medembed.cache.embeddings import load_statistics
from medembed.cache.store import Cache, open_cache
from medembed.cli import main
from medembed.core import object_store
from medembed.core.errors import ArgumentError, ImageError, PathNotFoundError, StorageError
from medembed.core.locations import BucketPath
from medembed.dataset.manifest import Manifest, check_images, write_manifest
from medembed.extraction import extract
from medembed.images import hashing
from medembed.images.load import read_content
from medembed.report import page
from medembed.report.gallery import Thumbnail, make_thumbnails
from medembed.sweeps.job import configure, write_command

NUMBERS = itertools.count()
N_IMAGES = 12
Look = Callable[[Manifest, Any, Cache], Any]


def thumbnails(manifest: Manifest, root: Any, cache: Any = None) -> dict[str, Thumbnail]:
    return make_thumbnails(manifest, root, manifest.rows["sha256"].tolist(), side=16)


def statistics(manifest: Manifest, root: Any, cache: Cache) -> bytes:
    return load_statistics(cache, manifest, root).X.tobytes()


LOOKS: dict[str, Look] = {
    "check": lambda manifest, root, cache: check_images(manifest, root),
    "measure": statistics,
    "show": thumbnails,
}


@pytest.fixture
def place(s3: S3) -> BucketPath:
    return BucketPath("s3", "bucket", f"roots/{os.getpid()}-{next(NUMBERS)}")


@pytest.fixture
def manifest(place: BucketPath, tmp_path: Path) -> Manifest:
    """Put images into the bucket, and keep them at `images` as well."""
    made = with_both_classes(write_images(tmp_path / "images", N_IMAGES))
    for path in (tmp_path / "images").glob("*.png"):
        object_store.put_object(place / path.name, path.read_bytes())
    return made


@pytest.fixture
def cache(manifest: Manifest, tmp_path: Path) -> Cache:
    extract(
        manifest, tmp_path / "images", HalvesEncoder(), tmp_path / "c", dtype="float32", decoders=1
    )
    return open_cache(tmp_path / "c")


def gets(s3: S3) -> list[str]:
    return [asked.key for asked in s3.asked if asked.method == "GET" and not asked.is_listing]


@pytest.mark.parametrize("look", LOOKS)
def test_a_bucket_gives_what_a_directory_gives_and_each_image_is_fetched_once(
    look: str, s3: S3, manifest: Manifest, place: BucketPath, cache: Cache, tmp_path: Path
) -> None:
    near = LOOKS[look](manifest, tmp_path / "images", cache)
    s3.asked.clear()
    assert LOOKS[look](manifest, str(place), cache) == near
    assert sorted(gets(s3)) == sorted(f"{place.key}/{name}" for name in manifest.rows["image"])


@pytest.mark.parametrize("look", LOOKS)
def test_a_bounded_number_of_requests_is_in_flight(
    look: str,
    s3: S3,
    manifest: Manifest,
    place: BucketPath,
    cache: Cache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_once, most, lock = [0], [0], threading.Lock()

    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def read(*given: Any, **options: Any) -> Any:
            with lock:
                at_once[0] += 1
                most[0] = max(most[0], at_once[0])
            try:
                return real(*given, **options)
            finally:
                with lock:
                    at_once[0] -= 1

        return read

    for name in ("read_object", "read_part"):
        monkeypatch.setattr(object_store, name, counting(getattr(object_store, name)))
    monkeypatch.setattr(object_store, "AHEAD", 3)
    s3.seconds = 0.01
    LOOKS[look](manifest, place, cache)
    assert most[0] == 3


@pytest.mark.parametrize("look", LOOKS)
def test_a_bucket_that_refuses_is_one_error_and_no_fault_of_an_image(
    look: str, s3: S3, manifest: Manifest, place: BucketPath, cache: Cache
) -> None:
    s3.fault = lambda asked: (403, "AccessDenied") if asked.key.endswith("003.png") else None
    with pytest.raises(StorageError, match="403"):
        LOOKS[look](manifest, place, cache)


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("stream", ["tar://shards", "hf://datasets/owner/films"])
def test_streams_and_empty_prefixes_are_refused(
    stream: str, look: str, manifest: Manifest, place: BucketPath, cache: Cache
) -> None:
    with pytest.raises(ArgumentError, match=r"is read from front to back.*name the directory"):
        LOOKS[look](manifest, stream, cache)
    with pytest.raises(PathNotFoundError, match="no object below s3://"):
        LOOKS[look](manifest, place / "nowhere", cache)


def test_a_read_of_an_image_leaves_the_blame_with_the_bucket(
    s3: S3, manifest: Manifest, place: BucketPath
) -> None:
    s3.fault = lambda asked: (403, "AccessDenied")
    with pytest.raises(StorageError, match="403"):
        read_content([place / "000.png"], manifest.rows["sha256"][0], lambda pixels: pixels)


def test_missing_and_odd_objects_are_listed(
    s3: S3, manifest: Manifest, place: BucketPath, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "WHOLE_FILE_LIMIT", 100)  # each is fetched in pieces
    counts: list[tuple[int, int]] = []
    assert check_images(manifest, place, lambda *done: counts.append(done)) == []
    assert counts[-1] == (N_IMAGES, N_IMAGES)
    object_store.delete_objects([place / "000.png"])
    object_store.put_object(place / "001.png", b"not the manifest's")
    object_store.put_object(place / "002.png", b"")
    missing, other, empty = check_images(manifest, place)
    assert missing == "000.png is missing"
    assert "001.png is not the manifest's: its sha256 begins 1f37db12509d" in other
    assert "002.png is not the manifest's: its sha256 begins e3b0c44298fc" in empty
    assert len(thumbnails(manifest, place)) == N_IMAGES - 3
    with pytest.raises(ImageError, match=r"s3://.*000\.png cannot be measured: no such object"):
        load_statistics(cache, manifest, place)


def test_presence_alone_is_one_listing(s3: S3, manifest: Manifest, place: BucketPath) -> None:
    without = Manifest(manifest.rows.assign(sha256=""), manifest.label_level)
    object_store.delete_objects([place / "004.png"])
    s3.asked.clear()
    assert check_images(without, place) == ["004.png is missing"]
    assert gets(s3) == []
    assert len(s3.asked) == 2  # whether there is anything, and what


def test_what_is_fetched_is_said_first_and_shown(
    manifest: Manifest, place: BucketPath, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []

    def announce(words: str, unit: str) -> AbstractContextManager[Callable[[int, int], None]]:
        said.append((words, unit))
        return nullcontext(lambda done, total: said.append((done, total)))

    monkeypatch.setattr(object_store, "_announcer", [announce])
    load_statistics(cache, manifest, place)
    words = f"Fetching {N_IMAGES} images from {place} to measure them"
    assert said[0] == (words, "images")
    assert said[1:] == [(n, N_IMAGES) for n in range(1, N_IMAGES + 1)]


def call(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == code, result.output
    assert SECRET not in result.output
    return result.output


def test_commands_take_image_roots_in_a_bucket(
    manifest: Manifest, place: BucketPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_manifest(manifest, Path("m.csv"))
    assert "m.csv: no problems" in call("manifest", "check", "m.csv", "--image-root", place)
    object_store.delete_objects([place / "005.png"])
    checked = call("manifest", "check", "m.csv", "--image-root", place, code=1)
    assert "005.png is missing" in checked
    given: dict[str, Any] = {}

    def write(runs: Any, out: Path, **options: Any) -> dict[str, Any]:
        given.update(options)
        return {"page": out / "index.html"}

    monkeypatch.setattr(page, "write_report", write)
    call("report", "run", "-o", "page", "--manifest", "m.csv", "--image-root", place, "--cache",
         place)  # fmt: skip
    assert given["cases"].cache == place
    found = given["find_thumbnails"](manifest.rows["sha256"].tolist())
    assert len(found) == N_IMAGES - 1
    # A page may be published, and a bucket's name be that of a hospital.
    assert f"--image-root {place.name}" in given["command"]
    assert "bucket" not in given["command"]


def test_a_run_names_no_bucket(manifest: Manifest, place: BucketPath, cache: Cache) -> None:
    asked = configure(cache, manifest, image_root=str(place))
    assert asked.image_root == place
    assert "imagestats" in asked.heads
    command = write_command(asked, cache=cache, manifest=manifest, out="run", pool=None, space=None)
    assert f"--image-root {place.name}" in command
    assert "bucket" not in command
