"""The table of heads: their names, how they are made, and what a sweep tries first."""

import importlib
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np

from medembed.errors import TrainingDataError

if TYPE_CHECKING:
    from medembed.heads.base import Head

__all__ = ["HEADS", "default_space", "head_class", "make_head"]

#: Name to "module:class"; a class is imported when it is asked for.
HEADS = {
    "lightgbm": "medembed.heads.trees:LightGBMHead",
    "logistic": "medembed.heads.linear:LogisticHead",
    "mlp": "medembed.heads.mlp:MLPHead",
}

#: The default first, then the far ends before the steps between, so that few tries span the range.
_C_PATH = (0.01, 1.0, 0.0001, 0.1, 0.001, 10.0, 0.00001, 100.0)


def head_class(name: str) -> "type[Head]":
    """Return the class behind a name of `HEADS`.

    Raises
    ------
    TrainingDataError
        No such head; names the nearest.
    """
    if name not in HEADS:
        raise TrainingDataError(f"unknown head {name!r}; {_nearest(name, sorted(HEADS))}")
    module, _, attribute = HEADS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]


def make_head(name: str, params: dict[str, Any], *, seed: int = 0, n_jobs: int = 1) -> "Head":
    """Return an unfitted head.

    Parameters
    ----------
    name : str
        One of `HEADS`.
    params : dict
        Constructor arguments that differ from the defaults.
    seed, n_jobs : int
        Handed on as `random_state` and `n_jobs` to heads that have them, unless `params` does.

    Raises
    ------
    TrainingDataError
        No such head or parameter; names the nearest.
    """
    head = head_class(name)()
    known = sorted(head.get_params())
    for key in params:
        if key not in known:
            raise TrainingDataError(f"head {name} has no parameter {key!r}; {_nearest(key, known)}")
    given = {"random_state": seed, "n_jobs": n_jobs} | params
    return head.set_params(**{key: value for key, value in given.items() if key in known})  # type: ignore[no-any-return]


def default_space(name: str, n_configs: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return up to `n_configs` different sets of parameters; the first is the default one.

    A longer space begins with the shorter one of the same seed. `logistic` walks a path of C, at
    most its length; the others draw at random, which covers more values of each parameter than a
    grid of the same size (Bergstra and Bengio, JMLR 13, 2012).

    Raises
    ------
    TrainingDataError
        No such head, or fewer than one set asked for.
    """
    head_class(name)
    if n_configs < 1:
        raise TrainingDataError(
            f"{n_configs} configurations of {name} asked for; ask for 1 or more"
        )
    if name == "logistic":
        return [{"C": C} for C in _C_PATH[:n_configs]]
    generator = np.random.default_rng(seed)
    draw = {"mlp": _draw_mlp, "lightgbm": _draw_lightgbm}[name]
    return [{}, *(draw(generator) for _ in range(n_configs - 1))]


def _draw_mlp(generator: np.random.Generator) -> dict[str, Any]:
    hidden = ((), (64,), (128,), (256,), (512,), (128, 64), (256, 128))
    return {
        "hidden": list(hidden[generator.integers(len(hidden))]),
        "dropout": float(generator.choice([0.0, 0.1, 0.3, 0.5])),
        "lr": _log_uniform(generator, 1e-4, 5e-3),
        "weight_decay": _log_uniform(generator, 1e-4, 1.0),
    }


def _draw_lightgbm(generator: np.random.Generator) -> dict[str, Any]:
    return {
        "num_leaves": int(generator.choice([4, 8, 15, 31, 63])),
        "learning_rate": _log_uniform(generator, 0.02, 0.2),
        "feature_fraction": float(generator.choice([0.05, 0.1, 0.2, 0.4])),
        "lambda_l2": _log_uniform(generator, 0.1, 100.0),
    }


def _log_uniform(generator: np.random.Generator, low: float, high: float) -> float:
    """Return a number whose logarithm is uniform, to three digits: it is read in tables."""
    return float(f"{np.exp(generator.uniform(np.log(low), np.log(high))):.3g}")


def _nearest(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}Known are {', '.join(known)}"
