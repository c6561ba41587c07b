"""Sweep several targets of one manifest: rows are loaded once, and folds are the same for all."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medembed.cache.store import Cache
from medembed.core.errors import TrainingDataError
from medembed.core.prompts import Prompts
from medembed.dataset.build_file import KeptBuild, read_build
from medembed.dataset.manifest import Manifest
from medembed.dataset.splits import draw_target_folds
from medembed.dataset.targets import check_targets, count_target
from medembed.results.runs import Run
from medembed.results.targets import TargetEntry, TargetRuns, create_targets
from medembed.sweeps.data import PooledColumns, SharedRows, SweepConfig, SweepRows, list_poolings
from medembed.sweeps.job import Execution, configure, fit_memory, run_sweep, write_command

__all__ = ["TargetSweep", "prepare_targets", "sweep_targets"]


@dataclass(frozen=True, eq=False)
class TargetSweep:
    """A sweep of targets, of which nothing is trained yet.

    Attributes
    ----------
    runs : TargetRuns
        The directory, with its `targets.json`.
    """

    runs: TargetRuns
    _asked: SweepConfig
    _poolings: Sequence[PooledColumns]
    _rows: SharedRows
    _build: KeptBuild | None
    _execution: Execution

    def sweep(self, name: str, **watched: Any) -> Run:
        """Train a target and return its complete run.

        Parameters
        ----------
        name : str
            One of ``runs.names``.
        **watched
            ``progress`` and ``board`` of `medembed.sweeps.sweep`.
        """
        data = SweepRows(replace(self._asked, target=name), self._poolings, self._rows)
        command = self.runs.content.command
        out = self.runs.run_path(name)
        return run_sweep(data, out, command, self._build, self._execution, **watched)


def sweep_targets(
    cache: Cache | str | os.PathLike[str],
    manifest: Manifest | str | Path,
    out: str | Path,
    targets: str | Sequence[str],
    *,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> TargetRuns:
    """Sweep several targets of a manifest, each into a run of its own below `out`.

    Folds come from manifest and seed and are the same for all targets, whichever are asked for;
    each target trains on those rows where its answer is known. In cross-validation, scalings and
    components are learnt once, from all training rows of a fold's learning part.

    Parameters
    ----------
    cache, manifest
        As for `medembed.sweeps.sweep`.
    out : str or Path
        The directory: new, or that of an identical sweep, which is then resumed.
    targets : str or sequence of str
        Names of targets; ``label`` is the manifest's own label.
    progress : callable, optional
        Called for each target with the number of trained folds so far and the total.
    **options
        The further options of `medembed.sweeps.sweep`.

    Returns
    -------
    TargetRuns
        With a complete run for each target that can be estimated.

    Raises
    ------
    ManifestError
        The manifest has no such target.
    TrainingDataError
        No target can be estimated, or on the conditions of `medembed.sweeps.sweep`.
    RunError
        `out` holds a different sweep or is a run, or every head of a target failed.
    """
    prepared = prepare_targets(cache, manifest, out, targets, **options)
    for name in prepared.runs.names:
        prepared.sweep(name, progress=progress)
    return prepared.runs


def prepare_targets(
    cache: Cache | str | os.PathLike[str],
    manifest: Manifest | str | Path,
    out: str | Path,
    targets: str | Sequence[str],
    *,
    pool: str | Sequence[str] | None = None,
    space: str | Path | None = None,
    prompts: Prompts | str | Path | None = None,
    jobs: int | None = None,
    backend: str = "loky",
    **options: Any,
) -> TargetSweep:
    """Check the options, load the rows, and write `targets.json`; see `sweep_targets`."""
    asked = configure(cache, manifest, space=space, prompts=prompts, **options)
    if asked.without is not None:
        raise TrainingDataError(
            "an audit suspects labels, and targets have answers of their own. Leave out --target "
            "or --without-suspects."
        )
    wanted = targets.split(",") if isinstance(targets, str) else targets
    names = check_targets(wanted, asked.manifest.rows.columns)
    if not names:
        raise TrainingDataError("no target was given. Name at least one with --target.")
    poolings = list_poolings(asked.cache, pool)
    execution = fit_memory(asked, poolings, Execution(jobs, backend))
    execution.start()
    rows = SharedRows(asked, poolings, draw_target_folds)
    entries = list(_describe(asked, names, poolings, rows))
    if all(entry.reason is not None for entry in entries):
        reasons = " ".join(f"{entry.name}: {entry.reason}" for entry in entries)
        raise TrainingDataError(f"no target can be estimated. {reasons}")
    command = write_command(
        asked,
        cache=cache,
        manifest=manifest,
        out=out,
        pool=pool,
        space=space,
        targets=names,
        prompts=prompts,
    )
    shared = {
        "manifest": asked.digest,
        "n_folds": asked.n_folds,
        "train_fraction": asked.train_fraction,
        "seed": asked.seed,
    }
    runs = create_targets(out, shared, entries, command)
    build = read_build(manifest, asked.manifest)
    return TargetSweep(runs, asked, poolings, rows, build, execution)


def _describe(
    asked: SweepConfig, names: Sequence[str], poolings: Sequence[PooledColumns], rows: SharedRows
) -> Iterator[TargetEntry]:
    """Yield each target with its counts, and why it cannot be estimated if it cannot."""
    for name in names:
        reason = None
        try:
            SweepRows(replace(asked, target=name), poolings, rows)
        except TrainingDataError as error:
            reason = str(error)
        counts = count_target(asked.manifest.rows, name)
        yield TargetEntry(name=name, reason=reason, **counts)
