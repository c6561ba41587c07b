"""`predict`: what a packaged model says of images, where it looks them up, what it refuses."""

import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from made_dicom import dicom
from PIL import Image

from medembed.cache.embeddings import load_embeddings
from medembed.cache.failures import Failure
from medembed.cache.store import create_cache, open_cache
from medembed.cli import main
from medembed.cli.predict import write_table
from medembed.core.errors import (
    EncoderError,
    MissingRowsError,
    ModelError,
    PathNotFoundError,
    RunError,
)
from medembed.dataset.covariates import fit_covariates
from medembed.dataset.manifest import make_manifest, read_manifest, write_manifest
from medembed.encoders.loading import load_encoder
from medembed.encoders.preprocessing import Preprocessing, prepare
from medembed.evaluation.drift.reference import fit_reference
from medembed.extraction import extract
from medembed.heads.attention import AttentionHead
from medembed.heads.lightgbm import LightGBMHead
from medembed.heads.linear import LogisticHead
from medembed.heads.packaging import Model, load_model, save_model
from medembed.images.decode import IMAGES_VERSION, decode_image
from medembed.images.intensity import Intensity
from medembed.images.load import DEFAULT_LIMITS
from medembed.prediction import Predictor, encode
from medembed.prediction.decisions import raw_scores, score_rows, spec_of_card
from medembed.prediction.encode import find_encoder, read_intensity
from medembed.prediction.inputs import list_images
from medembed.prediction.predictor import find_model
from medembed.results.model_card import EncoderSource, describe_decisions, read_card
from medembed.results.predictions import image_code
from medembed.results.runs import create_run

COLUMNS = ["image", "sha256", "patient", "study", "region", "label", "split", "age"]
KEYS = ["image", "study", "probability", "decision", "operating_point"]
KEYS += ["set", "coverage"]
KEYS += ["distance", "distance_p", "far"]
KEYS += ["n_views", "n_failed", "trained_on", "error"]
MODELS = ("logistic", "lightgbm", "attention", "cells", "covariates")


