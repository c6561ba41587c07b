"""The score by layer: a linear probe of each block's output, judged out-of-fold.

Where a sweep tries the same pooling of several blocks (`mean@6,mean@12`), its logistic head is
cross-validated on each of them, with the configuration that the inner split chose there. Layers are
compared by these predictions of train alone; no layer's score on test is looked at.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from medembed.cache.embeddings import Embeddings
from medembed.core.poolings import block_of
from medembed.results.ablations import compare_layers
from medembed.results.comparison_schema import LayerSeries
from medembed.results.runs import Run
from medembed.sweeps.finalize import predict_folds, score_studies
from medembed.sweeps.runner import Ledger
from medembed.sweeps.selection import choose
from medembed.sweeps.training import Training

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

__all__ = ["PROBE", "LayerProbes"]

PROBE = "logistic"
"""The head in every sweep, and the one by which layers are compared."""


class LayerProbes:
    """Collects a sweep's out-of-fold predictions by layer, pooling by pooling.

    Parameters
    ----------
    run : Run
        The run, locked by this process.
    ledger : Ledger
        Its trials.
    metric : str
        The score that chooses each layer's configuration.
    poolings : sequence of str
        The poolings tried.

    Attributes
    ----------
    wanted : set of str
        Poolings that belong to a series of layers.
    """

    def __init__(self, run: Run, ledger: Ledger, metric: str, poolings: Sequence[str]) -> None:
        self._run, self._ledger, self._metric = run, ledger, metric
        self._series = _find_series(poolings)
        self.wanted = {name for names in self._series.values() for name in names}
        self._found: dict[str, NDArray[np.float64]] = {}
        self._studies: pd.DataFrame | None = None

    def add(
        self,
        pooling: str,
        embeddings: Embeddings,
        training: Training,
        jobs: int | None,
        backend: str,
    ) -> None:
        """Cross-validate the probe on a pooling whose trials are complete.

        A pooling on which no configuration could be trained is left out.
        """
        winner = choose(self._ledger, PROBE, self._metric, pooling)
        if winner.trial is None:
            return
        predicted = predict_folds(self._run, training, winner, jobs, backend)
        if predicted is None:
            return
        studies = score_studies(predicted, embeddings, training, per_study=False)
        self._found[pooling] = studies["probability"].to_numpy(np.float64)
        self._studies = studies

    def describe(self, n_blocks: Any) -> list[LayerSeries]:
        """Return an entry for each series, see `results.ablations.compare_layers`.

        `n_blocks` is what the cache notes as the number of the encoder's blocks, if anything.
        """
        known = n_blocks if type(n_blocks) is int else None
        return [
            compare_layers(self._studies, found, head=PROBE, pooling=base, n_blocks=known)
            for base, names in self._series.items()
            if self._studies is not None
            and len(found := {name: self._found[name] for name in names if name in self._found}) > 1
        ]


def _find_series(poolings: Sequence[str]) -> dict[str, list[str]]:
    """Return, by pooling, its layers from the first to the last, the tower's own output last."""
    series: dict[str, list[tuple[int, str]]] = {}
    for name in poolings:
        if (at := block_of(name)) is not None:
            series.setdefault(at[0], []).append((at[1], name))
    ordered = {base: [name for _, name in sorted(own)] for base, own in series.items()}
    whole = {base: [*own, *([base] if base in poolings else [])] for base, own in ordered.items()}
    return {base: own for base, own in whole.items() if len(own) > 1}
