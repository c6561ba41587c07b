"""Extraction: each content once, whatever happens on the way."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import slow_files
from click.testing import CliRunner
from made_extraction import HalvesEncoder, counts, extract_here, list_images, write_images
from PIL import Image

from medembed.cache.embeddings import load_embeddings
from medembed.cache.spec import hex_from_keys
from medembed.cache.store import open_cache
from medembed.cli import main
from medembed.core.errors import (
    CacheError,
    DeviceMemoryError,
    EncoderError,
    ManifestError,
    MedembedError,
    MissingRowsError,
    PathNotFoundError,
    SpecMismatchError,
)
from medembed.dataset.manifest import Manifest, write_manifest
from medembed.encoders.protocol import Encoder, PipelinedEncoder
from medembed.extraction import extract, spec_of
from medembed.extraction.report import describe_times
from medembed.extraction.writer import Timeline

HELPERS = Path(__file__).parents[1] / "helpers"
N_CANARY_CALLS = 5  # of a new cache: four to lay it, one to check it


def by_hand(root: Path, manifest: Manifest) -> np.ndarray:
    """Compute mean and max of both halves, (n, 4), from the files."""
    rows = []
    for name in manifest.rows["image"]:
        pixels = np.array(Image.open(root / name)).astype(np.float32)
        left, right = pixels[:, :4], pixels[:, 4:]
        rows.append([left.mean(), right.mean(), left.max(), right.max()])
    return np.array(rows, np.float32)


def test_the_stand_in_is_an_encoder() -> None:
    assert isinstance(HalvesEncoder(), Encoder)


def test_embeddings_are_the_encoders_in_the_manifests_order(tmp_path: Path) -> None:
    manifest = write_images(tmp_path / "images", 10)
    progress: list[tuple[int, int]] = []
    encoder = HalvesEncoder()
    report = extract_here(
        tmp_path, manifest, encoder, progress=lambda done, total: progress.append((done, total))
    )
    assert counts(report) == (10, 0, 10, 0, 0)
    np.testing.assert_array_equal(
        load_embeddings(tmp_path / "cache", manifest).X, by_hand(tmp_path / "images", manifest)
    )
    assert progress[-1] == (10, 10)
    assert progress == sorted(progress)
    assert encoder.shapes[N_CANARY_CALLS:] == [(4, 8, 8)] * 3  # the last batch is filled up
    cache = open_cache(tmp_path / "cache")
    assert cache.spec == spec_of(encoder, ("mean", "max"), "float32")
    assert cache.spec.preprocessing["images_version"] >= 1
    assert cache.recorded["versions"]["numpy"] == np.__version__
    assert cache.verify() == []


def test_a_second_run_embeds_only_what_is_new(tmp_path: Path) -> None:
    extract_here(tmp_path, write_images(tmp_path / "images", 6))
    more = write_images(tmp_path / "images", 9)
    encoder = HalvesEncoder()
    assert counts(extract_here(tmp_path, more, encoder)) == (9, 6, 3, 0, 0)
    assert len(encoder.shapes) == 1 + 1  # the canary and the new
    assert counts(extract_here(tmp_path, more, encoder)) == (9, 9, 0, 0, 0)
    np.testing.assert_array_equal(
        load_embeddings(tmp_path / "cache", more).X, by_hand(tmp_path / "images", more)
    )


def test_the_same_bytes_are_embedded_once_even_if_one_copy_is_gone(tmp_path: Path) -> None:
    root = tmp_path / "images"
    write_images(root, 3)
    for twin in ("0.png", "zzz.png"):
        (root / twin).write_bytes((root / "001.png").read_bytes())
    manifest = list_images(root)
    hand = by_hand(root, manifest)
    (root / "0.png").unlink()
    (root / "001.png").write_bytes(b"something else")
    assert counts(extract_here(tmp_path, manifest)) == (5, 0, 3, 0, 2)
    np.testing.assert_array_equal(load_embeddings(tmp_path / "cache", manifest).X, hand)


def test_bad_images_are_failures_with_a_reason_and_not_tried_again(tmp_path: Path) -> None:
    root = tmp_path / "images"
    write_images(root, 5)
    (root / "001.png").write_bytes((root / "001.png").read_bytes()[:60])
    (root / "003.png").write_bytes(b"not an image")
    manifest = list_images(root)
    report = extract_here(tmp_path, manifest)
    assert counts(report) == (5, 0, 3, 2, 0)
    assert [(f["image"], f["stage"]) for f in report.failures] == [
        ("001.png", "decode"),
        ("003.png", "decode"),
    ]
    assert all(f["reason"] for f in report.failures)
    assert str(tmp_path) not in (tmp_path / "cache" / "failures.jsonl").read_text()
    again = extract_here(tmp_path, manifest)
    assert counts(again) == (5, 3, 0, 2, 0)
    assert again.failures == report.failures
    retried = extract_here(tmp_path, manifest, retry_failed=True)
    assert counts(retried) == (5, 3, 0, 2, 0)
    assert (
        len((tmp_path / "cache" / "failures.jsonl").read_text().splitlines()) == 2
    )  # the same again is not written twice
    loaded = load_embeddings(tmp_path / "cache", manifest)
    assert (len(loaded), len(loaded.failed)) == (3, 2)


def test_a_failure_names_every_image_of_its_bytes(tmp_path: Path) -> None:
    root = tmp_path / "images"
    write_images(root, 6)
    (root / "001.png").write_bytes((root / "001.png").read_bytes()[:60])
    for twin in ("003.png", "copy.png"):
        (root / twin).write_bytes((root / "001.png").read_bytes())
    manifest = list_images(root)
    (root / "005.png").rename(tmp_path / "away.png")
    names = ["001.png", "003.png", "copy.png", "005.png"]
    report = extract_here(tmp_path, manifest)
    assert counts(report) == (7, 0, 3, 2, 2)
    assert [failure["image"] for failure in report.failures] == names
    assert len({failure["sha256"] for failure in report.failures}) == 2
    write_manifest(manifest, tmp_path / "m.csv")
    info = ["cache", "info", str(tmp_path / "cache"), "--failures", "--json"]
    for options, expected in ((["--manifest", str(tmp_path / "m.csv")], names), ([], [None] * 2)):
        done = CliRunner().invoke(main, [*info, *options])
        assert done.exit_code == 0, done.output
        found = [failure["image"] for failure in json.loads(done.stdout)["failed"]]
        assert sorted(found, key=str) == sorted(expected, key=str)
    (root / "000.png").write_bytes(b"other")
    with pytest.raises(ManifestError, match="nor were 2 that failed") as caught:
        extract(manifest, root, HalvesEncoder(), tmp_path / "second", decoders=1)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["000.png", *names]
    (tmp_path / "away.png").rename(root / "005.png")
    again = extract_here(tmp_path, manifest)
    assert (counts(again), again.failures) == ((7, 3, 1, 1, 2), report.failures[:3])


def test_a_file_that_is_missing_is_tried_again_when_it_is_back(tmp_path: Path) -> None:
    root = tmp_path / "images"
    manifest = write_images(root, 3)
    (root / "001.png").rename(tmp_path / "away.png")
    report = extract_here(tmp_path, manifest)
    assert counts(report) == (3, 0, 2, 1, 0)
    assert report.failures[0]["stage"] == "read"
    assert report.failures[0]["reason"] == "No such file or directory"
    assert len(load_embeddings(tmp_path / "cache", manifest)) == 2
    (tmp_path / "away.png").rename(root / "001.png")
    assert counts(extract_here(tmp_path, manifest)) == (3, 2, 1, 0, 0)
    assert load_embeddings(tmp_path / "cache", manifest).failed.empty


def test_bytes_that_are_not_the_manifests_are_refused_after_all_others_are_kept(
    tmp_path: Path,
) -> None:
    root = tmp_path / "images"
    manifest = write_images(root, 6)
    old = (root / "002.png").read_bytes()
    (root / "002.png").write_bytes((root / "003.png").read_bytes())
    with pytest.raises(ManifestError, match=r"1 image.*build the manifest again") as caught:
        extract_here(tmp_path, manifest)
    (problem,) = caught.value.problems
    assert problem.startswith("002.png: sha256 ")
    assert manifest.rows["sha256"][2] in problem
    cache = open_cache(tmp_path / "cache")
    assert len(cache.keys()) == 5
    assert not cache.failures()
    with pytest.raises(MissingRowsError, match="1 of 6"):
        load_embeddings(cache, manifest)
    (root / "002.png").write_bytes(old)
    assert counts(extract_here(tmp_path, manifest)) == (6, 5, 1, 0, 0)


def test_beside_other_bytes_the_images_that_failed_are_named_too(tmp_path: Path) -> None:
    root = tmp_path / "images"
    manifest = write_images(root, 6)
    (root / "002.png").write_bytes((root / "003.png").read_bytes())
    (root / "004.png").unlink()
    with pytest.raises(ManifestError, match="nor were 1 that failed") as caught:
        extract_here(tmp_path, manifest)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["002.png", "004.png"]


def test_an_image_on_which_the_encoder_fails_does_not_take_others_along(tmp_path: Path) -> None:
    manifest = write_images(tmp_path / "images", 9)
    report = extract_here(tmp_path, manifest, HalvesEncoder(dislikes=6))
    assert counts(report) == (9, 0, 8, 1, 0)
    assert [(f["image"], f["stage"], f["reason"]) for f in report.failures] == [
        ("005.png", "encode", "an image begins with 6")
    ]
    hand = by_hand(tmp_path / "images", manifest)
    np.testing.assert_array_equal(
        load_embeddings(tmp_path / "cache", manifest).X, np.delete(hand, 5, axis=0)
    )
    assert counts(extract_here(tmp_path, manifest, retry_failed=True)) == (9, 8, 1, 0, 0)


def test_an_encoder_that_breaks_is_not_blamed_on_the_images(tmp_path: Path) -> None:
    class Breaking(HalvesEncoder):
        def encode(self, pixels: np.ndarray, poolings: Sequence[str]) -> dict[str, np.ndarray]:
            if len(self.shapes) > N_CANARY_CALLS:
                raise EncoderError("out of memory")
            return super().encode(pixels, poolings)

    manifest = write_images(tmp_path / "images", 20)
    with pytest.raises(EncoderError, match=r"halves failed on 8 images in a row.*out of memory"):
        extract_here(tmp_path, manifest, Breaking())
    cache = open_cache(tmp_path / "cache")
    assert len(cache.keys()) == 4
    assert not cache.failures()


def test_values_that_fit_no_float16_name_the_way_out(tmp_path: Path) -> None:
    manifest = write_images(tmp_path / "images", 3)
    with pytest.raises(CacheError, match="--dtype float32"):
        extract_here(tmp_path, manifest, HalvesEncoder(scale=1e4), dtype="float16")
    assert not (tmp_path / "cache").exists()


def test_values_that_are_not_finite_are_never_stored(tmp_path: Path) -> None:
    manifest = write_images(tmp_path / "images", 3)
    extract_here(tmp_path, Manifest(manifest.rows[:1], "study"))

    class Late(HalvesEncoder):
        """Give NaN for everything after the canary."""

        def encode(self, pixels: np.ndarray, poolings: Sequence[str]) -> dict[str, np.ndarray]:
            self.scale = np.nan if self.shapes else 1.0
            return super().encode(pixels, poolings)

    report = extract_here(tmp_path, manifest, Late())
    assert counts(report) == (3, 1, 0, 2, 0)
    assert report.failures[0]["reason"] == "its embedding is not finite in fp32"


@pytest.mark.parametrize("n_bad", [1, 9])
def test_images_that_are_not_finite_cost_no_pass_of_their_own(tmp_path: Path, n_bad: int) -> None:
    class Dark(HalvesEncoder):
        """Give NaN for images that begin with a small pixel."""

        def encode(self, pixels: np.ndarray, poolings: Sequence[str]) -> dict[str, np.ndarray]:
            rows = super().encode(pixels, poolings)
            small = (pixels[:, 0, 0] > 0) & (pixels[:, 0, 0] <= n_bad)
            if len(self.shapes) > N_CANARY_CALLS:
                rows["max"][small] = np.nan
            return rows

    manifest, encoder = write_images(tmp_path / "images", 20), Dark()
    report = extract_here(tmp_path, manifest, encoder, batch_size=20)
    assert counts(report) == (20, 0, 20 - n_bad, n_bad, 0)
    assert len(encoder.shapes) == N_CANARY_CALLS + 1
    hand = by_hand(tmp_path / "images", manifest)
    found = load_embeddings(tmp_path / "cache", manifest).X
    np.testing.assert_array_equal(found, hand[n_bad:])


def test_a_cache_of_another_spec_is_refused_before_work_begins(tmp_path: Path) -> None:
    manifest = write_images(tmp_path / "images", 3)
    extract_here(tmp_path, manifest)
    encoder = HalvesEncoder()
    encoder.preprocessing = replace(encoder.preprocessing, fit="pad")
    for dry_run in (False, True):
        with pytest.raises(SpecMismatchError, match=r"with fit=stretch.*fit=pad.*drop --fit"):
            extract_here(tmp_path, manifest, encoder, dry_run=dry_run)
    assert not encoder.shapes


def test_a_dry_run_touches_nothing(tmp_path: Path) -> None:
    manifest = write_images(tmp_path / "images", 4)
    assert counts(extract_here(tmp_path, manifest, dry_run=True)) == (4, 0, 4, 0, 0)
    assert not (tmp_path / "cache").exists()
    extract_here(tmp_path, Manifest(manifest.rows[:3], "study"))
    report = extract_here(tmp_path, manifest, dry_run=True)
    assert counts(report) == (4, 3, 1, 0, 0)
    assert report.images_per_second == 0
    assert len(open_cache(tmp_path / "cache").keys()) == 3


def test_a_wrong_request_leaves_nothing_behind(tmp_path: Path) -> None:
    manifest = write_images(tmp_path / "images", 2)
    (tmp_path / "empty").mkdir()
    encoder, cache = HalvesEncoder(), tmp_path / "cache"
    with pytest.raises(PathNotFoundError, match=r"no directory at .*gone"):
        extract(manifest, tmp_path / "gone", encoder, cache)
    with pytest.raises(PathNotFoundError, match=r"none of the 2 images.*000\.png"):
        extract(manifest, tmp_path / "empty", encoder, cache)
    with pytest.raises(EncoderError, match="no pooling 'grid4'; choose among mean, max"):
        extract(manifest, tmp_path / "images", encoder, cache, poolings=("mean", "grid4"))
    bare = Manifest(manifest.rows.assign(sha256=""), "study")
    with pytest.raises(ManifestError, match="2 manifest rows have no sha256"):
        extract(bare, tmp_path / "images", encoder, cache)
    assert not cache.exists()


def test_colour_is_counted(tmp_path: Path) -> None:
    root = tmp_path / "images"
    write_images(root, 2)
    red = Image.new("RGB", (8, 8), (200, 30, 30))
    red.putpixel((3, 4), (100, 30, 30))
    red.save(root / "red.png")
    assert extract_here(tmp_path, list_images(root)).colour == 1


def test_ctrl_c_commits_what_is_embedded(tmp_path: Path) -> None:
    manifest = write_images(tmp_path / "images", 20)

    def interrupt(done: int, _total: int) -> None:
        if done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract_here(tmp_path, manifest, progress=interrupt)
    cache = open_cache(tmp_path / "cache")
    assert hex_from_keys(cache.keys()) == sorted(manifest.rows["sha256"][:8])
    assert counts(extract_here(tmp_path, manifest)) == (20, 8, 12, 0, 0)


def test_no_more_images_are_read_ahead_than_agreed(tmp_path: Path) -> None:
    manifest = write_images(tmp_path / "images", 60)

    class Hiding(HalvesEncoder):
        """Give the decoders time to run ahead in the first batch, then hide all that is unread."""

        def encode(self, pixels: np.ndarray, poolings: Sequence[str]) -> dict[str, np.ndarray]:
            if is_first_batch(self.shapes):
                time.sleep(0.5)
                for path in (tmp_path / "images").glob("*.png"):
                    path.unlink()
            return super().encode(pixels, poolings)

    report = extract_here(tmp_path, manifest, Hiding())
    slots, in_flight, gathered = 2 * 4 + 2, 2 * 4, 4
    assert 4 < report.embedded <= slots + in_flight + gathered
    assert {failure["stage"] for failure in report.failures} == {"read"}


def is_first_batch(shapes: Sequence[tuple[int, ...]]) -> bool:
    """Tell whether only canaries were embedded so far: one by one when laid, by fours to check."""
    return len(shapes) == N_CANARY_CALLS


def test_slow_reading_does_not_hold_back_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write_images(tmp_path / "images", 6)
    slow_files.hold(tmp_path / "images" / "005.png", tmp_path / "site", monkeypatch)
    seen = []

    def feed() -> None:
        for _ in range(200):  # until the first batch is on disk, 20 s at most
            seen[:] = list((tmp_path / "cache" / "shards").glob("*.h5"))
            if seen:
                break
            time.sleep(0.1)
        slow_files.release(tmp_path / "images" / "005.png")

    feeder = threading.Thread(target=feed)
    feeder.start()
    report = extract_here(tmp_path, manifest, commit_seconds=0.2)
    feeder.join()
    assert seen
    assert counts(report) == (6, 0, 6, 0, 0)


def decoders_of(parent: int) -> list[int]:
    """List the decoder processes that a process has started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            status = (entry / "status").read_text()
            command = (entry / "cmdline").read_bytes()
            if f"PPid:\t{parent}\n" in status and b"medembed.extraction.decode_worker" in command:
                found.append(int(entry.name))
    return found


