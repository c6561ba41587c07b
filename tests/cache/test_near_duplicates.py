"""Copies across splits are found by embedding, and chance alone raises no more alarms than said."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from medembed.cache import image_similarity, near_duplicates
from medembed.cache.failures import Failure
from medembed.cache.image_similarity import find_nearest, find_nearest_groups, whiten
from medembed.cache.near_duplicates import NearDuplicates, find_near_duplicates
from medembed.cache.spec import CacheSpec, keys_from_hex
from medembed.cache.store import Cache, create_cache
from medembed.cli import main
from medembed.core.errors import ManifestError, MedembedError, MissingRowsError, TrainingDataError
from medembed.dataset.manifest import Manifest, make_manifest, write_manifest
from medembed.encoders.loading import load_encoder
from medembed.encoders.preprocessing import prepare
from medembed.images.decode import decode_image

WIDTH = 16


def make_table(patients: list[str], n_test: int, **columns: list[str]) -> pd.DataFrame:
    """One row per entry of `patients`; the first `n_test` are for testing."""
    images = [f"{number:05d}.png" for number in range(len(patients))]
    table = {
        "image": images,
        "sha256": [hashlib.sha256(image.encode()).hexdigest() for image in images],
        "patient": patients,
        "study": patients,
        "region": ["hand"] * len(patients),
        "label": [""] * len(patients),
        "split": ["test"] * n_test + ["train"] * (len(patients) - n_test),
    }
    return pd.DataFrame({**table, **columns}, dtype=str)


def make_data(
    home: Path, X: np.ndarray, table: pd.DataFrame, *, dtype: str = "float32", n_left_out: int = 0
) -> tuple[Cache, Manifest]:
    """Embed every row but the last few: half of the columns as `mean`, half as `max`."""
    half = X.shape[1] // 2
    shapes = {"mean": (half,), "grid4": (2, 2), "max": (X.shape[1] - half,)}
    spec = CacheSpec("ab" * 32, {"fit": "stretch"}, shapes, dtype)
    cache = create_cache(home, spec, {"source": "demo"})
    # a content that stands in several rows is embedded once, with the last one's values
    place = {sha256: row for row, sha256 in enumerate(table["sha256"][: len(X) - n_left_out])}
    kept = X[list(place.values())]
    values = {"mean": kept[:, :half], "grid4": np.zeros((len(kept), 2, 2)), "max": kept[:, half:]}
    if place:
        cache.commit(keys_from_hex(list(place)), values)
    return cache, make_manifest(table, "image")


def one_each(n: int) -> list[str]:
    return [f"p{number:05d}" for number in range(n)]


def noise(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, WIDTH)).astype(np.float32)


def planted(n: int = 300, n_test: int = 60, **columns: list[str]) -> tuple[np.ndarray, Any]:
    """Rows 5 and 7 are of test; their copies in train are rows 105 and 207."""
    X = noise(n)
    X[5], X[7] = X[105] + 0.02 * noise(1, 1)[0], 1.05 * X[207]
    return X, make_table(one_each(n), n_test, **columns)


def test_a_planted_copy_is_found_and_named(tmp_path: Path) -> None:
    found = find_near_duplicates(*make_data(tmp_path, *planted()), false_alarm_rate=0.01)
    pairs = found.pairs[found.pairs["similarity"] > 0.99].sort_values("image_a")
    assert list(pairs) == ["image_a", "image_b", "patient_a", "patient_b", "similarity"]
    assert pairs.iloc[:, :4].to_numpy().tolist() == [
        ["00005.png", "00105.png", "p00005", "p00105"],
        ["00007.png", "00207.png", "p00007", "p00207"],
    ]
    assert found.pairs["similarity"].is_monotonic_decreasing
    assert found.threshold < 0.97
    counts = (found.n_test, found.n_train, found.n_calibration, found.n_alike)
    assert counts == (60, 240, 240, 0)
    assert found.expected_false_alarms == pytest.approx(0.6)
    lines = [line for line in found.problems() if "'00005.png'" in line]
    likeness_of = dict(zip(found.pairs["image_a"], found.pairs["similarity"], strict=True))
    assert lines == [
        "test image '00005.png' looks like train image '00105.png' "
        f"(similarity {likeness_of['00005.png']:.3f}; a false alarm in 1 of 100 images)"
    ]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_pooling_of_large_numbers_does_not_drown_the_other(tmp_path: Path, dtype: str) -> None:
    X, table = planted()
    X[:, : WIDTH // 2] *= 1000
    step = {"float16": 0.02, "float32": 2e-6}[dtype]
    X[:, WIDTH // 2] = 100.05 + step * X[:, WIDTH // 2]  # constant, up to rounding
    data = make_data(tmp_path, X, table, dtype=dtype)
    found = find_near_duplicates(*data, false_alarm_rate=0.01)
    assert {"00005.png", "00007.png"} <= set(found.pairs["image_a"])
    X[7, WIDTH // 2 + 1 :] = X[8, WIDTH // 2 + 1 :]  # half of it is another's now
    found = find_near_duplicates(*make_data(tmp_path / "b", X, table, dtype=dtype))
    assert "00007.png" not in set(found.pairs["image_a"])


def simulate(
    home: Path, monkeypatch: pytest.MonkeyPatch, patients: list[str], n_test: int, n_sets: int
) -> tuple[float, float]:
    """Return which share of test images is flagged in sets without copies, and its margin.

    Patients differ, and their images vary about them; half of the patients are much like others.
    Sets are handed over in memory: hundreds of caches take their time.
    """
    table = make_table(patients, n_test)
    cache, manifest = make_data(home, noise(len(table)), table)
    codes = pd.factorize(table["patient"])[0]
    shares = []
    for number in range(n_sets):
        generator = np.random.default_rng([4, number])
        spread = generator.choice([0.3, 1.5], size=(codes.max() + 1, 1))
        centres = spread * generator.normal(size=(codes.max() + 1, 6))
        X = (centres[codes] + 0.3 * generator.normal(size=(len(codes), 6))).astype(np.float32)
        loaded = (table, X, {"n_failed": 0, "n_missing": 0})
        monkeypatch.setattr(near_duplicates, "_load", lambda *_, loaded=loaded: loaded)
        found = find_near_duplicates(cache, manifest, false_alarm_rate=0.05, seed=number)
        # in one set of a hundred two patients may look alike by chance, and count as one
        assert found.false_alarm_rate == max(0.05, 2 / (found.n_calibration + 1))
        assert found.n_test == n_test
        shares.append(len(found.pairs) / n_test)
    return float(np.mean(shares)), 3 * float(np.std(shares)) / n_sets**0.5


@pytest.mark.parametrize(("n_train", "true_rate"), [(39, 0.05), (59, 2 / 60), (79, 0.05)])
def test_false_alarms_are_as_rare_as_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_train: int, true_rate: float
) -> None:
    """The two nearest to each other of n + 1 patients are flagged together, so the rate has steps.

    With 59 patients alpha (n + 1) = 3, and the rate kept is 2 / 60; counting 1 in place of 2 would
    make it 4 / 60, which is more than 0.05.
    """
    share, margin = simulate(tmp_path, monkeypatch, one_each(40 + n_train), 40, 400)
    assert margin < 0.012
    assert share < 0.05 + margin
    assert abs(share - true_rate) < margin


def test_false_alarms_are_as_rare_as_said_with_several_views_of_a_patient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patients = [f"t{k // 2:03d}" for k in range(40)]
    patients += [f"p{k:03d}" for k in range(99) for _ in range(1 + k % 3)]
    share, margin = simulate(tmp_path, monkeypatch, patients, 40, 200)
    assert 0.02 - margin < share < 0.05 + margin


def test_views_of_one_patient_do_not_raise_the_threshold(tmp_path: Path) -> None:
    X, table = planted()
    alone = find_near_duplicates(*make_data(tmp_path / "alone", X, table), false_alarm_rate=0.01)
    X = np.vstack([X, X[60:] + 0.001])
    patients = [*table["patient"], *table["patient"][60:]]
    again = make_table(patients, 60, split=["test"] * 60 + ["train"] * 480)
    found = find_near_duplicates(*make_data(tmp_path / "twice", X, again), false_alarm_rate=0.01)
    assert (found.n_train, found.n_calibration, found.n_alike) == (480, 240, 0)
    assert found.threshold == pytest.approx(alone.threshold, abs=0.01)
    assert {"00005.png", "00007.png"} <= set(found.pairs["image_a"])


def test_the_same_bytes_of_two_train_patients_do_not_raise_the_threshold(tmp_path: Path) -> None:
    X, table = planted()
    table.loc[100:119, "sha256"] = table["sha256"][200:220].to_numpy()
    X[100:120] = X[200:220]
    found = find_near_duplicates(*make_data(tmp_path / "same", X, table), false_alarm_rate=0.01)
    assert (found.n_calibration, found.n_alike) == (220, 0)
    assert found.threshold < 0.95


def test_copies_inside_train_are_named_and_do_not_raise_the_threshold(tmp_path: Path) -> None:
    X, table = planted()
    alone = find_near_duplicates(*make_data(tmp_path / "alone", X, table), false_alarm_rate=0.01)
    X[110:115] = X[210:215] + 1e-4
    found = find_near_duplicates(*make_data(tmp_path / "more", X, table), false_alarm_rate=0.01)
    assert (found.n_alike, found.n_calibration) == (0, 235)
    assert found.threshold == pytest.approx(alone.threshold, abs=0.01)
    assert {"00005.png", "00007.png"} <= set(found.pairs["image_a"])
    assert list(found.lookalikes) == ["split", *found.pairs]
    named = found.lookalikes[["split", "image_a", "image_b", "patient_a", "patient_b"]]
    assert sorted(named.to_numpy().tolist()) == [
        ["train", f"00{k}.png", f"00{k + 100}.png", f"p00{k}", f"p00{k + 100}"]
        for k in range(110, 115)
    ]
    assert "5 pairs of images within a split look alike under two patients" in found.describe()
    lines = [line for line in found.problems() if line.startswith("train images")]
    assert len(lines) == 5
    assert lines[0].endswith(f"and stand under two patients, {PATIENTS_OF[lines[0][14:23]]}")
    assert len(found.as_dict()["lookalikes"]) == 5


PATIENTS_OF = {f"00{k}.png": f"'p00{k}' and 'p00{k + 100}'" for k in range(110, 115)}


def test_look_alikes_of_test_are_named_as_well(tmp_path: Path) -> None:
    X, table = planted()
    X[20], X[21:24] = X[30] + 1e-4, 0.0  # one film twice, three black ones
    found = find_near_duplicates(*make_data(tmp_path, X, table))
    assert set(found.lookalikes["split"]) == {"test"}
    pairs = set(zip(found.lookalikes["image_a"], found.lookalikes["image_b"], strict=True))
    black = {(f"000{a}.png", f"000{b}.png") for a, b in ((21, 22), (21, 23), (22, 23))}
    assert pairs == {("00020.png", "00030.png"), *black}


def test_the_order_of_rows_and_the_labels_make_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do they where patients are drawn, and views of each."""
    monkeypatch.setattr(near_duplicates, "MAX_CALIBRATION", 50)
    X, table = planted()
    table["patient"] = table["study"] = [f"{split}{k // 3}" for k, split in table["split"].items()]
    cache, manifest = make_data(tmp_path, X, table)
    first = find_near_duplicates(cache, manifest, false_alarm_rate=0.1)
    assert (len(first.pairs) > 2, first.n_calibration) == (True, 50)
    for seed in range(5):
        rows = manifest.rows.sample(frac=1, random_state=seed).reset_index(drop=True)
        rows["label"] = pd.array(np.arange(len(rows)) % 2, dtype="Int8")
        again = find_near_duplicates(cache, Manifest(rows, "image"), false_alarm_rate=0.1)
        pd.testing.assert_frame_equal(first.pairs, again.pairs)
        assert first.as_dict() == again.as_dict()


