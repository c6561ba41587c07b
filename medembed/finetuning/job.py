"""Fine-tune an encoder's last blocks with a head, depth by depth, and write a run.

Every depth and seed is one trial of the run: written to its ledger when it ends, under a key that
hashes everything that determines its result. An interrupted trial resumes after its last epoch.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from medembed.cache.embeddings import find_rows
from medembed.core.errors import DeviceMemoryError, EncoderError, TrainingDataError
from medembed.core.files import json_digest
from medembed.dataset.build_file import read_build
from medembed.dataset.manifest import Manifest, existing_images, read_manifest
from medembed.evaluation.thresholds import ThresholdRule, parse_rules
from medembed.extraction.image_encoder import EncoderLike, name_encoder
from medembed.extraction.image_store import refuse_empty_root
from medembed.finetuning.batches import Images, VectorImages, compute_rows, read_images
from medembed.finetuning.config import (
    FineTuneConfig,
    Trial,
    describe,
    read_config,
    resolve_config,
    write_command,
)
from medembed.finetuning.data_split import TrainRows, choose_rows
from medembed.finetuning.export import (
    TrialResult,
    adapt,
    finish,
    load_ending,
    package,
    save_adapted,
)
from medembed.finetuning.frozen_features import (
    TRUNK_DTYPE,
    TokenImages,
    fill_trunk_cache,
    make_trunk,
)
from medembed.finetuning.head_init import init_from_sweep, init_random
from medembed.finetuning.hyperparameters import Depth, Hyperparameters
from medembed.finetuning.network import Network, blank_start
from medembed.finetuning.training import Trainer, explaining_memory
from medembed.images.load import DEFAULT_LIMITS, Limits
from medembed.results.provenance import public_name
from medembed.results.runs import Run, RunLike, create_run, open_run

__all__ = ["finetune"]

Progress = Callable[[int, int], None]
OnStatus = Callable[[str], None]


def finetune(
    manifest: Manifest | str | Path,
    image_root: str | os.PathLike[str],
    encoder: EncoderLike,
    out: str | Path,
    *,
    unfreeze: str | Sequence[str | int] = (0, 1, 2, 4),
    from_run: RunLike | None = None,
    trunk_cache: str | Path | None = None,
    trunk_dtype: str = TRUNK_DTYPE,
    n_seeds: int = 1,
    n_folds: int = 5,
    pool: str | Sequence[str] | None = None,
    config: Hyperparameters | Mapping[str, object] | None = None,
    device: str = "auto",
    precision: str = "auto",
    fit: str = "stretch",
    seed: int = 0,
    operating_points: Sequence[str | ThresholdRule] = (),
    limits: Limits = DEFAULT_LIMITS,
    progress: Progress | None = None,
    on_status: OnStatus | None = None,
) -> Run:
    """Train a head alone, and with the last blocks of its encoder, and score each once on test.

    One fold of the patients of `train` is held out: its predictions are the out-of-fold predictions
    behind the cross-validation score, calibration, thresholds and prediction sets. Some of the
    other folds' patients, who are not trained on either, are used for early stopping.

    Parameters
    ----------
    manifest : Manifest or path
        Names the images, their labels, patients and splits.
    image_root : path
        Directory that the manifest's image paths are relative to.
    encoder : Encoder, str or path
        A loaded encoder, which is not modified, or a reference that `load_encoder` accepts.
    out : path
        The run directory: new, or that of an identical training, which is then resumed.
    unfreeze : str or sequence
        Depths, such as ``0,1,2,all``: the number of last blocks that train, with the norm after
        them; 0 trains the head alone, ``all`` everything.
    from_run : Run or path, optional
        A sweep on this encoder's embeddings and this manifest, whose best MLP or logistic head is
        used, retrained without the held-out patients. By default a new MLP.
    trunk_cache : path, optional
        Directory for the output of the blocks that stay frozen at every depth. It excludes
        augmentation.
    trunk_dtype : {"float32", "float16"}
        Dtype of that output.
    n_seeds : int
        Number of seeds per depth, starting from `seed`; the held-out patients depend only on
        `seed`.
    n_folds : int
        Number of folds, one of which is held out.
    pool : str or sequence of str, optional
        Single-vector poolings, joined; by default mean and max, or those of `from_run`.
    config : mapping or Hyperparameters, optional
        Hyperparameters, such as ``{"epochs": 10, "lr": 3e-4}``; `precision` is overridden by the
        argument.
    device, precision, fit : str
        Where and how to run the encoder, see `load_encoder`; a loaded encoder keeps its own device
        and fit. bf16 applies to products in training.
    seed : int
        Random seed.
    operating_points : sequence of str or ThresholdRule
        Rules packaged with every model in addition to `thresholds.PACKAGED`; see
        `thresholds.parse_rule`.
    limits : Limits
        Limits on size and time beyond which an image counts as failed.
    progress : callable, optional
        Called as progress(done, total).
    on_status : callable, optional
        Called with a few words when a new step begins.

    Returns
    -------
    Run
        Complete. Its ``leaderboard`` has the columns ``head, pooling, trial, params, cv, seconds,
        status, error, depth, lora, seed, trainable, best_epoch, encoder``, best first, failed
        trials last. ``lora`` is the rank of adapters, ``trainable`` how many numbers training
        changes, ``encoder`` the fingerprint of the adapted encoder, None for depth 0.

    Raises
    ------
    TrainingDataError
        Depths, labels, patients or hyperparameters are invalid; raised before any training.
    EncoderError
        The encoder cannot be loaded or unfrozen.
    PathNotFoundError, ManifestError
        Images are missing, or differ from the manifest's.
    RunError
        `out` holds a different run, `from_run` does not match, or every depth failed.
    CacheError
        The disk is too small for the trunk cache, or a shard is damaged.
    MedembedError
        `config` asks for LoRA, and peft is not installed.
    """
    points = parse_rules(operating_points)
    table = read_manifest(manifest)
    rows, root = choose_rows(table, n_folds, seed), existing_images(image_root)
    from_run = None if from_run is None else open_run(from_run).path
    refuse_empty_root(root, rows.rows["image"], len(rows), "to train on")
    asked = resolve_config(
        table,
        root,
        unfreeze.split(",") if isinstance(unfreeze, str) else unfreeze,
        encoder,
        read_config(config),
        from_run=from_run,
        trunk=(trunk_cache, trunk_dtype),
        seeds=tuple(range(seed, seed + n_seeds)),
        n_folds=n_folds,
        pool=pool,
        on={"device": device, "precision": precision, "fit": fit},
    )
    asked = replace(asked, limits=limits, build=read_build(manifest, table), points=points)
    name = "MANIFEST" if isinstance(manifest, Manifest) else public_name(manifest)
    reference = public_name(name_encoder(encoder))
    command = write_command(asked, name, reference, public_name(out), from_run)
    run = create_run(out, asked.question(), details=describe(asked, command))
    with run.locked():
        if not run.is_complete:
            _train_all(
                run, asked, rows, progress or (lambda *_: None), on_status or (lambda _: None)
            )
        run.drop_folds()
        shutil.rmtree(run.path / "training", ignore_errors=True)
    return run


def _train_all(
    run: Run, asked: FineTuneConfig, rows: TrainRows, progress: Progress, on_status: OnStatus
) -> None:
    """Train the trials missing from the ledger, and finish the run."""
    images, rows = _open_images(run, asked, rows, progress, on_status)
    shared = json_digest([asked.question(), rows.rows["sha256"].tolist()])
    keys = {trial.head: json_digest([shared, trial.head])[:32] for trial in asked.trials}
    endings = {head: load_ending(run, key, rows) for head, key in keys.items()}
    if any(ending is None for ending in endings.values()):
        run.drop_partial_models()
        X = None
        for trial in sorted(asked.trials, key=lambda trial: (trial.seed, trial.number)):
            if endings[trial.head] is None:
                own = asked.for_seed(trial.seed)
                if X is None or asked.recipe.from_scratch:
                    X = _embed(own, images, rows, progress, on_status)
                key = keys[trial.head]
                trained = _train(run, own, rows, images, X, trial, key, progress, on_status)
                endings[trial.head] = trained
    done = [ending for ending in endings.values() if ending is not None]
    finish(run, asked.manifest, rows, done, asked.build, asked.points)


def _open_images(
    run: Run, asked: FineTuneConfig, rows: TrainRows, progress: Progress, on_status: OnStatus
) -> tuple[Images, TrainRows]:
    """Decode the images, or fill the trunk cache; leave out failed images."""
    if asked.n_cut is not None and asked.trunk_cache is not None:
        trunk = make_trunk(asked.encoder, asked.n_cut, asked.recipe.precision)
        own = replace(asked.manifest, rows=rows.rows)
        cache = fill_trunk_cache(
            asked.trunk_cache,
            trunk,
            own,
            asked.image_root,
            dtype=asked.trunk_dtype,
            limits=asked.limits,
            progress=progress,
            on_status=on_status,
        )
        _, _, failed = find_rows(cache, rows.rows, "MANIFEST")
        left, _ = rows.without(failed)
        return TokenImages(cache, left.rows), left
    images, failed = read_images(
        rows.rows,
        asked.image_root,
        asked.encoder.preprocessing,
        run.path,
        limits=asked.limits,
        progress=progress,
        on_status=on_status,
    )
    left, kept = rows.without(failed)
    return images.of(kept), left


def _embed(
    asked: FineTuneConfig, images: Images, rows: TrainRows, progress: Progress, on_status: OnStatus
) -> np.ndarray:
    """Return the pooled vectors of all rows before any training, float32 (n, d)."""
    on_status("Embedding")
    width = sum(asked.encoder.dimensions[name][0] for name in asked.poolings)
    recipe = replace(asked.recipe, checkpointing=False)
    start = blank_start(width)
    network = Network(asked.encoder, Depth(0), recipe, asked.poolings, start, asked.n_cut)
    size = -(-recipe.batch_size // recipe.accumulate)
    X = np.empty((len(rows), width), np.float32)
    with torch.no_grad(), explaining_memory("the encoder", recipe):
        done, device = 0, asked.encoder.device
        for part in compute_rows(network.vectors, images, np.arange(len(rows)), device, size):
            X[done : done + len(part)] = part
            done += len(part)
            progress(done, len(rows))
    if not np.isfinite(X).all():
        raise EncoderError(
            f"embeddings of {asked.encoder.source} are not finite in {recipe.precision}. Try "
            "--precision fp32."
        )
    return X


def _train(
    run: Run,
    asked: FineTuneConfig,
    rows: TrainRows,
    images: Images,
    X: np.ndarray,
    trial: Trial,
    key: str,
    progress: Progress,
    on_status: OnStatus,
) -> TrialResult:
    """Return the result of training one depth with one seed; errors become a failed result."""
    name, depth, seed = trial.head, trial.depth, trial.seed
    known = {"number": trial.number, "head": name, "depth": depth.blocks, "seed": seed, "key": key}
    lora = asked.recipe.lora if depth.blocks else None
    known |= {"pooling": "+".join(asked.poolings), "params": asked.params(lora)}
    known |= {"lora": lora, "trainable": None}
    try:
        on_status(name)
        if asked.swept is not None:
            start = init_from_sweep(asked.swept, X, rows.y, rows.fitted, seed)
        else:
            start = init_random(X, rows.fitted, seed)
        # If only the head trains, its inputs do not change unless the images are augmented.
        is_fixed = not depth.blocks and not asked.recipe.augment
        own = VectorImages(X) if is_fixed else images
        given = (asked.encoder, depth, asked.recipe, asked.poolings, start, asked.n_cut)
        network = Network(*given, seed=seed)
        known["trainable"] = network.n_trainable
        path = run.path / "training" / f"{name}.safetensors"
        trainer = Trainer(network, rows, own, seed=seed, name=name, state_path=path, key=key)
        smoothing = float(start.params["label_smoothing"])
        trained = trainer.train(label_smoothing=smoothing, progress=progress, on_status=on_status)
        adapted = adapt(asked.encoder, network)
        fingerprint = None
        if depth.blocks:
            fingerprint = save_adapted(adapted, run.path / "encoders" / name)
        vectors = None if depth.blocks else X
        package(
            *(run, asked.manifest, rows, network, start, trained, adapted, fingerprint, known),
            vectors,
            asked.points,
        )
        path.unlink(missing_ok=True)
        ending = TrialResult.of(trained, fingerprint, known)
    except (TrainingDataError, DeviceMemoryError) as error:
        ending = TrialResult.failed(error, known)
    ending.write(run)
    return ending