def draw(path: Path, generator: np.random.Generator, label: int) -> None:
    pixels = generator.integers(40, 110, (64, 48), dtype=np.uint8)
    if label:
        top, left = generator.integers(2, 28, 2)
        pixels[top : top + 16, left : left + 16] = 190
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty studies of one to three views, their cache, and models on it; `age` is made up."""
    home = tmp_path_factory.mktemp("prediction")
    generator = np.random.default_rng(0)
    rows = []
    for patient in range(30):
        label = patient % 2
        for view in range(1 + patient % 3):
            path = home / "images" / f"p{patient:02d}" / f"view{view}.png"
            draw(path, generator, label)
            split, region = (
                ("test" if patient % 5 == 4 else "train"),
                ("hand", "wrist")[patient // 2 % 2],
            )
            name = path.relative_to(home / "images").as_posix()
            age = str(20 + 10 * label + patient % 3) if patient else ""
            row = (name, sha256(path), f"p{patient}", f"s{patient}", region, str(label), split, age)
            rows.append(row)
    manifest = make_manifest(pd.DataFrame(rows, columns=COLUMNS), "study")
    write_manifest(manifest, home / "manifest.csv")
    encoder = load_encoder("demo", device="cpu", precision="fp32")
    poolings = ("mean", "max", "grid4")
    extract(manifest, home / "images", encoder, home / "cache", poolings=poolings, decoders=1)
    for name in MODELS:
        package(home, name)
    return home


def package(home: Path, name: str) -> None:
    """Train a head by hand and save it as a sweep does."""
    pool = "grid4" if name == "cells" else "mean+max"
    embeddings = load_embeddings(home / "cache", home / "manifest.csv", pool=pool, cells=True)
    X, covariates = embeddings.X, None
    codes = pd.factorize(embeddings.studies, sort=True)[0]
    if name == "covariates":
        encoder = fit_covariates(embeddings.rows, ["age", "region"])
        X, covariates = np.hstack([X, encoder.transform(embeddings.rows)]), encoder.as_dict()
    trained = (embeddings.rows["split"] == "train").to_numpy()
    n_covariates = 0 if covariates is None else len(X.T) - len(embeddings.X.T)
    head: Any = LogisticHead(C=0.01, n_covariates=n_covariates)
    more = {}
    if name == "lightgbm":
        head = LightGBMHead(n_trees=5, min_data_in_leaf=2)
    elif name in ("attention", "cells"):
        head = AttentionHead(hidden=4, epochs=2, n_cells=16 if name == "cells" else 1)
        more = {"studies": codes[trained]}
    head.fit(X[trained], embeddings.y[trained], **more)
    raw = by_hand(head, X, codes)
    studies = embeddings.rows.groupby(codes)[["label", "region", "patient"]].first()
    decisions = describe_decisions(studies.assign(probability=raw))
    card = {
        "spec": embeddings.spec.as_dict(),
        "pooling": pool,
        "label_level": "study",
        "views": "attention" if more else "mean",
        **decisions,
        "encoder": {"source": "demo", "revision": None, "path": None},
        "covariates": covariates,
        "training_images": sorted(map(image_code, embeddings.rows["sha256"][trained])),
    }
    (home / "models").mkdir(exist_ok=True)
    save_model(home / "models" / name, head, card)


def by_hand(head: Any, X: np.ndarray, codes: np.ndarray) -> np.ndarray:
    if head.study_level:
        return np.asarray(head.predict_proba(X, codes)[:, 1])
    raw = pd.Series(head.predict_proba(X)[:, 1])
    return raw.groupby(codes).mean().to_numpy()


def changed(home: Path, out: Path, model: str = "logistic", **entries: Any) -> Path:
    """Save a model again with other entries in its card."""
    saved = load_model(home / "models" / model)
    out.parent.mkdir(exist_ok=True)
    save_model(out, saved.head, {**saved.card, **entries})
    return out


@functools.cache  # the encoder is loaded once for all tests that ask in the same way
def ask(home: Path, model: str = "logistic", **options: Any) -> Predictor:
    return Predictor(home / "models" / model, device="cpu", precision="fp32", **options)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["predict", *(str(argument) for argument in arguments)])


def parts(rows: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows = list(rows)
    images = [row for row in rows if row["image"] is not None]
    return images, [row for row in rows if row["image"] is None]


def numbers(rows: list[dict[str, Any]]) -> np.ndarray:
    return np.array([row["probability"] for row in rows], float)


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_loading_and_predicting_by_hand(home: Path, name: str) -> None:
    saved = load_model(home / "models" / name)
    card = read_card(saved, name)
    pool = saved.card["pooling"]
    embeddings = load_embeddings(home / "cache", home / "manifest.csv", pool=pool, cells=True)
    X = embeddings.X
    if name == "covariates":
        encoder = fit_covariates(embeddings.rows, ["age", "region"])
        X = np.hstack([X, encoder.transform(embeddings.rows)])
    names, codes = np.unique(embeddings.studies.astype(str), return_inverse=True)
    expected = card.calibration.apply(by_hand(saved.head, X, codes))
    images, studies = parts(
        ask(home, name, cache=home / "cache").predict_manifest(home / "manifest.csv")
    )
    assert [row["image"] for row in images] == embeddings.rows["image"].tolist()
    found = {row["study"]: row for row in studies}
    assert sorted(found) == names.tolist()
    of_studies = [found[study] for study in names]
    np.testing.assert_allclose(numbers(of_studies), expected, rtol=1e-9)
    decisions = np.where(expected >= card.threshold, "abnormal", "normal")
    assert [row["decision"] for row in of_studies] == decisions.tolist()
    assert [row["n_views"] for row in of_studies] == np.bincount(codes).tolist()
    # An image alone is answered as a study of one view.
    alone = card.calibration.apply(by_hand(saved.head, X, np.arange(len(X))))
    np.testing.assert_allclose(numbers(images), alone, rtol=1e-9)
    # `score_rows` says the same, sets included.
    tables = score_rows(saved, card, X, codes, embeddings.regions)
    for table, rows in zip(tables, (images, of_studies), strict=True):
        np.testing.assert_allclose(numbers(rows), table["probability"], rtol=1e-9)
        for column, word in (("normal_in_set", "normal"), ("abnormal_in_set", "abnormal")):
            assert [word in row["set"] for row in rows] == table[column].tolist()
    trained = embeddings.rows["split"] == "train"
    assert [row["trained_on"] for row in images] == trained.tolist()


@pytest.mark.parametrize("name", ["logistic", "cells", "covariates"])
def test_the_encoder_says_what_the_cache_says(home: Path, name: str) -> None:
    """Once of more images than are decoded in this process: decoders have their part in it."""
    n_images = 12 if name == "logistic" else 6
    rows = read_manifest(home / "manifest.csv").rows.iloc[:n_images]
    manifest = make_manifest(rows.assign(label=""), "study")  # and no label is needed
    looked_up = list(ask(home, name, cache=home / "cache").predict_manifest(manifest))
    computed = list(ask(home, name).predict_manifest(manifest, home / "images"))
    assert all(list(row) == KEYS for row in computed)
    np.testing.assert_allclose(numbers(computed), numbers(looked_up), atol=2e-3)
    for key in set(KEYS) - {"probability"}:
        assert [row[key] for row in computed] == [row[key] for row in looked_up]


def test_an_image_gets_the_same_answer_however_it_is_asked_for(home: Path) -> None:
    predictor = ask(home)
    files = sorted((home / "images").glob("p0[0-6]/*.png"))
    rows, _ = parts(predictor.predict_images(files))
    assert len(files) > 8
    assert [predictor.predict(file)["probability"] for file in files] == numbers(rows).tolist()


def test_an_operating_point_decides_images_and_studies(home: Path) -> None:
    known = {"cache": home / "cache"}
    usual = list(ask(home, **known).predict_manifest(home / "manifest.csv"))
    cuts = sorted(row["probability"] for row in usual)
    middle = float(f"{cuts[len(cuts) // 2]:.6f}")
    for asked in ("sensitivity=0.95", f"threshold={middle!r}"):
        predictor = ask(home, operating_point=asked, **known)
        rows = list(predictor.predict_manifest(home / "manifest.csv"))
        point = {"name": asked, "threshold": predictor.point.threshold}
        assert all(row["operating_point"] == point for row in rows)
        is_called = [row["probability"] >= point["threshold"] for row in rows]
        assert [row["decision"] == "abnormal" for row in rows] == is_called
        assert len(set(is_called)) == 2
        assert [row["probability"] for row in rows] == [row["probability"] for row in usual]
    assert predictor.point.threshold == middle
    card = predictor.card
    assert usual[0]["operating_point"] == {"name": "youden", "threshold": card.threshold}


def test_a_point_that_the_model_has_not_is_refused_before_anything_is_decoded(home: Path) -> None:
    words = (home / "models" / "logistic", home / "no such file.png", "--operating-point")
    found = run(*words, "sensitivity=0.7")
    assert found.exit_code == 1
    assert "has no operating point sensitivity=0.7: it packages youden, sensit" in found.stderr
    said = run(words[0], home / "images" / "p00" / "view0.png", *words[2:], "threshold=0.001")
    assert "Decisions at threshold=0.001: abnormal at 0.001 or above." in said.stderr
    assert "abnormal" in said.stdout.splitlines()[-1]


def test_files_are_studies_of_their_own_also_when_named_twice(home: Path) -> None:
    path = home / "images" / "p00" / "view0.png"
    images, studies = parts(ask(home).predict_images([path, path]))
    assert [row["study"] for row in images] == [str(path)] * 2
    assert [row["n_views"] for row in studies] == [1, 1]
    assert numbers(images).tolist() == numbers(studies).tolist()


def test_what_is_missing_in_the_cache_is_embedded_and_told(home: Path, tmp_path: Path) -> None:
    draw(tmp_path / "new.png", np.random.default_rng(9), 1)
    told: list[str] = []
    files = [home / "images" / "p00" / "view0.png", tmp_path / "new.png"]
    images, _ = parts(ask(home, cache=home / "cache", on_status=told.append).predict_images(files))
    assert [row["trained_on"] for row in images] == [True, False]
    assert all(row["error"] is None for row in images)
    assert told == [
        "1 of 2 images are not in the cache; they are embedded by demo now, and not kept."
    ]
    # Where there is no encoder, those that the cache has are answered for.
    absent = ask(home, cache=home / "cache", encoder=tmp_path / "nowhere", on_status=told.append)
    images, studies = parts(absent.predict_images(files))
    assert images[0]["decision"] == "normal"
    assert images[1]["decision"] is images[1]["set"] is None
    assert "not in the cache, and cannot be embedded" in images[1]["error"]
    assert studies[1]["error"] == "none of its 1 views could be answered"
    assert "1 of 2" in told[-1]
    with pytest.raises(EncoderError):
        list(absent.predict_images(files[1:]))
    rows = read_manifest(home / "manifest.csv").rows[:1].assign(sha256="0" * 64, label="")
    with pytest.raises(MissingRowsError, match=r"1 of 1 .* Give --image-root DIR"):
        list(ask(home, cache=home / "cache").predict_manifest(make_manifest(rows, "study")))


def test_another_encoder_or_cache_is_refused_by_its_first_difference(
    home: Path, tmp_path: Path
) -> None:
    file = home / "images" / "p00" / "view0.png"
    spec = spec_of_card(read_card(load_model(home / "models" / "logistic"), ""))
    other = changed(home, tmp_path / "other", spec={**spec.as_dict(), "encoder": "ab" * 32})
    said = r"embeddings of demo with encoder=abababababab…, and the encoder demo have encoder=\w"
    with pytest.raises(ModelError, match=said):
        Predictor(other).predict(file)
    cell = {"mean": (128,), "max": (64,)}
    changes = {
        "fit": {"preprocessing": {**spec.preprocessing, "fit": "pad"}},
        "images_version": {"preprocessing": {**spec.preprocessing, "images_version": 3}},
        "poolings": {"poolings": cell},
    }
    for name, change in changes.items():
        made = type(spec)(**{**spec.as_dict(), **change})
        create_cache(tmp_path / name, made, {"source": "demo"})
        with pytest.raises(ModelError, match=f"those in the cache at .* have {name}="):
            next(ask(home, cache=tmp_path / name).predict_images([file]))
    # The model says how images are fitted, and nobody is asked.
    padded = {**spec.as_dict(), **changes["fit"]}
    pad = Predictor(changed(home, tmp_path / "pad", spec=padded), device="cpu", precision="fp32")
    assert pad.predict(file)["probability"] != ask(home).predict(file)["probability"]


def test_monochrome1_and_monochrome2_get_the_same_answer(home: Path, tmp_path: Path) -> None:
    pixels = np.add.outer(7 * np.arange(60), 9 * np.arange(50)).astype(np.uint16) + 400
    window = {"BitsStored": 12, "WindowWidth": 800, "RescaleSlope": 1, "RescaleIntercept": 0}
    kinds = {"MONOCHROME2": (pixels, 800), "MONOCHROME1": (4095 - pixels, 4096 - 800)}
    found = []
    for kind, (values, center) in kinds.items():
        data = dicom(values, PhotometricInterpretation=kind, WindowCenter=center, **window)
        (tmp_path / kind).write_bytes(data)
        found.append(ask(home).predict(tmp_path / kind))
    assert found[0]["error"] is None
    assert found[0]["probability"] == found[1]["probability"]


def test_a_dicom_is_seen_through_the_window_of_the_model(home: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 4096, (64, 48), dtype=np.uint16)
    data = dicom(
        pixels,
        BitsStored=12,
        WindowCenter=[2048, 600],
        WindowWidth=[4096, 300],
        WindowCenterWidthExplanation=["soft", "bone"],
    )
    (tmp_path / "two.dcm").write_bytes(data)
    spec = load_model(home / "models" / "logistic").card["spec"]
    named = {**spec, "preprocessing": {**spec["preprocessing"], "window": "bone"}}
    model = changed(home, tmp_path / "bone", spec=named)
    predictor = Predictor(model, device="cpu", precision="fp32")
    found = predictor.predict(tmp_path / "two.dcm")["probability"]
    seen = decode_image(data, Intensity("bone")).pixels
    [embedder] = predictor.embedders
    X = embedder.encode(prepare(seen, embedder.encoder.preprocessing)[None])
    raw = predictor.model.head.predict_proba(X)[:, 1]
    assert found == pytest.approx(float(predictor.card.calibration.apply(raw)[0]), abs=1e-12)
    assert found != ask(home).predict(tmp_path / "two.dcm")["probability"]
    for intensity in (Intensity(), Intensity("bone"), Intensity("a, b", 2.5, 98)):
        preprocessing = {**spec["preprocessing"], "window": intensity.as_spec()}
        changed_spec = spec_of_card(read_card(predictor.model, "")).__class__(
            "a", preprocessing, {"mean": (1,)}, "float32"
        )
        assert read_intensity(changed_spec) == intensity


def test_a_model_of_an_older_version_answers_for_files_that_are_decoded_as_ever(
    home: Path, tmp_path: Path
) -> None:
    """Both where few are decoded in this process, and where others decode."""
    spec = load_model(home / "models" / "logistic").card["spec"]
    first = {**spec, "preprocessing": {**spec["preprocessing"], "images_version": 1}}
    old = Predictor(changed(home, tmp_path / "old", spec=first), device="cpu", precision="fp32")
    grey = [home / "images" / "p00" / "view0.png"] * (encode.FEW + 1)
    colours = np.random.default_rng(0).integers(0, 256, (40, 56, 4), dtype=np.uint8)
    colours[..., 3] = 0
    clear = tmp_path / "clear.png"
    Image.fromarray(colours).save(clear)
    assert ask(home).predict(clear)["error"] is None
    for paths in ([*grey[:1], clear], [*grey, clear]):
        *answered, refused = (row for row in old.predict_images(paths) if row["image"] is not None)
        assert all(
            row["probability"] == ask(home).predict(grey[0])["probability"] for row in answered
        )
        assert "differently since images_version 2, and the model is of images_version 1" in str(
            refused["error"]
        )


def test_16_bit_wrists_are_answered_as_their_8_bit_renderings(
    home: Path, shared_data: Path, tmp_path: Path
) -> None:
    paths = sorted((shared_data / "grazpedwri").glob("*/*.png"))
    assert len(paths) == 3
    rendered = np.round(np.asarray(Image.open(paths[0])) / 257).astype(np.uint8)
    Image.fromarray(rendered).save(tmp_path / "8.png", compress_level=1)
    assert np.isin(rendered, [0, 255]).mean() < 0.5
    deep, plain = (ask(home).predict(path) for path in (paths[0], tmp_path / "8.png"))
    assert deep["error"] is None
    assert deep["probability"] == plain["probability"]


def test_names_of_all_kinds(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (home / "images" / "p01" / "view0.png").read_bytes()
    names = ["a b.png", 'it\'s "x".png', "new\nline.png", "手の骨.png", "-dash.png", "é" * 100]
    for name in names:
        (tmp_path / name).write_bytes(source)
    raw = os.path.join(os.fsencode(tmp_path), b"latin-\xe9.png")
    with open(raw, "wb") as file:
        file.write(source)
    monkeypatch.chdir(tmp_path)
    options = ("--cache", home / "cache", home / "models" / "logistic")
    result = run("--jsonl", *options, "--", *names, os.fsdecode(b"latin-\xe9.png"))
    assert result.exit_code == 0, result.output
    images, _ = parts(map(json.loads, result.stdout.splitlines()))
    assert [row["image"] for row in images] == [*names, "latin-\\udce9.png"]
    table = run(*options, "--", *names)
    assert table.exit_code == 0
    lines = table.stdout.splitlines()
    assert len(lines) == 2 + len(names)
    assert "new\\nline.png" in lines[4]
    assert all(len(line) + sum(ord(c) > 0x2E80 for c in line) <= 80 for line in lines)


@pytest.fixture(scope="module")
def damaged(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three studies: one whole, one of which a view is truncated, one that is not there at all."""
    place = tmp_path_factory.mktemp("damaged")
    generator = np.random.default_rng(3)
    rows = []
    for study, view in (("a", 0), ("a", 1), ("b", 0), ("b", 1), ("c", 0), ("d", 0)):
        path = place / f"{study}{view}.png"
        draw(path, generator, 0)
        if path.name == "b1.png":
            path.write_bytes(path.read_bytes()[:-400])
        rows.append((path.name, sha256(path), study, study, "hand", "", "test", "30"))
    (place / "c0.png").unlink()
    draw(place / "d0.png", generator, 1)  # other bytes than the manifest's
    write_manifest(make_manifest(pd.DataFrame(rows, columns=COLUMNS), "study"), place / "m.csv")
    return place


