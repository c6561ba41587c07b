"""The table of heads: their names, and how they are made.

An installed package adds heads of its own by entry points of the group `medembed.heads`, each a
name and "module:class". A model can only name a head of this table: it cannot make medembed import
anything else.
"""

import importlib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from medembed.core.errors import TrainingDataError
from medembed.core.poolings import IMAGE_STATISTICS

if TYPE_CHECKING:
    from medembed.heads.base import Head

__all__ = ["BASELINES", "HEADS", "head_class", "known_heads", "make_head", "nearest"]

#: Name to "module:class"; a class is imported when it is asked for.
HEADS = {
    "attention": "medembed.heads.attention:AttentionHead",
    IMAGE_STATISTICS: "medembed.heads.linear:ImageStatisticsHead",
    "knn": "medembed.heads.knn:KNNHead",
    "lightgbm": "medembed.heads.lightgbm:LightGBMHead",
    "logistic": "medembed.heads.linear:LogisticHead",
    "metadata": "medembed.heads.linear:MetadataHead",
    "mlp": "medembed.heads.mlp:MLPHead",
    "text-logistic": "medembed.heads.words:TextLogisticHead",
    "zero-shot": "medembed.heads.words:ZeroShotHead",
}

#: Heads of `Head.is_baseline`, known without importing them.
BASELINES = frozenset({IMAGE_STATISTICS, "metadata"})


@cache
def known_heads() -> Mapping[str, str]:
    """Return `HEADS` and the heads that installed packages add.

    Raises
    ------
    TrainingDataError
        A package claims the name of one of `HEADS`, or two packages claim one name.
    """
    found = dict(HEADS)
    for point in entry_points(group="medembed.heads"):
        if found.get(point.name, point.value) != point.value:
            raise TrainingDataError(
                f"head {point.name!r} is {found[point.name]}, and an installed package claims the "
                f"name for {point.value}. Uninstall it, or have it renamed."
            )
        found[point.name] = point.value
    return found


def head_class(name: str) -> "type[Head]":
    """Return the class of a head named in `known_heads`.

    Raises
    ------
    TrainingDataError
        There is no such head; the message names the nearest.
    """
    known = known_heads()
    if name not in known:
        raise TrainingDataError(f"unknown head {name!r}; {nearest(name, sorted(known))}")
    module, _, attribute = known[name].partition(":")
    return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]


def make_head(name: str, params: Mapping[str, object], *, seed: int = 0, n_jobs: int = 1) -> "Head":
    """Return an unfitted head.

    Parameters
    ----------
    name : str
        One of `known_heads`.
    params : dict
        Constructor arguments that differ from the defaults.
    seed, n_jobs : int
        Passed as `random_state` and `n_jobs` to heads that have them, unless `params` sets them.

    Raises
    ------
    TrainingDataError
        There is no such head or parameter; the message names the nearest.
    """
    head = head_class(name)()
    known = sorted(head.get_params())
    for key in params:
        if key not in known:
            raise TrainingDataError(f"head {name} has no parameter {key!r}; {nearest(key, known)}")
    given = {"random_state": _as_state(seed), "n_jobs": n_jobs, **params}
    return head.set_params(**{key: value for key, value in given.items() if key in known})  # type: ignore[no-any-return]


def _as_state(seed: int) -> int:
    """Return a seed of up to 64 bits in the 32 that scikit-learn takes; smaller ones are kept."""
    if seed < 1 << 32:
        return seed
    import numpy as np

    return int(np.random.SeedSequence(seed).generate_state(1)[0])


def nearest(name: str, known: Sequence[str]) -> str:
    """Return the end of a message about an unknown name: the nearest known one, and all names."""
    close = get_close_matches(name, known, n=1)
    listed = ", ".join(known)
    return f"did you mean {close[0]}? Known are {listed}" if close else f"known are {listed}"
