"""Finish a trial: store its result in the run, write its encoder and head, score the run."""

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors.torch import save

from medembed.core.errors import EncoderError, MedembedError, RunError
from medembed.core.files import json_bytes, read_plain, sync_directory, write_atomically
from medembed.core.schema import as_json
from medembed.dataset.build_file import KeptBuild
from medembed.dataset.identities import name_persons
from medembed.dataset.manifest import Manifest
from medembed.encoders.base_ref import BASE_FILE, CHANGED_FILE, Origin, describe_base
from medembed.encoders.checkpoint_files import WEIGHTS_FILE, holds_file
from medembed.encoders.delta import find_changed
from medembed.encoders.loading import adapt_encoder, load_encoder
from medembed.encoders.preprocessing import PROCESSOR_FILES
from medembed.encoders.torch_encoder import TorchEncoder
from medembed.evaluation.drift.reference import fit_reference
from medembed.evaluation.scores import by_study
from medembed.evaluation.thresholds import ThresholdRule
from medembed.extraction import spec_of
from medembed.finetuning.data_split import HELD_OUT, TrainRows
from medembed.finetuning.network import Network, Start
from medembed.finetuning.training import Trained
from medembed.heads.mlp import MLPHead
from medembed.heads.packaging import save_model
from medembed.heads.scaling import Projection
from medembed.results.comparison import score_run
from medembed.results.model_card import CardDecisions, describe_decisions
from medembed.results.model_readme import (
    NewCard,
    complete_cards,
    count_trained,
    describe_encoder,
    describe_use,
    write_readme,
)
from medembed.results.predictions import image_code, image_rows, prior_rows
from medembed.results.provenance import list_left_out, summarise_data
from medembed.results.run_schema import CV_METHOD, TrialRecord, describe_failure, is_final
from medembed.results.runs import Run

__all__ = ["TrialResult", "adapt", "finish", "load_ending", "package", "save_adapted"]


def package(
    run: Run,
    manifest: Manifest,
    rows: TrainRows,
    network: Network,
    start: Start,
    trained: Trained,
    encoder: TorchEncoder,
    fingerprint: str | None,
    known: Mapping[str, Any],
    vectors: NDArray[np.float32] | None = None,
    points: Sequence[ThresholdRule] = (),
) -> None:
    """Save a trained head in `models/<head>/`, in the format of a sweep's winners.

    Parameters
    ----------
    encoder : TorchEncoder
        The encoder whose embeddings the head reads; `fingerprint` is set if training changed it.
    known : mapping
        See `TrialResult.known`.
    vectors : float32 array of shape (n, d), optional
        The head's input for all rows, if known: the model then stores statistics of the training
        rows, from which `evaluate` measures drift.
    points : sequence of ThresholdRule
        Operating points in addition to the default ones.
    """
    path = run.model_path(known["head"])
    path.parent.mkdir(exist_ok=True)
    spec = spec_of(encoder, network.poolings).as_dict()
    if fingerprint is not None:
        spec["encoder"] = fingerprint
    # Held-out patients determined thresholds and count as seen; embeddings are those of all rows.
    seen = np.flatnonzero(rows.folds >= 0)
    data = summarise_data(manifest.rows, rows.failed, manifest.label_level)
    base = run.info.encoder
    place = None if fingerprint is None else f"../../encoders/{known['head']}"
    decisions: CardDecisions = describe_decisions(_held_studies(rows, trained), points)
    card: NewCard = {
        "name": known["head"],
        "spec": spec,
        "pooling": known["pooling"],
        "label_level": manifest.label_level,
        "views": "mean",
        **decisions,  # type: ignore[typeddict-item]
        "metric": "auroc",
        "cv": trained.score,
        "cv_method": CV_METHOD,
        "trial": known["number"],
        "seed": known["seed"],
        "depth": known["depth"],
        "encoder": describe_encoder(base.source, base.revision, place),
        "covariates": None,
        "data": {"trained": count_trained(rows.rows.iloc[seen]), "manifest": as_json(data)},
        "use": describe_use(synthetic=data.synthetic),
        "manifest": run.info.asked.manifest,
        "synthetic": data.synthetic,
        "training_images": sorted({image_code(own) for own in rows.rows["sha256"].iloc[seen]}),
    }
    reference = None
    if vectors is not None:
        persons, parts = name_persons(rows.rows), rows.rows["region"]
        patients, regions = persons.to_numpy(str)[seen], parts.to_numpy(str)[seen]
        reference = fit_reference(vectors[seen], known["seed"], patients=patients, regions=regions)
    head, texts = _as_head(network, start, trained), write_readme(card)
    save_model(path, head, card, reference=reference, texts=texts, replace=True)


