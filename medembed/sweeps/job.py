"""Sweep heads over the embeddings of a cache: choose, cross-validate, refit, score once on test.

Early stopping and the choice of a configuration use patients of the folds that are trained on, so
that the scored fold influences neither.

Every trial and fold is written to the run's ledger when it ends, under a key that hashes everything
that determines its result; repeating the sweep runs only the missing ones.
"""

import os
import shlex
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medembed.cache.store import Cache, open_cache
from medembed.core.errors import TrainingDataError
from medembed.core.locations import Location, as_location
from medembed.core.poolings import IMAGE_STATISTICS
from medembed.core.prompts import Prompts, read_prompts
from medembed.core.ray_cluster import connected_to_ray
from medembed.core.system import library_versions
from medembed.dataset.build_file import KeptBuild, read_build
from medembed.dataset.manifest import Manifest, existing_images, read_manifest
from medembed.evaluation.scores import SCORES
from medembed.evaluation.thresholds import ThresholdRule, parse_rules
from medembed.heads.registry import head_class
from medembed.results.label_audit import read_suspects
from medembed.results.provenance import (
    describe_source,
    list_left_out,
    public_name,
    summarise_data,
)
from medembed.results.run_schema import CV_METHOD
from medembed.results.runs import Run, create_run
from medembed.sweeps.data import (
    Exclusion,
    PooledColumns,
    SweepConfig,
    SweepRows,
    estimate_need,
    list_poolings,
    plan_batches,
)
from medembed.sweeps.finalize import CardExtras, finish
from medembed.sweeps.layers import PROBE, LayerProbes
from medembed.sweeps.memory import fit_jobs
from medembed.sweeps.processes import choose_jobs, start_importing
from medembed.sweeps.runner import Ledger, run_batches
from medembed.sweeps.search_space import default_spaces, read_spaces
from medembed.sweeps.selection import Standing, choose, standings
from medembed.sweeps.worker_pool import BACKENDS

__all__ = ["Execution", "configure", "fit_memory", "run_sweep", "sweep", "write_command"]

_WORTH_SAYING = 1_000_000_000  # bytes
METADATA_HEAD, STATISTICS_HEAD = "metadata", IMAGE_STATISTICS
WORD_HEADS = ("zero-shot", "text-logistic")  # what prompts add


