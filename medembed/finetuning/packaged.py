"""The trained head as a model that predicts on embeddings of its own encoder."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from medembed.dataset.manifest import Manifest
from medembed.encoders.torch_encoder import TorchEncoder
from medembed.evaluation.calibration import fit_platt
from medembed.evaluation.intervals import plain
from medembed.evaluation.scores import by_study, score
from medembed.evaluation.thresholds import youden_threshold
from medembed.extraction import spec_of
from medembed.finetuning.network import Network, Start
from medembed.finetuning.rows import TrainRows
from medembed.finetuning.training import Trained
from medembed.heads.mlp import MLPHead
from medembed.heads.packaging import save_model
from medembed.heads.projection import Projection
from medembed.results.priors import image_code
from medembed.results.provenance import is_synthetic
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
) -> None:
    """Save a trained head in `models/<head>/`, as a sweep saves its winners.

    Parameters
    ----------
    encoder : TorchEncoder
        Whose embeddings it reads, and `fingerprint` if training has changed it.
    known : mapping
        See `finishing.Ending`.
    """
    path = run.model_path(known["head"])
    path.parent.mkdir(exist_ok=True)
    spec = spec_of(encoder, network.poolings).as_dict()
    if fingerprint is not None:
        spec["encoder"] = fingerprint
    held = pd.DataFrame(
        {
            "study": pd.factorize(rows.rows["study"].iloc[rows.held], sort=True)[0],
            "label": rows.y[rows.held],
            "probability": trained.held,
        }
    )
    studies = by_study(held)
    y, raw = studies["label"].to_numpy(np.int8), studies["probability"].to_numpy()
    calibration = fit_platt(raw, y)
    threshold = float(youden_threshold(y, calibration.apply(raw)))
    card = {
        "spec": spec,
        "pooling": known["pooling"],
        "label_level": manifest.label_level,
        "views": "mean",
        "calibration": calibration.as_dict(),
        "threshold": threshold,
        "metric": "auroc",
        "cv": trained.counters.best_key[0],
        "trial": known["number"],
        "seed": known["seed"],
        "depth": known["depth"],
        "scores": {"out_of_fold": plain(score(y, calibration.apply(raw), threshold))},
        "manifest": run.info["asked"]["manifest"],
        "synthetic": is_synthetic(manifest.rows),
        # The held-out patients chose the epoch, so they have been seen too.
        "training_images": sorted(
            {image_code(digest) for digest in rows.rows["sha256"][rows.folds >= 0]}
        ),
    }
    save_model(path, _as_head(network, start, trained), card, replace=True)


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
