"""The table of heads: their names, and how they are made."""

import importlib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from medembed.errors import TrainingDataError

if TYPE_CHECKING:
    from medembed.heads.base import Head

__all__ = ["HEADS", "head_class", "make_head", "nearest"]

#: Name to "module:class"; a class is imported when it is asked for.
HEADS = {
    "attention": "medembed.heads.attention:AttentionHead",
    "lightgbm": "medembed.heads.trees:LightGBMHead",
    "logistic": "medembed.heads.linear:LogisticHead",
    "mlp": "medembed.heads.mlp:MLPHead",
}


def head_class(name: str) -> "type[Head]":
    """Return the class behind a name of `HEADS`.

    Raises
    ------
    TrainingDataError
        No such head; names the nearest.
    """
    if name not in HEADS:
        raise TrainingDataError(f"unknown head {name!r}; {nearest(name, sorted(HEADS))}")
    module, _, attribute = HEADS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]


def make_head(name: str, params: Mapping[str, Any], *, seed: int = 0, n_jobs: int = 1) -> "Head":
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
            raise TrainingDataError(f"head {name} has no parameter {key!r}; {nearest(key, known)}")
    given = {"random_state": seed, "n_jobs": n_jobs, **params}
    return head.set_params(**{key: value for key, value in given.items() if key in known})  # type: ignore[no-any-return]


def nearest(name: str, known: Sequence[str]) -> str:
    """Return the end of a message about an unknown name: the nearest known one, and all of them."""
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}Known are {', '.join(known)}"
