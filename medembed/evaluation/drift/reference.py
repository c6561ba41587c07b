"""Measure how far a set of embeddings is from those of a model's training, without labels.

Directions come from one third of the training patients; the statistics along them and their chance
variation come from the other two thirds. The latter and new patients from the training distribution
are therefore exchangeable, and tests keep their level. One row per patient is used, because views
of one patient are not independent.

In addition to the whole cloud, the mix of regions is compared, and each region with itself.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import betaincinv, ndtri, stdtrit

from medembed.core.errors import ModelError, TrainingDataError
from medembed.evaluation.bootstrap import CONFIDENCE, patient_codes
from medembed.evaluation.drift.embedding_space import Space, fit_remoteness, frechet, learn_space
from medembed.evaluation.paired import holm

__all__ = [
    "BASIS",
    "MIN_PATIENTS",
    "VERDICTS",
    "fit_reference",
    "measure_drift",
]


def _fit_regions(points: np.ndarray, regions: np.ndarray) -> dict[str, np.ndarray]:
    """Summarise points (n, k) by region (n,): names (JSON in uint8), counts, means, spreads."""
    names = sorted({str(region) for region in regions})
    members = [points[regions.astype(str) == name] for name in names]
    return {
        "region_names": np.frombuffer(json.dumps(names).encode(), np.uint8).copy(),
        "region_counts": np.array([len(own) for own in members]),
        "region_means": np.stack([own.mean(axis=0) for own in members]),
        "region_spreads": np.array([_spread(own) for own in members]),
    }


def _spread(points: np.ndarray) -> float:
    """Return the trace of the covariance, or -1 for a single point, whose spread is unknown."""
    return float(points.var(axis=0, ddof=1).sum()) if len(points) > 1 else -1.0


def _measure_regions(
    reference: Mapping[str, np.ndarray], points: np.ndarray, regions: np.ndarray
) -> dict[str, Any]:
    """Return ``regions`` and ``within_regions`` of `drift.measure_drift`.

    Parameters
    ----------
    reference : mapping
        Contains the arrays of `_fit_regions`, and the ``range`` of `drift.fit_reference`.
    points, regions : arrays of shape (n, k) and (n,)

    Raises
    ------
    ModelError
        The reference's arrays do not fit together, or a region has no patients.
    """
    names = _read_names(reference, points.shape[1])
    known, limit = dict(zip(names, range(len(names)), strict=True)), reference["range"][0]
    counts, entries = reference["region_counts"], []
    mean_shift, noise, weight = np.zeros(points.shape[1]), 0.0, 0.0
    for name in sorted({*names, *(str(region) for region in regions)}):
        own, k = points[regions.astype(str) == name], known.get(name)
        entry: dict[str, Any] = {"region": name, "n_patients": len(own)}
        entry |= {"share": len(own) / len(points), "shift": None, "outside_share": None}
        entry["training_share"] = 0.0 if k is None else float(counts[k] / counts.sum())
        if len(own):
            entry["outside_share"] = float((np.linalg.norm(own, axis=1) > limit).mean())
        if len(own) and k is not None:
            moved = own.mean(axis=0) - reference["region_means"][k]
            spreads = _spread(own), float(reference["region_spreads"][k])
            chance = spreads[0] / len(own) + spreads[1] / int(counts[k])
            chance = chance if min(spreads) >= 0 else math.inf
            entry["shift"] = _beyond(moved, chance)
            if math.isfinite(chance):
                mean_shift += len(own) * moved
                noise, weight = noise + len(own) ** 2 * chance, weight + len(own)
        entries.append(entry)
    within = _beyond(mean_shift / weight, noise / weight**2) if weight else None
    return {"regions": entries, "within_regions": within}


def _beyond(moved: np.ndarray, chance: float) -> float | None:
    """Return a length after subtracting chance from its square, or None if chance is unknown."""
    if not math.isfinite(chance):
        return None
    return math.sqrt(max(0.0, float(moved @ moved) - chance))


def _read_names(reference: Mapping[str, np.ndarray], k: int) -> list[str]:
    shapes = [
        reference[name].shape if name in reference else None
        for name in ("region_counts", "region_means", "region_spreads")
    ]
    try:
        names = json.loads(bytes(reference["region_names"]))
    except ValueError:
        names = None
    n = len(names) if isinstance(names, list) else -1
    fits = shapes == [(n,), (n, k), (n,)] and all(isinstance(name, str) for name in names)
    if not fits or not (reference["region_counts"] >= 1).all():
        raise ModelError(
            "the model's reference of regions is damaged; copy or train the model again"
        )
    return list(names)


#: With fewer training patients, or new ones, drift is not measured.
MIN_TRAINING, MIN_PATIENTS = 12, 5
#: More patients are not used: 4,500 determine the distances precisely enough.
_MAX_PATIENTS = 4_500
#: Random parts of the training patients for each size: the smallest p is 1 / 201.
_N_PARTS = 200
#: Share of the training patients within the training range.
RANGE = 0.95
ALPHA = 0.05
_CLIP = 3.0
#: Distances, in standard deviations, below which drift is slight or clear: two normal clouds at
#: these distances share 2 Phi(-D / 2) of their mass, 80 % and 50 %.
SLIGHT, CLEAR = 0.5, 1.35
VERDICTS = ("none", "slight", "clear", "strong")
BASIS = (
    "Drift is said where a test at 5 % (of distance, mean and range, by Holm) says so; by "
    "its distance beyond chance, in standard deviations of training, it is slight below "
    f"{SLIGHT:g} (two normal clouds that far apart share 80 %), clear below {CLEAR:g} (they share "
    "half), and strong beyond."
)
_N_COLUMNS = 5


def fit_reference(
    X: np.ndarray,
    seed: int = 0,
    *,
    patients: np.ndarray | None = None,
    regions: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Return a summary of training embeddings for `measure_drift`, without any of their rows.

    Parameters
    ----------
    X : float array of shape (n, d)
        Embeddings of the training rows, finite.
    seed : int
        Determines which patients the directions come from, and the random parts.
    patients, regions : arrays of shape (n,), optional
        Each row's patient (by default every row is its own) and region.

    Returns
    -------
    dict of str to ndarray
        Some hundred kB. ``n_patients`` (those behind the statistics); with `MIN_TRAINING` patients
        or more also the space's arrays (see `Space`), ``mean`` (K,) and ``covariance`` (K, K) in
        the space, ``column_mean`` (d,), ``range`` (distance, its rank, number of patients),
        ``quantiles`` of distance (101,), the arrays of `fit_remoteness`, ``part_sizes`` (S,) and
        ``parts`` (S, 2, 200), the chance variation, see `measure_drift`; with `regions`
        ``region_names`` (JSON in uint8), ``region_counts``, ``region_means``, ``region_spreads``.

    Raises
    ------
    TrainingDataError
        A row has no patient or several, or an embedding is not finite.
    """
    codes = _codes_of(X, patients)
    generator = np.random.default_rng(seed)
    rows = _one_row_each(codes, generator)
    rows = generator.permutation(rows)[:_MAX_PATIENTS]
    if len(rows) < MIN_TRAINING:
        return {"n_patients": np.array([len(rows)])}
    for_space, kept = rows[: len(rows) // 3], rows[len(rows) // 3 :]
    space = learn_space(X[for_space], X[kept], generator)
    points = space.project(X[kept])
    distances = np.sort(np.linalg.norm(points, axis=1))
    rank = min(math.ceil(RANGE * (len(kept) + 1)), len(kept))
    sizes = _part_sizes(len(kept))
    reference = {
        "n_patients": np.array([len(kept)]),
        **space.as_arrays(),
        "mean": _clipped(points).mean(axis=0),
        "covariance": _covariance(_clipped(points)),
        "column_mean": X[kept].mean(axis=0, dtype=np.float64).astype(np.float32),
        "range": np.array([distances[rank - 1], rank, len(kept)]),
        "quantiles": np.quantile(distances, np.linspace(0, 1, 101)),
        **fit_remoteness(space, X[for_space], X[kept]),
        "part_sizes": sizes,
        "parts": np.stack([_random_parts(_clipped(points), n, generator) for n in sizes]),
    }
    if regions is not None:
        reference |= _fit_regions(points, np.asarray(regions)[kept])
    return reference


def measure_drift(
    reference: Mapping[str, np.ndarray],
    X: np.ndarray,
    seed: int = 0,
    *,
    patients: np.ndarray | None = None,
    regions: np.ndarray | None = None,
) -> dict[str, Any]:
    """Return a comparison of embeddings with those behind a reference, without using labels.

    Parameters
    ----------
    reference : mapping
        From `fit_reference`.
    X : float array of shape (n, d)
        Embeddings with the columns of the reference.
    seed : int
        Determines which row of each patient is used.
    patients, regions : arrays of shape (n,), optional
        See `fit_reference`.

    Returns
    -------
    dict
        JSON values. ``verdict``, one of `VERDICTS`, or None if drift cannot be measured;
        ``sentence`` and ``basis`` of the verdict; ``p``, the smallest after Holm's correction;
        ``n_patients``, ``n_training_patients``.

        ``distance``: ``value``, ``beyond_chance``, ``chance_median``, ``chance_high`` (95 %),
        ``p``. The Fréchet distance between normal clouds (Dowson and Landau, Journal of
        Multivariate Analysis 12, 1982), in standard deviations of training. Under equal
        distributions its square is about (1 / m + 1 / n) times a factor that does not depend on
        the numbers of patients m and n; this factor is estimated by comparing random parts of the
        training patients with the rest, at the size of the new set, or half of the training
        patients if the new set is larger. ``shift`` has the corresponding values for the distance
        between the means alone, which detects smaller shifts.

        ``outside``: ``n`` of ``of`` patients further out than 95 % of training (``share`` with
        its Clopper-Pearson interval ``low``, ``high``), ``expected`` share, ``chance_high`` (95 %),
        ``p``. Exact: the number outside the j-th of N training distances is beta-binomial with
        parameters N + 1 - j and j. ``share_of_rows`` counts all rows.

        ``columns``: those that differ most, ``{column, shift}`` in standard deviations.
        ``regions``, if both sides have them: per region ``region, n_patients, share,
        training_share, shift`` (of its mean, beyond chance; None if there are too few patients),
        ``outside_share``; and ``within_regions``, the shift of the mean after adjusting for the mix
        of regions.

    Raises
    ------
    ModelError
        The reference is damaged, or of embeddings with another number of columns.
    TrainingDataError
        A row has no patient or several, or an embedding is not finite.
    """
    codes = _codes_of(X, patients)
    rows = _one_row_each(codes, np.random.default_rng(seed))
    n_known = _count_known(reference)
    counts = {"n_patients": len(rows), "n_rows": len(X), "n_training_patients": n_known}
    if "mean" not in reference or len(rows) < MIN_PATIENTS:
        return _not_measured(counts, few_training="mean" not in reference)
    space = Space.from_arrays(reference)
    if X.shape[1] != len(space.centre):
        raise ModelError(
            f"the model's reference is of {len(space.centre)} columns, these embeddings have "
            f"{X.shape[1]}; use the poolings that the model reads"
        )
    _check_reference(reference, space)
    points, all_points = space.project(X[rows]), space.project(X)
    tests = _measure_distances(reference, points)
    tests["outside"] = _measure_range(reference, points, all_points)
    p = float(holm([test["p"] for test in tests.values()]).min())
    found: dict[str, Any] = {
        **counts,
        "p": p,
        **tests,
        "columns": _furthest_columns(reference, space, X[rows]),
    }
    if regions is not None and "region_names" in reference:
        found |= _measure_regions(reference, points, np.asarray(regions)[rows])
    verdict = _judge(p, max(tests[name]["beyond_chance"] for name in ("distance", "shift")))
    return {
        "verdict": verdict,
        "sentence": _write_sentence(verdict, found),
        "basis": BASIS,
        **found,
    }


def _codes_of(X: np.ndarray, patients: np.ndarray | None) -> np.ndarray:
    codes = np.arange(len(X)) if patients is None else patient_codes(patients)
    if len(codes) != len(X):
        raise TrainingDataError(f"{len(X)} embeddings, but {len(codes)} patients")
    if not np.isfinite(X).all():
        raise TrainingDataError("an embedding is not finite; drift cannot be measured")
    return codes


def _one_row_each(codes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return a random row of every patient, by the patients' codes."""
    order = generator.permutation(len(codes))
    _, first = np.unique(codes[order], return_index=True)
    return np.asarray(order[first])


def _part_sizes(n: int) -> np.ndarray:
    """Return sizes of parts from `MIN_PATIENTS` to one half, each about twice the previous."""
    largest = max(n // 2, min(MIN_PATIENTS, n - 2))
    n_sizes = max(1, round(math.log2(largest / MIN_PATIENTS)) + 1)
    sizes = np.geomspace(min(MIN_PATIENTS, largest), largest, n_sizes)
    return np.unique(sizes.round().astype(np.int64))


def _random_parts(points: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """Return sorted distances of random parts from the rest: (2, 200) `_scaled` squares.

    The first row holds Fréchet distances, the second distances of the means.
    """
    n, k = points.shape
    moments = np.hstack([points, (points[:, :, None] * points[:, None, :]).reshape(n, -1)])
    inside = np.zeros((_N_PARTS, n))
    for draw in inside:
        draw[generator.permutation(n)[:size]] = 1
    own, whole = inside @ moments, moments.sum(axis=0)
    a, b = _normals(own, size, k), _normals(whole - own, n - size, k)
    squares = np.stack([frechet(*a, *b), ((a[0] - b[0]) ** 2).sum(axis=1)])
    return np.sort(_scaled(squares, size, n - size), axis=1)


def _normals(sums: np.ndarray, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Turn sums of points and of their products into means (B, k) and covariances (B, k, k)."""
    means = sums[:, :k] / n
    products = sums[:, k:].reshape(-1, k, k) / n
    return means, (products - means[:, :, None] * means[:, None, :]) * (n / (n - 1))


def _clipped(points: np.ndarray) -> np.ndarray:
    """Return points clipped to `_CLIP`, as heavy tails distort covariances; the range sees them."""
    return np.asarray(np.clip(points, -_CLIP, _CLIP))


def _covariance(points: np.ndarray) -> np.ndarray:
    return np.asarray(np.cov(points, rowvar=False).reshape(points.shape[1], -1))


def _scaled(squared: Any, m: int, n: int) -> Any:
    return squared / (1 / m + 1 / n)


def _measure_distances(
    reference: Mapping[str, np.ndarray], points: np.ndarray
) -> dict[str, dict[str, Any]]:
    n, n_known = len(points), int(reference["n_patients"][0])
    points, mean = _clipped(points), _entry(reference, "mean")
    own = points.mean(axis=0), _covariance(points)
    squares = {
        "distance": float(frechet(*own, mean, _entry(reference, "covariance"))),
        "shift": float(((own[0] - mean) ** 2).sum()),
    }
    parts = _interpolate(_entry(reference, "part_sizes"), _entry(reference, "parts"), n)
    # the parts estimate the spread of the training patients only as well as their number allows
    unsure = float(stdtrit(n_known - 1, 1 - ALPHA / 2) / ndtri(1 - ALPHA / 2)) ** 2
    chances = parts * (1 / n + 1 / n_known) * unsure
    return {
        name: {
            "value": math.sqrt(squared),
            "beyond_chance": math.sqrt(max(0.0, squared - float(chance.mean()))),
            "chance_median": math.sqrt(float(np.median(chance))),
            "chance_high": math.sqrt(float(np.quantile(chance, 1 - ALPHA))),
            "p": (1 + int((chance >= squared).sum())) / (1 + len(chance)),
        }
        for (name, squared), chance in zip(squares.items(), chances, strict=True)
    }


def _interpolate(sizes: np.ndarray, parts: np.ndarray, n: int) -> np.ndarray:
    """Return the parts' distances (2, 200) at size n, interpolated between neighbouring sizes."""
    place = np.interp(math.log(n), np.log(sizes), np.arange(len(sizes)))
    low, high = parts[math.floor(place)], parts[math.ceil(place)]
    return np.asarray(low + (place - math.floor(place)) * (high - low))


def _measure_range(
    reference: Mapping[str, np.ndarray], points: np.ndarray, all_points: np.ndarray
) -> dict[str, Any]:
    from scipy.stats import betabinom  # not earlier: takes half a second, and only drift needs it

    limit, rank, n_known = _entry(reference, "range")
    is_outside = np.linalg.norm(points, axis=1) > limit
    n, of = int(is_outside.sum()), len(points)
    tail = (1 - CONFIDENCE) / 2
    chance = betabinom(of, n_known + 1 - rank, rank)
    return {
        "n": n,
        "of": of,
        "share": n / of,
        "low": float(betaincinv(n, of - n + 1, tail)) if n else 0.0,
        "high": float(betaincinv(n + 1, of - n, 1 - tail)) if n < of else 1.0,
        "expected": float(chance.mean() / of),
        "chance_high": float(chance.ppf(1 - ALPHA) / of),
        "p": float(chance.sf(n - 1)),
        "share_of_rows": float((np.linalg.norm(all_points, axis=1) > limit).mean()),
    }


def _furthest_columns(
    reference: Mapping[str, np.ndarray], space: Space, X: np.ndarray
) -> list[dict[str, Any]]:
    means = X.mean(axis=0, dtype=np.float64)
    shifts = (means - _entry(reference, "column_mean")) / space.scale
    most = np.argsort(-np.abs(shifts), kind="stable")[:_N_COLUMNS]
    return [{"column": int(column), "shift": float(shifts[column])} for column in most]


def _judge(p: float, beyond_chance: float) -> str:
    if p >= ALPHA:
        return VERDICTS[0]
    return VERDICTS[1 + (beyond_chance >= SLIGHT) + (beyond_chance >= CLEAR)]


def _write_sentence(verdict: str, found: Mapping[str, Any]) -> str:
    distance, shift, outside = found["distance"], found["shift"], found["outside"]
    told = (
        f"the embeddings lie {distance['value']:.2f} standard deviations from those of training, "
        f"where chance reaches {distance['chance_high']:.2f}, their mean {shift['value']:.2f}, "
        f"where it reaches {shift['chance_high']:.2f}; {outside['n']:,} of "
        f"{outside['of']:,} patients ({outside['share']:.0%}) are outside the range that holds "
        f"{RANGE:.0%} of training patients, where it reaches {outside['chance_high']:.0%}"
    )
    if verdict == "none":
        return f"No drift seen: {told}."
    mixed = _describe_mix(found.get("regions", []))
    return f"{verdict.capitalize()} drift (p = {max(found['p'], 0.001):.3f}): {told}.{mixed}"


def _describe_mix(regions: list[dict[str, Any]]) -> str:
    """Return a sentence on the region whose share differs most, if a tenth of the mix differs."""
    gaps = [abs(entry["share"] - entry["training_share"]) for entry in regions]
    if sum(gaps) / 2 < 0.1:
        return ""
    most = regions[int(np.argmax(gaps))]
    return (
        f" The mix of regions differs, most in {most['region']}: {most['share']:.0%} here, "
        f"{most['training_share']:.0%} in training."
    )


def _not_measured(counts: dict[str, int], *, few_training: bool) -> dict[str, Any]:
    if few_training:
        reason = f"the model was trained on fewer than {MIN_TRAINING} patients"
    else:
        reason = f"there are {counts['n_patients']} patients, at least {MIN_PATIENTS} are needed"
    nothing = dict.fromkeys(("p", "distance", "shift", "outside"))
    return {
        "verdict": None,
        "sentence": f"Drift was not measured: {reason}.",
        "basis": BASIS,
        **counts,
        **nothing,
        "columns": [],
    }


def _count_known(reference: Mapping[str, np.ndarray]) -> int:
    counted = _entry(reference, "n_patients")
    if counted.shape != (1,) or counted[0] < (2 if "mean" in reference else 0):
        raise _damaged("n_patients")
    return int(counted[0])


def _check_reference(reference: Mapping[str, np.ndarray], space: Space) -> None:
    """Refuse arrays that do not fit together, or hold values that `fit_reference` never returns."""
    k = len(space.spreads) + len(space.rest[1:])
    names = ("mean", "covariance", "column_mean", "range", "part_sizes", "parts")
    mean, covariance, columns, limits, sizes, parts = (_entry(reference, name) for name in names)
    are_rising = sizes.ndim == 1 and sizes.size > 0 and (np.diff(sizes, prepend=0) > 0).all()
    are_right = {
        "mean": mean.shape == (k,),
        "covariance": covariance.shape == (k, k),
        "column_mean": columns.shape == space.centre.shape,
        "range": limits.shape == (3,) and 1 <= limits[1] <= limits[2],
        "part_sizes": are_rising,
        "parts": parts.shape[:2] == (sizes.size, 2) and parts.ndim == 3 and (parts >= 0).all(),
    }
    wrong = next((name for name, is_right in are_right.items() if not is_right), None)
    if wrong is not None or not parts.size:
        raise _damaged(wrong or "parts")


def _damaged(name: str) -> ModelError:
    return ModelError(f"the model's reference is damaged in {name}; copy or train the model again")


def _entry(reference: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in reference:
        raise ModelError(f"the model's reference lacks {name}; copy or train the model again")
    return reference[name]
