"""The cases of the page: their order, what is known of each, their films, and their data."""

import base64
import io
import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from made_runs import fit_sets, give_model, make_images, make_run, manifest_of
from made_sweeps import make_data
from PIL import Image

import medembed
from medembed.cache.embeddings import load_embeddings
from medembed.cli import main
from medembed.core.errors import RunError
from medembed.dataset.manifest import Manifest, read_manifest
from medembed.report import cases, page, page_data
from medembed.report.cases import CaseSources, collect_films, list_cases, read_heat_map
from medembed.report.gallery import Thumbnail, film_name, make_thumbnails
from medembed.report.page import write_report
from medembed.report.page_schema import PageDocument
from medembed.results.alignment import align_runs
from medembed.results.comparison import compare_aligned
from medembed.results.deferral import find_sets
from medembed.results.embedding_map import EmbeddingMap, MapInfo
from medembed.results.predictions import image_code
from medembed.sweeps import sweep

WEB = Path(medembed.__file__).parent / "report" / "web"
TEMPLATES = WEB.parent / "templates"
ATTACK = "</script><script>alert(1)</script>\u2028\u202e"


def unpack(packed):
    return np.frombuffer(base64.b64decode(packed.data), f"<{packed.type}")


def read_document(path):
    """Return the data of a written page."""
    text = re.search(r'id="page-data">(.*?)</script>', path.read_text(), re.S)[1]
    return PageDocument.model_validate(json.loads(text))


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "sweep"
    run = make_run(path, make_images(n_patients=150), {"mlp": 1.5, "logistic": 3.0})
    give_model(run, "mlp", conformal=fit_sets(run, "mlp").as_dict())
    test_set = align_runs([run])
    return [run], compare_aligned([run], test_set, n_resamples=20), test_set


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    home = tmp_path_factory.mktemp("swept")
    cache, manifest = make_data(home, {"mean": 4.0, "max": 0.5})
    sweep(cache, manifest, home / "run", heads="logistic", n_configs=1, n_folds=3, jobs=1)
    return home


def test_confident_mistakes_come_first_then_what_is_nearly_undecided(aligned):
    found = list_cases(*aligned, None, CaseSources()).content
    head = next(c for c in aligned[2].contenders if c.head == "mlp")
    probability, label = unpack(found.probability[0]), unpack(found.label)
    assert sorted(probability) == pytest.approx(sorted(head.probability))
    is_wrong = (probability >= np.float32(head.threshold)) != (label == 1)
    n = int(is_wrong.sum())
    assert 5 < n < len(label)
    assert is_wrong[:n].all()
    far = np.abs(
        np.log(probability / (1 - probability)) - np.log(head.threshold / (1 - head.threshold))
    )
    assert (np.diff(far[:n]) <= 1e-5).all()
    assert (np.diff(far[n:]) >= -1e-5).all()


def test_a_case_has_its_films_and_the_set_that_predict_gives(aligned):
    found = list_cases(*aligned, None, CaseSources()).content
    units = aligned[2].units
    own = {" ".join(i[:16] for i in images.split()): k for k, images in enumerate(units["images"])}
    order = [own[films] for films in found.films]
    assert sorted(order) == list(range(len(units)))
    head = next(c for c in aligned[2].contenders if c.head == "mlp")
    sets = find_sets(aligned[0], aligned[2], head)
    conformal = fit_sets(aligned[0][0], "mlp")
    told = conformal.sets(head.raw, units["region"].to_numpy())
    assert sets.tolist() == [int(a) + 2 * int(b) for a, b in told]
    assert unpack(found.sets).tolist() == sets[order].tolist()
    regions = list_cases(*aligned, None, CaseSources()).regions
    assert [regions[k] for k in unpack(found.region)] == units["region"].iloc[order].tolist()


