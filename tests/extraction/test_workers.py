"""Several workers on one cache: disjoint shares, each row once, the same embeddings."""

import os
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from forked import fork
from made_extraction import HalvesEncoder, write_images

from medembed.cache import shards
from medembed.cache.embeddings import load_embeddings
from medembed.cache.index import committed_shards
from medembed.cache.pending import Worker, find_worker, parse_worker
from medembed.cache.spec import hex_from_keys
from medembed.cache.store import create_cache, open_cache
from medembed.cli import main
from medembed.core.errors import MedembedError
from medembed.core.locations import as_location
from medembed.dataset.manifest import Manifest, read_manifest, write_manifest
from medembed.encoders.loading import load_encoder
from medembed.extraction import extract
from medembed.extraction.writer import RowWriter

N_IMAGES = 96


def be_worker(root: Path, place: str, environ: dict[str, str], worker: str, seconds: float) -> None:
    """Be one worker; `seconds` per batch make it slow enough to be killed."""
    os.environ.update(environ)
    os.chdir(root)
    extract(
        read_manifest("manifest.csv"),
        Path("images"),
        HalvesEncoder(seconds=seconds),
        place,
        batch_size=4,
        decoders=1,
        worker=parse_worker(worker),
        commit_seconds=0.1,
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest, np.ndarray]:
    """Write images and manifest, and what one process makes of them."""
    root = tmp_path_factory.mktemp("dataset")
    manifest = write_images(root / "images", N_IMAGES)
    write_manifest(manifest, root / "manifest.csv")
    extract(manifest, root / "images", HalvesEncoder(), root / "alone")
    return root, manifest, load_embeddings(root / "alone", manifest).X


def start(root: Path, cache: str, worker: str, seconds: float = 0.0) -> ForkServerProcess:
    environ = {
        name: os.environ[name] for name in os.environ if name.startswith(("AWS_", "MEDEMBED_"))
    }
    return fork(be_worker, root, cache, environ, worker, seconds)


def end(process: ForkServerProcess) -> int | None:
    """Wait for a worker's end; None if it does not come."""
    process.join(timeout=120)
    return process.exitcode


def check_union(cache: str, manifest: Manifest, alone: np.ndarray) -> None:
    """Check that the cache is whole, holds each row once, and gives stage 2 the same bytes."""
    assert open_cache(cache).verify() == []
    paths = committed_shards(open_cache(cache).path / "shards")
    assert sum(len(shards.read_keys(path)) for path in paths) == N_IMAGES
    assert load_embeddings(cache, manifest).X.tobytes() == alone.tobytes()


@pytest.fixture
def place(dataset: tuple[Path, Manifest, np.ndarray], tmp_path: Path) -> Path:
    (tmp_path / "images").symlink_to(dataset[0] / "images")
    (tmp_path / "manifest.csv").symlink_to(dataset[0] / "manifest.csv")
    return tmp_path


@pytest.mark.parametrize("count", [2, 4, 8])
def test_workers_at_once_make_the_cache_that_one_makes(
    count: int, dataset: tuple[Path, Manifest, np.ndarray], place: Path, any_place: str
) -> None:
    workers = [start(place, any_place, f"{index}/{count}") for index in range(count)]
    assert [end(worker) for worker in workers] == [0] * count
    check_union(any_place, *dataset[1:])


def test_killed_workers_are_replaced_by_any_other_number(
    dataset: tuple[Path, Manifest, np.ndarray], place: Path, any_place: str
) -> None:
    workers = [start(place, any_place, f"{index}/2", seconds=0.2) for index in range(2)]
    while not committed_shards(as_location(any_place, "a cache") / "shards"):
        assert any(worker.is_alive() for worker in workers)
        time.sleep(0.02)
    for worker in workers:
        worker.kill()
        assert end(worker) == -signal.SIGKILL
    assert 0 < len(open_cache(any_place).keys()) < N_IMAGES
    assert [end(start(place, any_place, f"{index}/3")) for index in (2, 0, 1)] == [0, 0, 0]
    check_union(any_place, *dataset[1:])


def test_rows_that_another_process_has_committed_meanwhile_are_not_doubled(
    dataset: tuple[Path, Manifest, np.ndarray], tmp_path: Path
) -> None:
    alone = open_cache(dataset[0] / "alone")
    keys = alone.keys()[:30]
    rows = alone.read(keys, ["mean", "max"])
    cache = create_cache(tmp_path / "cache", alone.spec, alone.recorded)
    with RowWriter(cache, commit_seconds=60.0) as writer:
        writer.add(hex_from_keys(keys), rows)
        other = {name: values[10:25] for name, values in rows.items()}
        open_cache(cache.path).commit(keys[10:25], other)
    lengths = [len(shards.read_keys(path)) for path in (cache.path / "shards").glob("*.h5")]
    assert sorted(lengths) == [15, 15]
    assert writer.n_committed == 30
    assert cache.verify() == []
    np.testing.assert_array_equal(cache.read(keys, ["mean"])["mean"], rows["mean"])


def test_a_towers_embeddings_do_not_depend_on_the_shares(
    dataset: tuple[Path, Manifest, np.ndarray], tmp_path: Path
) -> None:
    root, manifest, _ = dataset
    small = Manifest(manifest.rows.iloc[:13].reset_index(drop=True), manifest.label_level)
    encoder = load_encoder("demo", device="cpu", precision="fp32")
    for name, workers in (("alone", [None]), ("shared", [Worker(n, 3) for n in range(3)])):
        for worker in workers:
            extract(small, root / "images", encoder, tmp_path / name, worker=worker)
    alone, shared = (load_embeddings(tmp_path / name, small).X for name in ("alone", "shared"))
    assert alone.tobytes() == shared.tobytes()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"RANK": "3"}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (Worker(3, 8), "RANK")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, (Worker(0, 2), "SLURM_PROCID")),
        (
            {
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "1",
                "SLURM_ARRAY_TASK_ID": "4",
                "SLURM_ARRAY_TASK_COUNT": "5",
            },
            (Worker(4, 5), "SLURM_ARRAY_TASK_ID"),
        ),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "9"},
            (Worker(1, 2), "RANK"),
        ),
    ],
)
def test_launchers_name_the_worker(
    environ: dict[str, str], expected: tuple[Worker, str] | None
) -> None:
    assert find_worker(environ) == expected


@pytest.mark.parametrize("rank", ["8", "-1", "one", ""])
def test_a_launchers_contradiction_is_an_error(rank: str) -> None:
    with pytest.raises(MedembedError, match=r"RANK=.*WORLD_SIZE=8 .*--worker I/N"):
        find_worker({"RANK": rank, "WORLD_SIZE": "8"})


@pytest.mark.parametrize("text", ["2/2", "1", "a/b", "1/2/3", "-1/2", "0/0", ""])
def test_a_worker_that_is_none_is_wrong_usage(text: str) -> None:
    with pytest.raises(ValueError, match=r"worker|I/N"):
        parse_worker(text)
    given = ["m.csv", "--image-root", ".", "--encoder", "demo", "--cache", "c", "--worker", text]
    result = CliRunner().invoke(main, ["extract", *given])
    assert result.exit_code == 2
    assert "Invalid value for '--worker'" in result.output
