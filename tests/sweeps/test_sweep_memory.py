"""A sweep's memory: an upper bound that is not far off, and what is said where it is not there."""

import sys
from pathlib import Path

import pytest
from made_sweeps import make_data

from medembed.cache.store import open_cache
from medembed.core import system
from medembed.core.errors import TrainingDataError
from medembed.core.system import available_memory, total_memory
from medembed.dataset.manifest import read_manifest
from medembed.sweeps import job, memory
from medembed.sweeps.data import SweepConfig, SweepRows, estimate_need, list_poolings
from medembed.sweeps.memory import MemoryNeed, fit_jobs
from medembed.sweeps.search_space import default_spaces

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from made_table import make_table, write_table
from peak_memory import watch

GB = 1_000_000_000
NEED = MemoryNeed(n_rows=1_000_000, n_trained=900_000, n_columns=1152)


def config(cache: Path, manifest: Path, **more: object) -> SweepConfig:
    options = {"covariates": (), "train_fraction": 1.0, **more}
    return SweepConfig(
        cache=open_cache(cache),
        manifest=read_manifest(manifest),
        heads=["logistic"],
        spaces=default_spaces(),
        n_configs=None,
        n_folds=2,
        metric="auroc",
        seed=0,
        **options,
    )


def need_of(cache: Path, manifest: Path, **more: object) -> MemoryNeed:
    asked = config(cache, manifest, **more)
    return estimate_need(asked, list_poolings(asked.cache, None))


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_estimate_is_an_upper_bound_at_most_twice_the_peak(jobs: int, tmp_path: Path) -> None:
    cache, manifest = write_table(make_table(14_000, 5_000, 1024), tmp_path)
    (tmp_path / "space.toml").write_text("[logistic]\nconfigs = 1\nmax_iter = 20\n")
    sweep = [sys.executable, "-m", "medembed", "sweep", str(cache), str(manifest)]
    options = ["--heads", "logistic", "--space", str(tmp_path / "space.toml"), "--folds", "2"]
    where = ["--jobs", str(jobs), "--out", str(tmp_path / "run"), "--json"]
    peak = watch([*sweep, *options, *where]).peak_gb * GB
    bound = need_of(cache, manifest).bytes_with(jobs)
    assert peak <= bound <= 2 * peak


def test_fewer_rows_than_columns_need_room_for_a_basis() -> None:
    """The peaks were measured, of perceptrons on a made table."""
    for jobs, n_folds, peak in ((1, 2, 1.66), (2, 2, 2.99), (2, 5, 3.10), (2, 10, 4.06)):
        need = MemoryNeed(n_rows=1_625, n_trained=1_500, n_columns=31_104, n_folds=n_folds)
        assert peak * GB <= need.bytes_with(jobs) <= 1.5 * peak * GB


def test_many_rows_of_few_columns_need_room_to_be_scored() -> None:
    """The peak was measured, of a logistic head and LightGBM on a made table."""
    need = MemoryNeed(n_rows=1_083_333, n_trained=1_000_000, n_columns=64, n_folds=2)
    assert 3.77 * GB <= need.bytes_with(2) <= 1.5 * 3.77 * GB
    assert need.bytes_with(1) < need.bytes_with(2)


def test_rows_columns_and_covariates_are_counted_without_loading(tmp_path: Path) -> None:
    cache, manifest = make_data(tmp_path / "data", {"mean": 1.0, "max": 0.5})[:2]
    rows = read_manifest(manifest).rows
    width = sum(shape[0] for shape in open_cache(cache).spec.poolings.values())
    need = need_of(cache, manifest)
    n_trained = ((rows["split"] == "train") & rows["label"].notna()).sum()
    assert need == MemoryNeed(len(rows), n_trained, width, n_folds=2)
    more = need_of(cache, manifest, covariates=("region",), train_fraction=0.5)
    assert more.n_columns == width + more.n_joined
    assert more.n_joined == rows["region"].nunique() + 1
    assert more.n_trained == -(-n_trained // 2)


def test_as_many_processes_are_used_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "choose_jobs", lambda asked: asked or 4)
    for free, expected in ((1000 * GB, 4), (NEED.bytes_with(3), 3), (NEED.bytes_with(1), 1)):
        monkeypatch.setattr(memory, "available_memory", lambda free=free: free)
        assert fit_jobs(NEED, None) == expected
    with pytest.raises(TrainingDataError, match=r"\(1,000,000 rows × 1,152 columns, 2 processes\)"):
        fit_jobs(NEED, 2)


def test_too_little_memory_is_said_before_rows_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, manifest = make_data(tmp_path / "data", {"mean": 1.0, "max": 0.5})[:2]
    monkeypatch.setattr(job, "SweepRows", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(memory, "available_memory", lambda: GB // 10)
    with pytest.raises(TrainingDataError) as caught:
        job.sweep(cache, manifest, tmp_path / "run", jobs=1)
    text = str(caught.value)
    assert text.startswith("this sweep needs up to 0.5 GB of memory (")
    assert "1 process), and there are 0.1 GB. Use fewer columns (--pool m" in text
    assert "--train-fraction 0.5" in text
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(memory, "available_memory", lambda: GB)
    with pytest.raises(TrainingDataError, match=r"there are 1\.0 GB\. --jobs 1 fits; the results"):
        job.sweep(cache, manifest, tmp_path / "run", jobs=2)


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_what_a_containers_limit_leaves(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages of files that the container may drop count as free."""
    monkeypatch.setattr(system, "CGROUPS", tmp_path)
    here = tmp_path / "memory" if version == 1 else tmp_path
    here.mkdir(exist_ok=True)
    limit, usage, kept = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if version == 1
        else ("memory.max", "memory.current", "inactive_file")
    )
    assert 0 < available_memory() <= total_memory() + 1024 * _swap()
    (here / limit).write_text(f"{GB // 10}\n")
    (here / usage).write_text(f"{GB // 20}\n")
    (here / "memory.stat").write_text(f"anon 5\n{kept} 1000\n")
    monkeypatch.setattr(system, "_memory_limits", lambda: iter([here / limit]))
    assert available_memory() == GB // 20 + 1000
    (here / usage).write_text(f"{GB}\n")
    assert available_memory() == 0


def _swap() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("SwapFree")))


def test_columns_with_covariates_are_in_memory_once(tmp_path: Path) -> None:
    cache, manifest = make_data(tmp_path / "data", {"mean": 1.0})[:2]
    asked = config(cache, manifest, covariates=("region",))
    poolings = list_poolings(asked.cache, None)
    embeddings, training = SweepRows(asked, poolings).load(poolings[0].name)
    assert embeddings.X.base is training.X
    assert embeddings.X.shape[1] == training.X.shape[1] - training.n_covariates
