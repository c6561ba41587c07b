"""What a sweep has to train: trials, and the batches of trials that train together."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medembed.core.errors import TrainingDataError
from medembed.core.files import json_digest
from medembed.heads.batched_mlp import resolve_precision
from medembed.heads.registry import head_class, make_head
from medembed.results.runs import RUN_VERSION
from medembed.sweeps.search_space import HeadSpace

__all__ = ["Batch", "Pooling", "Trial", "plan_batches"]


@dataclass(frozen=True)
class Pooling:
    """Columns that heads are tried on.

    Attributes
    ----------
    name : str
        Poolings of the cache joined by `+`.
    n_cells : int
        Vectors per image; above 1 only heads that read cells take it.
    """

    name: str
    n_cells: int = 1


@dataclass(frozen=True)
class Trial:
    """One configuration of one head on one pooling; `keys` has one entry per fold."""

    head: str
    number: int
    pooling: str
    params: Mapping[str, Any]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Batch:
    """Trials of one head and pooling that train together.

    Attributes
    ----------
    rungs : tuple of int
        Epochs after which the weaker half is retired.
    """

    trials: tuple[Trial, ...]
    rungs: tuple[int, ...] = ()

    @property
    def head(self) -> str:
        """The head of all trials."""
        return self.trials[0].head

    @property
    def pooling(self) -> str:
        """The pooling of all trials."""
        return self.trials[0].pooling


def plan_batches(
    heads: Sequence[str],
    poolings: Sequence[Pooling],
    spaces: Mapping[str, HeadSpace],
    n_configs: int | None,
    n_folds: int,
    shared: Mapping[str, Any],
) -> list[Batch]:
    """List everything that a sweep trains.

    A trial's key hashes all that decides its result: `shared`, its head, pooling, parameters and
    fold, and the batch it trains in.

    Raises
    ------
    TrainingDataError
        A head has no pooling that it can read, or a parameter is out of range.
    """
    batches = []
    for head in heads:
        space, own = spaces[head], _readable(head, poolings)
        drawn = [_resolved(params) for params in space.draw(n_configs, shared["seed"])]
        for params in drawn:
            make_head(head, params).check_parameters()
        for k, pooling in enumerate(own):
            for start, part in _parts(head, drawn):
                number = k * len(drawn) + start
                batches.append(
                    _batch(head, pooling.name, number, part, space.rungs, n_folds, shared)
                )
    return batches


def _readable(head: str, poolings: Sequence[Pooling]) -> list[Pooling]:
    reads_cells = "n_cells" in head_class(head)().get_params()
    own = [pooling for pooling in poolings if reads_cells or pooling.n_cells == 1]
    if not own:
        names = ", ".join(pooling.name for pooling in poolings)
        raise TrainingDataError(
            f"head {head} reads one vector per image, and {names} holds several. Add a "
            f"single-vector pooling: --pool mean,{names}."
        )
    return own


def _resolved(params: Mapping[str, Any]) -> dict[str, Any]:
    """Replace what depends on the machine by what it is here."""
    if "precision" in params:
        return {**params, "precision": resolve_precision(params["precision"])}
    return dict(params)


def _parts(head: str, drawn: Sequence[Any]) -> Iterator[tuple[int, Sequence[Any]]]:
    size = head_class(head).n_together or len(drawn)
    for start in range(0, len(drawn), size):
        yield start, drawn[start : start + size]


def _batch(
    head: str,
    pooling: str,
    number: int,
    params: Sequence[Mapping[str, Any]],
    rungs: tuple[int, ...],
    n_folds: int,
    shared: Mapping[str, Any],
) -> Batch:
    rungs = rungs if len(params) > 1 else ()
    together = json_digest([RUN_VERSION, shared, head, pooling, list(params), rungs])
    trials = [
        Trial(
            head,
            number + i,
            pooling,
            own,
            tuple(json_digest([together, own, fold])[:32] for fold in range(n_folds)),
        )
        for i, own in enumerate(params)
    ]
    return Batch(tuple(trials), rungs)
