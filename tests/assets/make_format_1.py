"""Write `format-1/`: a cache, a run and its models as format version 1 has them, all synthetic.

    python tests/assets/make_format_1.py tests/assets/format-1

It was run once, by the release that introduced the format. Its output stays as it is: every later
release must read it (`tests/test_formats.py`). Numbers are drawn, not measured; no image is behind
them.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from medembed.cache.embeddings import load_embeddings
from medembed.cache.failures import Failure
from medembed.cache.spec import CacheSpec, keys_from_hex
from medembed.cache.store import create_cache
from medembed.dataset.manifest import make_manifest, write_manifest
from medembed.heads.packaging import load_model

N_PATIENTS = 48
SPEC = CacheSpec(
    encoder="ab" * 32,
    preprocessing={"width": 8, "height": 8, "fit": "stretch", "window": None},
    poolings={"mean": (3,), "max": (3,), "grid4": (16, 3)},
    dtype="float16",
)


def make(place: Path) -> None:
    place.mkdir()
    os.chdir(place)  # so that no path of the machine is recorded
    chance = np.random.default_rng(1)
    images = [f"patient{n:02d}/study1/image1.png" for n in range(N_PATIENTS)]
    digests = [hashlib.sha256(image.encode()).hexdigest() for image in images]
    labels = np.arange(N_PATIENTS) % 2
    table = pd.DataFrame(
        {
            "image": images,
            "sha256": digests,
            "patient": [image[:9] for image in images],
            "study": [image[:16] for image in images],
            "region": ["elbow" if n % 4 < 2 else "wrist" for n in range(N_PATIENTS)],
            "label": [str(label) for label in labels],
            "split": ["test" if n % 3 == 0 else "train" for n in range(N_PATIENTS)],
        }
    )
    write_manifest(make_manifest(table, "study"), Path("manifest.csv"))
    cache = create_cache("cache", SPEC, {"source": "synthetic", "precision": "fp32"})
    mean = chance.standard_normal((N_PATIENTS, 3)) + labels[:, None]
    rows = {"mean": mean, "max": mean + 1, "grid4": np.repeat(mean[:, None], 16, axis=1)}
    keys = keys_from_hex(digests)
    for part in (slice(0, 20), slice(20, N_PATIENTS - 1)):
        cache.commit(keys[part], {name: values[part] for name, values in rows.items()})
    cache.record_failures([Failure(digests[-1], "decode", "synthetic: there is no image")])
    sweep = (
        "sweep cache manifest.csv --out run --heads logistic,mlp,lightgbm --pool mean --configs 2"
    )
    subprocess.run([sys.executable, "-m", "medembed", *sweep.split(), "--folds", "3"], check=True)
    write_expected()


def write_expected() -> None:
    """Write what the release that made these files read from them."""
    data = load_embeddings("cache", "manifest.csv", pool="mean+max")
    X = data.X[:, :3]
    models = {path.name: load_model(path) for path in sorted(Path("run/models").iterdir())}
    expected = {
        "X": data.X.tolist(),
        "sha256": data.rows["sha256"].tolist(),
        "probabilities": {
            name: model.head.predict_proba(X)[:, 1].tolist() for name, model in models.items()
        },
    }
    Path("expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