def test_no_more_patients_are_drawn_than_the_bound_and_the_seed_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data(tmp_path, *planted())
    monkeypatch.setattr(near_duplicates, "MAX_CALIBRATION", 50)
    calls: list[tuple[int, int]] = []
    first, again, *others = (
        find_near_duplicates(*data, seed=seed, progress=lambda *call: calls.append(call))
        for seed in (0, 0, *range(1, 9))
    )
    assert first.n_calibration == 50
    assert first.as_dict() == again.as_dict()
    assert len({first.threshold, *(other.threshold for other in others)}) > 1
    assert calls[:2] == [(50, 110), (110, 110)]
    assert first.n_looked == 100
    assert "Look-alikes within a split were looked for among 100 of 300 images." in first.describe()


def test_nearest_rows_are_those_of_the_whole_product(monkeypatch: pytest.MonkeyPatch) -> None:
    X = noise(500) + 3
    groups = np.arange(500) // 3
    exact = X.astype(np.float64) - X.mean(axis=0, dtype=np.float64)
    exact /= exact.std(axis=0)
    metric = np.linalg.inv(np.corrcoef(exact.T) + image_similarity.RIDGE * np.eye(WIDTH))
    product = exact @ metric @ exact.T
    lengths = np.sqrt(np.diag(product))
    product /= np.outer(lengths, lengths)
    product[groups[:, None] == groups] = -np.inf
    monkeypatch.setattr(image_similarity, "QUERY_ROWS", 64)
    monkeypatch.setattr(image_similarity, "REFERENCE_ROWS", 37)
    whiten(X, 1e-7)
    ticks: list[int] = []
    similarity, nearest = find_nearest(X[:99], X[99:], tick=ticks.append)
    others = product[:99, 99:]
    np.testing.assert_array_equal(nearest, others.argmax(axis=1))
    np.testing.assert_allclose(similarity, others.max(axis=1), atol=2e-6)
    assert ticks == [64, 35]
    ticks.clear()
    # groups of three, of which some are cut by the blocks of 37 rows
    shuffled = np.random.default_rng(1).permutation(500)
    similarity, rows = find_nearest_groups(
        X[shuffled], groups[shuffled], np.argsort(shuffled), 5, tick=ticks.append
    )
    by_group = np.maximum.reduceat(product, np.arange(0, 500, 3), axis=1)
    expected = np.sort(by_group, axis=1)[:, :-6:-1]
    np.testing.assert_allclose(similarity, expected, atol=2e-6)
    nearest = shuffled[rows]
    np.testing.assert_allclose(np.take_along_axis(product, nearest, axis=1), expected, atol=2e-6)
    assert ticks == [64] * 7 + [52]


