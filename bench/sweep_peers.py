"""What `sweep.py` compares a sweep with: peers of its MLPs, of its trees and of its linear head.

Each runs in a process of its own, on the rows and folds that `medembed sweep --seed 0` draws.
"""

import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import numpy as np
import torch
from sklearn.base import clone
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegressionCV, RidgeClassifierCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medembed.cache.embeddings import load_embeddings
from medembed.dataset.splits import draw_folds
from medembed.heads.lightgbm import LightGBMHead
from medembed.heads.mlp import MLPHead
from medembed.sweeps.search_space import default_spaces, read_spaces
from peer_mlps import Perceptron, Rows, predict, train_one, train_together, warm_up

__all__ = [
    "LINEAR_PEERS",
    "MLP_PEERS",
    "N_COLUMNS",
    "N_FOLDS",
    "SLOW_LIMIT",
    "SLOW_ONE_IN",
    "TREE_PEERS",
    "find_version",
    "load_table",
    "run_peer",
]

N_COLUMNS = 1152
N_FOLDS = 5
ONE_IN = 8
SLOW_ONE_IN = {"gridsearch_early_stopping": 32, "skorch": 32}
SLOW_LIMIT = 200  # seconds for one; strong weight decay produces numbers that are slow to compute
EPOCHS, EARLY_EPOCHS, PATIENCE, BATCH_SIZE = 20, 60, 8, 256
TIMED_EPOCHS = 2
TORCH_PEERS = ("autograd", "vmap")
MLP_PEERS = ("gridsearch", "gridsearch_early_stopping", "skorch", *TORCH_PEERS)
TREE_PEERS = ("lightgbm", "hist_gradient_boosting")
LINEAR_PEERS = ("ridge_cv", "logistic_cv")