def test_a_decoder_that_crashes_costs_the_image_it_was_working_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, path = write_images(tmp_path / "images", 12), tmp_path / "images" / "004.png"
    slow_files.hold(path, tmp_path / "site", monkeypatch)

    def kill() -> None:
        while not slow_files.begun(path):
            time.sleep(0.01)
        (pid,) = decoders_of(os.getpid())
        os.kill(pid, signal.SIGSEGV)
        while pid in decoders_of(os.getpid()):
            time.sleep(0.01)
        slow_files.release(path)

    killer = threading.Thread(target=kill)
    killer.start()
    report = extract_here(tmp_path, manifest, decoders=1)
    killer.join()
    assert counts(report) == (12, 0, 11, 1, 0)
    (failure,) = report.failures
    assert (failure["image"], failure["stage"]) == ("004.png", "decode")
    assert failure["reason"] == "the decoder process died on it (SIGSEGV)"
    assert not decoders_of(os.getpid())


def test_decoders_that_cannot_start_are_not_blamed_on_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write_images(tmp_path / "images", 12)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(MedembedError, match=r"exit status 1.*not the images"):
        extract_here(tmp_path, manifest)
    assert not open_cache(tmp_path / "cache").failures()


def test_decoders_import_nothing_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write_images(tmp_path / "images", 4)
    (tmp_path / "numpy.py").write_text("raise SystemExit('numpy of the working directory')")
    monkeypatch.chdir(tmp_path)
    assert counts(extract_here(tmp_path, manifest)) == (4, 0, 4, 0, 0)


