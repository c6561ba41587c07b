"""Images in tar files: one pass makes the manifest, another the rows; nothing is sought in."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from made_extraction import HalvesEncoder, counts, write_images
from s3_server import S3, Asked

from medembed.cache.embeddings import load_embeddings
from medembed.cache.pending import Worker
from medembed.cache.store import open_cache
from medembed.cli import main
from medembed.core import object_store
from medembed.core.errors import ArgumentError, ImageError, ManifestError, PathNotFoundError
from medembed.core.locations import BucketPath
from medembed.dataset.build_file import build_path, read_build
from medembed.dataset.manifest import Manifest, existing_images, read_manifest
from medembed.dataset.recipes.stream import build_from_stream
from medembed.extraction import extract
from medembed.images import tar_stream
from medembed.images.tar_stream import TarRoot, list_tars, parse_tar_root

N_IMAGES = 12


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def about(number: int, **more: Any) -> dict[str, Any]:
    split = "test" if number % 4 == 3 else "train"
    own = {"patient": f"p{number}", "study": f"p{number}/1", "region": "hand", "split": split}
    return {**own, "label": number % 2, "age": 20 + number, "notes": ["no", "cell"], **more}


@pytest.fixture
def tars(tmp_path: Path) -> TarRoot:
    """Write two tar files of samples, the second one compressed."""
    write_images(tmp_path / "images", N_IMAGES)
    folder = tmp_path / "tars"
    folder.mkdir()
    for shard, mode in enumerate(("w", "w:gz")):
        with tarfile.open(folder / f"shard-{shard}.tar", mode) as tar:
            for number in range(shard * 6, shard * 6 + 6):
                add(tar, f"a/{number:03d}.json", json.dumps(about(number)).encode())
                add(
                    tar,
                    f"a/{number:03d}.png",
                    (tmp_path / "images" / f"{number:03d}.png").read_bytes(),
                )
    return TarRoot(folder)


def run_extract(manifest: Manifest, root: Any, cache: Path, **options: Any) -> Any:
    options = {"dtype": "float32", "batch_size": 4, "decoders": 1} | options
    return extract(manifest, root, HalvesEncoder(), cache, **options)


def test_a_stream_gives_the_manifest_and_the_rows_of_its_files(
    tars: TarRoot, tmp_path: Path
) -> None:
    manifest = build_from_stream(tars).manifest
    assert manifest.rows["image"].iloc[0] == "shard-0.tar/a/000.png"
    assert manifest.rows["label"].tolist() == [0, 1] * 6
    assert manifest.rows["age"].tolist() == [str(20 + n) for n in range(N_IMAGES)]
    assert "notes" not in manifest.rows
    report = run_extract(manifest, str(tars), tmp_path / "cache", decoders=2)
    assert counts(report) == (N_IMAGES, 0, N_IMAGES, 0, 0)
    near = manifest.rows.assign(image=[f"{n:03d}.png" for n in range(N_IMAGES)])
    run_extract(Manifest(near, "study"), tmp_path / "images", tmp_path / "near")
    far = load_embeddings(tmp_path / "cache", manifest).X
    assert far.tobytes() == load_embeddings(tmp_path / "near", manifest).X.tobytes()
    assert counts(run_extract(manifest, str(tars), tmp_path / "cache"))[1] == N_IMAGES


def test_workers_share_a_stream(tars: TarRoot, tmp_path: Path) -> None:
    manifest = build_from_stream(tars).manifest
    done = [
        run_extract(manifest, tars, tmp_path / "cache", worker=Worker(n, 3)).embedded
        for n in range(3)
    ]
    assert sum(done) == N_IMAGES
    assert max(done) < N_IMAGES


def test_a_stream_may_lie_in_a_bucket(s3: S3, tars: TarRoot, tmp_path: Path) -> None:
    place = BucketPath("s3", "bucket", f"tars/{os.getpid()}-{tmp_path.name}")
    assert isinstance(tars.place, Path)
    for path in tars.place.iterdir():
        object_store.put_object(place / path.name, path.read_bytes())
    far = parse_tar_root(f"tar://{place}")
    assert far is not None
    s3.fault = lambda asked: "half" if asked.n % 2 == 1 and asked.key.endswith(".tar") else None
    manifest = build_from_stream(far).manifest
    assert manifest.rows.equals(build_from_stream(tars).manifest.rows)
    assert run_extract(manifest, str(far), tmp_path / "cache").embedded == N_IMAGES


def test_a_tar_file_that_is_replaced_while_it_is_read_is_no_mixture(
    s3: S3, tars: TarRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = BucketPath("s3", "bucket", f"tars/{os.getpid()}-{tmp_path.name}/x.tar")
    assert isinstance(tars.place, Path)
    data = (tars.place / "shard-0.tar").read_bytes()
    object_store.put_object(place, data)
    monkeypatch.setattr(tar_stream, "BLOCK", 4096)

    def replace(asked: Asked) -> None:
        if asked.method == "GET" and asked.n == 2 and asked.key == place.key:
            object_store.put_object(place, data.replace(b"IHDR", b"ihdr"))

    s3.fault = replace
    with pytest.raises(ImageError, match=r"x\.tar .* was replaced while it was read"):
        build_from_stream(TarRoot(place))


def test_tar_files_of_one_name_below_a_prefix_are_told_apart(s3: S3, tmp_path: Path) -> None:
    place = BucketPath("s3", "bucket", f"tars/{os.getpid()}-{tmp_path.name}")
    for folder in ("train", "test"):
        object_store.put_object(place / folder / "s.tar", b"")
    assert [file.name for file in list_tars(TarRoot(place))] == ["test/s.tar", "train/s.tar"]
    assert [file.name for file in list_tars(TarRoot(place / "train" / "s.tar"))] == ["s.tar"]
    with pytest.raises(PathNotFoundError, match=r"no tar file at s3://.*/y\.tar"):
        list_tars(TarRoot(place / "y.tar"))


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 2)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number in range(2):
            add(tar, f"a/._{number}.png", b"\x00\x05\x16\x07")
            add(tar, f"a/{number}.json", json.dumps(about(number)).encode())
            add(tar, f"a/{number}.png", (tmp_path / "images" / f"{number:03d}.png").read_bytes())
    images = build_from_stream(TarRoot(tmp_path / "x.tar")).manifest.rows["image"]
    assert images.tolist() == ["x.tar/a/0.png", "x.tar/a/1.png"]


def test_numbers_of_a_header_that_are_none_are_one_error(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("0.png")
        member.pax_headers = {"GNU.sparse.map": "one,two"}
        tar.addfile(member, io.BytesIO(b""))
    with pytest.raises(ImageError, match=r"x\.tar cannot be read to its end"):
        build_from_stream(TarRoot(tmp_path / "x.tar"))


def test_what_the_stream_does_not_hold_fails_alone(tars: TarRoot, tmp_path: Path) -> None:
    manifest = build_from_stream(tars).manifest
    assert isinstance(tars.place, Path)
    (tars.place / "shard-1.tar").unlink()
    report = run_extract(manifest, tars, tmp_path / "cache")
    assert (report.embedded, report.failed) == (6, 6)
    assert "no file in the tar files has its bytes" in report.failures[0]["reason"]
    large = run_extract(manifest, tars, tmp_path / "other", limits=_limits(60))
    assert large.embedded == 0


def _limits(n_bytes: int) -> Any:
    from medembed.images.load import Limits

    return Limits(max_bytes=n_bytes)


@pytest.mark.parametrize("n_bytes", [10_500, 10_240, 11_300])
def test_a_tar_file_that_ends_early_is_named_and_rows_before_stay(
    n_bytes: int, tars: TarRoot, tmp_path: Path
) -> None:
    manifest = build_from_stream(tars).manifest
    assert isinstance(tars.place, Path)
    path = tars.place / "shard-0.tar"
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(ImageError, match=r"shard-0\.tar cannot be read to its end"):
        run_extract(manifest, tars, tmp_path / "cache", batch_size=1)
    assert 0 < len(open_cache(tmp_path / "cache").keys()) < 6


def test_samples_that_lack_something_are_all_listed(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 3)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number in range(3):
            add(tar, f"{number}.png", (tmp_path / "images" / f"{number:03d}.png").read_bytes())
            add(tar, f"{number}.json", [b"{", b"[]", b'{"patient": "p"}'][number])
    with pytest.raises(ManifestError) as caught:
        build_from_stream(TarRoot(tmp_path / "x.tar"))
    assert caught.value.problems == (
        "x.tar/0.json is not JSON",
        "x.tar/1.json is not a table of values",
        "x.tar/2: no study, region, split",
    )


def test_the_label_may_stand_in_a_file_of_its_own(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 2)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number in range(2):
            own = {k: v for k, v in about(number).items() if k != "label"}
            add(tar, f"{number}.cls", f"{number}\n".encode())
            add(tar, f"{number}.json", json.dumps(own).encode())
            add(tar, f"{number}.png", (tmp_path / "images" / f"{number:03d}.png").read_bytes())
    assert build_from_stream(TarRoot(tmp_path / "x.tar")).manifest.rows["label"].tolist() == [0, 1]


def test_options_say_what_the_names_of_other_programs_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", 8)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number in range(8):
            own = {"person": f"p{number}", "finding": ["fine", "bent"][number % 2], "age": number}
            add(tar, f"{number}.json", json.dumps(own).encode())
            add(tar, f"{number}.png", (tmp_path / "images" / f"{number:03d}.png").read_bytes())
    words = ["manifest", "build", "--from-stream", "tar://x.tar", "-o", "m.csv", "--patient",
             "person", "--label", "finding"]  # fmt: skip
    refused = CliRunner().invoke(main, words)
    assert refused.exit_code == 1
    assert "Name what is abnormal with --abnormal" in refused.output
    assert not (tmp_path / "m.csv").exists()
    more = ["--abnormal", "bent", "--covariate", "age", "--test-fraction", "0.5"]
    built = CliRunner().invoke(main, [*words, *more])
    assert built.exit_code == 0, built.output
    rows = read_manifest(tmp_path / "m.csv").rows
    assert rows["label"].tolist() == [0, 1] * 4
    assert rows["patient"].tolist() == [f"p{number}" for number in range(8)]
    assert rows["age"].tolist() == [str(number) for number in range(8)]
    assert (rows["split"] == "test").sum() == 4


def test_who_looks_images_up_by_name_refuses_a_stream(tars: TarRoot, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="read from front to back"):
        existing_images(str(tars))
    with pytest.raises(PathNotFoundError, match="no tar file at"):
        extract(tmp_path / "m.csv", f"tar://{tmp_path / 'empty'}", HalvesEncoder(), tmp_path / "c")


def test_the_commands_take_a_stream(
    tars: TarRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    built = CliRunner().invoke(
        main, ["manifest", "build", "--from-stream", "tar://tars", "-o", "m.csv"]
    )
    assert built.exit_code == 0, built.output
    assert "12 images, 12 studies, 12 patients, 6 abnormal" in built.output
    assert "--image-root tar://tars" in built.output
    assert built.output.count("Hashing: ") == 1
    manifest = read_manifest(tmp_path / "m.csv")
    assert len(manifest.rows) == N_IMAGES
    kept = read_build("m.csv", manifest)
    assert kept is not None
    assert kept.counts.found == N_IMAGES
    assert kept.stream is not None
    assert (kept.stream.kind, kept.stream.dataset, kept.recipe.name) == ("tar", None, None)
    assert str(tmp_path) not in build_path("m.csv").read_text()
    words = ["extract", "m.csv", "--image-root", "tar://tars", "--encoder", "demo", "--cache", "c"]
    done = CliRunner().invoke(main, [*words, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "12 embedded" in done.output
    refused = CliRunner().invoke(main, [*words, "--backend", "ray"])
    assert refused.exit_code == 2
    assert "front to back" in refused.output
    mixed = ["manifest", "build", "mura", "--from-stream", "tar://tars", "-o", "m2.csv"]
    assert CliRunner().invoke(main, mixed).exit_code == 2
