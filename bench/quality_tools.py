"""The tools of the quality study: what each had found when, and what that scores on test.

A tool runs in a process of its own, by `quality.py`: first `race`, whose clock starts with the
first fit, then `score`, which refits outside the clock what was the best so far. Each sees the rows
and the folds of `medembed sweep` of the same seed, never the test rows, and may use both cores.

- `medembed`: the default sweep. When the ledger has a configuration on all folds it counts; what is
  best so far is chosen as at a sweep's end: each head's best configuration on inner patients, then
  the head with the best out-of-fold score.
- `autograd`: the sweep's perceptrons, one after the other in torch (`peer_mlps.train_one`), each
  on five folds, stopped by the fold, ranked by its AUROC.
- `vmap`: the same, those of equal widths as one module (`peer_mlps.train_together`).
- `optuna`: TPE with the median pruner over the default space of all three heads, pruned fold by
  fold, two threads (`peer_optuna`). Only where Optuna is installed (`pip install optuna`).
- `ridge`, `logistic_cv`: `RidgeClassifierCV` with 13 penalties and `LogisticRegressionCV` with the
  sweep's eight, on standardised columns.

The clock of the first four starts with libraries loaded and rows in memory; medembed's processes,
which start while it loads rows, load their libraries within it. `autograd`, `vmap` and `optuna`
stop when the time is over.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medembed.cache.embeddings import load_embeddings, patient_folds
from medembed.heads.mlp import MLPHead
from medembed.heads.registry import make_head
from medembed.sweeps.search_space import default_spaces

__all__ = ["TOOLS", "Data", "Found", "load"]

N_FOLDS = 5
AT_ONCE = 0.1


class Data(NamedTuple):
    """Training rows (n, d) float32 with labels and folds, and test rows."""

    X: np.ndarray
    y: np.ndarray
    folds: list[tuple[np.ndarray, np.ndarray]]
    X_test: np.ndarray
    y_test: np.ndarray


class Found(NamedTuple):
    """What was the best after `at` seconds, by the tool's own `score`."""

    at: float
    score: float
    params: Mapping[str, Any]
    budget: int | None = None


def load(cache: str, manifest: str, seed: int) -> Data:
    """Return the rows with the folds that a sweep of this seed draws."""
    rows = load_embeddings(cache, manifest)
    place = np.full(len(rows), -1)
    is_train = (rows.rows["split"] == "train").to_numpy()
    place[is_train] = np.arange(is_train.sum())
    folds = [(place[train], place[held]) for train, held in patient_folds(rows, N_FOLDS, seed)]
    y = rows.y.astype(np.int64)
    return Data(rows.X[is_train], y[is_train], folds, rows.X[~is_train], y[~is_train])


class _TrainedError(Exception):
    """Ends a sweep before its refits."""


def race_medembed(asked: argparse.Namespace) -> Iterator[Found]:
    """Sweep until every configuration is trained; `score` resumes the run and ends it."""
    from medembed.sweeps import sweep

    ticks: list[float] = []

    def note(done: int, total: int) -> None:
        ticks.append(time.perf_counter())
        if done == total:
            raise _TrainedError

    with suppress(_TrainedError):
        sweep(asked.cache, asked.manifest, asked.run, seed=asked.seed, progress=note)
    records = [json.loads(line) for line in (asked.run / "trials.jsonl").read_text().splitlines()]
    assert len(records) == len(ticks) - 1, "the run was not new"
    folds: dict[tuple[str, int], list[dict[str, Any]]] = {}
    best: dict[str, float] = {}
    for record, tick in zip(records, ticks[1:], strict=True):
        own = folds.setdefault((record["head"], record["trial"]), [])
        own.append(record)
        if len(own) < N_FOLDS or any(one["status"] != "ok" for one in own):
            continue
        score = float(np.mean([one["score"] for one in own]))
        if score > best.get(record["head"], -np.inf):
            best[record["head"]] = score
            budgets = [one["best_epoch"] for one in sorted(own, key=lambda one: one["fold"])]
            params = {"head": record["head"], "params": record["params"], "budgets": budgets}
            yield Found(tick - ticks[0], score, params)
    yield Found(ticks[-1] - ticks[0], np.nan, {})  # the end


