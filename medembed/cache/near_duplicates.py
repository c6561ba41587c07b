"""Find images of `test` that look like images of `train`: leaks that comparing bytes misses.

An image that was re-encoded, resized or slightly brightened has different bytes and almost the
original embedding. The threshold of similarity is estimated from the data: from the similarity of
images of different train patients.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from medembed.cache.embeddings import find_rows, load_embeddings
from medembed.cache.image_similarity import LookAlikes, find_lookalikes, find_nearest, whiten
from medembed.cache.index import keys_from_column
from medembed.cache.store import Cache, open_cache
from medembed.core.errors import MedembedError
from medembed.core.nearest import counting
from medembed.dataset.checks import cap
from medembed.dataset.identities import name_persons
from medembed.dataset.manifest import Manifest, read_manifest, require_hashes
from medembed.dataset.splits import join_same_bytes

__all__ = ["ALIKE", "MAX_CALIBRATION", "REACH", "NearDuplicates", "find_near_duplicates"]

MAX_CALIBRATION = 4000
"""Most train images, of different patients, that determine the threshold. In a larger split,
look-alikes are searched among equally many images, one drawn per patient."""
REACH = 0.9999
"""The highest threshold: a losslessly saved copy is above it, in float16 or float32."""
ALIKE = 0.9
"""From this similarity on, train images of different patients count as alike. With the demo
encoder, 19 of 20 copies saved as JPEG at quality 80 or resized reach it."""


@dataclass(frozen=True, eq=False)
class NearDuplicates:
    """Test images that look like a train image, and how often that is expected by chance.

    Parameters
    ----------
    pairs : DataFrame
        One row per flagged test image, the most similar first: `image_a` (test), `image_b` (the
        nearest train image), `patient_a`, `patient_b`, and `similarity`, above `threshold` and at
        most 1.
    lookalikes : DataFrame
        One row per pair of images of one split that look alike under different patients, the most
        similar first: `split` and the columns of `pairs`.
    threshold : float
        Test images are flagged above it; at most `REACH`, or infinite if nothing could be compared.
    false_alarm_rate : float
        At most this share of test images without a twin is flagged: the requested rate, or the
        smallest that the number of train patients and `REACH` allow; 0 if the threshold is
        infinite.
    asked : float
        The requested rate.
    expected_false_alarms : float
        `false_alarm_rate * n_test`.
    n_test, n_train : int
        Number of images compared.
    n_calibration : int
        Number of train images, each of another patient, that the threshold was estimated from;
        patients whose images look alike count as one.
    n_alike : int
        How many of these have a twin (similarity of at least `ALIKE`) of another train patient that
        is no look-alike, because other images are about as near; such twins raise the threshold.
    n_looked : int
        Number of images whose look-alikes were searched, over both splits.
    n_failed, n_missing : int
        Rows left out because the image failed to be embedded, or is not in the cache yet.
    """

    pairs: pd.DataFrame = field(repr=False)
    lookalikes: pd.DataFrame = field(repr=False)
    threshold: float
    false_alarm_rate: float
    asked: float
    expected_false_alarms: float
    n_test: int
    n_train: int
    n_calibration: int
    n_alike: int
    n_looked: int
    n_failed: int
    n_missing: int

    def as_dict(self) -> dict[str, object]:
        """Return JSON values; an infinite threshold is None."""
        tables = ("pairs", "lookalikes")
        numbers = {name: value for name, value in vars(self).items() if name not in tables}
        if math.isinf(self.threshold):
            numbers["threshold"] = None
        return {**numbers, **{name: getattr(self, name).to_dict("records") for name in tables}}

    def problems(self) -> list[str]:
        """Return a line per flagged test image and per pair of look-alikes within a split.

        For each kind, the first 20 and the number of others.
        """
        chance = f"a false alarm in {_share(self.false_alarm_rate)}"
        lines = (
            f"test image {a!r} looks like train image {b!r} (similarity {similarity:.3f}; {chance})"
            for a, b, similarity in zip(
                self.pairs["image_a"],
                self.pairs["image_b"],
                self.pairs["similarity"],
                strict=True,
            )
        )
        return [*cap(lines, len(self.pairs)), *self._lookalike_lines()]

    def _lookalike_lines(self) -> list[str]:
        lines = (
            f"{row.split} images {row.image_a!r} and {row.image_b!r} look alike (similarity "
            f"{row.similarity:.3f}) and stand under two patients, {row.patient_a!r} and "
            f"{row.patient_b!r}"
            for row in self.lookalikes.itertuples(index=False)
        )
        return cap(lines, len(self.lookalikes))

    def describe(self) -> str:
        """Return sentences on what was compared, what was found, and what chance explains."""
        sentences = [self._outcome()]
        if 0 < self.asked < self.false_alarm_rate:
            sentences.append(
                f"{self.n_calibration:,} train patients allow no rarer "
                f"false alarms than in {_share(self.false_alarm_rate)} (asked for: "
                f"{_share(self.asked)})."
            )
        if self.n_alike:
            sentences.append(
                f"{self.n_alike:,} of {self.n_calibration:,} sampled train images are so near "
                f"(similarity {ALIKE} or more) to several other train patients, which raises the "
                "threshold: fainter copies are missed."
            )
        if len(self.lookalikes):
            found = len(self.lookalikes)
            sentences.append(
                f"{found:,} pair{'s' if found > 1 else ''} of images within a split look alike "
                "under two patients: one image that stands twice, or films that show nothing. "
                "The threshold was not read off them."
            )
        n_images = self.n_test + self.n_train
        if 0 < self.n_looked < n_images:
            sentences.append(
                f"Look-alikes within a split were looked for among {self.n_looked:,} of "
                f"{n_images:,} images."
            )
        if self.n_failed:
            sentences.append(f"Left out: {self.n_failed:,} that could not be embedded.")
        if self.n_missing:
            sentences.append(
                f"Left out: {self.n_missing:,} not in the cache; `medembed extract` embeds them."
            )
        return " ".join(sentences)

    def _outcome(self) -> str:
        if math.isinf(self.threshold):
            lacks = "train images of two patients" if self.n_test else "test images"
            return f"Near-duplicates were not looked for: the cache has no {lacks} of the manifest."
        found = len(self.pairs)
        looks = f"{found:,} look" if found > 1 else f"{found or 'none'} looks"
        of_these = "of these " if found > self.expected_false_alarms else ""
        return (
            f"Compared {self.n_test:,} test images with {self.n_train:,} train images: {looks} "
            f"like a train image (similarity above {self.threshold:.3f}); about "
            f"{_number(self.expected_false_alarms)} {of_these}are expected by chance alone."
        )


def find_near_duplicates(
    cache: Cache | str | os.PathLike[str],
    manifest: Manifest | str | os.PathLike[str],
    *,
    false_alarm_rate: float = 0.001,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> NearDuplicates:
    """Return test images whose embedding is too near to that of a train image.

    Embeddings are all single-vector poolings of the cache joined, without columns that are constant
    up to the rounding of its dtype. Their similarity is a cosine, in a metric learned from all
    compared rows of test and train (`whiten`). Labels are not used. The result does not depend on
    the order of the rows.

    Parameters
    ----------
    cache, manifest : Cache, Manifest or path
        The cache and the manifest to join. Rows that failed or are not embedded yet are left out
        and counted.
    false_alarm_rate : float
        Share in (0, 1) of test images without a twin that may be flagged.
    seed : int
        Random seed of the sample of train images that the threshold is estimated from.
    progress : callable, optional
        Called as progress(done, total) with images whose nearest train image is known.

    Returns
    -------
    NearDuplicates

    Raises
    ------
    MissingRowsError
        No row is in the cache, and not because all failed; the message names the command to run.
    ManifestError
        The manifest has no SHA-256s (`--structure-only`), or is invalid.
    CacheError
        A shard is damaged (`ShardError`).
    TrainingDataError
        The cache has no pooling of one vector per image.
    MedembedError
        `false_alarm_rate` is out of range.

    Notes
    -----
    For each of up to `MAX_CALIBRATION` randomly drawn train patients, one image is drawn, and its
    similarity S_i to the nearest image of any *other* train patient is computed, as expected for a
    test image without a twin. Patients that share an image's bytes count as one. A test image with
    similarity s is flagged if 2 + #{i: S_i >= s} <= alpha (n + 1), which is a threshold on s.

    This is a conformal test by ranks (Vovk, Gammerman and Shafer, Algorithmic Learning in a Random
    World, 2005), with one image per patient because images of one patient are not exchangeable
    with those of others (Dunn, Wasserman and Ramdas, JASA 118, 2023: single subsampling). The 2 in
    place of the usual 1 compensates for leaving out: if the test patient were one of the train
    patients, as the rank argument assumes, it would also be as near to its nearest patient.
    With a 1 the rate could be twice alpha (as for the jackknife+; Barber et al., Annals of
    Statistics 49, 2021), and is if all train patients are drawn and alpha (n + 1) = 1.

    Train patients whose images look alike also count as one (`find_alike`): a duplicate film, or
    two black ones, would otherwise set the threshold, and no copy would exceed it. They are listed
    in `lookalikes`, as are those within `test`. In any case the threshold is at most `REACH`; if
    that lowers it, the resulting rate is computed and reported.

    An image drawn from a test patient without a twin is thus flagged with probability at most alpha
    if that patient and the train patients are exchangeable, as if `test` had been drawn by lot. Two
    effects are neglected: exact ties, and other views of the test patient that are as near to a
    second train patient. If `test` comes from another source, the rate is not guaranteed. Train
    images that are very near to several patients are no look-alikes, and raise the threshold
    (`n_alike`).

    With n patients alpha is at least 2 / (n + 1). If less is requested, this value is used and
    reported: the threshold is then the largest S_i.

    Memory: the embeddings once, as float32 (as in a sweep), a d x d matrix, and blocks of fixed
    size.
    """
    if not 0 < false_alarm_rate < 1:
        raise MedembedError(
            f"false_alarm_rate={false_alarm_rate!r} is out of range: give a share between 0 and 1."
        )
    cache = cache if isinstance(cache, Cache) else open_cache(cache)
    rows, X, left_out = _load(cache, manifest)
    whiten(X, float(np.finfo(cache.spec.dtype).eps))
    n_test = int((rows["split"] == "test").sum())
    test, train = X[:n_test], X[n_test:]  # views, no copies
    groups = _groups(rows[n_test:])
    drawn = _draw(groups, seed) if n_test else np.empty(0, np.int64)
    alike = _looked_at(groups, drawn)
    tick = counting(progress, len(alike) + n_test)
    within_train = find_lookalikes(train, groups, alike, tick)
    usual = _usual(within_train, np.isin(alike, drawn))
    threshold, rate = _calibrate(usual, false_alarm_rate)
    similarity, nearest = find_nearest(test, train, tick=tick)
    test_groups = _groups(rows[:n_test])
    looked = _looked_at(test_groups, _draw(test_groups, seed))
    within_test = find_lookalikes(test, test_groups, looked)
    return NearDuplicates(
        pairs=_pair(rows, similarity, nearest + n_test, threshold),
        lookalikes=_list_lookalikes(rows, {0: within_test, n_test: within_train}),
        threshold=threshold,
        false_alarm_rate=rate,
        asked=false_alarm_rate,
        expected_false_alarms=rate * n_test,
        n_test=n_test,
        n_train=len(train),
        n_calibration=len(usual),
        n_alike=int((usual >= ALIKE).sum()),
        n_looked=len(alike) + len(looked),
        **left_out,
    )


def _load(
    cache: Cache, manifest: Manifest | str | os.PathLike[str]
) -> tuple[pd.DataFrame, np.ndarray, dict[str, int]]:
    """Return the embedded rows, test before train and by image, their X, and the rows left out."""
    name = "MANIFEST" if isinstance(manifest, Manifest) else str(manifest)
    manifest = manifest if isinstance(manifest, Manifest) else read_manifest(Path(manifest))
    require_hashes(manifest)
    rows = manifest.rows.sort_values(["split", "image"], ignore_index=True)
    done = cache.is_done(keys_from_column(rows["sha256"]))
    if not done.any():
        find_rows(cache, rows, name)  # raises an error that names the command to run
    n_failed = int(rows["sha256"][~done].isin(list(cache.failures())).sum())
    found = load_embeddings(cache, Manifest(rows[done], manifest.label_level))
    left_out = {"n_failed": n_failed, "n_missing": int((~done).sum()) - n_failed}
    return found.rows, found.X, left_out


def _groups(train: pd.DataFrame) -> np.ndarray:
    """Return train patients as numbers from 0, (n,) int64; those that share bytes are merged."""
    joined = join_same_bytes(name_persons(train), train["sha256"])
    return np.asarray(pd.factorize(joined, sort=True)[0], np.int64)


def _draw(groups: np.ndarray, seed: int) -> np.ndarray:
    """Return the rows, (k,), of one image each of at most `MAX_CALIBRATION` drawn patients.

    A single patient cannot be compared: k is then 0.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(groups))
    _, firsts = np.unique(groups[order], return_index=True)
    if len(firsts) < 2:
        return np.empty(0, np.int64)
    drawn = generator.permutation(firsts)[:MAX_CALIBRATION]
    return np.asarray(np.sort(order[drawn]), np.int64)