@dataclass
class SmallDevice(HalvesEncoder):
    """Hold no more images than `room`, and work on batches handed over ahead."""

    room: int = 1
    in_flight: int = 2
    waiting: list[int] = field(default_factory=list)

    def encode(self, pixels: np.ndarray, poolings: Sequence[str]) -> dict[str, np.ndarray]:
        if len(pixels) > self.room:
            raise DeviceMemoryError(f"{len(pixels)} images do not fit")
        return super().encode(pixels, poolings)

    def submit(
        self, pixels: np.ndarray, poolings: Sequence[str]
    ) -> Callable[[], dict[str, np.ndarray]]:
        copy = pixels.copy()
        self.waiting.append(len(copy))
        return lambda: self.encode(copy, poolings)

    def warm_up(
        self,
        poolings: Sequence[str],
        *,
        n_images: int,
        batch_size: int | None = None,
        on_status: Callable[[str], None] | None = None,
    ) -> int:
        return batch_size or 32

    def reference(self) -> Encoder:
        return self


@pytest.mark.parametrize("room", [1, 3, 5])
def test_a_batch_that_does_not_fit_the_device_is_halved(tmp_path: Path, room: int) -> None:
    manifest = write_images(tmp_path / "images", 43)
    encoder = SmallDevice(room=max(room, 4))
    assert isinstance(encoder, PipelinedEncoder)
    extract_here(tmp_path, Manifest(manifest.rows[:1], "study"), encoder)  # lays the canary
    encoder.room = room
    report = extract_here(tmp_path, manifest, encoder, batch_size=16)
    assert counts(report) == (43, 1, 42, 0, 0)
    assert report.batch_size == {1: 1, 3: 2, 5: 4}[room]
    np.testing.assert_array_equal(
        load_embeddings(tmp_path / "cache", manifest).X, by_hand(tmp_path / "images", manifest)
    )