def find_version(name: str) -> str | None:
    """Return the installed release, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


class Table(NamedTuple):
    """Training rows, their folds, and test rows."""

    X: np.ndarray
    y: np.ndarray
    folds: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray


def load_table(place: Path) -> Table:
    """Return the rows with the folds that `medembed sweep --seed 0` draws."""
    embeddings = load_embeddings(place / "cache", place / "manifest.parquet")
    is_train = (embeddings.rows["split"] == "train").to_numpy()
    rows = embeddings.rows[is_train].reset_index(drop=True)
    folds = np.asarray(draw_folds(rows, n_folds=N_FOLDS, seed=0), np.int64)
    X, y = embeddings.X, embeddings.y.astype(np.int64)  # the dtype that torch's losses need
    return Table(X[is_train], y[is_train], folds, X[~is_train], y[~is_train])


def run_peer(name: str, place: Path) -> dict[str, Any]:
    """Time a grid search, in a separate process, whose memory is released afterwards."""
    table, spaces = load_table(place), read_spaces(place / "space.toml")
    if name in TORCH_PEERS:
        return run_torch(name, table, spaces["mlp"].draw())
    if name in LINEAR_PEERS:
        return run_linear(name, table)
    share = None
    if name in MLP_PEERS:
        drawn = [{**MLPHead().get_params(), **params} for params in spaces["mlp"].draw()]
        chosen = one_in(drawn, SLOW_ONE_IN.get(name, ONE_IN))
        share = sum(map(n_weights, chosen)) / sum(map(n_weights, drawn))
        estimator, grid = MLPS[name](chosen, table)
    elif name == "lightgbm":
        estimator, grid = lightgbm_defaults(spaces["lightgbm"].draw()[::ONE_IN])
    else:
        estimator, grid = HistGradientBoostingClassifier(random_state=0), [{}]
    with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
        search = GridSearchCV(
            estimator,
            grid,
            scoring="roc_auc",
            cv=PredefinedSplit(table.folds),
            n_jobs=joblib.cpu_count(),
            refit=False,
            error_score="raise",
        )
        # start the processes, and their imports, with a search whose time does not count
        few = np.concatenate([np.flatnonzero(table.folds == f)[:64] for f in range(N_FOLDS)])
        warm = clone(search).set_params(param_grid=grid[0], cv=PredefinedSplit(table.folds[few]))
        warm.fit(table.X[few], table.y[few])
        start = time.perf_counter()
        search.fit(table.X, table.y)
        seconds = time.perf_counter() - start
    scores = search.cv_results_["mean_test_score"]
    best = search.cv_results_["params"][int(scores.argmax())]
    fitted = clone(estimator).set_params(**best).fit(table.X, table.y)
    on_test = roc_auc_score(table.y_test, fitted.predict_proba(table.X_test)[:, 1])
    return {
        "seconds": seconds,
        "configurations": len(scores),
        "share_of_weights": share,
        "auroc": round(float(scores.max()), 5),
        "auroc_test": round(float(on_test), 5),
        "auroc_of_each": [round(float(score), 5) for score in scores],
        "params": {key: repr(value) for key, value in best.items()},
    }


def run_torch(name: str, table: Table, drawn: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Time two epochs without one fold, and count them for `EPOCHS` epochs of every fold.

    `autograd` trains one configuration of eight, one by one; `vmap` all, those of equal widths as
    one module. The best after two epochs is trained on all rows for `EPOCHS` epochs, untimed.
    """
    torch.set_num_threads(joblib.cpu_count())
    drawn = [{**MLPHead().get_params(), **params} for params in drawn]
    chosen = drawn if name == "vmap" else one_in(drawn, ONE_IN)
    held = table.folds == 0
    rows = Rows.of(table.X, table.y, np.flatnonzero(~held), np.flatnonzero(held))
    groups: dict[Any, list[dict[str, Any]]] = {}
    for number, params in enumerate(chosen):
        groups.setdefault(tuple(params["hidden"]) if name == "vmap" else number, []).append(params)
    warm_up(chosen[0])
    start, scores = time.perf_counter(), []
    for members in groups.values():
        if name == "vmap":
            ended = train_together(members, rows, epochs=TIMED_EPOCHS)
        else:
            ended = [train_one(members[0], rows, epochs=TIMED_EPOCHS)]
        scores += [own.auroc for own in ended]
    seconds = time.perf_counter() - start
    tried = [params for members in groups.values() for params in members]
    best = tried[int(np.argmax(scores))]
    everything = np.arange(len(table.y))
    whole = train_one(best, Rows.of(table.X, table.y, everything), epochs=EPOCHS)
    assert whole.model is not None
    on_test = predict(whole.model, Rows.scale(table.X, everything, table.X_test))
    return {
        "seconds": seconds * N_FOLDS * EPOCHS / TIMED_EPOCHS,
        "timed_seconds": seconds,
        "configurations": len(chosen),
        "share_of_weights": sum(map(n_weights, chosen)) / sum(map(n_weights, drawn)),
        "auroc": round(max(scores), 5),
        "auroc_test": round(float(roc_auc_score(table.y_test, on_test)), 5),
        "auroc_of_each": [round(score, 5) for score in scores],
        "params": {key: repr(value) for key, value in best.items()},
    }


def run_linear(name: str, table: Table) -> dict[str, Any]:
    """Time a linear model of scikit-learn that chooses its penalty on the folds, and refits."""
    folds = PredefinedSplit(table.folds)
    penalties = sorted(params["C"] for params in default_spaces()["logistic"].draw())
    if name == "ridge_cv":
        model: Any = RidgeClassifierCV(np.logspace(-1, 5, 13), cv=folds, scoring="roc_auc")
    else:
        model = LogisticRegressionCV(
            Cs=penalties, cv=folds, scoring="roc_auc", max_iter=200, n_jobs=joblib.cpu_count()
        )
    start = time.perf_counter()
    fitted = make_pipeline(StandardScaler(), model).fit(table.X, table.y)
    seconds = time.perf_counter() - start
    on_test = roc_auc_score(table.y_test, fitted.decision_function(table.X_test))
    return {"seconds": seconds, "auroc_test": round(float(on_test), 5)}