def sweep(
    cache: Cache | str | os.PathLike[str],
    manifest: Manifest | str | Path,
    out: str | Path,
    *,
    heads: str | Sequence[str] = ("logistic", "mlp", "lightgbm"),
    pool: str | Sequence[str] | None = None,
    space: str | Path | None = None,
    n_configs: int | None = None,
    n_folds: int = 5,
    metric: str = "auroc",
    covariates: Sequence[str] = (),
    train_fraction: float = 1.0,
    seed: int = 0,
    operating_points: Sequence[str | ThresholdRule] = (),
    prompts: Prompts | str | Path | None = None,
    image_root: str | os.PathLike[str] | None = None,
    without_suspects: str | Path | None = None,
    jobs: int | None = None,
    backend: str = "loky",
    progress: Callable[[int, int], None] | None = None,
    board: Callable[[Callable[[], list[Standing]]], None] | None = None,
    announce: Callable[[str], None] | None = None,
) -> Run:
    """Choose and cross-validate each head's configuration, refit it on train, score it on test.

    Parameters
    ----------
    cache : Cache or path
        Embeddings of the manifest's images.
    manifest : Manifest or path
        Labels, patients and splits.
    out : str or Path
        The run directory: new, or that of an identical sweep, which is then resumed.
    heads : str or sequence of str
        Names of heads, see `medembed.heads.registry`; ``logistic`` is added if missing.
    pool : str or sequence of str, optional
        Columns to try heads on, each a pooling or several joined by ``+``; by default all
        single-vector poolings of the cache joined. A pooling of cells, such as ``grid4``, is for
        heads that read cells; ``mean@all`` stands for `mean@K` of every block in the cache. Where
        several blocks are tried, `Run.info` has the score by layer, see `sweeps.layers`.
    space : path, optional
        A search space, see `sweeps.search_space`; heads that it does not name use the default.
    n_configs : int, optional
        Configurations tried per head and pooling, at least 1; by default the space's number.
    n_folds : int
        Patient-disjoint folds, at least 2.
    metric : str
        The study-level score by which configurations are chosen, one of `SCORES`.
    covariates : sequence of str
        Columns of the manifest that are encoded and appended to every embedding.
    train_fraction : float in (0, 1]
        Share of the training patients to use; the patients of a smaller share are contained in a
        larger one, and keep their folds.
    seed : int
        Determines folds, configurations and heads. Equal seeds give equal predictions for any
        `jobs`.
    operating_points : sequence of str or ThresholdRule
        Rules packaged with every model in addition to `thresholds.PACKAGED`; see
        `thresholds.parse_rule`.
    prompts : Prompts or path, optional
        A file of `medembed prompts`, of the checkpoint whose image tower the cache is of. Adds the
        heads that read words, ``zero-shot`` and ``text-logistic``, unless `heads` names one; they
        read the pooling ``pooler``.
    image_root : path, optional
        Directory, or bucket's prefix, that the manifest's paths are relative to. Adds the head
        ``imagestats``, whose columns are measured on the files if the cache does not hold the
        pooling of that name.
    without_suspects : path, optional
        `audit.json` of `medembed audit labels`, or its directory: its suspects of train are not
        trained on. Those of test are scored as all others.
    jobs : int, optional
        Single-threaded processes; by default one per core, or as many as fit into memory. 1 trains
        in this process. More than cores and memory allow are refused.
    backend : {"loky", "ray"}
        Processes on this machine, or on the Ray cluster at `RAY_ADDRESS`.
    progress : callable, optional
        Called with the number of trained folds so far and the total.
    board : callable, optional
        Called whenever a trial has ended, with a function that returns the current leaderboard (see
        `standings`) whenever it is called.
    announce : callable, optional
        Called once, before rows are loaded, with a sentence on the memory that the sweep takes at
        most, if that is 1 GB or more.

    Returns
    -------
    Run
        Complete. Its ``leaderboard`` has the columns ``head, pooling, trial, params, cv, seconds,
        status, error, chosen_by, n_tried, budget, fold_budgets``, best first; heads whose
        configurations all failed come last. ``cv`` is the winner's score when trained on all folds
        except the scored one; ``chosen_by`` is the optimistic score by which it was chosen, on
        patients within these folds, from ``n_tried`` configurations. ``fold_budgets`` are the
        best numbers of epochs or trees there, ``budget`` is their median, used for the model; None
        for heads without one.

    Raises
    ------
    TrainingDataError
        Labels, patients, columns, heads, space, prompts, metric or memory do not allow this sweep;
        raised before any training.
    ModelError
        The file of prompts is damaged, or has no set of the name that the space asks for.
    CacheError
        A pooling is not in the cache.
    MissingRowsError
        Rows of the manifest are neither embedded nor listed as failed.
    RunError
        `out` holds a different sweep or is not a run, or every head failed.
    """
    asked = configure(
        cache,
        manifest,
        heads=heads,
        space=space,
        n_configs=n_configs,
        n_folds=n_folds,
        metric=metric,
        covariates=covariates,
        train_fraction=train_fraction,
        seed=seed,
        operating_points=operating_points,
        prompts=prompts,
        image_root=image_root,
        without_suspects=without_suspects,
    )
    poolings = list_poolings(asked.cache, pool)
    execution = fit_memory(asked, poolings, Execution(jobs, backend), announce)
    execution.start()
    data = SweepRows(asked, poolings)
    command = write_command(
        asked, cache=cache, manifest=manifest, out=out, pool=pool, space=space, prompts=prompts
    )
    build = read_build(manifest, asked.manifest)
    return run_sweep(data, out, command, build, execution, progress=progress, board=board)


