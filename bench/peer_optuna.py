"""Optuna over a sweep's default space: TPE, the median pruner, two threads, one thread per fit.

A trial draws a head and its parameters, is fitted fold by fold, and may be pruned after each fold
by the mean so far. Perceptrons are those of `peer_mlps`, trees LightGBM's own, logistic regression
scikit-learn's on standardised columns; the first two are stopped by the fold, as is usual.
"""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import optuna
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medembed.heads.lightgbm import LightGBMHead
from medembed.heads.mlp import MLPHead
from medembed.sweeps.search_space import HeadSpace, Range, default_spaces
from peer_mlps import Rows, predict, train_one

__all__ = ["refit", "search"]

HEADS = ("logistic", "mlp", "lightgbm")
THREADS = 2
EARLY_STOPPING = 30


def search(
    data: Any, seconds: float, seed: int
) -> Iterator[tuple[float, float, dict[str, Any], int | None]]:
    """Yield (seconds, mean AUROC over folds, parameters, epochs or trees) of each new best."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.MedianPruner(),
    )
    spaces, ends = default_spaces(), []
    start = time.perf_counter()

    def judge(trial: optuna.Trial) -> float:
        head = trial.suggest_categorical("head", HEADS)
        params = {"head": head, **_suggest(trial, spaces[head])}
        scores, budgets = [], []
        for number, (train, held) in enumerate(data.folds):
            score, budget = _fit_fold(data, params, train, held, seed, start + seconds)
            scores.append(score)
            budgets.append(budget)
            trial.report(float(np.mean(scores)), number)
            if trial.should_prune():
                raise optuna.TrialPruned
        known = [budget for budget in budgets if budget is not None]
        budget = max(1, round(float(np.median(known)))) if known else None
        ends.append((time.perf_counter() - start, float(np.mean(scores)), params, budget))
        return ends[-1][1]

    # (a trial that the end of the time cuts short raises, which counts as failed)
    study.optimize(judge, timeout=seconds, n_jobs=THREADS, catch=(Exception,))
    best = -np.inf
    for at, score, params, budget in ends:
        if score > best and at <= seconds:
            best = score
            yield at, score, params, budget


def _suggest(trial: optuna.Trial, space: HeadSpace) -> dict[str, Any]:
    found = dict(space.constants)
    for name, values in space.varying.items():
        key = f"{space.head}.{name}"
        if not isinstance(values, Range):
            found[name] = values[trial.suggest_categorical(key, range(len(values)))]
        elif isinstance(values.low, int):
            found[name] = trial.suggest_int(key, values.low, int(values.high), log=values.log)
        else:
            found[name] = trial.suggest_float(key, values.low, values.high, log=values.log)
    return found


def _mlp_params(params: Mapping[str, Any]) -> dict[str, Any]:
    return {**MLPHead().get_params(), **params}


def _fit_fold(
    data: Any,
    params: Mapping[str, Any],
    train: np.ndarray,
    held: np.ndarray,
    seed: int,
    until: float,
) -> tuple[float, int | None]:
    if params["head"] == "mlp":
        rows = Rows.of(data.X, data.y, train, held)
        ended = train_one(_mlp_params(params), rows, seed=seed, until=until)
        return ended.auroc, ended.best_epoch
    if params["head"] == "lightgbm":
        from lightgbm import early_stopping

        model = _trees(params, LightGBMHead().n_trees, seed)
        model.fit(
            data.X[train],
            data.y[train],
            eval_set=[(data.X[held], data.y[held])],
            eval_metric="auc",
            callbacks=[early_stopping(EARLY_STOPPING, verbose=False)],
        )
        probability = model.predict_proba(data.X[held])[:, 1]
        return float(roc_auc_score(data.y[held], probability)), model.best_iteration_
    model = _logistic(params).fit(data.X[train], data.y[train])
    return float(roc_auc_score(data.y[held], model.decision_function(data.X[held]))), None


def _trees(params: Mapping[str, Any], n_trees: int, seed: int) -> Any:
    from lightgbm import LGBMClassifier

    own = {key: params[key] for key in ("num_leaves", "learning_rate") if key in params}
    return LGBMClassifier(
        n_estimators=n_trees,
        reg_lambda=params.get("lambda_l2", 0.0),
        random_state=seed,
        n_jobs=1,
        verbosity=-1,
        **own,
    )


def _logistic(params: Mapping[str, Any]) -> Any:
    return make_pipeline(StandardScaler(), LogisticRegression(C=params["C"], max_iter=200))


def refit(data: Any, params: Mapping[str, Any], budget: int | None, seed: int) -> np.ndarray:
    """Return the scores of the test rows by a model of all training rows."""
    everything = np.arange(len(data.y))
    if params["head"] == "mlp":
        assert budget
        rows = Rows.of(data.X, data.y, everything)
        model = train_one(_mlp_params(params), rows, epochs=budget, seed=seed).model
        assert model is not None
        return predict(model, Rows.scale(data.X, everything, data.X_test))
    if params["head"] == "lightgbm":
        assert budget
        trees = _trees(params, budget, seed).fit(data.X, data.y)
        return np.asarray(trees.predict_proba(data.X_test)[:, 1])
    return np.asarray(_logistic(params).fit(data.X, data.y).decision_function(data.X_test))