def test_what_fails_has_a_row_with_the_reason_and_no_guess(home: Path, damaged: Path) -> None:
    options = ("--manifest", damaged / "m.csv", "--image-root", damaged, "--json")
    result = run(home / "models" / "logistic", *options)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: 3 of 6 images could not be predicted")
    images, studies = parts(json.loads(result.stdout))
    reasons = {row["image"]: row["error"] for row in images if row["error"]}
    assert re.fullmatch("cannot be decoded: .*truncated.*", reasons["b1.png"])
    assert reasons["c0.png"] == "cannot be read: No such file or directory"
    assert "holds other bytes than expected" in reasons["d0.png"]
    assert set(reasons) == {"b1.png", "c0.png", "d0.png"}
    for row in (*images, *studies):
        nothing = [row[key] is None for key in ("probability", "decision", "set")]
        assert all(nothing) if row["error"] else not any(nothing)
    counts = {row["study"]: (row["n_views"], row["n_failed"]) for row in studies}
    assert counts == {"a": (2, 0), "b": (2, 1), "c": (1, 1), "d": (1, 1)}
    alone = next(row for row in images if row["image"] == "b0.png")
    assert studies[1]["probability"] == pytest.approx(alone["probability"], rel=1e-12)
    table = run(home / "models" / "logistic", *options[:-1])
    assert "= b (2 views, 1 failed)" in table.stdout
    assert max(map(len, table.stdout.splitlines())) <= 80