def _held_studies(rows: TrainRows, trained: Trained) -> pd.DataFrame:
    """Return one row per held-out study: see `describe_decisions`."""
    held = rows.rows.iloc[rows.held]
    return by_study(
        pd.DataFrame(
            {
                "study": pd.factorize(held["study"], sort=True)[0],
                "region": held["region"].to_numpy(),
                "patient": name_persons(held).to_numpy(),
                "label": rows.y[rows.held],
                "probability": trained.held,
            }
        )
    )


def _as_head(network: Network, start: Start, trained: Trained) -> MLPHead:
    """Return the head in the form that a sweep trains."""
    kept = {name: start.params[name] for name in ("hidden", "activation", "dropout", "scaling")}
    head = MLPHead(**kept, label_smoothing=start.params["label_smoothing"])
    layers = [
        (layer.get_parameter("weight"), layer.get_parameter("bias"))
        for layer in network.head.layers
    ]
    head.weights_ = [weight.detach().cpu().numpy().T.copy() for weight, _ in layers]
    head.biases_ = [bias.detach().cpu().numpy().copy() for _, bias in layers]
    head.projection_ = Projection(start.mean, start.scale)
    head.best_epoch_ = trained.counters.best_epoch
    head.classes_, head.n_features_in_ = np.array([0, 1]), len(start.mean)
    return head


def adapt(encoder: TorchEncoder, network: Network) -> TorchEncoder:
    """Return a copy of the initial encoder with all trained changes, adapters merged."""
    adapted = encoder.copy()
    state = adapted.model.state_dict()
    for name, tensor in network.changed_tensors().items():
        state[name].copy_(tensor)
    return adapted


def save_adapted(encoder: TorchEncoder, directory: Path) -> str:
    """Write an encoder's changes to its base's tensors, and return its fingerprint.

    The directory appears completely or not at all, replacing an existing one. It holds only the
    changed tensors and names the base; if all have changed, it is a checkpoint that needs no base.
    It is loaded and compared once before it appears.

    Raises
    ------
    EncoderError
        The written files read back differently.
    """
    assert encoder.origin is not None
    origin = encoder.origin
    tensors, is_whole = find_changed(encoder)
    directory.parent.mkdir(parents=True, exist_ok=True)
    for left in directory.parent.glob(f".{directory.name}.*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    made = Path(
        tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent)
    )
    try:
        made.chmod(0o755)
        for name in ("config.json", *PROCESSOR_FILES):
            if holds_file(origin.directory / name):
                write_atomically(made / name, read_plain(origin.directory / name))
        fingerprint = _write(encoder, origin, made, directory, tensors, is_whole)
        shutil.rmtree(directory, ignore_errors=True)
        os.rename(made, directory)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    sync_directory(directory.parent)
    return fingerprint


def _write(
    encoder: TorchEncoder,
    origin: Origin,
    made: Path,
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    is_whole: bool,
) -> str:
    contiguous = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    data = save(contiguous, {"format": "pt"})
    write_atomically(made / (WEIGHTS_FILE if is_whole else CHANGED_FILE), data)
    if not is_whole:
        again = adapt_encoder(origin, encoder.preprocessing, tensors)
        document = describe_base(origin, directory, again.fingerprint)
        write_atomically(made / BASE_FILE, json_bytes(document))
    # Beside its final place, so that a base's relative path is already right.
    read: Any = load_encoder(made, device="cpu", precision="fp32", fit=encoder.preprocessing.fit)
    theirs = read.model.state_dict()
    for name, tensor in encoder.model.state_dict().items():
        if not torch.equal(theirs[name], tensor.cpu()):
            raise EncoderError(
                f"the encoder written to {directory} does not read back as written: {name} differs."
            )
    fingerprint: str = read.fingerprint
    return fingerprint