def test_a_device_that_holds_no_image_is_said_so(tmp_path: Path) -> None:
    manifest = write_images(tmp_path / "images", 9)
    encoder = SmallDevice(room=4)
    extract_here(tmp_path, Manifest(manifest.rows[:1], "study"), encoder)
    encoder.room = 0
    with pytest.raises(EncoderError, match=r"not even one image fits.*--precision bf16"):
        extract_here(tmp_path, manifest, encoder)
    assert not open_cache(tmp_path / "cache").failures()


def test_images_are_decoded_and_rows_written_while_the_encoder_works(tmp_path: Path) -> None:
    manifest = write_images(tmp_path / "images", 40)
    timeline = Timeline(keep_spans=True)
    encoder = HalvesEncoder(seconds=0.03)
    report = extract_here(tmp_path, manifest, encoder, timeline=timeline, commit_seconds=0.0)
    encoding = [span for span in timeline.spans if span.stage == "encode"]
    for stage in ("decode", "write"):
        inside = [
            span
            for span in timeline.spans
            if span.stage == stage and any(e.start < span.start < e.end for e in encoding)
        ]
        assert inside, f"no {stage} while the encoder was waited for"
    assert report.stages["encode"] > 0
    assert describe_times(report).startswith("read ")


def test_a_disk_without_room_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write_images(tmp_path / "images", 3)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage(100, 90, 10))
    with pytest.raises(CacheError, match=r"would grow by .* MB free.*choose another --cache"):
        extract_here(tmp_path, manifest)
    assert not (tmp_path / "cache").exists()