def configure(
    cache: Cache | str | os.PathLike[str],
    manifest: Manifest | str | Path,
    *,
    heads: str | Sequence[str] = ("logistic", "mlp", "lightgbm"),
    space: str | Path | None = None,
    n_configs: int | None = None,
    n_folds: int = 5,
    metric: str = "auroc",
    covariates: Sequence[str] = (),
    train_fraction: float = 1.0,
    seed: int = 0,
    operating_points: Sequence[str | ThresholdRule] = (),
    prompts: Prompts | str | Path | None = None,
    image_root: str | os.PathLike[str] | None = None,
    without_suspects: str | Path | None = None,
) -> SweepConfig:
    """Return the options of `sweep`, checked, with cache and manifest open."""
    heads = heads.split(",") if isinstance(heads, str) else heads
    _check_options(heads, n_configs, n_folds, metric)
    opened = open_cache(cache)
    words = None if prompts is None else read_prompts(prompts)
    heads = _add_word_heads(heads, words, opened, covariates)
    root = None if image_root is None else existing_images(image_root)
    if root is not None:
        heads = [*heads, STATISTICS_HEAD]
    lacking = _find_lacking(heads, opened, covariates, root)
    heads = [head for head in heads if head not in lacking]
    heads = list(dict.fromkeys([*heads, PROBE]))  # always a linear baseline
    read, without = read_manifest(manifest), None
    if without_suspects is not None:
        read, without = _leave_out(read, without_suspects)
    return SweepConfig(
        cache=opened,
        manifest=read,
        heads=heads,
        spaces=default_spaces(heads) if space is None else read_spaces(space, heads),
        n_configs=n_configs,
        n_folds=n_folds,
        metric=metric,
        covariates=tuple(covariates),
        train_fraction=train_fraction,
        seed=seed,
        points=parse_rules(operating_points),
        words=words,
        image_root=root,
        lacking=lacking,
        without=without,
    )


@dataclass(frozen=True)
class Execution:
    """Where a sweep's processes run: their number and kind, see `sweep`."""

    jobs: int | None = None
    backend: str = "loky"

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise TrainingDataError(f"--jobs is {self.jobs}; at least 1 process trains.")
        _check_known("backend", self.backend, BACKENDS)
        if self.backend == "loky":
            choose_jobs(self.jobs)

    def start(self) -> None:
        """Let processes of this machine import libraries, which takes seconds, while rows load."""
        if self.backend == "loky":
            start_importing(self.jobs)


def fit_memory(
    asked: SweepConfig,
    poolings: Sequence[PooledColumns],
    execution: Execution,
    announce: Callable[[str], None] | None = None,
) -> Execution:
    """Return `execution` with as many processes as fit into memory; see `fit_jobs`."""
    if execution.backend != "loky":  # the memory of a Ray cluster is elsewhere
        return execution
    need = estimate_need(asked, poolings)
    jobs = fit_jobs(need, execution.jobs, _spare(asked, poolings))
    if announce is not None and need.bytes_of_rows(jobs) >= _WORTH_SAYING:
        each = ", whatever the number of poolings" if len(poolings) > 1 else ""
        announce(f"This sweep takes {need.describe(jobs)}{each}.")
    return replace(execution, jobs=jobs)


def run_sweep(
    data: SweepRows,
    out: str | Path,
    command: str,
    build: KeptBuild | None,
    execution: Execution,
    *,
    progress: Callable[[int, int], None] | None = None,
    board: Callable[[Callable[[], list[Standing]]], None] | None = None,
) -> Run:
    """Train, finish and return the run of a sweep's rows; see `sweep`.

    Parameters
    ----------
    data : SweepRows
    out : str or Path
        The run directory.
    command : str
        The command that repeats the sweep.
    build : KeptBuild, optional
        What the manifest's build found.
    execution : Execution
    progress, board
        See `sweep`.
    """
    asked = data.asked
    batches = plan_batches(
        asked.heads,
        data.tried,
        asked.spaces,
        asked.n_configs,
        asked.n_folds,
        data.shared,
        asked.words,
    )
    rows = asked.labelled_rows
    details = {
        "seed": asked.seed,
        "cv_method": CV_METHOD,
        "command": command,
        "versions": library_versions("sweep"),
        "encoder": describe_source(
            asked.cache.recorded, asked.cache.spec.encoder, asked.cache.spec.preprocessing
        ),
        "data": summarise_data(rows, data.failed, asked.manifest.label_level, build),
        "left_out": list_left_out(rows, data.failed),
        **({"lacking": dict(asked.lacking)} if asked.lacking else {}),
        **({"without_suspects": asked.without.as_dict()} if asked.without else {}),
    }

    def watch(ledger: Ledger) -> None:
        if progress is not None:
            progress(len(ledger.done), ledger.n_wanted)
        if board is not None:
            board(lambda: standings(ledger, asked.metric))

    with _connected(execution.backend):
        run = create_run(out, data.question(batches), details=details)
        with run.locked():
            if not run.is_complete:
                ledger = Ledger(run, batches, watch)
                _train(run, ledger, data, execution.jobs, execution.backend)
            elif progress is not None:
                progress(n_total := len(run.trial_records()), n_total)
            run.drop_folds()
    return run