def test_a_column_that_varies_by_rounding_alone_is_dropped() -> None:
    X = noise(200)
    without = X[:, 1:].copy()
    X[:, 0] = np.float16(100) + np.where(X[:, 0] > 0, 0.0, 0.0625)  # one step of float16
    whiten(without, 0.0)
    whiten(X, float(np.finfo(np.float16).eps))
    np.testing.assert_array_equal(X[:, 0], 0.0)
    np.testing.assert_allclose(X[:, 1:], without, atol=1e-6)


def test_rows_without_any_difference_are_like_no_other(tmp_path: Path) -> None:
    constant = np.full((40, WIDTH), 7.3, np.float32)
    table = make_table(one_each(40), 10)
    found = find_near_duplicates(*make_data(tmp_path / "all", constant, table))
    assert (found.threshold, len(found.pairs)) == (0.0, 0)
    X = noise(40)
    X[1] = X[2] = X[20] = 0.0
    X -= np.float32(X.mean(axis=0))
    found = find_near_duplicates(*make_data(tmp_path / "some", X, table))
    assert np.isfinite(found.threshold)
    json.dumps(found.as_dict(), allow_nan=False)


def test_numbers_as_large_as_float32_allows_do_no_harm(tmp_path: Path) -> None:
    X, table = planted()
    found = find_near_duplicates(*make_data(tmp_path, X / np.abs(X).max() * 3e38, table))
    assert {"00005.png", "00007.png"} <= set(found.pairs["image_a"])