@dataclass(frozen=True, eq=False)
class TrialResult:
    """One depth with one seed, trained or failed.

    Attributes
    ----------
    known : dict
        ``number``, ``head``, ``depth``, ``lora`` (rank of its adapters, or None), ``seed``,
        ``key``, ``pooling``, ``params``, ``trainable`` (how many numbers of tower and head
        training changes; None if it did not begin).
    score : float or None
        AUROC of the held-out patients' studies at the best epoch, which other patients chose; None
        if the trial failed.
    best_epoch : int or None
    seconds : float
    error : str or None
    encoder : str or None
        Fingerprint of the adapted encoder.
    history : list of dict
        Per epoch `train_loss`, `loss`, `auroc`.
    probability : float64 array or None
        Probabilities of the held-out rows, then of the test rows.
    """

    known: Mapping[str, Any]
    score: float | None
    best_epoch: int | None
    seconds: float
    error: str | None
    encoder: str | None
    history: Sequence[Mapping[str, float]]
    probability: NDArray[np.float64] | None

    @classmethod
    def of(cls, trained: Trained, encoder: str | None, known: Mapping[str, Any]) -> "TrialResult":
        """Return the result of a successful training."""
        counters = trained.counters
        return cls(
            known=known,
            score=trained.score,
            best_epoch=counters.best_epoch,
            seconds=counters.seconds,
            error=None,
            encoder=encoder,
            history=counters.history,
            probability=np.concatenate([trained.held, trained.tested]),
        )

    @classmethod
    def failed(cls, error: MedembedError, known: Mapping[str, Any]) -> "TrialResult":
        """Return the result of a failed training."""
        return cls(known, None, None, 0.0, describe_failure(error), None, [], None)

    def write(self, run: Run) -> None:
        """Write the result to the run's ledger, synced to disk."""
        key = self.known["key"]
        if self.probability is not None:
            run.keep_fold(key, self.probability)
        run.append_trial(
            TrialRecord(
                trial=self.known["number"],
                head=self.known["head"],
                pooling=self.known["pooling"],
                params=dict(self.known["params"]),
                fold=HELD_OUT,
                score=self.score,
                best_epoch=self.best_epoch,
                seconds=self.seconds,
                status="ok" if self.error is None else "error",
                error=self.error,
                key=key,
                depth=self.known["depth"],
                lora=self.known["lora"],
                seed=self.known["seed"],
                trainable=self.known["trainable"],
                encoder=self.encoder,
                history=tuple(map(dict, self.history)),
            )
        )

    def as_entry(self) -> dict[str, Any]:
        """Return the trial's row of the leaderboard."""
        return {
            "head": self.known["head"],
            "pooling": self.known["pooling"],
            "trial": None if self.error else self.known["number"],
            "params": dict(self.known["params"]),
            "cv": self.score,
            "seconds": round(self.seconds, 3),
            "status": "ok" if self.error is None else "error",
            "error": self.error,
            "depth": self.known["depth"],
            "lora": self.known["lora"],
            "seed": self.known["seed"],
            "trainable": self.known["trainable"],
            "best_epoch": self.best_epoch,
            "encoder": self.encoder,
        }


def load_ending(run: Run, key: str, rows: TrainRows) -> TrialResult | None:
    """Return the result of the trial of this key, or None if it has to be trained."""
    records = [record for record in run.trial_records() if record.key == key]
    if not records:
        return None
    record = records[-1]
    probability = run.kept_fold(key)
    if record.status == "ok":
        whole = probability is not None and len(probability) == len(rows.held) + len(rows.tested)
        is_done = whole and (not record.depth or (run.path / "encoders" / record.head).is_dir())
    else:
        is_done = is_final(record.error)
    if not is_done:
        run.forget_trials({key})
        return None
    names = ("head", "depth", "seed", "key", "pooling", "params", "lora", "trainable")
    return TrialResult(
        known={"number": record.trial, **{name: getattr(record, name) for name in names}},
        score=record.score,
        best_epoch=record.best_epoch,
        seconds=record.seconds,
        error=record.error,
        encoder=record.encoder,
        history=list(record.history),
        probability=probability,
    )


def finish(
    run: Run,
    manifest: Manifest,
    rows: TrainRows,
    endings: Sequence[TrialResult],
    build: KeptBuild | None = None,
    points: Sequence[ThresholdRule] = (),
) -> None:
    """Write predictions, leaderboard and counts, then the scores, which complete the run.

    `build` is the record of the manifest's build, `points` are operating points in addition to the
    default ones.

    Raises
    ------
    RunError
        Every depth failed.
    """
    ordered = sorted(endings, key=lambda e: np.inf if e.score is None else -e.score)
    trained = [ending for ending in ordered if ending.probability is not None]
    if not trained:
        reasons = "; ".join(f"{e.known['head']}: {e.error}" for e in ordered)
        raise RunError(f"every depth failed in the run at {run.path}. {reasons}")
    own = np.concatenate([rows.held, rows.tested])
    # The codes of patients and studies are those of all rows, as for the priors.
    images = image_rows(rows.rows, np.where(rows.folds == HELD_OUT, HELD_OUT, -1)).iloc[own]
    parts = [
        images.assign(
            head=ending.known["head"],
            trial=ending.known["number"],
            probability=ending.probability,
        )
        for ending in trained
    ]
    parts += prior_rows(rows.rows, rows.folds)
    run.write_predictions(pd.concat(parts, ignore_index=True))
    run.end(
        leaderboard=[ending.as_entry() for ending in ordered],
        data=summarise_data(manifest.rows, rows.failed, manifest.label_level, build),
        left_out=list_left_out(manifest.rows, rows.failed),
    )
    scores = score_run(run, operating_points=points)
    complete_cards(run, scores)
    run.write_scores(scores)
