"""No film that stands twice and none that shows nothing hides a copy across splits."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medembed.cache import near_duplicates
from medembed.cache.embeddings import load_embeddings
from medembed.cache.image_similarity import LEAST, SAME, find_alike
from medembed.cache.near_duplicates import REACH, NearDuplicates, find_near_duplicates
from medembed.cache.spec import CacheSpec, keys_from_hex
from medembed.cache.store import create_cache, open_cache
from medembed.dataset.manifest import make_manifest, read_manifest
from medembed.demo.cohort import draw_cohort, render_view
from medembed.encoders.loading import load_encoder
from medembed.encoders.preprocessing import prepare

Rows = dict[str, np.ndarray]
N_TRAIN, N_TEST = 36, 8


def encode(image: Image.Image, **save: Any) -> bytes:
    output = io.BytesIO()
    image.save(output, **save)
    return output.getvalue()


@pytest.fixture(scope="module")
def embed() -> Callable[[list[Image.Image]], np.ndarray]:
    """Embed images with the demo encoder, as float16 stores them."""
    encoder = load_encoder("demo", device="cpu", precision="fp32")

    def embed(images: list[Image.Image]) -> np.ndarray:
        # Not by `decode_image`, which refuses blank films: caches made before hold them.
        decoded = [np.asarray(image.convert("L")) for image in images]
        pixels = np.stack([prepare(some, encoder.preprocessing) for some in decoded])
        found = encoder.encode(pixels, ["mean", "max"])
        return np.hstack([found["mean"], found["max"]]).astype(np.float16).astype(np.float32)

    return embed


@pytest.fixture(scope="module")
def films(embed: Callable[[list[Image.Image]], np.ndarray]) -> Rows:
    """Films of 44 synthetic patients, those of train saved anew, and films of nothing."""
    views, seen = [], set()
    for view in draw_cohort(N_TRAIN + N_TEST, 3):
        if view.patient not in seen:
            seen.add(view.patient)
            views.append(Image.fromarray(render_view(view).pixels))
    generator = np.random.default_rng(0)
    hazy = [generator.integers(0, 7, (210, 170)).astype(np.uint8) for _ in range(12)]
    again = [Image.open(io.BytesIO(encode(v, format="JPEG", quality=80))) for v in views[:N_TRAIN]]
    blank = [Image.new("L", (180, 200 + k), grey) for k, grey in enumerate((0, 0, 0, 255, 0))]
    return {
        "films": embed(views),
        "again": embed(again),
        "blank": embed(blank),
        "hazy": embed([Image.fromarray(pixels) for pixels in hazy]),
    }


def look(
    monkeypatch: pytest.MonkeyPatch,
    train: np.ndarray,
    test: np.ndarray,
    patients: list[str] | None = None,
    **options: Any,
) -> NearDuplicates:
    """Compare rows that are handed over in memory; `patients` are those of train."""
    patients = patients or [f"p{k}" for k in range(len(train))]
    table = pd.DataFrame(
        {
            "image": [f"{k}.png" for k in range(len(test) + len(train))],
            "sha256": [f"{k:064x}" for k in range(len(test) + len(train))],
            "patient": [*(f"t{k}" for k in range(len(test))), *patients],
            "split": ["test"] * len(test) + ["train"] * len(train),
        },
        dtype=str,
    )
    X = np.vstack([test, train]).astype(np.float32)
    loaded = (table, X, {"n_failed": 0, "n_missing": 0})
    monkeypatch.setattr(near_duplicates, "_load", lambda *_: loaded)
    monkeypatch.setattr(near_duplicates, "open_cache", lambda _: FLOAT16)
    return find_near_duplicates("cache", "manifest", **options)


class FLOAT16:
    spec = CacheSpec("ab" * 32, {}, {"mean": (1,)}, "float16")


ADDED = {
    "nothing": lambda rows: rows["blank"][:0],
    "two black films": lambda rows: rows["blank"][:2],
    "five blank films": lambda rows: rows["blank"],
    "a dozen hazy films": lambda rows: rows["hazy"],
    "one film twice": lambda rows: rows["again"][20:21],
    "one film four times": lambda rows: np.repeat(rows["again"][20:21], 3, axis=0),
    "a tenth twice": lambda rows: rows["again"][20:25],
    "all twice": lambda rows: rows["again"][:N_TRAIN],
}


@pytest.mark.parametrize("what", ADDED)
def test_copies_are_found_whatever_stands_twice_in_train(
    what: str, films: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four train films saved anew stand in test as rows 0 to 3."""
    added = ADDED[what](films)
    test = np.vstack([films["again"][:4], films["films"][N_TRAIN:]])
    clean = look(monkeypatch, films["films"][:N_TRAIN], test)
    found = look(monkeypatch, np.vstack([films["films"][:N_TRAIN], added]), test)
    copies = {f"{k}.png" for k in range(4)}
    assert copies <= set(found.pairs["image_a"])
    # with all twice a region has five films: not every pair is told from a dense place
    assert found.threshold < (0.98 if what == "all twice" else 0.9)
    # no more of the others than without
    assert len(found.pairs) <= max(len(clean.pairs), 4 + 2 * found.expected_false_alarms)
    alike = found.lookalikes[found.lookalikes["split"] == "train"]
    assert (len(alike) > 0) == (len(added) > 0)
    first = N_TEST + 4 + N_TRAIN
    added_images = {f"{k}.png" for k in range(first, first + len(added))}
    named = set(alike["image_a"]) | set(alike["image_b"])
    # of five blank films one is white, and looks like no other; with all twice see above
    n_untold = {"five blank films": 1, "all twice": N_TRAIN // 3}.get(what, 0)
    assert len(added_images - named) <= n_untold
    assert len(clean.lookalikes) == 0


def test_a_single_other_pooling_will_do(films: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    half = films["films"].shape[1] // 2
    test = np.vstack([films["again"][:4], films["films"][N_TRAIN:]])
    train = np.vstack([films["films"][:N_TRAIN], films["blank"][:2], films["again"][30:31]])
    for columns in (slice(0, half), slice(half, None)):
        found = look(monkeypatch, train[:, columns], test[:, columns])
        assert {f"{k}.png" for k in range(4)} <= set(found.pairs["image_a"])
        assert len(found.lookalikes) == 2


@pytest.mark.parametrize("seed", range(3))
def test_three_films_of_which_one_stands_twice(
    seed: int, films: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = np.random.default_rng(seed).choice(N_TRAIN, 3, replace=False)
    train = np.vstack([films["films"][chosen], films["films"][chosen[:1]]])
    test = np.vstack([films["again"][chosen[2:]], films["films"][-4:]])
    found = look(monkeypatch, train, test)
    assert found.n_calibration == 3
    assert found.threshold < 0.9
    assert "0.png" in set(found.pairs["image_a"])


def test_one_patient_alone_is_said_to_allow_no_comparison(
    films: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    test, train = films["again"][:4], films["films"][:N_TRAIN]
    found = look(monkeypatch, train, test, ["one"] * N_TRAIN)
    assert found.describe().startswith("Near-duplicates were not looked for")
    assert len(found.lookalikes) == 0


def test_black_films_alone_leave_nothing_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).normal(size=(9, 16))
    found = look(monkeypatch, np.ones((6, 16)), noise)
    assert found.threshold == np.inf
    assert len(found.lookalikes) == 15


def test_two_hospitals_are_no_look_alikes(films: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """One hospital's films are brighter by five standard deviations of each column."""
    rows = films["films"].copy()
    rows[::3] += 5 * rows.std(axis=0)
    found = look(monkeypatch, rows[:N_TRAIN], rows[N_TRAIN:])
    assert len(found.lookalikes) == 0
    moved = np.vstack([films["again"][:4], rows[N_TRAIN:]])
    moved[[0, 3]] += 5 * films["films"].std(axis=0)
    train = np.vstack([rows[:N_TRAIN], films["again"][31:32]])
    found = look(monkeypatch, train, moved)
    assert {f"{k}.png" for k in range(4)} <= set(found.pairs["image_a"])


@given(
    st.integers(0, 10**6),
    st.integers(3, 120),
    st.sampled_from([3, 6, 12, 40]),
    st.sampled_from(["even", "dense", "tails"]),
)
@settings(max_examples=60, deadline=None)
def test_the_threshold_is_never_out_of_reach(seed: int, n: int, d: int, kind: str) -> None:
    """Whatever the cloud: a copy without loss passes, and two films that are one do not matter."""
    generator = np.random.default_rng(seed)
    train = generator.normal(size=(n, d))
    if kind == "dense":
        train *= generator.choice([0.2, 1.5], size=(n, 1))
    if kind == "tails":
        train /= np.sqrt(generator.chisquare(3, size=(n, 1)) / 3)
    with pytest.MonkeyPatch.context() as patch:
        test = np.vstack([train[:1], generator.normal(size=(5, d))])
        found = look(patch, np.vstack([train, train[-1:], np.zeros((2, d))]), test)
    assert found.threshold <= REACH < SAME
    assert found.pairs["image_a"][0] == "0.png"
    assert 0 < found.false_alarm_rate <= 1
    last = found.lookalikes[found.lookalikes["split"] == "train"]
    assert {f"{k + 6}.png" for k in (n - 1, n, n + 1, n + 2)} <= {
        *last["image_a"],
        *last["image_b"],
    }


@pytest.mark.parametrize("kind", ["even", "dense"])
def test_clean_sets_seldom_have_look_alikes(kind: str) -> None:
    """At most about one set of a hundred has a pair that is told to look alike."""
    n_sets = 0
    for seed in range(60):
        generator = np.random.default_rng([9, seed])
        X = generator.normal(size=(60, 12))
        if kind == "dense":
            X *= generator.choice([0.3, 1.5], size=(60, 1))
        X /= np.linalg.norm(X, axis=1, keepdims=True)
        alike = X @ X.T
        np.fill_diagonal(alike, -1)
        n_sets += find_alike(-np.sort(-alike, axis=1)[:, :59], 60).any()
    assert n_sets <= 3


def test_what_is_told_does_not_depend_on_how_dense_a_set_is() -> None:
    """The same cloud, seen from ten times as far: all are nearer, and the same pairs look alike."""
    generator = np.random.default_rng(5)
    X = np.vstack([generator.normal(size=(80, 12)), np.zeros((1, 12))])
    X[80] = X[3] + 0.005
    X = np.hstack([X, np.full((81, 1), 4.0)])
    for distance in (1, 10):
        Y = X * [*[1.0] * 12, distance]
        Y /= np.linalg.norm(Y, axis=1, keepdims=True)
        alike = Y @ Y.T
        np.fill_diagonal(alike, -1)
        told = find_alike(-np.sort(-alike, axis=1)[:, :64], 81)
        assert told.any(axis=1).nonzero()[0].tolist() == [3, 80]


def test_nothing_below_the_least_similarity_looks_alike() -> None:
    alike = np.full((100, 16), 0.01)
    alike[0, 0] = alike[1, 0] = LEAST - 0.01
    assert not find_alike(alike, 100).any()
    alike[:2, 0] = LEAST + 0.05
    assert find_alike(alike, 100).any(axis=1).nonzero()[0].tolist() == [0, 1]


def test_real_chest_films_have_no_look_alikes_until_one_stands_twice(
    tmp_path: Path, shared_data: Path
) -> None:
    """736 real films of 508 patients, with a byte-equal pair, as an ImageNet encoder sees them."""
    cache, table = open_cache(shared_data / "nih" / "cache"), shared_data / "nih" / "manifest.csv"
    manifest = read_manifest(table)
    known = load_embeddings(cache, manifest, pool="mean")
    rows = known.rows[["image", "sha256", "patient", "study", "region", "label", "split"]]
    train = np.flatnonzero(rows["split"] == "train")
    # films of train that stand under another patient, once in train and four times in test
    of = np.array([train[7], *train[[20, 120, 220, 320]]])
    added = rows.iloc[of].assign(split=["train", *["test"] * 4])
    for column, form in (("image", "new{}.png"), ("patient", "new{}"), ("study", "new{}")):
        added[column] = [form.format(k) for k in range(5)]
    added["sha256"] = [f"{k:064x}" for k in range(5)]
    noise = np.random.default_rng(0).normal(size=(5, known.X.shape[1]))
    X = np.vstack([known.X, known.X[of] + 0.1 * known.X.std(axis=0) * noise])
    both = pd.concat([rows, added], ignore_index=True).astype({"label": str})
    both = both.drop_duplicates("sha256", ignore_index=False)
    spec = CacheSpec("ab" * 32, {}, {"mean": (X.shape[1],)}, "float16")
    again = create_cache(tmp_path / "c", spec, {"source": "x"})
    again.commit(keys_from_hex(both["sha256"].tolist()), {"mean": X[both.index]})
    found = find_near_duplicates(again, make_manifest(both.reset_index(drop=True), "image"))
    assert {f"new{k}.png" for k in range(1, 5)} <= set(found.pairs["image_a"])
    assert len(found.pairs) < 4 + 6
    assert (found.n_looked, found.n_failed) == (740, 0)
    assert found.lookalikes[["image_a", "image_b"]].isin(["new0.png"]).any(axis=1).all()
    assert len(found.lookalikes) == 1
    assert found.threshold < 0.3