def test_files_that_are_none_are_told_and_the_others_answered(home: Path, damaged: Path) -> None:
    os.mkfifo(damaged / "pipe")
    files = [damaged / "a0.png", damaged / "absent.png", damaged, damaged / "pipe"]
    images, _ = parts(ask(home).predict_images(files))
    reasons = [None, "No such file or directory", "is a directory", "is not a file"]
    assert [row["error"] for row in images] == reasons
    assert [row["trained_on"] for row in images] == [False, None, None, None]


def test_known_failures_of_the_cache_are_not_tried_again(home: Path, tmp_path: Path) -> None:
    cache = create_cache(tmp_path / "cache", open_cache(home / "cache").spec, {"source": "demo"})
    rows = read_manifest(home / "manifest.csv").rows[:2].assign(label="")
    cache.record_failures([Failure(rows["sha256"][0], "decode", "the PNG is torn")])
    cache.record_failures([Failure(rows["sha256"][1], "read", "Stale file handle")])
    found = ask(home, cache=cache).predict_manifest(make_manifest(rows, "study"), home / "images")
    images, _ = parts(found)
    assert images[0]["error"] == "failed in the cache (decode): the PNG is torn"
    assert images[1]["error"] is None


def test_a_manifest_without_hashes_and_a_wrong_root(home: Path, tmp_path: Path) -> None:
    rows = read_manifest(home / "manifest.csv").rows[:3].assign(sha256="", label="")
    manifest = make_manifest(rows, "study")
    images, _ = parts(ask(home, cache=home / "cache").predict_manifest(manifest, home / "images"))
    assert [row["trained_on"] for row in images] == [True] * 3
    whole = read_manifest(home / "manifest.csv").rows[:3].assign(label="")
    with pytest.raises(PathNotFoundError, match="none of the 3 images to answer for is below"):
        list(ask(home).predict_manifest(make_manifest(whole, "study"), tmp_path))


