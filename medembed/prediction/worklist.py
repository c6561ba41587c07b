"""Choose which unlabelled studies to label next.

A share of the list is a simple random sample of the unlabelled studies, and marked as such: scores
estimated on it stay valid, which those on the other studies do not. The others are chosen by
weighted k-means (Zhdanov 2019, "Diverse mini-batch active learning", arXiv:1901.05954): the studies
with the greatest weights are clustered by their embeddings into as many clusters as are wanted, and
the study nearest to each centre is taken. The weight is

- with a model: how near the study's probability lies to the share of abnormal ones among the
  labelled studies, which is where the features say nothing;
- without one: the squared distance to the nearest labelled study, or equal while none is labelled,
  so that the list covers the data set.
"""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_array
from scipy.special import expit, logit

from medembed.cache.embeddings import load_embeddings
from medembed.cache.store import Cache, open_cache
from medembed.core.errors import ArgumentError, TrainingDataError
from medembed.core.files import write_atomically
from medembed.core.text import Summarised, Summary, count_values, counted, to_csv
from medembed.dataset.identities import name_persons
from medembed.dataset.manifest import Manifest, read_manifest
from medembed.dataset.relabelling import AT_RANDOM, CHOSEN_BY
from medembed.heads.packaging import Model, load_model
from medembed.prediction.decisions import check_spec, score_rows
from medembed.prediction.predictor import Predictor, find_model
from medembed.results.model_card import Card, read_card
from medembed.results.runs import Run

__all__ = ["COVER", "UNCERTAINTY", "Worklist", "check_target", "make_worklist"]

COVER, UNCERTAINTY = "cover", "uncertainty"
N_COMPONENTS = 64
"""Principal components in which distances are measured."""
N_CANDIDATES = 5
"""The most uncertain studies that are clustered, per study wanted (Zhdanov's beta)."""
MOST_EXACT = 20_000
"""Studies above which k-means works on mini-batches."""


@dataclass(frozen=True, repr=False)
class Worklist(Summarised):
    """Studies to label next.

    Attributes
    ----------
    rows : pandas.DataFrame
        A row per image, in the order of the list: `rank` (1 is first; views of a study share it),
        `sha256`, `image`, `study`, `patient`, `region`, `chosen_by` ("random", "cover" or
        "uncertainty"), and `probability` (calibrated, of the study; NaN without a model).
    n_unlabelled : int
        Unlabelled studies of train that could be chosen.
    n_test : int
        Unlabelled studies of test, which are never chosen.
    """

    rows: pd.DataFrame
    n_unlabelled: int
    n_test: int

    def __len__(self) -> int:
        return int(self.rows["rank"].nunique())

    def counts(self) -> dict[str, int]:
        """Return the number of studies by `chosen_by`."""
        firsts = self.rows.drop_duplicates("rank")
        return {str(name): int(n) for name, n in firsts[CHOSEN_BY].value_counts().items()}

    def as_dict(self, *, names: bool = False) -> list[dict[str, object]]:
        """Return a record per image; names of images, studies and patients only if asked for."""
        kept = ["rank", "sha256", "region", CHOSEN_BY, "probability"]
        rows = self.rows[[*kept, *(("image", "study", "patient") if names else ())]]
        known = rows.astype({"probability": object}).where(rows.notna(), None)
        return [
            {str(key): own for key, own in record.items()} for record in known.to_dict("records")
        ]

    def write(self, path: str | Path, *, names: bool = False) -> None:
        """Write the list as CSV with an empty column `new_label`, for `manifest relabel`.

        Probabilities are left out: a reader who sees them no longer labels independently.

        Parameters
        ----------
        path : path
            A new `.csv` file: an existing one may hold labels.
        names : bool
            Also write the names of images, studies and patients.

        Raises
        ------
        ArgumentError
            The file exists, or its name does not end in `.csv`.
        """
        path = Path(path)
        check_target(path)
        columns = ["rank", "sha256", "region", CHOSEN_BY, *(("image", "study") if names else ())]
        lines = self.rows[columns].itertuples(index=False, name=None)
        text = to_csv([[*columns, "new_label"], *([*line, ""] for line in lines)])
        write_atomically(path, text.encode())

    def summarise(self) -> Summary:
        """Return how many studies were chosen, and by what."""
        return Summary(
            f"Worklist: {counted(len(self), 'study')} of {self.n_unlabelled:,} unlabelled in train",
            {
                "chosen by": count_values(self.counts()),
                "images": f"{len(self.rows):,}",
                "unlabelled in test": f"{self.n_test:,}, never chosen",
            },
        )


def check_target(path: Path) -> None:
    """Raise ArgumentError unless a worklist can be written to `path`, see `Worklist.write`."""
    if path.suffix != ".csv":
        raise ArgumentError(f"a worklist is a .csv file; {path} is not.")
    if path.exists():
        raise ArgumentError(
            f"{path} already exists, and may hold labels. Move it, or name another file."
        )
    if not path.parent.is_dir():
        raise ArgumentError(f"{path.parent} is not a directory. Create it, or name another.")