def one_in(drawn: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """Return every `step`-th configuration, or the next one that has a hidden layer."""
    return [
        next(params for params in [*drawn[start:], *drawn] if params["hidden"])
        for start in range(0, len(drawn), step)
    ]


def n_weights(params: dict[str, Any]) -> int:
    """Return the number of weights of an MLP on the table, to which its time is proportional."""
    return sum(a * b for a, b in pairwise([N_COLUMNS, *params["hidden"], 1]))


def one_of_each(chosen: list[dict[str, Any]]) -> list[dict[str, list[Any]]]:
    return [{key: [value] for key, value in params.items()} for params in chosen]


def sklearn_mlp(chosen: list[dict[str, Any]], early: bool) -> tuple[Any, list[dict[str, Any]]]:
    epochs = EARLY_EPOCHS if early else EPOCHS
    mlp = MLPClassifier(
        batch_size=BATCH_SIZE,
        max_iter=epochs,
        early_stopping=early,
        # without early stopping it would still end where the training loss no longer falls
        n_iter_no_change=PATIENCE if early else epochs,
        random_state=0,
    )
    grid = [
        {
            "mlpclassifier__hidden_layer_sizes": tuple(params["hidden"]),
            "mlpclassifier__activation": "tanh" if params["activation"] == "tanh" else "relu",
            "mlpclassifier__learning_rate_init": params["lr"],
            "mlpclassifier__alpha": params["weight_decay"],
        }
        for params in chosen
    ]
    return make_pipeline(StandardScaler(), mlp), one_of_each(grid)


class _SkorchPerceptron(Perceptron):
    """The module that a skorch user would write."""

    def __init__(self, hidden: tuple[int, ...], activation: str, dropout: float, n: int) -> None:
        params = {"hidden": hidden, "activation": activation, "dropout": dropout}
        super().__init__(n, params, n_outputs=2)


def skorch_mlp(chosen: list[dict[str, Any]], table: Table) -> tuple[Any, list[dict[str, Any]]]:
    from skorch import NeuralNetClassifier

    net = NeuralNetClassifier(
        _SkorchPerceptron,
        module__n=table.X.shape[1],
        criterion=torch.nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW,
        max_epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        iterator_train__shuffle=True,
        train_split=None,
        verbose=0,
    )
    balanced = len(table.y) / (2 * np.bincount(table.y))
    net_grid = [
        {
            "module__hidden": tuple(params["hidden"]),
            "module__activation": params["activation"],
            "module__dropout": params["dropout"],
            "lr": params["lr"],
            "optimizer__weight_decay": params["weight_decay"],
            "criterion__label_smoothing": params["label_smoothing"],
            "criterion__weight": torch.tensor(
                balanced if params["class_weight"] else [1.0, 1.0], dtype=torch.float32
            ),
        }
        for params in chosen
    ]
    grid = [{f"neuralnetclassifier__{k}": v for k, v in own.items()} for own in net_grid]
    return make_pipeline(StandardScaler(), net), one_of_each(grid)


MLPS: dict[str, Callable[..., tuple[Any, list[dict[str, Any]]]]] = {
    "gridsearch": lambda chosen, table: sklearn_mlp(chosen, early=False),
    "gridsearch_early_stopping": lambda chosen, table: sklearn_mlp(chosen, early=True),
    "skorch": skorch_mlp,
}


def lightgbm_defaults(chosen: list[dict[str, Any]]) -> tuple[Any, list[dict[str, Any]]]:
    from lightgbm import LGBMClassifier

    own = [{**LightGBMHead().get_params(), **params} for params in chosen]
    names = {
        "num_leaves": "num_leaves",
        "learning_rate": "learning_rate",
        "lambda_l2": "reg_lambda",
    }
    grid = [{names[key]: params[key] for key in names} for params in own]
    n_trees = own[0]["n_trees"]
    return LGBMClassifier(n_estimators=n_trees, n_jobs=1, verbosity=-1), one_of_each(grid)