def _looked_at(groups: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Return the rows whose look-alikes are searched: all, or in a large split the drawn ones."""
    return np.arange(len(groups)) if len(drawn) and len(groups) <= MAX_CALIBRATION else drawn


def _usual(alike: LookAlikes, is_drawn: np.ndarray) -> np.ndarray:
    """Return the drawn images' similarity to other patients, once per group of look-alikes."""
    is_known = np.flatnonzero(is_drawn & np.isfinite(alike.usual))
    _, first = np.unique(alike.units[is_known], return_index=True)
    return np.asarray(alike.usual[is_known[first]])


def _calibrate(usual: np.ndarray, rate: float) -> tuple[float, float]:
    """Return the threshold and its false-alarm rate; see the notes of `find_near_duplicates`."""
    n = len(usual)
    if n < 2:
        return math.inf, 0.0
    n_allowed = max(2, math.floor(rate * (n + 1) + 1e-9))  # 0.29 * 100 is 28.999…
    threshold, kept = float(np.sort(usual)[::-1][n_allowed - 2]), max(rate, 2 / (n + 1))
    if threshold <= REACH:
        return threshold, kept
    return REACH, min(1.0, max(kept, (2 + int((usual > REACH).sum())) / (n + 1)))


def _list_lookalikes(rows: pd.DataFrame, found: dict[int, LookAlikes]) -> pd.DataFrame:
    """Return the named pairs of both splits, keyed by each split's first row."""
    pairs = np.concatenate([alike.pairs + start for start, alike in found.items()])
    similarity = np.concatenate([alike.similarity for alike in found.values()])
    order = np.argsort(-similarity, kind="stable")
    a, b = rows.iloc[pairs[order, 0]], rows.iloc[pairs[order, 1]]
    return pd.DataFrame({"split": a["split"].to_numpy(object), **_names(a, b)}).assign(
        similarity=similarity[order]
    )


def _names(a: pd.DataFrame, b: pd.DataFrame) -> dict[str, np.ndarray]:
    return {
        f"{column}_{side}": part[column].to_numpy(object)
        for column in ("image", "patient")
        for side, part in (("a", a), ("b", b))
    }


def _pair(
    rows: pd.DataFrame, similarity: np.ndarray, nearest: np.ndarray, threshold: float
) -> pd.DataFrame:
    flagged = np.flatnonzero(similarity > threshold)
    flagged = flagged[np.argsort(-similarity[flagged], kind="stable")]
    a, b = rows.iloc[flagged], rows.iloc[nearest[flagged]]
    return pd.DataFrame({**_names(a, b), "similarity": similarity[flagged]})


def _share(rate: float) -> str:
    """Return a share of images as text: "1 of 1,000 images", above 1 % "4.9 % of images"."""
    return f"1 of {1 / rate:,.0f} images" if rate <= 0.01 else f"{100 * rate:.2g} % of images"


def _number(expected: float) -> str:
    """Return an expected number as text, with one digit below 2: 3, 0.3, 0.05."""
    return f"{expected:,.0f}" if expected >= 2 else f"{expected:.1g}"
