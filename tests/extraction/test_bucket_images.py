"""Images in a bucket: fetched ahead, a bounded number in flight; and every command on buckets."""

import errno
import itertools
import json
import os
import tarfile
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from made_extraction import HalvesEncoder, counts, with_both_classes, write_images
from s3_server import S3, SECRET, Asked

from medembed.cache.embeddings import load_embeddings
from medembed.cache.store import open_cache
from medembed.cli import main
from medembed.core import object_store
from medembed.core.errors import ManifestError, MedembedError, PathNotFoundError, StorageError
from medembed.core.locations import BucketPath
from medembed.dataset.manifest import Manifest, write_manifest
from medembed.extraction import decode_pool, extract, image_fetcher
from medembed.extraction.image_store import read_rows

NUMBERS = itertools.count()
N_IMAGES = 24


@pytest.fixture
def place(s3: S3) -> BucketPath:
    return BucketPath("s3", "bucket", f"images/{os.getpid()}-{next(NUMBERS)}")


def upload(folder: Path, place: BucketPath) -> None:
    for path in folder.glob("*.png"):
        object_store.put_object(place / path.name, path.read_bytes())


@pytest.fixture
def data(place: BucketPath, tmp_path: Path) -> Manifest:
    """Put images into the bucket, and keep them at `images` as well."""
    manifest = with_both_classes(write_images(tmp_path / "images", N_IMAGES))
    upload(tmp_path / "images", place)
    return manifest


def run_extract(manifest: Manifest, root: Any, cache: Any, **options: Any) -> Any:
    options = {"dtype": "float32", "batch_size": 4, "decoders": 1} | options
    return extract(manifest, root, HalvesEncoder(), cache, **options)


def test_images_of_a_bucket_give_the_rows_of_a_directory(
    s3: S3, data: Manifest, place: BucketPath, tmp_path: Path
) -> None:
    report = run_extract(data, str(place), tmp_path / "far", decoders=2)
    assert counts(report) == (N_IMAGES, 0, N_IMAGES, 0, 0)
    run_extract(data, tmp_path / "images", tmp_path / "near")
    far, near = (load_embeddings(tmp_path / name, data).X for name in ("far", "near"))
    assert far.tobytes() == near.tobytes()
    got = [asked for asked in s3.asked if asked.method == "GET" and asked.key.endswith(".png")]
    assert len(got) == N_IMAGES  # each once


def test_what_trains_on_images_reads_those_of_a_bucket(
    data: Manifest, place: BucketPath, tmp_path: Path
) -> None:
    """As finetune and autoencoder do."""
    read = [
        read_rows(data.rows, root, HalvesEncoder().preprocessing, remedy="None.")
        for root in (place, tmp_path / "images")
    ]
    assert read[0].pixels.tobytes() == read[1].pixels.tobytes()
    assert read[0].failures == []


