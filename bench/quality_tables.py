"""The six tables of the quality study, each as a cache and a manifest, anew for every seed.

Four are made up, each with 1,500 images for training and 1,500 for testing: small enough that a
study of 6 tables × 10 seeds × 6 tools takes an hour or two on two cores.

- `made`: the table of the other benchmarks, 512 columns: 128 directions, linear part, products.
- `low_rank`: 768 columns of rank 24, as of an encoder for another kind of image.
- `few_columns`: 512 columns, of which 8 decide, by thresholds and by products.
- `noisy`: 768 columns in which 40 weak directions lie under much stronger noise.

`nih` is real: features of 736 chest radiographs, divided into training and test patients anew for
every seed. `demo` is what the demo's encoder makes of its synthetic radiographs, divided likewise.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from made_table import Table, draw_people, label_by, make_table, write_table
from medembed.dataset.manifest import Manifest, read_manifest, write_manifest
from medembed.dataset.splits import split_patients

__all__ = ["TABLES", "Place", "prepare"]

N_TRAIN, N_TEST, N_PATIENTS = 1_500, 1_500, 800
TEST_FRACTION = 0.35
SHARED = Path(__file__).parents[2] / "shared" / "data"
DEMO_PATIENTS = 400

Place = tuple[Path, Path]
"""The paths of a cache and of a manifest."""


def prepare(name: str, seed: int, folder: Path, shared: Path = SHARED) -> Place:
    """Return the cache and the manifest of a table, written into `folder` if they are not there."""
    return TABLES[name](folder, seed, shared)


def _write_made(draw: Callable[[np.random.Generator], Table], name: str) -> Callable[..., Place]:
    def write(folder: Path, seed: int, _shared: Path) -> Place:
        own = folder / f"{name}-{seed}"
        if not (own / "manifest.parquet").exists():
            # (the manifest is written last)
            write_table(draw(np.random.default_rng([seed, len(name)])), own)
        return own / "cache", own / "manifest.parquet"

    return write


def _made(generator: np.random.Generator) -> Table:
    seed = int(generator.integers(1 << 31))
    return make_table(N_TRAIN, N_PATIENTS, 512, n_test=N_TEST, seed=seed)


def _low_rank(generator: np.random.Generator, rank: int = 24, width: int = 768) -> Table:
    people = draw_people(generator, N_TRAIN, N_PATIENTS, N_TEST)
    latent = generator.standard_normal((people.n_studies, rank))
    signal = 1.5 * latent[:, 0] + latent[:, 1] + latent[:, 2] * latent[:, 3] - latent[:, 4] ** 2
    label = label_by(signal, generator)
    views = latent[people.studies] + 0.3 * generator.standard_normal((len(people.studies), rank))
    X = views @ generator.standard_normal((rank, width)) / np.sqrt(rank)
    X += 0.01 * generator.standard_normal(X.shape)
    return people.as_table(X.astype(np.float32), label)


def _few_columns(generator: np.random.Generator, width: int = 512) -> Table:
    people = draw_people(generator, N_TRAIN, N_PATIENTS, N_TEST)
    columns = generator.standard_normal((people.n_studies, width))
    first = columns[:, :8]
    signal = 2.0 * (first[:, 0] > 0.5) + 2.0 * (first[:, 1] < -0.3) + 1.2 * first[:, 2]
    signal += 1.5 * (first[:, 3] * first[:, 4] > 0) + np.abs(first[:, 5:]).sum(axis=1)
    label = label_by(signal, generator)
    X = columns[people.studies] + 0.2 * generator.standard_normal((len(people.studies), width))
    order = generator.permutation(width)
    return people.as_table(X[:, order].astype(np.float32), label)


def _noisy(generator: np.random.Generator, n_weak: int = 40, width: int = 768) -> Table:
    people = draw_people(generator, N_TRAIN, N_PATIENTS, N_TEST)
    latent = generator.standard_normal((people.n_studies, n_weak))
    signal = latent @ generator.standard_normal(n_weak) / np.sqrt(n_weak)
    label = label_by(2.0 * signal + 0.7 * latent[:, 0] * latent[:, 1], generator)
    views = latent[people.studies]
    X = views @ generator.standard_normal((n_weak, width)) / np.sqrt(n_weak)
    # noise with directions of its own, four times as strong, and as much again in every column
    n_noise = 100
    noise = generator.standard_normal((len(views), n_noise))
    X += 4.0 * noise @ generator.standard_normal((n_noise, width)) / np.sqrt(n_noise)
    X += 2.0 * generator.standard_normal(X.shape)
    return people.as_table(X.astype(np.float32), label)


def _nih(folder: Path, seed: int, shared: Path) -> Place:
    data = shared / "nih"
    if not data.is_dir():
        raise SystemExit(f"{data} is not there: leave out nih (--tables), or give --shared")
    return data / "cache", _divide(read_manifest(data / "manifest.csv"), folder / "nih", seed)


def _demo(folder: Path, seed: int, _shared: Path) -> Place:
    home = folder / "demo"
    home.mkdir(exist_ok=True)
    if not (home / "manifest.csv").exists():
        from medembed import extraction
        from medembed.demo import pipeline
        from medembed.encoders.loading import load_encoder

        def show(_label: str, _unit: str) -> nullcontext[Callable[[int, int], None]]:
            return nullcontext(lambda _done, _total: None)

        drawn = pipeline._build(home / "drawn", DEMO_PATIENTS, 0, show)
        extraction.extract(drawn, home / "drawn" / "images", load_encoder("demo"), home / "cache")
        write_manifest(drawn, home / "manifest.csv")
    return home / "cache", _divide(read_manifest(home / "manifest.csv"), home, seed)


def _divide(manifest: Manifest, folder: Path, seed: int) -> Path:
    """Write the manifest with other test patients."""
    path = folder / f"manifest-{seed}.parquet"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        split = split_patients(manifest.rows, fraction=TEST_FRACTION, seed=seed)
        write_manifest(Manifest(manifest.rows.assign(split=split), manifest.label_level), path)
    return path


TABLES: dict[str, Callable[[Path, int, Path], Place]] = {
    "made": _write_made(_made, "made"),
    "nih": _nih,
    "demo": _demo,
    "low_rank": _write_made(_low_rank, "low_rank"),
    "few_columns": _write_made(_few_columns, "few_columns"),
    "noisy": _write_made(_noisy, "noisy"),
}