def test_models_without_sets_and_models_that_read_covariates(home: Path, tmp_path: Path) -> None:
    file = home / "images" / "p00" / "view0.png"
    old = changed(home, tmp_path / "old", conformal=None, conformal_note="it is of before")
    result = run(old, file, "--cache", home / "cache", "--json")
    assert json.loads(result.stdout)[0]["set"] is None
    assert "No prediction sets: it is of before" in result.stderr
    with pytest.raises(ModelError, match="reads age, region in addition to each image"):
        ask(home, "covariates").predict(file)
    strict, lax = (ask(home, cache=home / "cache", alpha=a).predict(file) for a in (0.001, 0.9))
    assert strict["set"] == ["normal", "abnormal"]
    assert len(lax["set"]) < 2


def test_a_row_says_how_far_it_lies_and_what_its_set_is_promised_of(
    home: Path, tmp_path: Path
) -> None:
    saved, options = load_model(home / "models" / "logistic"), ("--cache", home / "cache")
    options += ("--manifest", home / "manifest.csv")
    embeddings = load_embeddings(home / "cache", home / "manifest.csv", pool="mean+max")
    references = {"near": embeddings.X, "away": embeddings.X + 9 * embeddings.X.std()}
    rows, said = {}, {}
    for name, X in references.items():
        reference = fit_reference(X, 0, patients=embeddings.patients)
        save_model(tmp_path / name, saved.head, saved.card, reference=reference)
        result = run(tmp_path / name, *options, "--json")
        rows[name], said[name] = json.loads(result.stdout), result.stderr
        far = run(tmp_path / name, *options).stdout.count("!")
        shown = [r for r in rows[name] if r["image"] is not None or r["n_views"] > 1]
        assert far == sum(row["far"] for row in shown)
    assert all(row["far"] and row["distance"] > 1 for row in rows["away"])
    assert f"of {sum(r['image'] is not None for r in rows['away'])} images lie far" in said["away"]
    assert "Taken together, they are unlike the training images" in said["away"]
    assert np.mean([row["far"] for row in rows["near"]]) < 0.2
    assert "Taken together" not in said["near"]
    images, studies = parts(rows["near"])
    for study in studies:  # the furthest view's; p by Bonferroni's rule
        views = [row for row in images if row["study"] == study["study"]]
        assert study["distance"] == max(row["distance"] for row in views)
        least = min(row["distance_p"] for row in views)
        assert study["distance_p"] == pytest.approx(min(1, len(views) * least))
    assert {row["coverage"] for row in rows["near"]} == {"marginal"}  # of so few patients
    assert "Prediction sets are not to be relied on" in said["near"]
    before = run(home / "models" / "logistic", *options, "--json")
    assert {(r["distance"], r["distance_p"], r["far"]) for r in json.loads(before.stdout)} == {
        (None, None, None)
    }
    assert "Not known: how far these images lie" in before.stderr