def test_counts_at_each_threshold_are_those_of_the_predictions(aligned):
    document = page_data.make_document(*aligned[1:], {}, list_cases(*aligned, None, CaseSources()))
    y = aligned[2].y == 1
    assert document.thresholds == sorted(document.thresholds)
    for own, head in zip(document.heads, aligned[2].contenders, strict=False):
        assert own.threshold in document.thresholds
        called = head.probability[:, None] >= np.array(document.thresholds)
        assert unpack(own.true_positives).tolist() == called[y].sum(axis=0).tolist()
        assert unpack(own.false_positives).tolist() == called[~y].sum(axis=0).tolist()
        assert unpack(own.distribution).sum() == len(y)


def test_a_row_at_the_threshold_is_called_abnormal():
    called = page_data.count_called(np.array([0.5, 0.2, 0.5]), np.array([0.2, 0.5, 0.6]))
    assert called.tolist() == [3, 2, 0]


def make_answers(images):
    """A manifest of the images whose views differ in one target, and are unknown in another."""
    first = images.groupby("study").cumcount() == 0
    image = [f"{k}.png" for k in range(len(images))]
    metal = np.where(first & (images["patient"] % 3 == 1), "1", "0")
    cast = np.where(images["patient"] % 3 == 0, "", np.where(first, "", "0"))
    rows = images.assign(image=image, target_metal=metal, target_cast=cast)
    return Manifest(rows.astype({"label": "Int8"}), "image")


def test_cases_and_map_have_the_manifests_answers_to_other_targets(aligned):
    images = make_images(n_patients=150)
    manifest = make_answers(images)
    found = list_cases(*aligned, manifest, CaseSources())
    assert found.target == "label"
    assert list(found.content.targets) == ["metal", "cast"]
    own = images.set_index(images["sha256"].str[:16])
    rows = manifest.rows.set_index(own.index)
    metal, cast = (unpack(found.content.targets[name]) for name in ("metal", "cast"))
    for k, films in enumerate(found.content.films):
        codes = films.split()
        assert metal[k] == rows.loc[codes, "target_metal"].astype(int).max()
        known = [answer for answer in rows.loc[codes, "target_cast"] if answer]
        assert cast[k] == (int(max(known)) if known else 2)
    assert set(metal) == {0, 1}
    assert set(cast) == {0, 2}
    table = images.assign(pooling="mean", x=0.0, y=np.arange(len(images))).astype({"label": "Int8"})
    info = MapInfo(method="pca", seed=0, manifest="0", explained={}, versions={})
    document = page_data.make_document(
        *aligned[1:], {}, found, ("sweep", EmbeddingMap(table, info))
    )
    order = table.assign(train=table["split"] != "test").sort_values(["train", "sha256"])
    expected = rows.loc[order["sha256"].str[:16], "target_metal"].astype(int)
    assert unpack(document.map.targets["metal"]).tolist() == expected.tolist()


def test_without_a_manifest_a_page_has_no_other_target(aligned):
    assert list_cases(*aligned, None, CaseSources()).content.targets == {}


def test_near_films_are_the_nearest_of_train_and_of_other_patients(swept, tmp_path):
    result = CliRunner().invoke(
        main,
        ["report", str(swept / "run"), "-o", str(tmp_path), "--cache", str(swept / "cache")],
    )
    assert result.exit_code == 0, result.output
    found = read_document(tmp_path / "index.html").cases
    embeddings = load_embeddings(swept / "cache", swept / "manifest.csv")
    vectors = embeddings.X / np.linalg.norm(embeddings.X, axis=1, keepdims=True)
    codes = embeddings.rows["sha256"].str[:16].to_numpy()
    is_train = (embeddings.rows["split"] == "train").to_numpy()
    near = unpack(found.training.neighbours).reshape(-1, 4)
    similarity = unpack(found.training.similarity).reshape(-1, 4)
    for k in (0, len(found.films) - 1):
        views = np.flatnonzero(np.isin(codes, found.films[k].split()))
        cosine = vectors[views] @ vectors[is_train].T
        best = np.sort(cosine.max(axis=0))[::-1][:4]
        assert similarity[k] == pytest.approx(best, abs=1e-5)
        assert unpack(found.distance)[k] == pytest.approx(1 - cosine.max(axis=1).min(), abs=1e-5)
        film = found.training.films[near[k, 0]]
        assert codes[is_train][cosine.max(axis=0).argmax()] == film


