"""How the mix of regions differs from training, and how far each region is from its own there."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from medembed.core.errors import ModelError

__all__ = ["fit_regions", "measure_regions"]


def fit_regions(points: np.ndarray, regions: np.ndarray) -> dict[str, np.ndarray]:
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
    """Return the trace of the covariance; -1 of one point: nothing is known of it."""
    return float(points.var(axis=0, ddof=1).sum()) if len(points) > 1 else -1.0


def measure_regions(
    reference: Mapping[str, np.ndarray], points: np.ndarray, regions: np.ndarray
) -> dict[str, Any]:
    """Return ``regions`` and ``within_regions`` of `drift.measure_drift`.

    Parameters
    ----------
    reference : mapping
        With what `fit_regions` gave, and the ``range`` of `drift.fit_reference`.
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
    """Return a length less what chance adds to its square; None where chance is not known."""
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