def score_medembed(asked: argparse.Namespace, data: Data, found: Sequence[Found]) -> dict[str, Any]:
    """Refit each head's bests for their out-of-fold score; end the sweep for its heads' scores."""
    import pandas as pd

    from medembed.results.predictions import PRIORS
    from medembed.sweeps import sweep

    curve: list[tuple[float, float]] = []
    latest: dict[str, tuple[float, float]] = {}  # head -> out-of-fold and test AUROC
    for one in _drop_superseded(found):
        if one.params:
            latest[one.params["head"]] = _refit_medembed(asked.seed, data, one.params)
            curve.append((one.at, max(latest.values())[1]))
    sweep(asked.cache, asked.manifest, asked.run, seed=asked.seed)
    rows = pd.read_parquet(asked.run / "predictions.parquet")
    rows = rows[(rows["split"] == "test") & rows["label"].notna()]
    heads = {
        str(head): _auroc(own["label"].to_numpy(int), own["probability"].to_numpy())
        for head, own in rows.groupby("head")
        if head not in PRIORS
    }
    return {"curve": curve, "heads": heads}


def _drop_superseded(found: Sequence[Found]) -> list[Found]:
    """Leave out what a better one of the same head follows at once: refits take a while."""
    kept: list[Found] = []
    for one in found:
        last = kept[-1] if kept else None
        if (
            last
            and last.params.get("head") == one.params.get("head")
            and one.at - last.at < AT_ONCE
        ):
            kept.pop()
        kept.append(one)
    return kept


def _refit_medembed(seed: int, data: Data, own: Mapping[str, Any]) -> tuple[float, float]:
    def fit(train: np.ndarray, budget: int | None) -> Any:
        head = make_head(own["head"], own["params"], seed=seed)
        head = head if budget is None else head.with_budget(budget)
        return head.fit(data.X[train], data.y[train])

    outside = []
    for (train, held), budget in zip(data.folds, own["budgets"], strict=True):
        probability = fit(train, budget).predict_proba(data.X[held])[:, 1]
        outside.append(_auroc(data.y[held], probability))
    whole = fit(np.arange(len(data.y)), _median(own["budgets"]))
    return float(np.mean(outside)), _auroc(data.y_test, whole.predict_proba(data.X_test)[:, 1])


def _median(budgets: Sequence[int | None]) -> int | None:
    known = [budget for budget in budgets if budget is not None]
    return max(1, round(float(np.median(known)))) if known else None


def _auroc(y: np.ndarray, scores: np.ndarray) -> float:
    from peer_mlps import auroc

    return float(auroc(y, scores))


def _mlps(seed: int) -> list[dict[str, Any]]:
    drawn = default_spaces()["mlp"].draw(None, seed)
    return [{**MLPHead().get_params(), **params} for params in drawn]


def race_autograd(asked: argparse.Namespace) -> Iterator[Found]:
    yield from _race_mlps(asked, [[params] for params in _mlps(asked.seed)])


def race_vmap(asked: argparse.Namespace) -> Iterator[Found]:
    groups: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for params in _mlps(asked.seed):
        groups.setdefault(tuple(params["hidden"]), []).append(params)
    yield from _race_mlps(asked, list(groups.values()))


def _race_mlps(
    asked: argparse.Namespace, groups: Sequence[Sequence[Mapping[str, Any]]]
) -> Iterator[Found]:
    from peer_mlps import OutOfTimeError, Rows, train_one, train_together, warm_up

    data = load(asked.cache, asked.manifest, asked.seed)
    warm_up(groups[0][0])
    start, best = time.perf_counter(), -np.inf
    limits: dict[str, Any] = {"seed": asked.seed, "until": start + asked.seconds}
    folds = [Rows.of(data.X, data.y, *fold) for fold in data.folds]
    for members in groups:
        try:
            if len(members) == 1:
                ended = [[train_one(members[0], rows, **limits)] for rows in folds]
            else:
                ended = [train_together(members, rows, **limits) for rows in folds]
        except OutOfTimeError:
            break
        at = time.perf_counter() - start
        for params, own in zip(members, zip(*ended, strict=True), strict=True):
            score = float(np.mean([one.auroc for one in own]))
            if score > best:
                best = score
                yield Found(at, score, params, _median([one.best_epoch for one in own]))