def test_float16_is_the_default_and_rounds(tmp_path: Path) -> None:
    manifest = write_images(tmp_path / "images", 5)
    extract(manifest, tmp_path / "images", HalvesEncoder(), tmp_path / "cache")
    loaded = load_embeddings(tmp_path / "cache", manifest)
    hand = by_hand(tmp_path / "images", manifest)
    assert loaded.spec.dtype == "float16"
    np.testing.assert_array_equal(loaded.X, hand.astype(np.float16))


N_KILLED = 240


def start_extraction(home: Path) -> "subprocess.Popen[bytes]":
    code = f"import made_extraction as t; print('up', flush=True); t.extract_slowly({str(home)!r})"
    environment = os.environ | {"PYTHONPATH": str(HELPERS)}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
    )
    assert process.stdout
    assert process.stdout.readline() == b"up\n"
    process.stdout.close()
    return process


def wait_for_the_end_of(pids: Sequence[int]) -> None:
    """Decoders end by themselves when whoever started them is killed."""
    for _ in range(200):
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return
        time.sleep(0.05)
    raise AssertionError("a decoder outlives the process that started it")


@pytest.mark.slow
def test_killed_again_and_again_the_cache_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    manifest = write_images(tmp_path / "images", N_KILLED)
    (tmp_path / "images" / "007.png").write_bytes(b"not an image")
    manifest = list_images(tmp_path / "images")
    shards = tmp_path / "cache" / "shards"
    generator = np.random.default_rng(0)
    n_done = []
    for n_batches in (0, 1, 4, 2, 3, 1):
        n_before = len(list(shards.glob("*.h5")))
        process = start_extraction(tmp_path)
        while process.poll() is None and len(list(shards.glob("*.h5"))) < n_before + n_batches:
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        orphans = decoders_of(process.pid)
        assert process.wait() == -signal.SIGKILL
        wait_for_the_end_of(orphans)
        n_done.append(len(open_cache(tmp_path / "cache").keys()) if shards.exists() else 0)
        assert not shards.exists() or open_cache(tmp_path / "cache").verify() == []
    assert n_done == sorted(n_done)
    assert 0 < n_done[-1] < N_KILLED - 1, "the kills fell outside the work"
    report = extract_here(tmp_path, manifest)
    assert counts(report)[1:3] == (n_done[-1], N_KILLED - 1 - n_done[-1])
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "images").symlink_to(tmp_path / "images")
    extract_here(tmp_path / "whole", manifest)
    killed = load_embeddings(tmp_path / "cache", manifest)
    whole = load_embeddings(tmp_path / "whole" / "cache", manifest)
    assert killed.X.tobytes() == whole.X.tobytes()
    pd.testing.assert_frame_equal(killed.rows, whole.rows)
    pd.testing.assert_frame_equal(killed.failed, whole.failed)
    cache = open_cache(tmp_path / "cache")
    assert cache.verify() == []  # whole, and no row twice
    assert cache.card()["rows"] == N_KILLED - 1
