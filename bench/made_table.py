"""A synthetic table, by default of MURA's size: embeddings with a known, partly non-linear signal.

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


def make_table(
    n_train: int = 36_808,
    n_patients: int = 11_184,
    width: int = 1152,
    *,
    n_test: int | None = None,
    seed: int = 0,
    share: float = 0.4,
) -> Table:
    """Return a random table; `share` is that of abnormal studies.

    `n_patients` are those of the `n_train` images for training. There are `n_test` images for
    testing, by default another twelfth as in MURA, of other patients.
    """
    generator = np.random.default_rng(seed)
    people = draw_people(generator, n_train, n_patients, n_test)
    scale = (1 + np.arange(N_LATENT)) ** -0.5
    latent = generator.standard_normal((people.n_studies, N_LATENT)).astype(np.float32)
    label = _labels(latent, generator, share)
    n_rows, studies = len(people.studies), people.studies
    rows = (latent[studies] + 0.3 * generator.standard_normal((n_rows, N_LATENT))) * scale
    mixing = generator.standard_normal((N_LATENT, width)).astype(np.float32) / np.sqrt(N_LATENT)
    X = rows.astype(np.float32) @ mixing
    X += 0.05 * generator.standard_normal((n_rows, width)).astype(np.float32)
    X += generator.standard_normal(width).astype(np.float32)
    return people.as_table(X, label)


@dataclass(frozen=True)
class People:
    """Which study and patient each image is of; the first `n_patients` are for training."""

    study_patient: np.ndarray
    studies: np.ndarray
    n_patients: int

    @property
    def n_studies(self) -> int:
        """The number of studies."""
        return len(self.study_patient)

    def as_table(self, X: np.ndarray, label: np.ndarray) -> Table:
        """Return these images with columns X and the labels of their studies."""
        patients = self.study_patient[self.studies]
        return Table(
            X=X.astype(np.float16).astype(np.float32),
            y=label[self.studies],
            patients=patients,
            studies=self.studies,
            regions=np.asarray(REGIONS)[self.study_patient % len(REGIONS)][self.studies],
            is_test=patients >= self.n_patients,
        )


def draw_people(
    generator: np.random.Generator, n_train: int, n_patients: int, n_test: int | None = None
) -> People:
    """Draw patients and studies for images; every patient has a study, every study an image."""
    if n_test is None:
        n_test, n_test_patients = n_train // 12, n_patients // 12
    else:
        n_test_patients = n_patients * n_test // n_train
    n_rows, all_patients = n_train + n_test, n_patients + n_test_patients
    n_studies = min(n_rows, round(all_patients * 1.2))
    study_patient = np.r_[
        np.arange(all_patients), generator.integers(0, all_patients, n_studies - all_patients)
    ]
    studies = np.r_[np.arange(n_studies), generator.integers(0, n_studies, n_rows - n_studies)]
    return People(study_patient, studies, n_patients)


def label_by(signal: np.ndarray, generator: np.random.Generator, share: float = 0.4) -> np.ndarray:
    """Return labels, int8, that a logistic model draws from `signal`; `share` of them are 1."""
    noisy = signal + generator.logistic(size=len(signal))
    return (noisy > np.quantile(noisy, 1 - share)).astype(np.int8)


def _labels(latent: np.ndarray, generator: np.random.Generator, share: float) -> np.ndarray:
    linear = latent[:, :32] @ generator.standard_normal(32) / np.sqrt(32)
    products = (latent[:, :6] * latent[:, 6:12]).sum(axis=1) / np.sqrt(6)
    far = np.linalg.norm(latent[:, 12:16], axis=1) > 2.2
    return label_by(1.6 * linear + 1.6 * products + 1.5 * far, generator, share)


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
