"""Does a prior of words help with few labels? Sweeps on made embeddings, whose truth is known.

    python bench/words.py [--seeds 20] [--labels 10 20 100] [--out FILE.json]

Images and prompts share a space by construction: images of the two classes lie on both sides of a
direction, and the prompts point along it with an error (cosine 0.7). All data are synthetic. Each
sweep sees the given number of labelled patients; the AUROC of 500 test patients is compared, and
the interval is of the mean paired difference over seeds (Student's t).
"""

import argparse
import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from medembed.cache.spec import CacheSpec, keys_from_hex
from medembed.cache.store import create_cache
from medembed.core.prompts import PromptEntry, Prompts, PromptsDocument
from medembed.dataset.manifest import Manifest, make_manifest
from medembed.evaluation.scores import by_study, score
from medembed.sweeps import sweep

FINGERPRINT = "ab" * 32
COSINE = 0.7
HEADS = ("zero-shot", "logistic", "text-logistic")


def make_space(seed: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the true direction, the prompts' one, and the spread of each column."""
    generator = np.random.default_rng(seed)
    true, error = generator.normal(size=(2, width))
    true /= np.linalg.norm(true)
    error -= error @ true * true
    error /= np.linalg.norm(error)
    spread = np.exp(0.3 * generator.normal(size=width))
    return true, COSINE * true + np.sqrt(1 - COSINE**2) * error, spread


def make_prompts(direction: np.ndarray) -> Prompts:
    """Return a prompt of each class, on both sides of the origin."""
    entries = [
        PromptEntry(set="made", label="normal", region=None, text="normal"),
        PromptEntry(set="made", label="abnormal", region=None, text="abnormal"),
    ]
    document = PromptsDocument(
        encoder=FINGERPRINT,
        text_encoder="cd" * 32,
        source="made",
        revision=None,
        logit_scale=20.0,
        logit_bias=0.0,
        prompts=entries,
    )
    return Prompts(document, np.stack([-direction, direction]).astype(np.float32))


def make_data(
    home: Path, seed: int, n_train: int, n_test: int, space: tuple[np.ndarray, ...]
) -> Manifest:
    """Write a cache of a study per patient, and return its manifest."""
    generator = np.random.default_rng([seed, n_train])
    n = n_train + n_test
    label = np.concatenate([generator.permutation(np.arange(m) % 2) for m in (n_train, n_test)])
    true, _, spread = space
    X = generator.normal(size=(n, len(true))) * spread + np.outer(2 * label - 1, true)
    names = [f"{seed}-{n_train}-{i}" for i in range(n)]
    digests = [hashlib.sha256(name.encode()).hexdigest() for name in names]
    spec = CacheSpec(FINGERPRINT, {"size": [8, 8]}, {"pooler": (len(true),)}, "float16")
    cache = create_cache(home / "cache", spec, {"source": "made", "precision": "fp32"})
    cache.commit(keys_from_hex(digests), {"pooler": X.astype(np.float32)})
    columns = {"image": names, "sha256": digests, "patient": names, "study": names}
    more = {"region": "hand", "label": label.astype(str), "split": ["train"] * n_train}
    more["split"] = ["train"] * n_train + ["test"] * n_test
    return make_manifest(pd.DataFrame({**columns, **more}), "study")


def measure(seed: int, n_labels: int, *, width: int = 32, n_test: int = 500) -> dict[str, float]:
    """Return each head's AUROC on test after a sweep with a number of labelled patients."""
    space = make_space(seed, width)
    with tempfile.TemporaryDirectory() as home:
        manifest = make_data(Path(home), seed, n_labels, n_test, space)
        run = sweep(
            Path(home) / "cache",
            manifest,
            Path(home) / "run",
            heads=HEADS,
            n_folds=2 if n_labels < 50 else 5,
            prompts=make_prompts(space[1]),
            seed=seed,
            jobs=1,
        )
        found = {}
        for head in HEADS:
            test = by_study(run.predictions().query("head == @head and split == 'test'"))
            y, p = test["label"].to_numpy(int), test["probability"].to_numpy()
            found[head] = float(score(y, p, 0.5)["auroc"])
    return found


def summarise(rows: list[dict[str, float]]) -> dict[str, object]:
    """Return means, and paired differences of text-logistic to the others with 95 % intervals."""
    found: dict[str, object] = {head: float(np.mean([r[head] for r in rows])) for head in HEADS}
    for other in HEADS[:2]:
        differences = np.array([r["text-logistic"] - r[other] for r in rows])
        half = stats.sem(differences) * stats.t.ppf(0.975, len(rows) - 1)
        mean = float(differences.mean())
        found[f"text-logistic - {other}"] = [mean, mean - float(half), mean + float(half)]
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 20, 100])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    results = {}
    for n in asked.labels:
        rows = [measure(seed, n) for seed in range(asked.seeds)]
        results[str(n)] = {"seeds": asked.seeds, **summarise(rows)}
        print(n, json.dumps(results[str(n)]), flush=True)
    if asked.out:
        asked.out.write_text(json.dumps({"labels": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
