"""The trained head as a model that predicts on embeddings of its own encoder."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medembed.dataset.identities import name_persons
from medembed.dataset.manifest import Manifest
from medembed.encoders.torch_encoder import TorchEncoder
from medembed.evaluation.drift.reference import fit_reference
from medembed.evaluation.scores import by_study
from medembed.evaluation.thresholds import ThresholdRule
from medembed.extraction import spec_of
from medembed.finetuning.data_split import TrainRows
from medembed.finetuning.network import Network, Start
from medembed.finetuning.training import Trained
from medembed.heads.mlp import MLPHead
from medembed.heads.packaging import save_model
from medembed.heads.scaling import Projection
from medembed.results.model_card import describe_decisions
from medembed.results.model_readme import (
    count_trained,
    describe_encoder,
    describe_use,
    write_readme,
)
from medembed.results.predictions import image_code
from medembed.results.provenance import summarise_data
from medembed.results.run_schema import CV_METHOD
from medembed.results.runs import Run

__all__ = ["package"]


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
    """Save a trained head in `models/<head>/`, as a sweep saves its winners.

    Parameters
    ----------
    encoder : TorchEncoder
        Whose embeddings it reads, and `fingerprint` if training has changed it.
    known : mapping
        See `finishing.TrialResult`.
    vectors : float32 array of shape (n, d), optional
        What the head reads of all rows, where that is known: the model then keeps statistics of
        the training rows, which `evaluate` measures drift from.
    points : sequence of ThresholdRule
        Operating points beside the usual ones.
    """
    path = run.model_path(known["head"])
    path.parent.mkdir(exist_ok=True)
    spec = spec_of(encoder, network.poolings).as_dict()
    if fingerprint is not None:
        spec["encoder"] = fingerprint
    # Those held out have decided thresholds, and count as seen; its embeddings are those of all.
    seen = np.flatnonzero(rows.folds >= 0)
    data = summarise_data(manifest.rows, rows.failed, manifest.label_level)
    place = None if fingerprint is None else f"../../encoders/{known['head']}"
    card = {
        "name": known["head"],
        "spec": spec,
        "pooling": known["pooling"],
        "label_level": manifest.label_level,
        "views": "mean",
        **describe_decisions(_held_studies(rows, trained), points),
        "metric": "auroc",
        "cv": trained.score,
        "cv_method": CV_METHOD,
        "trial": known["number"],
        "seed": known["seed"],
        "depth": known["depth"],
        "encoder": describe_encoder(run.info.get("encoder", {}), place),
        "covariates": None,
        "data": {"trained": count_trained(rows.rows.iloc[seen]), "manifest": data},
        "use": describe_use(synthetic=data["synthetic"]),
        "manifest": run.info["asked"]["manifest"],
        "synthetic": data["synthetic"],
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
    """Return the head as what a sweep would have trained."""
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