def test_where_the_encoder_is_said_to_be(home: Path, tmp_path: Path) -> None:
    place = tmp_path / "run" / "models" / "m"

    card = read_card(load_model(home / "models" / "logistic"), place)

    def find(**entries: Any) -> Any:
        return find_encoder(dataclasses.replace(card, encoder=EncoderSource(**entries)), place)

    assert find(source="demo") == "demo"
    assert find(source="google/medgemma-4b-pt", revision="ab12") == "google/medgemma-4b-pt@ab12"
    with pytest.raises(EncoderError, match=r"a directory whose location .* --encoder"):
        find(source="my-tower")
    with pytest.raises(EncoderError, match="does not name the encoder"):
        find()
    with pytest.raises(EncoderError, match="adapted encoder, which its card places at"):
        find(source="demo", path="../../encoders/unfreeze-2")
    (tmp_path / "run" / "encoders" / "unfreeze-2").mkdir(parents=True)
    found = find(source="demo", path="../../encoders/unfreeze-2")
    assert found == tmp_path / "run" / "encoders" / "unfreeze-2"


def test_explain_leaves_a_picture_of_each_image(home: Path, damaged: Path, tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    files = (damaged / "a0.png", damaged / "b1.png")
    options = ("--cache", home / "cache", "--device", "cpu", "--explain", out, "--json")
    result = run(home / "models" / "logistic", *files, *options)
    images, _ = parts(json.loads(result.stdout))
    name = image_code(sha256(files[0]))
    assert images[0]["explanation"] == str(out / f"{name}.png")
    assert images[1]["explanation"] is None
    assert {path.name for path in out.iterdir()} == {f"{name}.png", f"{name}.csv"}


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("a.png", "--manifest", "m.csv"),
        ("a.png", "--image-root", "."),
        ("a.png", "--json", "--jsonl"),
        ("a.png", "--alpha", "0"),
    ],
)
def test_wrong_usage(home: Path, arguments: tuple[str, ...]) -> None:
    assert run(home / "models" / "logistic", *arguments).exit_code == 2