@pytest.mark.parametrize(
    ("n_test", "n_train", "lacks"),
    [(0, 9, "test images"), (4, 0, "train images of two"), (4, 1, "train images of two")],
)
def test_where_nothing_can_be_compared_that_is_said(
    tmp_path: Path, n_test: int, n_train: int, lacks: str
) -> None:
    n = n_test + n_train
    found = find_near_duplicates(*make_data(tmp_path, noise(n), make_table(one_each(n), n_test)))
    assert (found.threshold, found.expected_false_alarms, len(found.pairs)) == (np.inf, 0, 0)
    assert found.describe().startswith("Near-duplicates were not looked for: the cache has no")
    assert lacks in found.describe()
    assert found.as_dict()["threshold"] is None
    json.dumps(found.as_dict(), allow_nan=False)


def test_one_patient_with_many_images_is_not_many_patients(tmp_path: Path) -> None:
    table = make_table([*one_each(4), *["one"] * 50], 4)
    found = find_near_duplicates(*make_data(tmp_path, noise(54), table))
    assert (found.n_train, found.n_calibration, found.threshold) == (50, 0, np.inf)


def test_few_patients_allow_no_rare_false_alarms_and_that_is_said(tmp_path: Path) -> None:
    X, table = noise(100), make_table(one_each(100), 60)
    X[5] = X[75]
    found = find_near_duplicates(*make_data(tmp_path, X, table))
    assert found.asked == 0.001
    assert found.false_alarm_rate == pytest.approx(2 / 41)
    assert found.expected_false_alarms == pytest.approx(120 / 41)
    assert found.pairs["image_b"][0] == "00075.png"
    assert (
        "40 train patients allow no rarer false alarms than in 4.9 % of images (asked for: 1 of "
        "1,000 images)."
    ) in found.describe()
    assert "a false alarm in 4.9 % of images)" in found.problems()[0]


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, float("nan")])
def test_a_rate_that_is_none_is_refused(tmp_path: Path, rate: float) -> None:
    data = make_data(tmp_path, *planted())
    with pytest.raises(MedembedError, match=r"false_alarm_rate=.* out of range.*between 0 and 1"):
        find_near_duplicates(*data, false_alarm_rate=rate)


