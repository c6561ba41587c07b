"""How often `medembed audit shortcuts` finds a marker that is there, and one that is not.

Data sets are drawn: Gaussian embeddings, half of the patients abnormal, one to three images of
each, and a label that one column of the embedding knows in part. A binary column of the manifest is

- null: drawn by itself;
- encoded: in the embedding, but independent of the label;
- shortcut: in the embedding, equal to the label in 85 % of patients.

Printed is how often p < 0.05 for each of the three questions, with Clopper and Pearson's limits.
Run by hand: `python bench/shortcuts.py [DRAWS]`, 400 for an hour of a core. All data are synthetic.
"""

import os
import sys
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from medembed.evaluation.bounds import clopper_pearson
from medembed.prediction.shortcuts import AuditRows

N_PATIENTS, N_FOLDS = 150, 5
WIDTHS = (12, 300)
QUESTIONS = ("encoded", "used", "gap")
MARKERS = ("null", "encoded", "shortcut")


def draw_rows(
    generator: np.random.Generator, marker: str, width: int = WIDTHS[0]
) -> tuple[AuditRows, np.ndarray]:
    """Return drawn rows, and the column of each."""
    label = generator.integers(0, 2, N_PATIENTS)
    column = generator.integers(0, 2, N_PATIENTS)
    if marker == "shortcut":
        column = np.where(generator.random(N_PATIENTS) < 0.85, label, 1 - label)
    codes = np.repeat(np.arange(N_PATIENTS), generator.integers(1, 4, N_PATIENTS))
    own = generator.normal(size=(N_PATIENTS, width))
    X = (own[codes] + generator.normal(size=(len(codes), width))).astype(np.float32)
    X[:, 0] += 1.2 * label[codes]
    if marker != "null":
        X[:, 1] += 4 * column[codes]
    fold = generator.permutation(np.arange(N_PATIENTS) % N_FOLDS)[codes]
    names = np.array(["no", "yes"], object)[column[codes]]
    return AuditRows(X, label[codes].astype(np.int8), fold, codes), names


def measure(
    marker: str, n_draws: int, width: int = WIDTHS[0], seed: int = 0
) -> dict[str, np.ndarray]:
    """Return the p of each question in each draw."""
    found: dict[str, list[float]] = {name: [] for name in QUESTIONS}
    for k in range(n_draws):
        rows, names = draw_rows(np.random.default_rng([seed, k]), marker, width)
        for name, p in rows.audit(names, ["no", "yes"]).p.items():
            found[name].append(p)
    return {name: np.array(own) for name, own in found.items()}


def main() -> None:
    """Print the share of draws with p < 0.05."""
    warnings.simplefilter("ignore")
    n_draws = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    print(f"{n_draws} draws of {N_PATIENTS} patients; share with p < 0.05")
    for width in WIDTHS:
        for marker in MARKERS:
            for name, p in measure(marker, n_draws, width).items():
                hits = int((p < 0.05).sum())
                low, high = clopper_pearson(hits / n_draws, n_draws, 0.95)
                share = f"{hits / n_draws:.3f} [{low:.3f}, {high:.3f}]"
                print(f"{width:>4} columns, {marker:<9} {name:<8} {share}", flush=True)


if __name__ == "__main__":
    main()