CACHED = """\
import atexit, sys
from medembed.__main__ import run
atexit.register(lambda: print("torch" in sys.modules, file=sys.stderr))
run()
"""


def test_a_cache_answers_in_a_fresh_process_without_torch(home: Path, tmp_path: Path) -> None:
    """And when its reader leaves, it ends without a word."""
    options = ("--manifest", str(home / "manifest.csv"), "--cache", str(home / "cache"), "--jsonl")
    command = [sys.executable, "-c", CACHED, "predict", str(home / "models" / "logistic"), *options]
    piped: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "pipesize": 4096}
    with subprocess.Popen(command, text=True, **piped) as process:
        assert process.stdout
        assert process.stderr
        lines = [json.loads(process.stdout.readline()) for _ in range(30)]
        process.stdout.close()
        said = process.stderr.read().splitlines()
        assert said.pop() == "False"
        assert all(line.startswith(("Prediction sets", "Not known")) for line in said)
    assert process.returncode != 0
    rows = list(ask(home, cache=home / "cache").predict_manifest(home / "manifest.csv"))
    assert lines == rows[:30]


IMPORTED = """\
import atexit, sys
from medembed.__main__ import run
unused = "transformers huggingface_hub lightgbm matplotlib sklearn.linear_model sympy torch._dynamo"
names = ["torch", *unused.split()]
atexit.register(lambda: print([name for name in names if name in sys.modules], file=sys.stderr))
run()
"""


