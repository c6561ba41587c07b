"""The initial head of a training: random, or the best of a sweep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from medembed.core.errors import ModelError, RunError
from medembed.dataset.targets import LABEL
from medembed.finetuning.network import Start
from medembed.heads.mlp import MLPHead
from medembed.heads.packaging import load_model
from medembed.heads.registry import head_class, known_heads, make_head
from medembed.heads.scaling import Projection, Projector
from medembed.results.model_card import CardDocument, read_card, require_winner
from medembed.results.runs import Run

if TYPE_CHECKING:
    from medembed.heads.base import Head

__all__ = ["HeadInit", "init_from_sweep", "init_random", "read_swept_head"]


@dataclass(frozen=True)
class HeadInit:
    """The configuration of the best suitable head of a sweep, without its weights.

    A sweep's packaged head has seen the patients that fine-tuning holds out, so its weights are
    learned again, for equally many epochs, from the other patients: held-out patients must be
    unseen to decide on stopping, and to give the out-of-fold predictions that calibration and
    thresholds are based on.

    Attributes
    ----------
    head : str
        "mlp" or "logistic".
    params : dict
        The head's parameters.
    budget : int or None
        Epochs of the refit.
    poolings : tuple of str
        The poolings that it reads, joined.
    """

    head: str
    params: dict[str, Any]
    budget: int | None
    poolings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON values."""
        params = {k: list(v) if isinstance(v, tuple) else v for k, v in self.params.items()}
        return {"head": self.head, "params": params, "budget": self.budget}


def read_swept_head(run: Run, spec: Mapping[str, Any], manifest: str) -> HeadInit:
    """Return the best MLP or logistic head of a sweep.

    Parameters
    ----------
    run : Run
        A complete run.
    spec : mapping
        The `encoder` and `preprocessing` that its embeddings must have been made with.
    manifest : str
        The required digest of its manifest.

    Raises
    ------
    RunError
        The run is unfinished, has no such head, or was swept on embeddings of another encoder or
        on another manifest; or the head reads more or other columns than the poolings.
    ModelError
        The packaged head is damaged.
    """
    run.require_complete()
    if (target := run.info.asked.target or LABEL) != LABEL:
        raise RunError(
            f"run at {run.path} was swept on the target {target}, and fine-tuning trains on the "
            "manifest's label. Name a run of the label, or leave out --from-run for a fresh head."
        )
    board = run.info.leaderboard
    suitable = [name for name in known_heads() if head_class(name).trains_with_encoder]
    names = [e.head for e in board if e.head in suitable and e.cv is not None]
    if not names:
        raise RunError(
            f"run at {run.path} has no head that can be trained on with an encoder: it has "
            f"{', '.join(entry.head for entry in board) or 'none'}, and one of "
            f"{', '.join(suitable)} is needed. Leave out --from-run for a fresh head."
        )
    model = load_model(run.model_path(names[0]))
    require_winner(run, names[0], model.card)
    card = read_card(model, run.model_path(names[0]))
    _refuse_other_rows(run, card.document, spec, manifest)
    params = model.head.get_params()
    _refuse_unsuitable(run, names[0], params)
    return HeadInit(names[0], params, model.head.best_epoch_, tuple(card.pooling.split("+")))


def init_from_sweep(
    swept: HeadInit, X: np.ndarray, y: np.ndarray, fitted: np.ndarray, seed: int
) -> Start:
    """Return a swept head's weights, trained on the frozen embeddings of the training rows.

    Parameters
    ----------
    X : (n, d) float32
        Pooled vectors of all rows.
    y : (n,) int
        Labels.
    fitted : (m,) int
        The rows that are trained on.

    Raises
    ------
    TrainingDataError
        The rows are of one class, or the loss stops being a finite number.
    """
    own_seed = {"random_state": seed} if "random_state" in swept.params else {}
    head: Head = make_head(swept.head, {**swept.params, **own_seed})
    if swept.budget is not None:
        head = head.with_budget(swept.budget)
    head.fit(X[fitted], y[fitted])
    weights, biases = head.as_layers()
    params = _plain_params({"hidden": (), **swept.params})
    projection: Projection = head.projection_
    return Start(projection.mean, projection.scale, tuple(weights), tuple(biases), params)


def init_random(
    X: np.ndarray, fitted: np.ndarray, seed: int, hidden: Sequence[int] = (256,)
) -> Start:
    """Return a random head whose weights and biases are uniform within 1 / sqrt(columns in).

    This is the initialisation of torch.nn.Linear. Columns are standardised by the training rows.
    """
    projection = Projector(X, fitted).learn("standard")
    weights, biases = [], []
    for k, (before, after) in enumerate(pairwise([X.shape[1], *hidden, 1])):
        drawn = np.random.default_rng([seed, k]).random((before + 1, after), np.float32)
        uniform = (2 * drawn - 1) / np.float32(np.sqrt(before))
        weights.append(uniform[:-1])
        biases.append(uniform[-1])
    params = _plain_params({"hidden": tuple(hidden)})
    return Start(projection.mean, projection.scale, tuple(weights), tuple(biases), params)


def _plain_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of an `MLPHead` with a network's shape."""
    kept = ("hidden", "activation", "dropout", "label_smoothing", "scaling")
    known = MLPHead().get_params()
    return {name: params.get(name, known[name]) for name in kept}


def _refuse_other_rows(
    run: Run, card: CardDocument, spec: Mapping[str, object], manifest: str
) -> None:
    if not {"encoder", "preprocessing"} <= card.spec.keys():
        raise ModelError(f"a head of the run at {run.path} has no spec on its card")
    for name, value in spec.items():
        if card.spec[name] != value:
            raise RunError(
                f"run at {run.path} was swept on embeddings of another {name} than this one's, so "
                "its heads do not fit. Extract and sweep with this --encoder and --fit, or leave "
                "out --from-run."
            )
    if card.manifest != manifest:
        raise RunError(
            f"run at {run.path} was swept on another manifest: its choice may have seen what is "
            "tested here. Sweep this manifest, or leave out --from-run."
        )


def _refuse_unsuitable(run: Run, name: str, params: Mapping[str, Any]) -> None:
    found = []
    if params.get("pca"):
        found.append(f"reads {params['pca']} principal components")
    if params.get("n_covariates"):
        found.append("reads covariates")
    if found:
        raise RunError(
            f"head {name} of the run at {run.path} {' and '.join(found)}, and a head that trains "
            "with its encoder reads the pooled columns alone. Sweep without that, or leave out "
            "--from-run."
        )
