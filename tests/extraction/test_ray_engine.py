"""`--engine ray`: the same cache as one process makes, also when Ray's workers are killed."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from made_extraction import HalvesEncoder, write_images

from medembed.cache import shards
from medembed.cache.embeddings import load_embeddings
from medembed.cache.store import create_cache, open_cache
from medembed.cli import main
from medembed.core.errors import (
    EncoderError,
    ManifestError,
    MedembedError,
    PathNotFoundError,
    SpecMismatchError,
)
from medembed.dataset.manifest import Manifest, write_manifest
from medembed.extraction import extract, ray_engine
from medembed.extraction.ray_engine import Actors, Job, Work, extract_on_ray

HELPERS = Path(__file__).parents[1] / "helpers"
pytestmark = pytest.mark.filterwarnings("ignore::Warning")  # of Ray's own, when it starts and ends
N_IMAGES = 60
UNDECODABLE = "007.png"

ray: Any = pytest.importorskip("ray", reason="Ray is not installed (medembed[ray])")


class FatalEncoder(HalvesEncoder):
    """Kills the process that it is in once rows are committed, as often as the bomb says."""

    def __init__(self, place: Path) -> None:
        super().__init__()
        self.place = place

    def encode(self, *arguments: Any) -> Any:
        bomb, deaths = self.place / "bomb", self.place / "deaths"
        n_shards = len(list(self.place.glob("cache/shards/*.h5")))
        with deaths.open("a") as file:
            if n_shards and deaths.stat().st_size < int(bomb.read_text()):
                file.write("x")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(*arguments)


def broken() -> HalvesEncoder:
    raise EncoderError("no such encoder")


@pytest.fixture(scope="module")
def cluster(lone_ray: None) -> Iterator[Any]:
    """Start a Ray of two nodes of one core each; its workers can import these tests."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # tokens are Ray's matter
        paths = [str(HELPERS), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        started = Cluster(initialize_head=True, head_node_args=node)
        started.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        patch.setenv("RAY_ADDRESS", started.address)
        ray.init(log_to_driver=False)
        yield started
        ray.shutdown()
        started.shutdown()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """Write images, one of them undecodable, one twice; and what one process makes of them."""
    root = tmp_path_factory.mktemp("ray-dataset")
    write_images(root / "images", N_IMAGES)
    (root / "images" / UNDECODABLE).write_bytes(b"no image")
    (root / "images" / "copy.png").write_bytes((root / "images" / "003.png").read_bytes())
    from made_extraction import list_images

    manifest = list_images(root / "images")
    write_manifest(manifest, root / "manifest.csv")
    extract(manifest, root / "images", HalvesEncoder(), root / "alone")
    return root, manifest


def job_of(root: Path, cache: Path, load: Any = HalvesEncoder, **more: Any) -> Job:
    options: dict[str, Any] = {"batch_size": 4, "decoders": 1, "commit_seconds": 0.0, **more}
    return Job(load, root / "images", cache, **options)


def check_whole(dataset: tuple[Path, Manifest], cache: Path) -> None:
    """Check that a cache holds each row once and what one process makes, to the byte."""
    root, manifest = dataset
    assert open_cache(cache).verify() == []
    lengths = [len(shards.read_keys(path)) for path in (cache / "shards").glob("*.h5")]
    alone, found = load_embeddings(root / "alone", manifest), load_embeddings(cache, manifest)
    assert sum(lengths) == len(open_cache(root / "alone").keys())
    assert found.X.tobytes() == alone.X.tobytes()
    assert found.failed.to_dict() == alone.failed.to_dict()


def test_tasks_make_the_cache_that_one_process_makes(
    cluster: None, dataset: tuple[Path, Manifest], tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    report = extract_on_ray(
        dataset[1],
        job_of(dataset[0], tmp_path / "cache"),
        partition_rows=8,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert (report.requested, report.embedded, report.failed, report.duplicates) == (
        N_IMAGES + 1,
        N_IMAGES - 1,
        1,
        1,
    )
    assert report.failures[0]["image"] == UNDECODABLE
    assert seen[-1] == (N_IMAGES, N_IMAGES)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    check_whole(dataset, tmp_path / "cache")
    again = extract_on_ray(dataset[1], job_of(dataset[0], tmp_path / "cache"))
    assert (again.embedded, again.already, again.failed) == (0, N_IMAGES - 1, 1)


def test_a_dry_run_makes_nothing(
    cluster: None, dataset: tuple[Path, Manifest], tmp_path: Path
) -> None:
    report = extract_on_ray(dataset[1], job_of(dataset[0], tmp_path / "cache"), dry_run=True)
    assert (report.embedded, report.already) == (N_IMAGES, 0)
    assert list(tmp_path.iterdir()) == []


def test_workers_that_die_in_the_middle_are_replaced(
    cluster: None, dataset: tuple[Path, Manifest], tmp_path: Path
) -> None:
    (tmp_path / "bomb").write_text("3")
    job = job_of(dataset[0], tmp_path / "cache", partial(FatalEncoder, tmp_path))
    report = extract_on_ray(dataset[1], job, partition_rows=15)
    assert len((tmp_path / "deaths").read_text()) >= 3  # two at once may both be the third
    assert (report.embedded, report.already, report.failed) == (N_IMAGES - 1, 0, 1)
    check_whole(dataset, tmp_path / "cache")


def test_workers_killed_from_outside_again_and_again_lose_nothing(
    cluster: None, dataset: tuple[Path, Manifest], tmp_path: Path
) -> None:
    cache, killed, stop = tmp_path / "cache", [], threading.Event()

    def kill() -> None:
        """Kill a worker whenever there are more shards than before, three times."""
        while len(killed) < 3 and not stop.is_set():
            time.sleep(0.05)
            if len(list(cache.glob("shards/*.h5"))) > 2 * len(killed):
                busy = [pid for pid in workers_of_ray() if has_decoder(pid)]
                if busy:
                    os.kill(busy[0], signal.SIGKILL)
                    killed.append(busy[0])

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        load = partial(HalvesEncoder, seconds=0.1)
        report = extract_on_ray(dataset[1], job_of(dataset[0], cache, load), partition_rows=20)
    finally:
        stop.set()
        thread.join()
    assert len(killed) == 3
    assert (report.embedded, report.already) == (N_IMAGES - 1, 0)
    check_whole(dataset, cache)


@pytest.mark.slow
def test_a_node_that_dies_in_the_middle_is_done_without(
    cluster: Any, dataset: tuple[Path, Manifest], tmp_path: Path
) -> None:
    cache, stop = tmp_path / "cache", threading.Event()
    node = cluster.add_node(num_cpus=2, object_store_memory=80 * 2**20)

    def remove() -> None:
        while not stop.is_set() and len(list(cache.glob("shards/*.h5"))) < 3:
            time.sleep(0.05)
        cluster.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=remove)
    thread.start()
    try:
        load = partial(HalvesEncoder, seconds=0.2)
        report = extract_on_ray(dataset[1], job_of(dataset[0], cache, load), partition_rows=12)
    finally:
        stop.set()
        thread.join()
    assert (report.embedded, report.already) == (N_IMAGES - 1, 0)
    check_whole(dataset, cache)


@pytest.mark.slow
def test_sigterm_commits_what_is_embedded(dataset: tuple[Path, Manifest], tmp_path: Path) -> None:
    """With a Ray of its own, as on a laptop."""
    script = f"""
        from functools import partial
        from pathlib import Path
        from made_extraction import HalvesEncoder
        from medembed.cli import console
        from medembed.dataset.manifest import read_manifest
        from medembed.extraction.ray_engine import Job, extract_on_ray

        console.terminate_cleanly()
        root = Path({str(dataset[0])!r})
        load = partial(HalvesEncoder, seconds=1.0)
        job = Job(
            load, root / "images", Path({str(tmp_path / "cache")!r}),
            batch_size=4, decoders=1, commit_seconds=3.0,
        )
        extract_on_ray(read_manifest(root / "manifest.csv"), job)
    """
    environment = {name: text for name, text in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**environment, "PYTHONPATH": str(HELPERS)},
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 60
    while not list(tmp_path.glob("cache/shards/*.h5")):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.1)
    time.sleep(1.5)  # some batches, less than up to the next commit
    n_before = len(open_cache(tmp_path / "cache").keys())
    process.terminate()
    assert process.wait(timeout=60) not in (0, -signal.SIGTERM)
    assert n_before < len(open_cache(tmp_path / "cache").keys()) < N_IMAGES - 1
    assert open_cache(tmp_path / "cache").verify() == []


def workers_of_ray() -> list[int]:
    """List the processes that run tasks, by their title."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def has_decoder(pid: int) -> bool:
    try:
        tasks = list(Path(f"/proc/{pid}/task").glob("*/children"))
        return any(path.read_text().strip() for path in tasks)
    except OSError:
        return False


def test_a_partition_whose_workers_always_die_is_one_clear_error(
    cluster: None, dataset: tuple[Path, Manifest], tmp_path: Path
) -> None:
    (tmp_path / "bomb").write_text("1000")
    job = job_of(dataset[0], tmp_path / "cache", partial(FatalEncoder, tmp_path))
    with pytest.raises(MedembedError, match=r"was lost .* times .*Rows committed so far are kept"):
        extract_on_ray(dataset[1], job)
    assert 0 < len(open_cache(tmp_path / "cache").keys()) < N_IMAGES - 1


def test_errors_of_a_task_are_those_of_the_local_engine(
    cluster: None, dataset: tuple[Path, Manifest], tmp_path: Path
) -> None:
    root, manifest = dataset
    with pytest.raises(EncoderError, match="no such encoder"):
        extract_on_ray(manifest, job_of(root, tmp_path / "cache", broken))
    with pytest.raises(PathNotFoundError, match="--image-root"):
        extract_on_ray(manifest, job_of(root / "no", tmp_path / "cache"))
    with pytest.raises(EncoderError, match="no pooling 'cls'"):
        extract_on_ray(manifest, job_of(root, tmp_path / "cache", poolings=("cls",)))
    other = open_cache(root / "alone")
    create_cache(tmp_path / "other", other.spec, other.recorded)
    with pytest.raises(SpecMismatchError):
        extract_on_ray(manifest, job_of(root, tmp_path / "other", dtype="float32"))
    assert not (tmp_path / "cache").exists()


def test_files_with_other_bytes_are_named_when_all_others_are_there(
    cluster: None, dataset: tuple[Path, Manifest], tmp_path: Path
) -> None:
    rows = dataset[1].rows.copy()
    wrong = rows["image"].isin(["010.png", "050.png"])
    rows.loc[wrong, "sha256"] = [("ab" if i else "cd") * 32 for i in range(2)]
    job = job_of(dataset[0], tmp_path / "cache")
    with pytest.raises(ManifestError, match="other bytes") as caught:
        extract_on_ray(Manifest(rows, dataset[1].label_level), job, partition_rows=8)
    assert len([p for p in caught.value.problems if "the manifest says" in p]) == 2
    assert len(open_cache(tmp_path / "cache").keys()) == N_IMAGES - 3


@pytest.mark.parametrize(
    ("nodes", "device", "decoders", "needs"),
    [
        ([{"CPU": 2.0}], "auto", None, (2, 0)),
        ([{"CPU": 16.0}, {"CPU": 8.0}], "cpu", None, (4, 0)),
        ([{"CPU": 16.0}, {"CPU": 8.0}], "auto", 99, (16, 0)),
        ([{"CPU": 32.0, "GPU": 4.0}], "auto", None, (8, 1)),
        ([{"CPU": 32.0, "GPU": 4.0}], "cuda", 2, (2, 1)),
        ([{"CPU": 32.0, "GPU": 4.0}], "cuda", 99, (8, 1)),
        ([{"CPU": 32.0, "GPU": 4.0}], "cpu", None, (4, 0)),
        ([{"CPU": 64.0}, {"CPU": 6.0, "GPU": 1.0}], "auto", None, (6, 1)),
    ],
)
def test_a_task_takes_no_more_than_a_node_has(
    nodes: list[dict[str, float]],
    device: str,
    decoders: int | None,
    needs: tuple[int, int],
) -> None:
    told = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": node} for node in nodes])
    found = ray_engine._needs(told, device, decoders)
    assert (found["num_cpus"], found["num_gpus"]) == needs


def test_cuda_without_a_gpu_is_refused() -> None:
    told = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": {"CPU": 4.0}}])
    with pytest.raises(MedembedError, match="this Ray has no GPU"):
        ray_engine._needs(told, "cuda", None)


def test_worker_is_not_for_ray(dataset: tuple[Path, Manifest], tmp_path: Path) -> None:
    ran = CliRunner().invoke(main, [*command(dataset[0], tmp_path), "--worker", "0/2"])
    assert ran.exit_code == 2
    assert "with --backend ray Ray divides the work" in ran.output


def test_without_ray_the_command_says_what_to_install(
    dataset: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    ran = CliRunner().invoke(main, command(dataset[0], tmp_path))
    assert ran.exit_code == 1
    assert "pip install 'medembed[ray]'" in ran.output


def command(root: Path, place: Path) -> list[str]:
    given = {"--image-root": root / "images", "--encoder": "demo", "--cache": place / "cache"}
    options = [str(part) for pair in given.items() for part in pair]
    return ["extract", str(root / "manifest.csv"), *options, "--engine", "ray"]


@pytest.mark.slow
def test_the_command_uses_the_encoder_that_it_is_given(
    cluster: None, dataset: tuple[Path, Manifest], tmp_path: Path
) -> None:
    ran = CliRunner().invoke(main, [*command(dataset[0], tmp_path), "--json", "--pool", "mean"])
    assert ran.exit_code == 0, ran.output
    report = json.loads(ran.stdout)
    assert (report["embedded"], report["failed"]) == (N_IMAGES - 1, 1)
    local = [part for part in command(dataset[0], tmp_path / "local") if part != "--engine"][:-1]
    assert CliRunner().invoke(main, [*local, "--pool", "mean"]).exit_code == 0
    found = [load_embeddings(p / "cache", dataset[1]).X for p in (tmp_path, tmp_path / "local")]
    np.testing.assert_allclose(*found, rtol=2e-3, atol=1e-3)


class CardedEncoder(FatalEncoder):
    """Notes the GPU that Ray has given its process: when it is loaded, and at every batch."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.seconds = 0.05
        self.note("loaded")

    def note(self, what: str) -> None:
        with (self.place / "notes").open("a") as file:
            file.write(f"{os.getpid()} {os.environ['CUDA_VISIBLE_DEVICES']} {what}\n")

    def encode(self, *arguments: Any) -> Any:
        self.note("batch")
        return super().encode(*arguments)


@pytest.mark.parametrize("deaths", [0, 2])
def test_each_worker_keeps_one_gpu_for_life_and_loads_once(
    cluster: Any, dataset: tuple[Path, Manifest], tmp_path: Path, deaths: int
) -> None:
    """GPUs that Ray is made to believe in; a second run must not find the first one's processes."""
    (tmp_path / "bomb").write_text(str(deaths))
    node = cluster.add_node(num_cpus=2, num_gpus=2, object_store_memory=80 * 2**20)
    try:
        for cache in (tmp_path / "cache", tmp_path / "again"):
            job = job_of(dataset[0], cache, partial(CardedEncoder, tmp_path))
            report = extract_on_ray(dataset[1], job, device="cuda", partition_rows=5)
    finally:
        cluster.remove_node(node)
    assert report.embedded == N_IMAGES - 1
    check_whole(dataset, tmp_path / "cache")
    notes = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    loads = [pid for pid, _, what in notes if what == "loaded"]
    cards = {pid: {card for other, card, _ in notes if other == pid} for pid in loads}
    assert len(loads) == len(set(loads))
    assert all(len(own) == 1 for own in cards.values())
    assert {card for own in cards.values() for card in own} == {"0", "1"}
    assert deaths + 4 >= len(loads) >= 4


# Without a cluster: what becomes of work whose actors die


class PretendedRay:
    """Runs actors' methods as soon as they are waited for; `dead` actors answer with an error."""

    def __init__(self, lives: list[int]) -> None:
        self.lives = lives  # of each actor that is started: how many pieces it does before it dies
        self.killed: list[Any] = []
        self.exceptions = SimpleNamespace(RayTaskError=RayTaskError, RayError=RayError)

    def remote(self, kind: Any) -> Any:
        def start(job: Any) -> Any:
            lives = self.lives.pop(0)
            actor = SimpleNamespace(left=lives, done=[])
            actor.ready = SimpleNamespace(remote=lambda: Answer(lambda: self.live(actor, 0)))
            actor.embed = SimpleNamespace(
                remote=lambda name: Answer(lambda: (self.live(actor, 1), name)[1])
            )
            return actor

        made = SimpleNamespace(remote=start)
        return SimpleNamespace(options=lambda **_: made)

    def live(self, actor: Any, cost: int) -> None:
        if actor.left < cost or actor.left < 0:
            actor.left = -1
            raise RayError
        actor.left -= cost

    def put(self, value: Any) -> Any:
        return value

    def wait(self, answers: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return answers[:1], answers[1:]

    def get(self, answer: Any) -> Any:
        return answer.compute()

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)


class RayError(Exception): ...


class RayTaskError(RayError): ...


class Answer:
    def __init__(self, compute: Any) -> None:
        self.compute = compute


def done_by(lives: list[int], n_works: int, n_actors: int) -> tuple[list[str], PretendedRay]:
    told = PretendedRay(lives)
    job = Job(HalvesEncoder, Path("images"), Path("cache"))
    works = (Work("embed", (f"part {i}",)) for i in range(n_works))
    with Actors(told, job, {}, lambda: n_actors) as actors:
        return sorted(result for _, result in actors.run(works, n_works)), told


@pytest.mark.parametrize(
    ("lives", "n_actors"),
    [
        ([99], 1),
        ([1, 2, 99], 1),  # one after the other takes the dead one's place
        ([0, 0, 0, 0, 0, 99, 99], 2),  # two partitions are lost up to three times each
        ([3, 1, 99, 99, 99, 99], 3),
        ([-1, -1, 99], 1),  # dead before they were there
    ],
)
def test_no_work_is_lost_with_its_actor(lives: list[int], n_actors: int) -> None:
    done, told = done_by(list(lives), 8, n_actors)
    assert done == [f"part {i}" for i in range(8)]
    assert len(told.killed) == len(lives) - len(told.lives)


@pytest.mark.parametrize("life", [0, -1])
def test_actors_that_always_die_are_one_clear_error(life: int) -> None:
    with pytest.raises(MedembedError, match=r"was lost 6 times \(RayError\): its workers died"):
        done_by([life] * 99, 1, 1)


def test_idle_actors_of_a_dead_node_cost_the_work_no_tries() -> None:
    """Nine die with nothing to do; the one that works dies over the last piece."""
    told = PretendedRay([99] * 9 + [99] * 2)
    actors = Actors(told, Job(HalvesEncoder, Path("images"), Path("cache")), {}, lambda: 9)
    assert len(list(actors.run((Work("embed", (str(i),)) for i in range(9)), 9))) == 9
    while actors._starting:
        list(actors._wait())
    for actor in actors._idle:
        actor.left = 0
    actors._idle[-1].left = 0
    for actor in actors._idle[:-1]:
        actor.left = -1
    [(work, result)] = actors.run(iter([Work("embed", ("last",))]), 9)
    assert result == "last"
    assert work.n_losses <= 1