def test_an_image_is_predicted_without_libraries_that_it_does_not_need(home: Path) -> None:
    """Torch is all that a tower of our own takes: neither transformers nor torch's compiler."""
    image = home / "images" / "p00" / "view0.png"
    command = [sys.executable, "-c", IMPORTED, "predict", str(home / "models" / "logistic")]
    done = subprocess.run([*command, str(image)], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "['torch']"
    assert "view0.png" in done.stdout


STREAMED = """\
import time, types
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from medembed.__main__ import run
from medembed.encoders.preprocessing import Preprocessing
from medembed.prediction.encode import Embedder
third, begun = (0.5, 0.5, 0.5), []
size = Preprocessing(8, 8, "stretch", "box", third, third, 1 / 255)
# Another encoder would only take time to start.
Embedder.encoder = types.SimpleNamespace(device="cpu", source="stub", preprocessing=size)
def encode(self, pixels, statistics=None):
    begun.append(1)
    while not Path(f"go{len(begun)}").exists():
        time.sleep(0.01)
    return np.zeros((len(pixels), 256), np.float32)
Embedder.encode = encode
run()
"""


def test_lines_come_as_they_are_ready_and_ctrl_c_leaves_whole_ones(
    home: Path, tmp_path: Path
) -> None:
    """An image is let through only when the lines of the one before have been read."""
    options = ("--manifest", str(home / "manifest.csv"), "--image-root", str(home / "images"))
    command = [sys.executable, "-c", STREAMED, "predict", str(home / "models" / "logistic")]
    process = subprocess.Popen(
        [*command, *options, "--jsonl", "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
        text=True,
    )
    assert process.stdout
    deadline = threading.Timer(300, process.kill)  # lines that are held back are waited for in vain
    deadline.start()
    found = []
    for number, n_lines in enumerate([2, 1, 2], start=1):  # a study of one view, and one of two
        (tmp_path / f"go{number}").touch()
        found += [json.loads(process.stdout.readline()) for _ in range(n_lines)]
    process.send_signal(signal.SIGINT)
    rest, said = process.communicate(timeout=300)
    deadline.cancel()
    assert rest == ""
    assert process.returncode == 130
    assert "Stopped after 3 images. Every printed line is complete" in said
    assert [(row["study"], row["n_views"]) for row in found] == [
        *(("s0", None), ("s0", 1), ("s1", None), ("s1", None), ("s1", 2)),
    ]


class Picky:
    """An encoder on a GPU that fails on every batch with a nearly black image."""

    device, preprocessing = "cuda", Preprocessing(8, 8, "stretch", "box", *[(0.5,) * 3] * 2, 1.0)

    def __init__(self) -> None:
        self.encoder, self.intensity, self.sizes = self, Intensity(), list[int]()
        self.images_version = IMAGES_VERSION
        self.limits, self.measures = DEFAULT_LIMITS, False

    def encode(self, pixels: np.ndarray, statistics: np.ndarray | None = None) -> np.ndarray:
        self.sizes.append(len(pixels))
        if (pixels.max(axis=(1, 2)) == 1).any():
            raise EncoderError("it is not finite")
        return pixels.reshape(len(pixels), -1).astype(np.float32)


def test_a_gpu_is_handed_batches_and_an_image_that_it_fails_on_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_read_ahead", encode._read_here)
    for number in range(20):
        level = 0 if number == 18 else 10 * number + 1
        image = Image.new("L", (8, 8), level)
        image.putpixel((7, 7), level + 1)
        image.save(tmp_path / f"{number:02d}.png")
    paths = sorted(tmp_path.iterdir())
    files = [encode.File(n, path, sha256(path)) for n, path in enumerate(paths)]
    embedder: Any = Picky()
    found = [encoded for batch in encode.encode_files(files, [embedder]) for encoded in batch]
    assert [encoded.number for encoded in found] == list(range(20))
    assert found[18].error == "cannot be encoded: it is not finite"
    assert [f.x is not None and f.x[0] == 10 * f.number + 1 for f in found].count(True) == 19
    assert embedder.sizes == [16, 4, 1, 1, 1, 1]


def test_a_head_that_gives_no_finite_numbers_is_never_an_answer() -> None:
    head: Any = SimpleNamespace(
        n_features_in_=2, predict_proba=lambda X: np.full((len(X), 2), np.nan)
    )
    card: Any = SimpleNamespace(pooling="mean", views="mean")
    with pytest.raises(ModelError, match="not finite"):
        raw_scores(Model(head, {}), card, np.zeros((3, 2), np.float32), np.zeros(3, np.int64))


def test_a_directory_means_the_images_below_it(home: Path, tmp_path: Path) -> None:
    films = tmp_path / "films"
    shutil.copytree(home / "images" / "p04", films / "one")
    (films / "notes.txt").write_text("no image")
    (films / "away").symlink_to(home / "images")
    model = home / "models" / "logistic"
    found = run(model, films, "--device", "cpu", "--json")
    assert found.exit_code == 0, found.output
    images, _ = parts(json.loads(found.stdout))
    assert [row["image"] for row in images] == sorted(map(str, (films / "one").iterdir()))
    assert "out of the image root" in found.stderr
    (tmp_path / "empty").mkdir()
    result = run(model, tmp_path / "empty")
    assert result.exit_code == 1
    assert str(tmp_path / "empty") in result.stderr


def test_a_directory_of_dicom_files_without_suffixes(home: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 4096, (32, 32), np.uint16)
    (tmp_path / "IM0001").write_bytes(dicom(pixels, bits=12))
    (tmp_path / "DIRECTORY").write_bytes(b"of something else")
    images, unseen = list_images([tmp_path])
    assert images == [tmp_path / "IM0001"]
    assert unseen == []


@pytest.mark.parametrize("suffix", [".csv", ".xlsx"])
def test_rows_go_into_a_table(home: Path, tmp_path: Path, suffix: str) -> None:
    hostile = tmp_path / "=HYPERLINK(1).png"
    shutil.copy(home / "images" / "p00" / "view0.png", hostile)
    out = tmp_path / f"rows{suffix}"
    model = home / "models" / "logistic"
    result = run(model, hostile, home / "images" / "p01", "--device", "cpu", "-o", out)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    table = pd.read_csv(out) if suffix == ".csv" else pd.read_excel(out)
    answers = json.loads(run(model, hostile, home / "images" / "p01", "--json").stdout)
    images, _ = parts(answers)
    assert len(table) == len(images)
    np.testing.assert_allclose(table["probability"], numbers(images))
    assert list(table["decision"]) == [row["decision"] for row in images]
    assert set(table["operating_point"]) == {"youden"}
    assert table["image"][0] == str(hostile)
    refused = run(model, hostile, "-o", tmp_path / "rows.txt")
    assert refused.exit_code == 2
    assert not (tmp_path / "rows.txt").exists()


def test_a_cell_that_a_spreadsheet_would_compute_is_text(tmp_path: Path) -> None:
    row = {
        "image": "=1+1",
        "study": "@x",
        "probability": 0.25,
        "decision": "normal",
        "operating_point": None,
        "set": [],
        "n_views": None,
    }
    write_table([row], tmp_path / "rows.csv")
    written = pd.read_csv(tmp_path / "rows.csv").iloc[0]
    assert (written["image"], written["study"], written["set"]) == ("'=1+1", "'@x", "neither")


def test_a_run_answers_by_its_best_model_in_cross_validation(home: Path, tmp_path: Path) -> None:
    run_path = tmp_path / "run"
    opened = create_run(run_path, {"kind": "sweep", "heads": ["logistic", "lightgbm"]})
    shutil.copytree(home / "models" / "lightgbm", run_path / "models" / "lightgbm")
    shutil.copytree(home / "models" / "logistic", run_path / "models" / "logistic")
    board = [{"head": "attention"}, {"head": "lightgbm"}, {"head": "logistic"}]
    opened.update_info(leaderboard=board)
    assert find_model(opened) == find_model(run_path) == run_path / "models" / "lightgbm"
    opened.update_info(leaderboard=[])
    with pytest.raises(RunError, match="packaged no model"):
        find_model(run_path)
