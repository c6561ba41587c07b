"""Which of several workers this process is: as it was told, or as its launcher says."""

import re
from collections.abc import Mapping

from medembed.cache.pending import Worker
from medembed.core.errors import MedembedError

__all__ = ["LAUNCHERS", "find_worker", "parse_worker"]

# Index and number of workers, by launcher: torchrun, `srun`, a SLURM array that counts from 0.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
)


def parse_worker(text: str) -> Worker:
    """Read `I/N`, counted from 0.

    Raises
    ------
    ValueError
        It is not two whole numbers with 0 <= I < N.
    """
    if not re.fullmatch(r"[0-9]{1,9}/[0-9]{1,9}", text):
        raise ValueError(f"{text!r} is not I/N, such as 0/4 for the first of four")
    index, count = map(int, text.split("/"))
    return Worker(index, count)


def find_worker(environ: Mapping[str, str]) -> tuple[Worker, str] | None:
    """Find what a launcher says in the environment, and the name of the variable that said it.

    None where there is no launcher, or it started one process only.

    Raises
    ------
    MedembedError
        A launcher's variables contradict each other.
    """
    for index, count in LAUNCHERS:
        if index not in environ or count not in environ:
            continue
        try:
            worker = parse_worker(f"{environ[index]}/{environ[count]}")
        except ValueError as error:
            raise MedembedError(
                f"{index}={environ[index]} and {count}={environ[count]} name no worker: {error}. "
                "Correct them, or say which worker this is with --worker I/N."
            ) from error
        if worker.count > 1:
            return worker, index
    return None