def test_a_bounded_number_is_in_flight_and_files_go(
    s3: S3, data: Manifest, place: BucketPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, most, lock = [0], [0], threading.Lock()
    held: list[int] = []
    places: set[str] = set()
    real = object_store.read_object

    def read(path: BucketPath, **options: Any) -> bytes:
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        try:
            return real(path, **options)
        finally:
            with lock:
                at_once[0] -= 1

    release = image_fetcher.ImageFetcher.release

    def count(self: Any, fetched: Any) -> None:
        directory = self._files.directories[0]
        held.append(len(os.listdir(directory)))
        places.add(str(directory))
        release(self, fetched)

    monkeypatch.setattr(object_store, "read_object", read)
    monkeypatch.setattr(object_store, "AHEAD", 3)
    monkeypatch.setattr(image_fetcher, "AHEAD", 2)
    monkeypatch.setattr(image_fetcher.ImageFetcher, "release", count)
    s3.seconds = 0.01
    run_extract(data, place, tmp_path / "cache", batch_size=1, decoders=1)
    assert 1 < most[0] <= 3
    assert max(held) <= 3 + 2 * 1 + 1 + 1  # ahead, in slots, being decoded
    assert len(places) == 1
    assert not any(map(os.path.exists, places))


def test_little_room_holds_up_nothing(
    data: Manifest, place: BucketPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_fetcher, "MAX_WAITING_BYTES", 1)
    assert run_extract(data, place, tmp_path / "cache", decoders=1).embedded == N_IMAGES


@pytest.mark.parametrize("kind", ["bucket", "tar"])
def test_memory_that_fills_up_is_the_disk_s_turn(
    kind: str, data: Manifest, place: BucketPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root: Any = place
    if kind == "tar":
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            tar.add(tmp_path / "images", "images")
        root = f"tar://{tmp_path / 'x.tar'}"
    memory, real = tmp_path / "memory", Path.write_bytes
    memory.mkdir()
    full = [str(memory)]

    def write(path: Path, content: bytes) -> int:
        if "medembed-" in str(path) and str(path).startswith(tuple(full)):
            real(path, content[:3])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, content)

    monkeypatch.setattr(decode_pool, "_memory_directory", lambda: memory)
    monkeypatch.setattr(Path, "write_bytes", write)
    assert run_extract(data, root, tmp_path / "cache").embedded == N_IMAGES
    full.append(tempfile.gettempdir())
    with pytest.raises(MedembedError, match=r"no room for .* of a fetched image .*set TMPDIR"):
        run_extract(data, root, tmp_path / "other")


def test_missing_odd_and_large_objects_fail_alone(
    data: Manifest, place: BucketPath, tmp_path: Path
) -> None:
    object_store.delete_objects([place / "000.png"])
    object_store.put_object(place / "001.png", b"not the manifest's")
    with pytest.raises(
        ManifestError, match=r"(?s)001\.png: sha256 .*000\.png: read failed: no such"
    ):
        run_extract(data, place, tmp_path / "cache")
    assert len(open_cache(tmp_path / "cache").keys()) == N_IMAGES - 2
    upload(tmp_path / "images", place)
    assert counts(run_extract(data, place, tmp_path / "cache"))[1:3] == (N_IMAGES - 2, 2)


@pytest.mark.parametrize("kind", ["cut", "half", 503])
def test_faults_in_passing_cost_no_image(
    kind: Any, s3: S3, data: Manifest, place: BucketPath
) -> None:
    s3.fault = lambda asked: kind if asked.n % 2 == 1 and asked.method == "GET" else None
    report = run_extract(data, place, place / "cache")
    assert (report.embedded, report.failed) == (N_IMAGES, 0)


def test_a_bucket_that_refuses_ends_the_run_and_is_no_failure_of_images(
    s3: S3, data: Manifest, place: BucketPath, tmp_path: Path
) -> None:
    def refuse(asked: Asked) -> Any:
        late = asked.method == "GET" and asked.key.endswith((".png",)) and asked.key[-6:-4] > "08"
        return (403, "AccessDenied") if late else None

    s3.fault = refuse
    with pytest.raises(StorageError, match="403"):
        run_extract(data, place, tmp_path / "cache", batch_size=2, decoders=1)
    cache = open_cache(tmp_path / "cache")
    assert 0 < len(cache.keys()) < N_IMAGES
    assert cache.failures() == {}
    s3.fault = lambda asked: None
    assert run_extract(data, place, tmp_path / "cache").failed == 0


def test_a_prefix_without_the_images_is_refused(
    data: Manifest, place: BucketPath, tmp_path: Path
) -> None:
    with pytest.raises(PathNotFoundError, match="no object below s3://bucket/nowhere"):
        run_extract(data, "s3://bucket/nowhere", tmp_path / "cache")
    object_store.put_object(place / "other" / "x.png", b"x")
    with pytest.raises(PathNotFoundError, match=f"none of the {N_IMAGES} images"):
        run_extract(data, place / "other", tmp_path / "cache")
    rows = data.rows.copy()
    rows.loc[0, "image"] = "../secret.png"
    with pytest.raises(ManifestError, match="names nothing below the image root"):
        run_extract(Manifest(rows, "study"), place, tmp_path / "cache")


def call(*words: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == code, result.output
    assert SECRET not in result.output
    return result


def test_every_step_takes_buckets(
    s3: S3, place: BucketPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    manifest = with_both_classes(write_images(tmp_path / "images", 48))
    upload(tmp_path / "images", place)
    write_manifest(manifest, tmp_path / "m.csv")
    cache = f"{place}-cache"
    common = ("m.csv", "--image-root", place, "--encoder", "demo", "--cache", cache)
    dry = call("extract", *common, "--dry-run", "--json")
    assert json.loads(dry.stdout)["embedded"] == 48
    done = call("extract", *common, "--device", "cpu")
    assert f"Next: medembed sweep {cache} m.csv" in done.stderr
    assert "48 already there" in call("extract", *common).stderr
    card = json.loads(call("cache", "info", cache, "--manifest", "m.csv", "--json").stdout)
    assert (card["path"], card["coverage"]["missing"]) == (cache, 0)
    call("cache", "verify", cache)
    call("cache", "compact", cache, "--grace", 0)
    swept = call(
        *("sweep", cache, "m.csv", "-o", "run", "--heads", "logistic", "--configs", "1"),
        *("--folds", "2", "--jobs", "1", "--image-root", place),
    )
    assert "Fetching 1 shard, " in swept.stderr
    assert f"Fetching 48 images from {place} to measure them" in swept.stderr
    assert SECRET not in (tmp_path / "run" / "run.json").read_text()
    near = call(
        *("predict", "run/models/logistic", "--manifest", "m.csv", "--json", "--cache", cache)
    )
    far = call(
        *("predict", "run/models/logistic", "--manifest", "m.csv", "--json", "--device", "cpu"),
        *("--image-root", place),
    )
    a, b = (
        [row["probability"] for row in json.loads(r.stdout) if row["image"]] for r in (near, far)
    )
    assert len(a) == 48
    np.testing.assert_allclose(a, b, atol=1e-3)
    elsewhere = with_both_classes(write_images(tmp_path / "others", 24, seed=9))
    rows = elsewhere.rows.assign(patient="other " + elsewhere.rows["patient"])
    write_manifest(Manifest(rows, "study"), tmp_path / "others.csv")
    upload(tmp_path / "others", place / "others")
    call("extract", "others.csv", "--image-root", place / "others", *common[3:], "--device", "cpu")
    call("evaluate", "run/models/logistic", cache, "others.csv", "-o", "there")
    call("cache", "compact", cache, "--grace", 0)
    pulled = json.loads(call("cache", "pull", cache, "here", "--json").stdout)
    assert pulled["shards"] == 1
    s3.fault = lambda asked: "cut"
    call("cache", "verify", "here")
    s3.fault = lambda asked: None
    assert "1 shard copied" in call("cache", "push", "here", f"{place}-copy").stderr
    assert "1 already there" in call("cache", "push", f"{place}-copy", "here").stderr


@pytest.mark.parametrize(
    "words",
    [
        ("report", "s3://bucket/run", "-o", "report"),
        ("manifest", "build", "r.toml", "--image-root", "s3://bucket/x", "-o", "m.csv"),
        ("sweep", "cache", "s3://bucket/m.csv", "-o", "run"),
        ("compare", "s3://bucket/run"),
        ("extract", "m.csv", "--image-root", "ftp://x", "--encoder", "demo", "--cache", "c"),
        ("cache", "export", "cache", "m.csv", "-o", "s3://bucket/x.csv"),
    ],
)
def test_what_cannot_work_on_a_bucket_says_so_in_one_error(words: tuple[str, ...]) -> None:
    output = call(*words, code=2).output
    assert "takes a local path" in output or "is no place that medembed reads" in output
    assert "Traceback" not in output