def score_mlps(asked: argparse.Namespace, data: Data, found: Sequence[Found]) -> dict[str, Any]:
    """Train each best on all rows for the median of its folds' epochs."""
    from peer_mlps import Rows, predict, train_one

    everything = np.arange(len(data.y))
    rows = Rows.of(data.X, data.y, everything)
    X_test = Rows.scale(data.X, everything, data.X_test)
    curve = []
    for one in found:
        assert one.budget
        model = train_one(one.params, rows, epochs=one.budget, seed=asked.seed).model
        curve.append((one.at, _auroc(data.y_test, predict(model, X_test))))
    return {"curve": curve}


def race_optuna(asked: argparse.Namespace) -> Iterator[Found]:
    from peer_optuna import search

    data = load(asked.cache, asked.manifest, asked.seed)
    for at, score, params, budget in search(data, asked.seconds, asked.seed):
        yield Found(at, score, params, budget)


def score_optuna(asked: argparse.Namespace, data: Data, found: Sequence[Found]) -> dict[str, Any]:
    """Refit each best on all rows."""
    from peer_optuna import refit

    curve = [
        (one.at, _auroc(data.y_test, refit(data, one.params, one.budget, asked.seed)))
        for one in found
    ]
    return {"curve": curve}


def race_ridge(asked: argparse.Namespace) -> Iterator[Found]:
    from sklearn.linear_model import RidgeClassifierCV

    yield _race_sklearn(
        asked,
        lambda folds: RidgeClassifierCV(np.logspace(-1, 5, 13), cv=folds, scoring="roc_auc"),
    )


def race_logistic(asked: argparse.Namespace) -> Iterator[Found]:
    from sklearn.linear_model import LogisticRegressionCV

    penalties = [params["C"] for params in default_spaces()["logistic"].draw()]

    def make(folds: Any) -> Any:
        return LogisticRegressionCV(
            Cs=sorted(penalties), cv=folds, scoring="roc_auc", max_iter=200, n_jobs=2
        )

    yield _race_sklearn(asked, make)


def _race_sklearn(asked: argparse.Namespace, make: Callable[[Any], Any]) -> Found:
    """Fit, which refits on all rows; the test score is taken after the clock."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    data = load(asked.cache, asked.manifest, asked.seed)
    model = make_pipeline(StandardScaler(), make(data.folds))
    start = time.perf_counter()
    model.fit(data.X, data.y)
    at = time.perf_counter() - start
    return Found(at, np.nan, {"test": _auroc(data.y_test, model.decision_function(data.X_test))})


def score_sklearn(_asked: Any, _data: Data, found: Sequence[Found]) -> dict[str, Any]:
    return {"curve": [(one.at, one.params["test"]) for one in found]}


class Tool(NamedTuple):
    """How a tool races, how what it found is scored, and the threads of its process."""

    race: Callable[[argparse.Namespace], Iterator[Found]]
    score: Callable[[argparse.Namespace, Data, Sequence[Found]], dict[str, Any]]
    threads: int | None = 2


TOOLS = {
    "medembed": Tool(race_medembed, score_medembed, None),
    "autograd": Tool(race_autograd, score_mlps),
    "vmap": Tool(race_vmap, score_mlps),
    "optuna": Tool(race_optuna, score_optuna, 1),
    "ridge": Tool(race_ridge, score_sklearn),
    "logistic_cv": Tool(race_logistic, score_sklearn),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("race", "score"))
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("cache")
    parser.add_argument("manifest")
    parser.add_argument("run", type=Path, help="where medembed sweeps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    tool = TOOLS[asked.tool]
    if asked.stage == "race":
        print(json.dumps([one._asdict() for one in tool.race(asked)]))
        return
    found = [Found(**one) for one in json.load(sys.stdin)]
    print(json.dumps(tool.score(asked, load(asked.cache, asked.manifest, asked.seed), found)))


if __name__ == "__main__":
    main()
