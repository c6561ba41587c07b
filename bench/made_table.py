"""A synthetic table of MURA's size: embeddings with a known, partly non-linear signal.

Studies have a latent vector whose variances decay like those of real embeddings; views of a study
differ from it by noise; a fixed random map transforms both into columns. The label depends on a
linear part, products of pairs and a threshold of the latent vector, and on chance. The table is not
based on radiographs.
"""

from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd

from medembed.cache.shards import max_rows
from medembed.cache.spec import CacheSpec, hex_from_keys
from medembed.cache.store import create_cache
from medembed.dataset.manifest import make_manifest, write_manifest

N_LATENT = 128
REGIONS = ("elbow", "finger", "forearm", "hand", "humerus", "shoulder", "wrist")


@dataclass(frozen=True)
class Table:
    """Rows are images; `split` is train or test."""

    X: np.ndarray
    y: np.ndarray
    patients: np.ndarray
    studies: np.ndarray
    regions: np.ndarray
    is_test: np.ndarray


def make_table(n_train: int = 36_808, n_patients: int = 11_184, width: int = 1152) -> Table:
    """Return a random table with an additional twelfth of images for testing, as in MURA."""
    generator = np.random.default_rng(0)
    n_rows = n_train + n_train // 12
    all_patients = n_patients + n_patients // 12
    # every patient has at least one study, every study at least one view
    n_studies = min(n_rows, round(all_patients * 1.2))
    study_patient = np.r_[
        np.arange(all_patients), generator.integers(0, all_patients, n_studies - all_patients)
    ]
    studies = np.r_[np.arange(n_studies), generator.integers(0, n_studies, n_rows - n_studies)]
    patients = study_patient[studies]
    scale = (1 + np.arange(N_LATENT)) ** -0.5
    latent = generator.standard_normal((n_studies, N_LATENT)).astype(np.float32)
    label = _labels(latent, generator)
    rows = (latent[studies] + 0.3 * generator.standard_normal((n_rows, N_LATENT))) * scale
    mixing = generator.standard_normal((N_LATENT, width)).astype(np.float32) / np.sqrt(N_LATENT)
    X = rows.astype(np.float32) @ mixing
    X += 0.05 * generator.standard_normal((n_rows, width)).astype(np.float32)
    X += generator.standard_normal(width).astype(np.float32)
    return Table(
        X=X.astype(np.float16).astype(np.float32),
        y=label[studies],
        patients=patients,
        studies=studies,
        regions=np.asarray(REGIONS)[study_patient % len(REGIONS)][studies],
        is_test=patients >= n_patients,
    )


def _labels(latent: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    linear = latent[:, :32] @ generator.standard_normal(32) / np.sqrt(32)
    products = (latent[:, :6] * latent[:, 6:12]).sum(axis=1) / np.sqrt(6)
    far = np.linalg.norm(latent[:, 12:16], axis=1) > 2.2
    signal = 1.6 * linear + 1.6 * products + 1.5 * far
    chance = generator.logistic(size=len(latent))
    return (signal + chance > np.quantile(signal + chance, 0.6)).astype(np.int8)


def write_table(table: Table, place: Path) -> tuple[Path, Path]:
    """Write a cache and a manifest of these rows."""
    spec = CacheSpec("ab" * 32, {"width": 896}, {"mean": (table.X.shape[1],)}, "float16")
    cache = create_cache(place / "cache", spec, {"source": "made up"})
    keys = np.random.default_rng(1).integers(0, 256, (len(table.X), 32), dtype=np.uint8)
    with mock.patch("os.fsync"):  # the disk is not what is measured
        for start in range(0, len(keys), max_rows(spec)):
            rows = slice(start, start + max_rows(spec))
            cache.commit(keys[rows], {"mean": table.X[rows]})
    frame = pd.DataFrame(
        {
            "image": [f"{number:06d}.png" for number in range(len(keys))],
            "sha256": hex_from_keys(keys),
            "patient": [f"patient{number:05d}" for number in table.patients],
            "study": [f"study{number:05d}" for number in table.studies],
            "region": table.regions,
            "label": table.y.astype(str),
            "split": np.where(table.is_test, "test", "train"),
        }
    )
    # a study has one region, whatever its patient's number
    write_manifest(make_manifest(frame, "study"), place / "manifest.parquet")
    return place / "cache", place / "manifest.parquet"