def make_worklist(
    cache: Cache | str | os.PathLike[str],
    manifest: Manifest | str | Path,
    n: int,
    *,
    model: Model | Predictor | Run | str | Path | None = None,
    random_share: float = 0.2,
    pool: str | None = None,
    seed: int = 0,
) -> Worklist:
    """Return the unlabelled studies of train to label next.

    If the manifest's label level is "image", images are chosen in place of studies. The chosen
    studies are of different patients as long as there are any, random ones excepted. The order is
    random, so that any beginning of the list holds its part of each kind.

    Parameters
    ----------
    cache, manifest : Cache, Manifest or path
        Embeddings of the manifest's images. Rows without a label are those to choose from.
    n : int
        Studies to choose; all of them if there are fewer.
    model : Model, Predictor, Run or path, optional
        Trained on the labels so far; of a run, the best by cross-validation. Without it the list
        covers the data set.
    random_share : float in [0, 1]
        Share of the list that is drawn at random.
    pool : str, optional
        Poolings in which distances are measured, see `load_embeddings`.
    seed : int
        Determines the list.

    Raises
    ------
    TrainingDataError
        No study of train is unlabelled.
    ArgumentError
        `n` is below 1, or `random_share` outside of [0, 1].
    ModelError
        The model reads other embeddings.
    MissingRowsError
        Rows are neither embedded nor listed as failed.
    """
    if n < 1:
        raise ArgumentError(f"a worklist has at least 1 study, not {n}.")
    if not 0 <= random_share <= 1:
        raise ArgumentError(f"the random share is between 0 and 1, not {random_share}.")
    opened, known = open_cache(cache), read_manifest(manifest)
    judge = None if model is None else _Judge.read(model, opened)
    unit = "study" if known.label_level == "study" else "sha256"
    embeddings = load_embeddings(opened, known, pool=pool, split="train")
    units = _Units.of(embeddings.rows, unit)
    free = np.flatnonzero(~units.is_labelled)
    if not len(free):
        raise TrainingDataError(
            "no embedded study of train is unlabelled. Add images without a label to the manifest; "
            "`empty` in the recipe's [label] says what those have in place of a label."
        )
    generator = np.random.default_rng(seed)
    n = min(n, len(free))
    at_random = generator.choice(free, round(random_share * n), replace=False)
    rest = np.setdiff1d(free, at_random)
    Z = _project(units.average(embeddings.X), seed)
    probability = np.full(len(units.persons), np.nan)
    if judge is None:
        reason = COVER
        weights = _novelty(Z[rest], Z[units.is_labelled])
    else:
        reason = UNCERTAINTY
        is_free = ~units.is_labelled[units.code]
        rows = embeddings.rows[is_free].reset_index(drop=True)
        probability[free] = judge.score(Manifest(rows, known.label_level), units.code[is_free])
        weights = _uncertainty(probability[rest], units.share)
        most = np.argsort(-weights, kind="stable")[: N_CANDIDATES * (n - len(at_random))]
        rest, weights = rest[most], weights[most]
    chosen = rest[_choose(Z[rest], weights, units.persons[rest], n - len(at_random), seed)]
    order = generator.permutation(n)
    picked = np.concatenate([at_random, chosen])[order]
    reasons = np.repeat([AT_RANDOM, reason], [len(at_random), len(chosen)])[order]
    of_test = known.rows[(known.rows["split"] == "test") & known.rows["label"].isna()]
    return Worklist(
        _list_images(embeddings.rows, units.code, picked, reasons, probability[picked]),
        n_unlabelled=len(free),
        n_test=of_test[unit].nunique(),
    )


@dataclass(frozen=True)
class _Units:
    """What gets one label: m studies, or images with different bytes.

    Attributes
    ----------
    code : int64 (rows,)
        The unit of each row, from 0 to m - 1.
    persons : object (m,)
        Patients, see `name_persons`.
    is_labelled : bool (m,)
    share : float
        Of abnormal units among the labelled ones; one half while none is labelled.
    """

    code: np.ndarray
    persons: np.ndarray
    is_labelled: np.ndarray
    share: float

    @classmethod
    def of(cls, rows: pd.DataFrame, column: str) -> "_Units":
        code, _ = pd.factorize(rows[column], sort=True)
        _, first = np.unique(code, return_index=True)
        label = rows["label"].astype("Float64").groupby(code).max()
        share = float(label.mean()) if label.notna().any() else 0.5
        persons = name_persons(rows).to_numpy(object)[first]
        return cls(code, persons, label.notna().to_numpy(), share)

    def average(self, X: np.ndarray) -> np.ndarray:
        """Return the mean of each unit's rows of X, (m, d) float32."""
        if len(self.persons) == len(X):
            return X[np.argsort(self.code)]
        share = (1 / np.bincount(self.code))[self.code].astype(np.float32)
        shape = (len(self.persons), len(X))
        mean: np.ndarray = csr_array((share, (self.code, np.arange(len(X)))), shape) @ X
        return mean


