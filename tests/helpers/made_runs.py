"""Write run directories by hand: what a sweep would leave, with scores that are known."""

import hashlib

import numpy as np
import pandas as pd

from medembed.dataset.manifest import Manifest
from medembed.evaluation.conformal import fit_conformal
from medembed.evaluation.scores import by_study
from medembed.heads.baselines import ClassPrior, RegionPrior
from medembed.heads.linear import LogisticHead
from medembed.heads.packaging import save_model
from medembed.results.comparison import compare_runs
from medembed.results.run_schema import CV_METHOD
from medembed.results.runs import create_run

REGIONS = ("elbow", "hand", "wrist")


def make_images(*, n_patients=60, regions=REGIONS, seed=0):
    """One row per image: a patient's study of one to three views, half of them for testing."""
    generator = np.random.default_rng(seed)
    rows = []
    for patient in range(n_patients):
        label = int(generator.random() < 0.5)
        for view in range(1 + patient % 3):
            name = hashlib.sha256(f"{patient}-{view}".encode()).hexdigest()
            rows.append((name, patient, patient, regions[patient % len(regions)], label))
    images = pd.DataFrame(rows, columns=["sha256", "patient", "study", "region", "label"])
    images["split"] = np.where(images["patient"] % 2, "test", "train")
    images["fold"] = (images["patient"] // 2 % 3).where(images["split"] == "train")
    return images


def make_run(path, images, heads, *, seed=1, complete=True, info=None, asked=None):
    """Write a run whose heads see the label through noise: `heads` maps names to its size."""
    winners, parts = [], []
    for trial, (head, noise) in enumerate(heads.items()):
        draws = np.random.default_rng([seed, trial]).normal(0, noise, len(images))
        signal = images["label"].astype("float64").fillna(0.5) * 2 - 1 + draws
        parts.append(images.assign(head=head, trial=trial, probability=1 / (1 + np.exp(-signal))))
        winners.append({"head": head, "pooling": "mean+max", "trial": trial, "params": {"C": 1.0}})
        winners[-1] |= {"cv": 0.9, "seconds": 1.5, "status": "ok", "error": None}
    train = images[(images["split"] == "train") & images["label"].notna()]
    for name, kind in {"class-prior": ClassPrior, "region-prior": RegionPrior}.items():
        fitted = kind().fit(train["region"], train["label"].astype(int))
        prior = fitted.predict_proba(images["region"])[:, 1].astype(np.float32)
        parts.append(images.assign(head=name, trial=pd.NA, probability=prior))
    data = {"images": len(images), "patients": int(images["patient"].nunique()), "left_out": 0}
    details = {
        "seed": seed,
        "cv_method": CV_METHOD,
        "command": "medembed sweep cache manifest.csv --out run",
    }
    details |= {"versions": {"medembed": "0.1.0"}, "leaderboard": winners, "data": data}
    run = create_run(path, {"seed": seed} | (asked or {}), details=details | (info or {}))
    run.write_predictions(pd.concat(parts, ignore_index=True))
    if complete:
        run.write_scores(compare_runs([run], n_resamples=50))
    return run


def fit_sets(run, head):
    """Keep a head's out-of-fold scores, as a sweep does."""
    rows = run.predictions().query(f"head == '{head}' and split == 'train'")
    studies = by_study(rows)
    return fit_conformal(studies["probability"], studies["label"].astype(int), studies["region"])


def give_model(run, head, **card):
    """Save a model under a head's name, which has learnt nothing and has this card."""
    X = np.random.default_rng(0).normal(size=(20, 2))
    path = run.model_path(head)
    path.parent.mkdir(exist_ok=True)
    save_model(path, LogisticHead().fit(X, np.arange(20) % 2), card)
    return path


def manifest_of(files):
    """A manifest of files by name, each a patient's own."""
    rows = [
        (name, hashlib.sha256(data).hexdigest(), f"p{i}", f"s{i}", "hand", 1, "test")
        for i, (name, data) in enumerate(sorted(files.items()))
    ]
    columns = ["image", "sha256", "patient", "study", "region", "label", "split"]
    return Manifest(pd.DataFrame(rows, columns=columns), "study")