def _train(run: Run, ledger: Ledger, data: SweepRows, jobs: int | None, backend: str) -> None:
    """Train the trials missing from the ledger, pooling by pooling, and finish the run."""
    asked = data.asked
    probes = LayerProbes(run, ledger, asked.metric, [pooling.name for pooling in data.poolings])
    for pooling in data.poolings:
        own = [batch for batch in ledger.batches if batch.pooling == pooling.name]
        if any(ledger.lacks(batch, fold) for batch in own for fold in range(asked.n_folds)):
            training = data.load(pooling.name)[1]
            run_batches(ledger, own, training, asked.n_folds, jobs, backend, data.bases)
        if pooling.name in probes.wanted:  # while its rows are in memory
            probes.add(pooling.name, *data.load(pooling.name), jobs, backend)
    if probes.wanted:
        run.update_info(layers=probes.describe(asked.cache.recorded.get("blocks")))
    winners = [choose(ledger, head, asked.metric) for head in asked.heads]
    extras: CardExtras = {"covariates": None if data.encoder is None else data.encoder.as_dict()}
    if asked.target:
        extras["target"] = asked.target
    finish(run, data.load, data.row_folds, winners, extras, asked.points, jobs, backend)


def _check_options(heads: Sequence[str], n_configs: int | None, n_folds: int, metric: str) -> None:
    if not heads:
        raise TrainingDataError("no head was given. Name at least one with --heads.")
    for head in heads:
        head_class(head)
    if n_configs is not None and n_configs < 1:
        raise TrainingDataError(f"--configs is {n_configs}; try at least 1 configuration per head.")
    if n_folds < 2:
        raise TrainingDataError(f"--folds is {n_folds}; cross-validation needs at least 2 folds.")
    _check_known("metric", metric, SCORES)


