"""Make caches of several poolings for sweeps: which columns know the label, and how well."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
from click.testing import CliRunner

from medembed.cache.embeddings import load_embeddings
from medembed.cache.failures import Failure
from medembed.cache.spec import CacheSpec, keys_from_hex
from medembed.cache.store import create_cache
from medembed.cli import main
from medembed.dataset.manifest import make_manifest, write_manifest
from medembed.evaluation.scores import by_study, score
from medembed.results.runs import open_run

SMALL = {"heads": ("logistic", "mlp"), "n_configs": 2, "n_folds": 3, "jobs": 1}
QUICK = {"n_configs": 1, "n_folds": 3, "jobs": 1}
WIDTH, CELLS = 6, 16
SHAPES = {"mean": (WIDTH,), "max": (WIDTH,), "grid4": (CELLS, WIDTH)}


def make_pooled_cache(path, table, signals, *, seed=7, poison=()):
    """Embed every row as noise; the first column of a pooling knows the label as well as it says.

    Of `grid4` that is the first column of cell 5. The images `poison` have absurd embeddings.
    """
    shapes = {name: SHAPES[name] for name in signals}
    spec = CacheSpec("ab" * 32, {"size": [8, 8], "fit": "stretch"}, shapes, "float32")
    cache = create_cache(path, spec, {"source": "demo", "precision": "fp32"})
    label = table["label"].replace("", "0").astype(float).to_numpy()
    poisoned = table["image"].isin(set(poison)).to_numpy()
    embeddings = {}
    for k, (name, size) in enumerate(signals.items()):
        generator = np.random.default_rng([seed, k])
        X = generator.normal(size=(len(table), *shapes[name])).astype(np.float32)
        X[(slice(None), 5, 0) if name == "grid4" else (slice(None), 0)] += size * label
        X[poisoned] = 1e6
        embeddings[name] = X
    cache.commit(keys_from_hex(table["sha256"].tolist()), embeddings)
    return path


def make_data(home, signals=None, *, table=None, label_level="study", **more):
    """Write a manifest and its cache; return the paths as `sweep` takes them."""
    table = make_table(**more) if table is None else table
    home.mkdir(exist_ok=True)
    write_manifest(make_manifest(table, label_level), home / "manifest.csv")
    cache = make_pooled_cache(home / "cache", table, signals or {"mean": 1.5})
    return cache, home / "manifest.csv"


def read_columns(data, pooling):
    """Return what a head on this pooling reads of all rows, and the rows."""
    embeddings = load_embeddings(*data, pool=pooling, cells=pooling == "grid4")
    return embeddings.X, embeddings.rows


def predictions_of(out, head):
    return open_run(out).predictions().query("head == @head").reset_index(drop=True)


def command(data, out, *options):
    return ["sweep", *map(str, data), "--out", str(out), "--folds", "3", "--jobs", "1", *options]


def refuse(arguments, out):
    """Run a command that has to end with one line of ours; return the line."""
    ran = CliRunner().invoke(main, arguments)
    assert ran.exit_code == 1, ran.output
    assert ran.stdout == ""
    [line] = ran.stderr.splitlines()
    assert line.startswith("Error: ")
    assert not out.exists()
    return line


def auroc_of(predictions):
    studies = by_study(predictions[predictions["label"].notna()])
    return score(studies["label"].to_numpy(int), studies["probability"].to_numpy(), 0.5)["auroc"]


def cv_of(predictions):
    train = predictions[(predictions["split"] == "train") & predictions["fold"].notna()]
    return np.mean([auroc_of(rows) for _, rows in train.groupby("fold")])


def winners(result):
    return {entry["head"]: entry for entry in result["leaderboard"]}


def session_of(pid):
    """Return the living processes of the session that a process began."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(after_name[3]) == pid and after_name[0] != "Z":
            found.append(int(path.parent.name))
    return found


def workers_in_session(pid):
    """Return those of them that train for a sweep."""
    found = []
    for process in session_of(pid):
        try:
            command = Path(f"/proc/{process}/cmdline").read_bytes()
            parent = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if b"multiprocessing.forkserver" in command and int(parent) != pid:  # not the server
            found.append(process)
    return found


def make_table(n_patients=48, seed=0):
    """A study of one to three views per patient; a quarter of the patients are for testing."""
    generator = np.random.default_rng(seed)
    rows = []
    for patient in range(n_patients):
        label = str(int(generator.random() < 0.5))
        for view in range(1 + patient % 3):
            image = f"patient{patient:03d}/view{view}.png"
            sha256 = hashlib.sha256(image.encode()).hexdigest()
            split = "test" if patient % 4 == 3 else "train"
            region = ("hand", "wrist")[patient // 2 % 2]
            rows.append((image, sha256, f"patient{patient:03d}", f"study{patient}", region))
            rows[-1] += (label, split)
    columns = ["image", "sha256", "patient", "study", "region", "label", "split"]
    return pd.DataFrame(rows, columns=columns)


def make_cache(path, table, *, signal_size=1.5, n_failed=0):
    """Embed every row but the last `n_failed`, with the label in the first column."""
    spec = CacheSpec("ab" * 32, {"size": [8, 8], "fit": "stretch"}, {"mean": (WIDTH,)}, "float32")
    cache = create_cache(path, spec, {"source": "/home/secret/demo", "precision": "fp32"})
    embedded, failed = table.iloc[: len(table) - n_failed], table.iloc[len(table) - n_failed :]
    X = np.random.default_rng(7).normal(size=(len(embedded), WIDTH)).astype(np.float32)
    X[:, 0] += signal_size * embedded["label"].replace("", "0").astype(float).to_numpy()
    cache.commit(keys_from_hex(embedded["sha256"].tolist()), {"mean": X})
    cache.record_failures([Failure(name, "decode", "truncated") for name in failed["sha256"]])
    return path


def broken_table(kind):
    table = make_table()
    train = table["split"] == "train"
    if kind == "no train":
        table["split"] = "test"
    elif kind == "no labels":
        table.loc[train, "label"] = ""
    elif kind == "one class":
        table.loc[train, "label"] = "1"
    elif kind == "no test":
        table["split"] = "train"
    elif kind == "few patients":
        table = table[~train | (table["patient"] < "patient002")]
    return table.reset_index(drop=True)