def outcome(n_pairs: int, **numbers: Any) -> NearDuplicates:
    pairs = pd.DataFrame({"image_a": ["a"] * n_pairs, "image_b": ["b"] * n_pairs})
    known = {
        "threshold": 0.9834,
        "false_alarm_rate": 0.001,
        "asked": 0.001,
        "expected_false_alarms": 3.197,
        "n_test": 3197,
        "n_train": 36_808,
        "n_calibration": 4000,
        **dict.fromkeys(("n_alike", "n_looked", "n_failed", "n_missing"), 0),
    }
    pairs = pairs.assign(similarity=0.99)
    return NearDuplicates(pairs=pairs, lookalikes=pairs[:0], **{**known, **numbers})


@pytest.mark.parametrize(
    ("n_pairs", "said"),
    [
        (0, "none looks like a train image (similarity above 0.983); about 3 are expected"),
        (1, "1 looks like a train image (similarity above 0.983); about 3 are expected"),
        (25, "25 look like a train image (similarity above 0.983); about 3 of these are expected"),
    ],
)
def test_what_is_expected_by_chance_is_said_whatever_was_found(n_pairs: int, said: str) -> None:
    assert outcome(n_pairs).describe() == (
        f"Compared 3,197 test images with 36,808 train images: {said} by chance alone."
    )
    assert "about 0.04 are" in outcome(0, expected_false_alarms=0.0384).describe()


def test_a_kind_of_problem_is_capped() -> None:
    lines = outcome(25).problems()
    assert len(lines) == 21
    assert lines[0].endswith("(similarity 0.990; a false alarm in 1 of 1,000 images)")
    assert lines[-1] == "… and 5 more of this kind"


def test_images_that_are_not_in_the_cache_are_left_out_and_counted(tmp_path: Path) -> None:
    X, table = planted()
    cache, manifest = make_data(tmp_path, X, table, n_left_out=30)
    shas = table["sha256"].tolist()
    cache.record_failures([Failure(sha, "decode", "truncated") for sha in shas[-20:]])
    found = find_near_duplicates(cache, manifest)
    assert (found.n_train, found.n_failed, found.n_missing) == (210, 20, 10)
    assert found.describe().endswith(
        "Left out: 20 that could not be embedded. Left out: 10 not in the cache; "
        "`medembed extract` embeds them."
    )