def _check_known(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise TrainingDataError(f"{name} {value!r} is unknown. Choose one of: {', '.join(known)}.")


def _add_word_heads(
    heads: Sequence[str], words: Prompts | None, cache: Cache, covariates: Sequence[str]
) -> list[str]:
    """Return the heads, with those that read words where there are prompts for the cache.

    Raises
    ------
    TrainingDataError
        The prompts are missing, or do not belong to the cache's vectors.
    """
    reading = [head for head in heads if head_class(head).reads_words]
    if words is None:
        if reading:
            raise TrainingDataError(
                f"head {reading[0]} needs prompts. Make them with `medembed prompts`, and give "
                "--prompts FILE."
            )
        return list(heads)
    document, source = words.document, cache.recorded.get("source") or "an unknown encoder"
    if document.encoder != cache.spec.encoder:
        raise TrainingDataError(
            f"the prompts are of {document.source} (image tower {document.encoder[:12]}…), and the "
            f"cache is of {source} ({cache.spec.encoder[:12]}…): words and images of two "
            "checkpoints have nothing in common. MedGemma's tower has no partner in words; "
            "MedSigLIP's has. Make prompts with the cache's own checkpoint."
        )
    shape = cache.spec.poolings.get(document.pooling)
    if shape != (words.n_columns,):
        held = "no" if shape is None else f"{shape} values of the"
        raise TrainingDataError(
            f"the prompts belong to the pooling {document.pooling}, and the cache holds {held} "
            f"{document.pooling}. Extract with --pool mean,max,{document.pooling}."
        )
    if words.regions and "region" not in covariates:
        raise TrainingDataError(
            "the prompts name regions, which heads read off a covariate. Add --covariates region, "
            "or make prompts without {region}."
        )
    return list(heads) if reading else [*heads, *WORD_HEADS]


def _leave_out(manifest: Manifest, audit: str | Path) -> tuple[Manifest, Exclusion]:
    """Return the manifest without the labels that an audit suspects in train."""
    suspects = [own for own in read_suspects(audit, manifest) if own.split == "train"]
    known = {sha256 for own in suspects for sha256 in own.images}
    rows = manifest.rows
    is_out = rows["sha256"].isin(known) & (rows["split"] == "train")
    masked = replace(manifest, rows=rows.assign(label=rows["label"].mask(is_out)))
    hashes = tuple(sorted(rows.loc[is_out, "sha256"]))
    return masked, Exclusion(manifest.digest(), len(suspects), hashes)


def _find_lacking(
    heads: Sequence[str],
    cache: Cache,
    covariates: Sequence[str],
    image_root: Location | None,
) -> dict[str, str]:
    """Return the baselines among the heads that have nothing to read, and why."""
    found = {}
    if METADATA_HEAD in heads and not covariates:
        found[METADATA_HEAD] = "no covariates were named. Add --covariates COLUMN,…"
    if (
        STATISTICS_HEAD in heads
        and image_root is None
        and IMAGE_STATISTICS not in cache.spec.poolings
    ):
        found[STATISTICS_HEAD] = (
            f"the cache does not hold {IMAGE_STATISTICS}. Add --image-root DIR, or extract with "
            f"--pool mean,max,{IMAGE_STATISTICS}"
        )
    return found


def _spare(asked: SweepConfig, poolings: Sequence[PooledColumns]) -> str:
    """Return what takes less memory than this sweep, as the end of a sentence."""
    ways = []
    if any("+" in pooling.name for pooling in poolings):
        ways.append(f"fewer columns (--pool {poolings[0].name.split('+')[0]})")
    if asked.train_fraction == 1:
        ways.append("a part of the patients (--train-fraction 0.5)")
    return " or ".join([*ways, "a machine with more"])


def _connected(backend: str) -> AbstractContextManager[Any]:
    """Return a context that stays connected to Ray during the sweep, if Ray is the backend."""
    return connected_to_ray("--backend ray") if backend == "ray" else nullcontext()


def write_command(
    asked: SweepConfig,
    *,
    cache: Cache | str | os.PathLike[str],
    manifest: Manifest | str | Path,
    out: str | Path,
    pool: str | Sequence[str] | None,
    space: str | Path | None,
    targets: Sequence[str] = (),
    prompts: Prompts | str | Path | None = None,
) -> str:
    """Return the command that repeats a sweep."""
    words = [
        "medembed",
        "sweep",
        public_name(cache.path if isinstance(cache, Cache) else as_location(cache, "a cache")),
    ]
    words += ["MANIFEST" if isinstance(manifest, Manifest) else public_name(manifest)]
    words += ["--out", public_name(out), "--heads", ",".join(asked.heads)]
    words += ["--target", ",".join(targets)] if targets else []
    words += ["--pool", pool if isinstance(pool, str) else ",".join(pool)] if pool else []
    words += ["--space", public_name(space)] if space else []
    if prompts is not None:
        words += ["--prompts", "FILE" if isinstance(prompts, Prompts) else public_name(prompts)]
    words += ["--configs", str(asked.n_configs)] if asked.n_configs else []
    words += ["--covariates", ",".join(asked.covariates)] if asked.covariates else []
    words += ["--without-suspects", "REVIEW"] if asked.without else []
    words += ["--image-root", public_name(asked.image_root)] if asked.image_root else []
    words += ["--train-fraction", str(asked.train_fraction)] if asked.train_fraction < 1 else []
    words += [word for rule in asked.points for word in ("--operating-point", rule.name)]
    words += ["--folds", str(asked.n_folds), "--metric", asked.metric, "--seed", str(asked.seed)]
    return shlex.join(words)
