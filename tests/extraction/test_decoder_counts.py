"""How many decoders a process starts by itself, alone and beside others of its launcher."""

import pytest

from medembed.core import system
from medembed.core.system import default_decoders

TORCHRUN = {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_CPUS_ON_NODE": "64"}


@pytest.mark.parametrize(
    ("cores", "environ", "expected"),
    [
        (2, {}, 2),
        (16, {}, 16),
        (192, {}, 32),  # one device needs no more
        (192, TORCHRUN, 24),
        (192, {"LOCAL_WORLD_SIZE": "2"}, 32),
        (4, TORCHRUN, 1),
        (64, {"LOCAL_WORLD_SIZE": "0"}, 32),
        (24, {"LOCAL_WORLD_SIZE": "many"}, 24),
        (64, {**STEP, "SLURM_NTASKS_PER_NODE": "4"}, 16),
        # Not srun: a batch script that runs one process itself.
        (24, {"SLURM_NTASKS_PER_NODE": "4", "SLURM_CPUS_ON_NODE": "24"}, 24),
        (64, {**STEP, "SLURM_STEP_TASKS_PER_NODE": "4(x2),8", "SLURM_NODEID": "1"}, 16),
        (64, {**STEP, "SLURM_STEP_TASKS_PER_NODE": "4(x2),8", "SLURM_NODEID": "2"}, 8),
        (64, {**STEP, "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "9"}, 32),
        # Of 64 cores SLURM has bound 8 to this process: they are its own.
        (8, {**STEP, "SLURM_STEP_TASKS_PER_NODE": "8"}, 8),
        # torchrun within a SLURM step: the processes that share the cores are torchrun's.
        (64, {**STEP, **TORCHRUN, "SLURM_STEP_TASKS_PER_NODE": "1"}, 8),
    ],
)
def test_decoders_share_the_cores_with_the_launchers_other_processes(
    monkeypatch: pytest.MonkeyPatch, cores: int, environ: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(system, "count_cores", lambda: cores)
    assert default_decoders(environ) == expected


def test_extraction_starts_no_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from made_extraction import HalvesEncoder, write_images

    from medembed.extraction import extract

    root = tmp_path_factory.mktemp("decoders")
    manifest = write_images(root / "images", 6)
    monkeypatch.setattr(system, "count_cores", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    report = extract(manifest, root / "images", HalvesEncoder(), root / "cache")
    assert report.decoders == 2