def test_a_cache_of_none_of_the_images_is_refused(tmp_path: Path) -> None:
    X, table = planted()
    cache, manifest = make_data(tmp_path / "c", X, table, n_left_out=300)
    write_manifest(manifest, tmp_path / "m.csv")
    with pytest.raises(MissingRowsError, match=rf"300 of 300.*\n.*extract {tmp_path}/m.csv"):
        find_near_duplicates(cache.path, tmp_path / "m.csv")
    cache.record_failures([Failure(sha, "decode", "truncated") for sha in table["sha256"]])
    found = find_near_duplicates(cache.path, tmp_path / "m.csv")
    assert (found.n_failed, found.n_test, found.n_train) == (300, 0, 0)


def test_caches_and_manifests_that_will_not_do_are_refused(tmp_path: Path) -> None:
    cache, manifest = make_data(tmp_path / "a", *planted())
    with pytest.raises(ManifestError, match="have no sha256"):
        find_near_duplicates(cache, Manifest(manifest.rows.assign(sha256=""), "image"))
    spec = CacheSpec("ab" * 32, {"fit": "stretch"}, {"g": (2, 2)}, "float32")
    grids = create_cache(tmp_path / "b", spec, {"source": "demo"})
    grids.commit(keys_from_hex(manifest.rows["sha256"].tolist()), {"g": np.zeros((300, 2, 2))})
    with pytest.raises(TrainingDataError, match="not one vector"):
        find_near_duplicates(grids, manifest)


def encode(image: Image.Image, **save: Any) -> bytes:
    output = io.BytesIO()
    image.save(output, **save)
    return output.getvalue()


def test_a_radiograph_saved_anew_is_nearer_to_itself_than_to_any_other(
    tmp_path: Path, shared_data: Path
) -> None:
    """The demo encoder on real radiographs: JPEG at quality 80, 95 % of the size, brightened."""
    listed = pd.read_csv(shared_data / "fracatlas" / "files.csv", dtype=str)
    listed = listed.drop_duplicates("pseudo_patient")
    paths = {path.name: path for path in (shared_data / "fracatlas" / "images").glob("*/*.jpg")}
    torn = {"IMG0004143.jpg", "IMG0004134.jpg"}
    names = sorted(set(listed["image_id"]) & set(paths) - torn)
    files = [paths[name].read_bytes() for name in names]
    source = Image.open(io.BytesIO(files[3])).convert("L")
    smaller = source.resize((round(source.width * 0.95), round(source.height * 0.95)))
    copies = [
        encode(source, format="JPEG", quality=80),
        encode(smaller, format="PNG"),
        encode(source.point(lambda level: min(255, round(level * 1.05))), format="PNG"),
    ]
    encoder = load_encoder("demo", device="cpu", precision="fp32")
    pixels = [prepare(decode_image(data).pixels, encoder.preprocessing) for data in copies + files]
    rows = encoder.encode(np.stack(pixels), ["mean", "max"])
    # three copies and four other radiographs are for testing
    table = make_table(one_each(len(pixels)), 0)
    others = [*range(3), *range(len(pixels) - 4, len(pixels))]
    table.loc[others, "split"] = "test"
    data = make_data(tmp_path, np.hstack([rows["mean"], rows["max"]]), table, dtype="float16")
    found = find_near_duplicates(*data)
    assert found.n_train > 12
    assert set(found.pairs["image_a"][:3]) == {f"{row:05d}.png" for row in range(3)}
    assert set(found.pairs["image_b"][:3]) == {f"{3 + 3:05d}.png"}
    assert found.pairs["similarity"][2] > max(found.threshold, 0.8)


def check(home: Path, *more: str) -> Result:
    arguments = ["manifest", "check", str(home / "m.csv"), "--cache", str(home / "cache")]
    return CliRunner().invoke(main, [*arguments, *more])


def lay_out(home: Path, X: np.ndarray, table: pd.DataFrame) -> None:
    _, manifest = make_data(home / "cache", X, table)
    write_manifest(manifest, home / "m.csv")