def thumbnails(calls):
    def find(wanted):
        calls.append(len(wanted))
        return {sha256: Thumbnail(sha256.encode() * 10, 3, 4) for sha256 in wanted}

    return find


def test_films_lie_beside_the_page_and_those_of_an_earlier_page_go(aligned, tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "BATCH", 50)
    monkeypatch.setattr(cases, "INLINED_BYTES", 20 * 640)
    found, calls = list_cases(*aligned, None, CaseSources()), []
    (tmp_path / "films").mkdir()
    for name in (f"{'0' * 16}.jpg", "mine.jpg"):
        (tmp_path / "films" / name).write_text("")
    told = []
    sources = CaseSources(find_thumbnails=thumbnails(calls), progress=lambda *n: told.append(n))
    films = collect_films(found, tmp_path, sources)
    assert max(calls) == 50
    assert told[-1] == (sum(calls), sum(calls)) == (len(found.images), len(found.images))
    assert len(films.inlined) == 20
    assert set(films.inlined) == {image[:16] for image in found.images[:20]}
    there = {path.name for path in (tmp_path / "films").iterdir()}
    assert there == {film_name(image) for image in found.images} | {"mine.jpg"}
    assert set(films.beside) | set(films.inlined) == {image[:16] for image in found.images}


def test_a_film_that_was_made_is_not_decoded_again(tmp_path):
    files = {}
    for k in range(3):
        output = io.BytesIO()
        values = np.random.default_rng(k).integers(0, 256, (30, 20), np.uint8)
        Image.fromarray(values).save(output, "PNG")
        files[f"{k}.png"] = output.getvalue()
        (tmp_path / f"{k}.png").write_bytes(files[f"{k}.png"])
    manifest = manifest_of(files)
    hashes = manifest.rows["sha256"].tolist()
    first = make_thumbnails(manifest, tmp_path, hashes)
    made = tmp_path / "films"
    made.mkdir()
    for sha256, thumbnail in first.items():
        (made / film_name(sha256)).write_bytes(thumbnail.jpeg)
    (made / film_name(hashes[2])).write_bytes(b"half a file")
    for name in files:
        (tmp_path / name).unlink()
    again = make_thumbnails(manifest, tmp_path, hashes, made=made)
    assert len(first) == 3
    assert again == {sha256: first[sha256] for sha256 in hashes[:2]}


def test_a_heat_map_is_placed_on_its_film(tmp_path):
    lines = ["row,column,left,top,right,bottom,logit"]
    for row, column in np.ndindex(2, 4):  # a film of 60 x 80, padded to a square of 80
        edges = (column * 20 - 10, row * 40, column * 20 + 10, row * 40 + 40)
        lines.append(f"{row},{column},{','.join(map(str, edges))},{row - column}")
    path = tmp_path / "heat.csv"
    path.write_text("\n".join(lines))
    found = read_heat_map(path)
    assert (found.rows, found.columns, found.top) == (2, 4, 3)
    assert found.box == pytest.approx([-10 / 60, 0, 70 / 60, 1], abs=1e-4)
    values = unpack(found.values).reshape(2, 4)
    assert values.tolist() == [[128, 86, 43, 1], [170, 128, 86, 43]]
    for text in ("", "row,column\n0,0", f"{lines[0]}\n0,0,0,0,1,1,nan", "\n".join(lines[:-1])):
        path.write_text(text)
        with pytest.raises(RunError, match="is not a heat map of"):
            read_heat_map(path)