@dataclass(frozen=True)
class _Judge:
    """A model, and the cache whose rows it scores."""

    model: Model
    card: Card
    cache: Cache

    @classmethod
    def read(cls, model: Model | Predictor | Run | str | Path, cache: Cache) -> "_Judge":
        path = find_model(model)
        loaded = load_model(path)
        card = read_card(loaded, path)
        check_spec(card, cache.spec, f"those in the cache at {cache.path}")
        return cls(loaded, card, cache)

    def score(self, manifest: Manifest, code: np.ndarray) -> np.ndarray:
        """Return the calibrated probability of each unit, in ascending order of `code`."""
        embeddings = load_embeddings(self.cache, manifest, pool=self.card.pooling, cells=True)
        X = embeddings.X
        if self.card.covariates is not None:
            X = np.hstack([X, self.card.covariates.transform(embeddings.rows)])
        _, found = score_rows(self.model, self.card, X, code, embeddings.regions)
        return found["probability"].to_numpy(np.float64)


def _project(X: np.ndarray, seed: int) -> np.ndarray:
    """Return the principal components of the rows of X, (m, at most 64)."""
    from sklearn.decomposition import PCA

    n = min(N_COMPONENTS, *X.shape)
    with np.errstate(invalid="ignore"):  # the share of the variance, where all rows are equal
        projected: np.ndarray = PCA(n, random_state=seed).fit_transform(X)
    return projected


def _novelty(Z: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    """Return the squared distance of each row of Z to the nearest labelled one, or ones."""
    if not len(labelled):
        return np.ones(len(Z))
    from sklearn.metrics import pairwise_distances_argmin_min

    _, distance = pairwise_distances_argmin_min(Z, labelled)
    squared: np.ndarray = distance.astype(np.float64) ** 2
    return squared


def _uncertainty(probability: np.ndarray, share: float) -> np.ndarray:
    """Return 1 for a probability of `share`, falling to 0 at 0 and 1.

    The log-odds are shifted so that `share` lies at one half.
    """
    lowest = np.finfo(np.float64).eps
    odds, prior = (logit(np.clip(p, lowest, 1 - lowest)) for p in (probability, share))
    shifted = odds - prior
    weights: np.ndarray = 1 - np.abs(2 * expit(shifted) - 1)
    return weights


def _choose(
    Z: np.ndarray, weights: np.ndarray, persons: np.ndarray, k: int, seed: int
) -> np.ndarray:
    """Return the indices of k rows of Z, near the centres of k weighted clusters.

    No two are of one person while there are others.
    """
    if k >= len(Z):
        return np.arange(len(Z))
    if not k:
        return np.arange(0)
    labels, distance = _cluster(Z, weights, k, seed)
    share = np.bincount(labels, weights, k)
    # clusters of greatest weight first, then each cluster's rows from its centre outwards
    order = np.lexsort((distance, labels, -share[labels]))
    chosen: list[int] = []
    used: set[Any] = set()
    taken: set[int] = set()
    for row in order.tolist():
        if labels[row] not in taken and persons[row] not in used:
            chosen.append(row)
            used.add(persons[row])
            taken.add(int(labels[row]))
    if len(chosen) >= k:
        return np.array(chosen[:k])
    rest = np.setdiff1d(np.argsort(-weights, kind="stable"), chosen, assume_unique=True)
    others = [row for row in rest.tolist() if persons[row] not in used]
    first = pd.Series(others, dtype=int).groupby(persons[others], sort=False).first().tolist()
    known = set(first)
    again = [row for row in rest.tolist() if row not in known]
    return np.array([*chosen, *first, *again][:k])


def _cluster(
    Z: np.ndarray, weights: np.ndarray, k: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the cluster of each row by weighted k-means, and its distance to the centre."""
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    kind = KMeans if len(Z) <= MOST_EXACT else MiniBatchKMeans
    found = kind(k, n_init=1, max_iter=50, random_state=seed)
    weights = weights if weights.max() > 0 else np.ones(len(Z))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different rows than clusters
        found.fit(Z, sample_weight=weights + 1e-6 * weights.max())
    return found.labels_, np.linalg.norm(Z - found.cluster_centers_[found.labels_], axis=1)


def _list_images(
    rows: pd.DataFrame,
    code: np.ndarray,
    picked: np.ndarray,
    reasons: np.ndarray,
    probability: np.ndarray,
) -> pd.DataFrame:
    """Return the images of the chosen units, see `Worklist.rows`."""
    rank = pd.Series(np.arange(1, len(picked) + 1), index=picked)
    images = rows.assign(rank=rank.reindex(code).to_numpy()).dropna(subset="rank")
    images = images.astype({"rank": int}).sort_values(["rank", "image"], ignore_index=True)
    at = images["rank"].to_numpy() - 1
    images = images.assign(**{CHOSEN_BY: reasons[at], "probability": probability[at]})
    columns = ["rank", "sha256", "image", "study", "patient", "region", CHOSEN_BY, "probability"]
    return images[columns]