def test_the_command_lists_pairs_and_exits_with_1(tmp_path: Path) -> None:
    lay_out(tmp_path, *planted())
    result = check(tmp_path, "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert set(document) == {"problems", "warnings", "near_duplicates"}
    assert document["near_duplicates"]["lookalikes"] == []
    numbers = document["near_duplicates"]
    pairs = {pair["image_a"]: pair["image_b"] for pair in numbers["pairs"]}
    assert (pairs["00005.png"], pairs["00007.png"]) == ("00105.png", "00207.png")
    assert len(document["problems"]) == len(pairs)
    assert (numbers["n_test"], numbers["n_train"], numbers["n_calibration"]) == (60, 240, 240)
    assert numbers["false_alarm_rate"] == pytest.approx(2 / 241)
    assert numbers["expected_false_alarms"] == pytest.approx(120 / 241)
    for problem in document["problems"]:
        assert problem in result.stderr
    assert "Compared 60 test images with 240 train images: " in result.stderr
    assert "of these are expected by chance alone." in result.stderr
    assert "Look at each pair" in result.stderr.splitlines()[-1]


def test_the_command_says_what_was_compared_where_nothing_is_found(tmp_path: Path) -> None:
    X = noise(300)
    X[:60] = -np.abs(X[:60]) - 9  # far from all of train
    X[60:] = np.abs(X[60:])
    lay_out(tmp_path, X, make_table(one_each(300), 60))
    result = check(tmp_path)
    assert (result.exit_code, result.stdout) == (0, ""), result.output
    assert "none looks like a train image" in result.stderr
    assert "about 0.5 are expected by chance alone." in result.stderr
    assert result.stderr.endswith("m.csv: no problems\n")
    document = json.loads(check(tmp_path, "--json", "--seed", "3").stdout)
    assert document["problems"] == document["near_duplicates"]["pairs"] == []
    without = CliRunner().invoke(main, ["manifest", "check", str(tmp_path / "m.csv"), "--json"])
    assert json.loads(without.stdout) == {"problems": [], "warnings": []}


def test_the_command_takes_a_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "MAX_CALIBRATION", 50)
    lay_out(tmp_path, *planted())
    thresholds = set()
    for seed in range(6):
        numbers = json.loads(check(tmp_path, "--json", "--seed", str(seed)).stdout)
        expected = find_near_duplicates(tmp_path / "cache", tmp_path / "m.csv", seed=seed)
        assert numbers["near_duplicates"] == expected.as_dict()
        thresholds.add(expected.threshold)
    assert len(thresholds) > 1


def test_images_are_compared_only_where_the_rows_are_sound(tmp_path: Path) -> None:
    lay_out(tmp_path, *planted())
    path = tmp_path / "m.csv"
    path.write_text(path.read_text().replace("test", "valid", 1))
    result = check(tmp_path, "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["near_duplicates"] is None
    assert any("'valid'" in problem for problem in document["problems"])
    assert "not looked for: the rows themselves have problems." in result.stderr
    assert "Correct the recipe" in result.stderr


def test_problems_of_images_and_pairs_stand_in_one_list(tmp_path: Path) -> None:
    lay_out(tmp_path, *planted())
    (tmp_path / "images").mkdir()
    result = check(tmp_path, "--json", "--image-root", str(tmp_path / "images"))
    problems = json.loads(result.stdout)["problems"]
    assert sum("is missing" in problem for problem in problems) == 300
    assert sum("looks like train image" in problem for problem in problems) >= 2


def test_hostile_names_do_no_harm(tmp_path: Path) -> None:
    names = [f"{number:05d}.png" for number in range(300)]
    names[5], names[105] = "\x1b[2J\x07evil\n{0}%s\u202e.png", "'quoted'\r\u2028.png"
    X, table = planted(image=names)
    lay_out(tmp_path, X, table)
    for more in ((), ("--json",)):
        result = check(tmp_path, *more)
        assert result.exit_code == 1
        assert not set(result.stderr) & set("\x1b\x07\r\u2028\u202e")
        lines = [line for line in result.stderr.splitlines() if "evil" in line]
        assert len(lines) == 1
        assert r"test image '\x1b[2J\x07evil\n{0}%s\u202e.png' looks like train" in lines[0]
    pairs = json.loads(result.stdout)["near_duplicates"]["pairs"]
    assert names[5] in [pair["image_a"] for pair in pairs]


def test_a_cache_that_is_not_there_is_said_before_any_hashing(tmp_path: Path) -> None:
    lay_out(tmp_path, *planted())
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    result = check(tmp_path, "--image-root", str(tmp_path))
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert str(tmp_path / "cache") in result.output