def test_options_of_cases_reach_the_page_and_names_only_when_asked(swept, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "plot_all", lambda *_: [])
    manifest = read_manifest(swept / "manifest.csv")
    test = manifest.rows[manifest.rows["split"] == "test"]
    heat = tmp_path / "heat"
    heat.mkdir()
    sha256 = test["sha256"].iloc[0]
    (heat / f"{image_code(sha256)}.csv").write_text(
        "row,column,left,top,right,bottom,logit\n0,0,0,0,8,8,1\n"
    )
    asked = ["report", str(swept / "run"), "-o", str(tmp_path / "out"), "--explanations", str(heat)]
    known = [*asked, "--manifest", str(swept / "manifest.csv")]
    assert CliRunner().invoke(main, [*known, "--covariates", "region"]).exit_code == 0
    text = (tmp_path / "out" / "index.html").read_text()
    assert f'"{sha256[:16]}":{{"rows":1' in text
    assert not any(name in text for name in test["image"])
    document = read_document(tmp_path / "out" / "index.html")
    own = [document.regions[k] for k in unpack(document.cases.region)]
    assert document.cases.covariates == {"region": own}
    named = [*known, "--names", "--image-root", str(tmp_path)]
    assert CliRunner().invoke(main, named).exit_code == 0
    assert test["image"].iloc[0] in (tmp_path / "out" / "index.html").read_text()
    refused = CliRunner().invoke(main, [*known, "--covariates", "age"])
    assert refused.exit_code == 1
    assert "no column 'age'" in refused.output
    refused = CliRunner().invoke(main, [*asked[:-1], str(tmp_path / "none")])
    assert refused.exit_code == 1
    assert "Give --explanations what" in refused.output


def test_hostile_text_stays_in_its_script(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "plot_all", lambda *_: [])
    monkeypatch.setattr(cases, "MAX_INLINED", 5)
    images = make_images(n_patients=60)
    images["region"] = images["region"].replace("hand", ATTACK)
    run = make_run(tmp_path / "run", images, {"mlp": 1.0})
    write_report([run], tmp_path / "out", n_resamples=20)
    text = (tmp_path / "out" / "index.html").read_text()
    assert text.count("</script>") == 3
    assert ATTACK in read_document(tmp_path / "out" / "index.html").regions
    assert "\u2028" not in text
    beside = (tmp_path / "out" / "cases.js").read_text()
    assert len(json.loads(beside.removeprefix("medembedCases(")[:-1])["films"]) == 30
    monkeypatch.setattr(cases, "MAX_INLINED", 50)
    write_report([run], tmp_path / "out", n_resamples=20)
    assert not (tmp_path / "out" / "cases.js").exists()


def test_the_script_is_what_its_source_gives(tmp_path):
    program = WEB / "node_modules" / ".bin" / "esbuild"
    if not program.exists():
        pytest.skip("esbuild is not installed: `make page` does it")
    wanted = json.loads((WEB / "package.json").read_text())["scripts"]["build"]
    command = wanted.replace("esbuild ", f"{program} ").replace("../templates", str(tmp_path))
    environment = {**os.environ, "ESBUILD_WORKER_THREADS": "0"}
    subprocess.run(command, shell=True, cwd=WEB, env=environment, check=True, capture_output=True)
    for name in ("page.js", "page.css"):
        assert (tmp_path / name).read_text() == (TEMPLATES / name).read_text(), name


def test_a_small_sample_and_its_size_are_stated(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "plot_all", lambda *_: [])
    for n, is_said in ((10, True), (3000, False)):
        run = make_run(tmp_path / f"run{n}", make_images(n_patients=n), {"mlp": 1.0})
        write_report([run], tmp_path / "out", n_resamples=20)
        text = (tmp_path / "out" / "index.html").read_text()
        assert ("Small sample." in text) is is_said
        studies = f"{n // 2:,} test studies of {n // 2:,} patients"
        assert re.search(rf"measured on [\d,]+ images in {studies}", text)
