"""`import medembed as me`: its names, signatures, laziness, types, and what comes back."""

import contextlib
import inspect
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from made_finetuning import make_cohort, make_tower, one_thread
from made_runs import make_images, make_run
from made_sweeps import make_data
from matplotlib.figure import Figure
from PIL import Image

import medembed
import medembed as me
from medembed.cli import main
from medembed.report import page

HEAVY = "torch transformers sklearn lightgbm pandas numpy h5py rich matplotlib scipy pydicom click"
HOSTILE = "<script>x</script>\x1b[31m\u202ehand"
ERRORS = {
    *("ArgumentError", "CacheError", "DeviceMemoryError", "EncoderError", "ImageError"),
    *("ManifestError", "MedembedError", "MissingLibraryError", "MissingRowsError", "ModelError"),
    *("NonFiniteError", "PathNotFoundError", "RecipeError", "RunError", "ShardError"),
    *("SpecMismatchError", "StorageError", "TrainingDataError"),
}
TYPES = {
    *("BuildReport", "Cache", "Comparison", "Embeddings", "Encoder", "ExtractionReport"),
    *("LabelAudit", "Manifest", "Preprocessing", "Relabelled", "Run", "ShortcutAudit"),
    "Worklist",
}
HEADS = {"Head", "LogisticHead", "MLPHead", "LightGBMHead", "AttentionHead", "KNNHead"}
SIGNATURES = {
    "build_manifest": "recipe, image_root, *, strict=False, structure_only=False, key_file=None, "
    "progress=None",
    "propose_recipe": "path, image_root=None, *, kind='auto', name='', image=None, label=None, "
    "normal=None, abnormal=None, empty=None, patient=None, study=None, region=None, split=None, "
    "covariates=None, pattern=None, test_fraction=None, seed=0, encoding='', delimiter='', "
    "sheet=''",
    "read_manifest": "path",
    "load_encoder": "ref, *, device='auto', precision='auto', fit='stretch', "
    "poolings=('mean', 'max'), progress=None",
    "extract": "manifest, image_root, encoder, cache, *, poolings=('mean', 'max'), "
    "dtype='float16', intensity=Intensity(window='first', low=1.0, high=99.0), batch_size=None, "
    "decoders=None, limits=Limits(max_bytes=1073741824, max_seconds=120.0), retry_failed=False, "
    "worker=None, known_shards=(), dry_run=False, commit_seconds=60.0, progress=None, "
    "on_status=None, announce=None, timeline=None",
    "open_cache": "path, *, known=()",
    "relabel": "manifest, review",
    "audit_labels": "run, manifest",
    "make_worklist": "cache, manifest, n, *, model=None, random_share=0.2, pool=None, seed=0",
    "audit_shortcuts": "cache, manifest, columns, *, pool=None, n_folds=5, seed=0, "
    "image_root=None, progress=None",
    "load_embeddings": "cache, manifest, *, pool=None, split=None, cells=False, verify=True",
    "patient_folds": "embeddings, n_folds=5, seed=0",
    "find_similar": "cache, manifest, query, *, k=10, pool=None, sha256=None, progress=None",
    "sweep": "cache, manifest, out, *, heads=('logistic', 'mlp', 'lightgbm'), pool=None, "
    "space=None, n_configs=None, n_folds=5, metric='auroc', covariates=(), train_fraction=1.0, "
    "seed=0, operating_points=(), prompts=None, image_root=None, without_suspects=None, "
    "jobs=None, backend='loky', progress=None, board=None, announce=None",
    "ensemble": "runs, out, *, heads=None, operating_points=()",
    "finetune": "manifest, image_root, encoder, out, *, unfreeze=(0, 1, 2, 4), from_run=None, "
    "trunk_cache=None, trunk_dtype='float32', n_seeds=1, n_folds=5, pool=None, config=None, "
    "device='auto', precision='auto', fit='stretch', seed=0, operating_points=(), "
    "limits=Limits(max_bytes=1073741824, max_seconds=120.0), progress=None, on_status=None",
    "open_run": "path",
    "compare": "*runs, level='study', n_resamples=2000, seed=0, by=None, manifest=None, "
    "margin=None, operating_points=(), prevalence=None",
    "write_report": "runs, out, *, level='study', n_resamples=2000, seed=0, date=None, "
    "find_thumbnails=None, manifest=None, margin=None, command=None, checklists=(), "
    "operating_points=(), prevalence=None, progress=None, figures=(), cases=None",
    "evaluate": "model, cache, manifest, out, *, split=None, recalibrate=None, seed=0, "
    "n_resamples=2000, operating_points=(), prevalence=None",
    "Predictor": "model, *, encoder=None, cache=None, device='auto', precision='auto', alpha=0.1, "
    "operating_point=None, limits=Limits(max_bytes=1073741824, max_seconds=120.0), "
    "fetching=None, on_status=None",
    "LogisticHead": "C=0.01, *, class_weight='balanced', standardize=True, pca=0, n_covariates=0, "
    "max_iter=200, tol=0.0001",
}
METHODS = {
    "Embeddings": "X y patients studies regions to_frame",
    "Run": "leaderboard model scores predictions trials name is_complete",
    "Comparison": "rows paired notes to_frame as_dict to_json render plot _repr_html_",
    "Predictor": "predict predict_images predict_manifest load card model",
    "Manifest": "rows label_level write digest",
    "Cache": "keys is_done failures card verify",
}


class Grey:
    """An encoder without weights: the mean and the largest grey level of four stripes."""

    source, revision, device, precision = "grey", None, "cpu", "fp32"
    fingerprint = "ab" * 32
    preprocessing = me.Preprocessing(16, 16, "stretch", "box", (0.5,) * 3, (0.5,) * 3, 1 / 255)
    dimensions = {"mean": (4,), "max": (4,)}  # noqa: RUF012 - as the README has it

    def encode(self, pixels: np.ndarray, poolings: list[str]) -> dict[str, np.ndarray]:
        stripes = pixels.reshape(len(pixels), 4, -1).astype(np.float32) / 255
        found = {"mean": stripes.mean(axis=2), "max": stripes.max(axis=2)}
        return {name: found[name] for name in poolings}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 40 patients, the abnormal ones brighter, and a recipe for them."""
    home = tmp_path_factory.mktemp("surface")
    generator = np.random.default_rng(0)
    lines = ["file,patient,study,part,finding"]
    for patient in range(40):
        for view in range(1 + patient % 2):
            name = f"p{patient:02d}-{view}.png"
            level = 60 + 90 * (patient % 2)
            pixels = generator.integers(level - 40, level + 60, (20, 24)).astype(np.uint8)
            (home / "images").mkdir(exist_ok=True)
            Image.fromarray(pixels).save(home / "images" / name)
            part = ("hand", "wrist")[patient // 2 % 2]
            lines.append(f"{name},Jane Doe {patient},s{patient},{part},{patient % 2}")
    (home / "images" / "labels.csv").write_text("\n".join([*lines, ""]))
    (home / "own.toml").write_text(
        'name = "own"\nlicence = ""\ncitation = ""\nurl = ""\nlayout = "table"\n'
        'label_level = "study"\n[table]\nfile = "labels.csv"\nimage = "file"\n'
        'patient = "patient"\nstudy = "study"\n[region]\ncolumn = "part"\n'
        '[label]\ncolumn = "finding"\nabnormal = "1"\nnormal = "0"\n'
        "[split]\nfraction = 0.3\nseed = 0\n"
    )
    return home


@pytest.fixture(scope="module")
def path(home: Path) -> dict[str, Any]:
    """The whole path with names of the surface alone."""
    built = me.build_manifest(home / "own.toml", home / "images", strict=True)
    built.manifest.write(home / "manifest.csv")
    report = me.extract(home / "manifest.csv", home / "images", Grey(), home / "cache", decoders=1)
    heads, own = "logistic,mlp", {"n_configs": 1, "n_folds": 3, "jobs": 1}
    run = me.sweep(home / "cache", built.manifest, home / "runs" / "sweep", heads=heads, **own)
    predictor = me.Predictor(run.model("mlp"), encoder=Grey())
    answers = predictor.predict(sorted(map(str, (home / "images").glob("p0*.png"))))
    kept = {"built": built, "report": report, "run": run, "predictor": predictor}
    return {**kept, "answers": answers, "comparison": me.compare(run, n_resamples=50)}


def test_the_names_are_those_that_were_agreed() -> None:
    functions = {name for name in SIGNATURES if name not in HEADS}
    assert set(me.__all__) == functions | TYPES | HEADS | ERRORS | {"__version__"}
    assert list(me.__all__) == sorted(me.__all__)
    assert set(me.__all__) <= set(dir(me))
    assert not [name for name in dir(me) if name not in me.__all__ and not name.startswith("__")]
    from medembed.core import errors

    assert set(errors.__all__) == ERRORS
    assert all(issubclass(getattr(me, name), me.MedembedError) for name in ERRORS)


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_signature_that_changes_is_noticed(name: str) -> None:
    given = inspect.signature(getattr(me, name)).parameters.values()
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in given]
    assert str(inspect.Signature(plain)) == f"({SIGNATURES[name]})"


@pytest.mark.parametrize("name", METHODS)
def test_what_comes_back_has_what_was_agreed(name: str) -> None:
    kind = getattr(me, name)
    known = {*dir(kind), *getattr(kind, "__dataclass_fields__", {}), *_attributes(kind)}
    assert set(METHODS[name].split()) <= known


def _attributes(kind: type) -> set[str]:
    return set(getattr(kind, "__annotations__", {}))


def test_every_public_name_has_a_docstring() -> None:
    for name in set(me.__all__) - {"__version__"}:
        assert len(inspect.getdoc(getattr(me, name)) or "") > 30, name


def test_nothing_is_loaded_before_a_name_is_used() -> None:
    code = (
        "import sys, medembed as me; n = [m for m in sys.modules if m.startswith('medembed.')]; "
        f"h = [m for m in {HEAVY.split()} if m in sys.modules]; dir(me); print(n, h)\n"
        "for name in me.__all__: getattr(me, name)\n"
        "try: me.nothing\nexcept AttributeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[] []", "module 'medembed' has no attribute 'nothing'"]


def test_the_whole_path_with_these_names_alone(path: dict[str, Any], home: Path) -> None:
    assert isinstance(path["built"], me.BuildReport)
    assert path["report"].embedded == 60
    assert isinstance(path["run"], me.Run)
    board = path["run"].leaderboard
    assert {"head", "pooling", "trial", "params", "cv", "seconds"} <= set(board.columns)
    assert board["cv"].is_monotonic_decreasing
    answers = path["answers"]
    assert list(answers["image"]) == sorted(map(str, (home / "images").glob("p0*.png")))
    odd = answers["image"].str.extract(r"p(\d\d)")[0].astype(int) % 2 == 1
    assert (answers["decision"] == np.where(odd, "abnormal", "normal")).mean() > 0.9
    assert answers["error"].isna().all()
    one = path["predictor"].predict(home / "images" / "p01-0.png")
    row = answers[answers["image"].str.endswith("p01-0.png")].iloc[0]
    assert one["probability"] == pytest.approx(row["probability"])
    assert me.Predictor(path["run"].model("mlp")).predict([]).columns.tolist() == list(answers)


def test_the_folds_are_the_sweeps(path: dict[str, Any], home: Path) -> None:
    embeddings = me.load_embeddings(home / "cache", home / "manifest.csv")
    folds = me.patient_folds(embeddings, n_folds=3)
    own = path["run"].predictions().query("head == 'logistic'").set_index("sha256")
    expected = embeddings.rows["sha256"].map(own["fold"]).fillna(-1).to_numpy(int)
    assert len(folds) == 3
    for k, (train, test) in enumerate(folds):
        assert np.array_equal(test, np.flatnonzero(expected == k))
        assert np.array_equal(train, np.flatnonzero((expected >= 0) & (expected != k)))
        assert not set(embeddings.patients[train]) & set(embeddings.patients[test])
    in_a_fold = np.concatenate([test for _, test in folds])
    assert (embeddings.rows["split"].to_numpy()[in_a_fold] == "train").all()
    alone = me.load_embeddings(home / "cache", home / "manifest.csv", split="train")
    train_only = me.patient_folds(alone, n_folds=3)
    for (_, test), (_, all_test) in zip(train_only, folds, strict=True):
        assert set(alone.rows["image"].iloc[test]) == set(embeddings.rows["image"].iloc[all_test])
    other = me.patient_folds(alone, n_folds=3, seed=1)
    assert [test.tolist() for _, test in other] != [test.tolist() for _, test in train_only]


def test_folds_of_the_manifest_where_images_failed(tmp_path: Path) -> None:
    """Rows that failed keep their patients' places: others are not dealt anew."""
    from made_sweeps import make_pooled_cache, make_table

    from medembed.cache.failures import Failure

    cache, manifest = make_data(tmp_path, {"mean": 1.5})
    whole = me.load_embeddings(cache, manifest)
    table = make_table()
    lost = table["sha256"].iloc[[0, 7, 20]].tolist()
    fewer = make_pooled_cache(tmp_path / "fewer", table[~table["sha256"].isin(lost)], {"mean": 1.5})
    me.open_cache(fewer).record_failures([Failure(name, "decode", "torn") for name in lost])
    left = me.load_embeddings(fewer, manifest)
    assert len(left.failed) == 3
    for (_, test), (_, own) in zip(me.patient_folds(whole), me.patient_folds(left), strict=True):
        kept = whole.rows["image"].iloc[test]
        assert set(left.rows["image"].iloc[own]) == set(kept) - set(left.failed["image"])


def test_scikit_learn_takes_embeddings_and_folds(path: dict[str, Any], home: Path) -> None:
    from sklearn.model_selection import cross_val_score

    embeddings = me.load_embeddings(home / "cache", home / "manifest.csv")
    folds = me.patient_folds(embeddings, n_folds=3)
    scores = cross_val_score(
        me.LogisticHead(), embeddings.X, embeddings.y, cv=folds, scoring="roc_auc"
    )
    assert scores.min() > 0.9
    frame = embeddings.to_frame()
    assert frame.shape == (len(embeddings), len(embeddings.rows.columns) + embeddings.X.shape[1])
    assert np.array_equal(frame[["mean[0]", "max[3]"]], embeddings.X[:, [0, 7]])


def test_a_thing_or_its_path_gives_one_answer(
    path: dict[str, Any], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "plot_all", lambda *_: [])  # figures are drawn elsewhere
    run, cache = path["run"], me.open_cache(home / "cache")
    manifest = me.read_manifest(str(home / "manifest.csv"))
    assert me.read_manifest(manifest) is manifest
    assert me.open_cache(cache) is cache
    assert me.open_run(run).path == me.open_run(str(run.path)).path == run.path
    by_path = me.load_embeddings(home / "cache", home / "manifest.csv")
    assert np.array_equal(me.load_embeddings(cache, manifest).X, by_path.X)
    again = me.extract(manifest, str(home / "images"), me.load_encoder(Grey()), cache)
    assert (again.already, again.embedded) == (60, 0)
    options = {"heads": ["logistic", "mlp"], "n_configs": 1, "n_folds": 3, "jobs": 1}
    assert me.sweep(cache, home / "manifest.csv", run.path, **options).info == run.info
    assert me.compare(run.path, n_resamples=50).as_dict() == path["comparison"].as_dict()
    image = home / "images" / "p03-1.png"
    models = (
        run.model("mlp"),
        run.model_path("mlp"),
        str(run.model_path("mlp")),
        path["predictor"],
    )
    for model in models:
        assert me.Predictor(model, cache=cache).predict(image) == path["predictor"].predict(image)
    same = dict.fromkeys(["seed", "n_resamples"], 5)
    evaluated = [
        me.evaluate(model, place, own, home / "runs" / f"own{i}", split="test", **same)
        for i, (model, place, own) in enumerate(
            [(models[0], cache, manifest), (models[2], home / "cache", home / "manifest.csv")]
        )
    ]
    assert all(isinstance(own, me.Run) for own in evaluated)
    first, second = ([row["scores"] for row in own.scores()["rows"]] for own in evaluated)
    assert first == second
    pages = [me.write_report(runs, home / "page", n_resamples=20) for runs in (run, [run.path])]
    assert pages[0] == pages[1]
    assert Path(pages[0]["page"]).is_file()


def test_an_encoder_takes_files_and_arrays(path: dict[str, Any], home: Path) -> None:
    encoder = me.load_encoder(Grey())
    assert isinstance(encoder, me.Encoder)
    embeddings = me.load_embeddings(home / "cache", home / "manifest.csv", pool="mean")
    files = [home / "images" / image for image in embeddings.rows["image"]]
    found = encoder.encode(files, ["mean"], batch_size=7)["mean"]
    assert np.array_equal(found.astype(np.float16), embeddings.X.astype(np.float16))
    arrays = [np.asarray(Image.open(file)) for file in files[:3]]
    for given in (arrays, np.stack(arrays), [str(files[0]), *arrays[1:]]):
        assert np.allclose(encoder.encode(given)["mean"], found[:3])
    assert encoder.encode(files[0])["max"].shape == (1, 4)
    assert encoder.encode(arrays[0])["max"].shape == (1, 4)
    prepared = np.zeros((3, 16, 16), np.uint8)
    assert encoder.encode(prepared, ["mean"])["mean"].shape == (3, 4)
    assert encoder.encode([], ["mean"])["mean"].shape == (0, 4)
    assert "grey on cpu in fp32: images of 16 × 16" in repr(encoder)


def test_compare_is_the_commands_document(path: dict[str, Any]) -> None:
    comparison, run = me.compare(path["run"]), path["run"]
    ran = CliRunner().invoke(main, ["compare", str(run.path), "--json"])
    assert json.loads(ran.stdout) == comparison.as_dict() == json.loads(comparison.to_json())
    assert comparison.to_json() == ran.stdout.rstrip("\n")
    assert comparison.rows == comparison.as_dict()["rows"]
    assert comparison.paired == comparison.as_dict()["paired"]
    comparison.rows[0]["head"] = "changed"
    assert comparison.rows[0]["head"] != "changed"
    shown = CliRunner().invoke(main, ["compare", str(run.path)]).stdout
    assert comparison.render(width=120) == shown.rstrip("\n")
    frame = comparison.to_frame()
    assert list(frame["head"]) == [row["head"] for row in comparison.rows]
    assert frame["auroc_low"].iloc[-1] != frame["auroc_low"].iloc[-1]  # a prior ranks nothing
    assert frame["auroc"].iloc[0] == comparison.rows[0]["scores"]["auroc"]["value"]
    assert {"slope", "intercept_high", "p_holm", "threshold"} <= set(frame.columns)


def test_the_sweeps_json_is_the_runs(path: dict[str, Any], home: Path) -> None:
    words = ["sweep", str(home / "cache"), str(home / "manifest.csv"), "--out"]
    words += [str(path["run"].path), "--heads", "logistic,mlp", "--configs", "1", "--folds", "3"]
    ran = CliRunner().invoke(main, [*words, "--jobs", "1", "--json"])
    assert json.loads(ran.stdout) == path["run"].as_dict()
    assert set(path["run"].as_dict()) == {"run", "leaderboard"}


def test_fine_tuning_takes_an_encoder_that_is_loaded(tmp_path: Path) -> None:
    manifest, tower = make_cohort(tmp_path, n_patients=24), make_tower(tmp_path / "tower", 2)
    config = {"epochs": 1, "batch_size": 16, "augment": False}
    asked = {"unfreeze": [1], "n_folds": 3, "config": config, "device": "cpu"}
    given = (tower, me.load_encoder(tower, device="cpu", precision="fp32"))
    with contextlib.redirect_stderr(io.StringIO()), one_thread():
        runs = [
            me.finetune(manifest, tmp_path / "images", encoder, tmp_path / f"run{i}", **asked)
            for i, encoder in enumerate(given)
        ]
    first, second = (run.predictions() for run in runs)
    assert first.equals(second)
    assert runs[0].info.encoder == runs[1].info.encoder
    assert runs[0].leaderboard["depth"].tolist() == [1]
    before = given[1].encode(tmp_path / "images" / "patient000" / "view0.png")["mean"]
    again = me.load_encoder(tower, device="cpu", precision="fp32")
    assert np.array_equal(before, again.encode(tmp_path / "images/patient000/view0.png")["mean"])


def test_files_of_version_1_print_too() -> None:
    assets = Path(__file__).parent / "assets" / "format-1"
    manifest, run = me.read_manifest(assets / "manifest.csv"), me.open_run(assets / "run")
    heads = [path.name for path in (assets / "run" / "models").iterdir()]
    predictors = [me.Predictor(run.model(head)) for head in heads]
    for thing in (manifest, run, me.open_cache(assets / "cache"), *predictors):
        assert len(repr(thing).splitlines()) > 1
        assert "error" not in repr(thing)
    assert "head" in run.leaderboard


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> me.Comparison:
    """A made comparison of a run with hostile names."""
    images = make_images(n_patients=90)
    images["region"] = images["region"].where(images["region"] != "hand", HOSTILE)
    place = tmp_path_factory.mktemp("runs") / "first"
    heads = {HOSTILE: 0.8, "logistic": 2.5}
    run = make_run(place, images, heads, info={"encoder": {"source": HOSTILE}})
    return me.compare(run, n_resamples=50)


def test_figures_are_matplotlibs(compared: me.Comparison) -> None:
    drawn = [name for name in dir(compared.plot) if not name.startswith("_")]
    named = {"roc", "precision_recall", "calibration", "confusion", "regions", "views", "deferral"}
    named |= {"cost", "decision_curve", "depths", "efficiency", "flow", "layers"}
    assert named | {"comparison"} == set(drawn)
    for name in ("roc", "calibration"):
        figure = getattr(compared.plot, name)()
        assert isinstance(figure, Figure)
        assert figure._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(me.RunError, match="nothing for the figure 'depths'"):
        compared.plot.depths()
    assert ".roc()" in repr(compared.plot)


def sink_safe(text: str) -> bool:
    return not any(c in text for c in ("\x1b", "\u202e"))


def test_a_comparison_prints_as_its_table(compared: me.Comparison) -> None:
    text, html = repr(compared), compared._repr_html_()
    assert "Heads on test studies" in text
    assert "Research software; not a medical device." in text
    assert html.count("<table>") == 2
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert sink_safe(text)
    assert sink_safe(html)


def test_everything_prints_short_and_names_no_patient(
    path: dict[str, Any], home: Path, compared: me.Comparison
) -> None:
    embeddings = me.load_embeddings(home / "cache", home / "manifest.csv")
    hostile = embeddings.manifest.rows.assign(region=HOSTILE)
    manifest = me.Manifest(hostile.rename(columns={"ids": HOSTILE}), "study")
    things: list[Any] = [
        *(path["built"], path["report"], path["run"], path["predictor"], embeddings, manifest),
        *(me.open_cache(home / "cache"), path["run"].model("mlp"), me.open_run(path["run"])),
        me.open_run(compared_path(compared, home)),
    ]
    for thing in things:
        text, html = repr(thing), thing._repr_html_()
        assert 2 <= len(text.splitlines()) <= 10, text
        assert max(map(len, text.splitlines())) < 200
        assert html.startswith("<table>")
        for shown in (text, html):
            assert sink_safe(shown)
            assert "<script>" not in html
            assert "Jane" not in shown
            assert str(home) not in shown
    assert "40 patients" in repr(path["built"])
    assert "logistic" in repr(path["run"])
    assert "60 of 60 images embedded" in repr(path["report"])
    assert "8 float32, mean+max" in repr(embeddings)
    assert "mean (4), max (4)" in repr(me.open_cache(home / "cache"))


def compared_path(compared: me.Comparison, home: Path) -> Path:
    images = make_images(n_patients=20)
    place = home / "runs" / "hostile"
    make_run(place, images, {HOSTILE: 1.0}, info={"encoder": {"source": HOSTILE}}, complete=False)
    return place


def test_what_cannot_be_read_prints_too(path: dict[str, Any], home: Path, tmp_path: Path) -> None:
    assert "is not a directory" in repr(me.Predictor(tmp_path / "none")) or "error" in repr(
        me.Predictor(tmp_path / "none")
    )
    import shutil

    shutil.copytree(home / "cache", tmp_path / "cache")
    cache = me.open_cache(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    assert "Cache cache:" in repr(cache)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda home: me.read_manifest(3), "a manifest is given as a path or as a Manifest"),
        (lambda home: me.read_manifest(None), "NoneType: None"),
        (lambda home: me.build_manifest(3, home), "a recipe is given as a path"),
        (lambda home: me.build_manifest("mura", 3), "the image root is given as a path"),
        (lambda home: me.open_cache(b"cache"), "a cache is given as a path or as a Cache"),
        (lambda home: me.open_run(3.5), "a run is given as a path or as a Run"),
        (lambda home: me.compare([home]), "this is of type list"),
        (lambda home: me.write_report(3, home), "a run is given as a path or as a Run"),
        (lambda home: me.write_report([], home / "page"), "no run was given"),
        (lambda home: me.compare(), "no run was given"),
        (lambda home: me.load_embeddings(pd.DataFrame(), home), "of type DataFrame"),
        (lambda home: me.patient_folds(np.zeros((3, 2))), "of type ndarray"),
        (lambda home: me.load_encoder(3), "lacks source, revision"),
        (lambda home: me.load_encoder(Grey()).encode(3), "images are paths, or uint8 arrays"),
        (lambda home: me.load_encoder(Grey()).encode([3]), "an image is given as a path"),
        (lambda home: me.load_encoder(Grey()).encode(np.zeros((4, 4))), "uint8 of shape"),
        (lambda home: me.load_encoder(Grey()).encode("no.png"), "there is no image at no.png"),
        (lambda home: me.load_encoder(Grey()).encode([], ["cls"]), "no pooling 'cls'; choose"),
        (lambda home: me.load_encoder(Grey()).encode(home / "own.toml"), "own.toml cannot be dec"),
        (lambda home: me.Predictor(3), "a model is given as a path or as a Model"),
        (lambda home: me.Predictor("m").predict(3), "the path of an image, or a list"),
        (lambda home: me.Predictor("m").predict({"a": 1}), "predict_manifest"),
        (lambda home: me.sweep(3, home, home), "a cache is given as a path"),
        (lambda home: me.evaluate(3, home, home, home), "a model is given as a path"),
        (lambda home: me.finetune(3, home, "demo", home / "o"), "a manifest is given as a path"),
        (
            lambda home: me.finetune(
                home / "manifest.csv", home / "images", "demo", home / "o", config={"epoch": 3}
            ),
            "unknown key 'epoch'; did you mean 'epochs'?",
        ),
        (
            lambda home: me.finetune(
                home / "manifest.csv", home / "images", "demo", home / "o", config=3
            ),
            "config is a mapping",
        ),
        (
            lambda home: me.finetune(home / "manifest.csv", home / "images", Grey(), home / "o"),
            "no",
        ),
    ],
)
def test_wrong_things_give_one_clear_error(
    path: dict[str, Any], home: Path, call: Any, words: str
) -> None:
    with pytest.raises(me.MedembedError) as caught:
        call(home)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_names_the_models_that_it_has(path: dict[str, Any]) -> None:
    with pytest.raises(me.RunError, match=r"no model of the head 'mpl'. Choose among: logistic, m"):
        path["run"].model("mpl")
    model = path["run"].model("logistic")
    assert isinstance(model.head, me.LogisticHead)
    assert model.path == path["run"].model_path("logistic")


SCRIPT = """
import numpy as np
import pandas as pd
import medembed as me

report: me.BuildReport = me.build_manifest("mura", "images", strict=True)
encoder = me.load_encoder("demo")
rows: dict[str, np.ndarray] = encoder.encode(["a.png"])
done: me.ExtractionReport = me.extract(report.manifest, "images", encoder, "cache")
run: me.Run = me.sweep("cache", report.manifest, "runs/sweep", heads=["mlp"])
tuned: me.Run = me.finetune("m.csv", "images", encoder, "runs/tuned", config={"epochs": 2})
board: pd.DataFrame = run.leaderboard
comparison: me.Comparison = me.compare(run, "runs/tuned")
table: pd.DataFrame = comparison.to_frame()
comparison.plot.roc()
predictor = me.Predictor(run.model("mlp"))
answers: pd.DataFrame = predictor.predict(["a.png"])
probability: float | None = predictor.predict("a.png")["probability"]
train: me.Embeddings = me.load_embeddings(me.open_cache("cache"), "m.csv", split="train")
folds: list[tuple[np.ndarray, np.ndarray]] = me.patient_folds(train, 3, seed=1)
page: str = me.write_report([run], "report")["page"]
evaluated: me.Run = me.evaluate(predictor, "cache", "m.csv", "runs/there")
wrong: int = me.open_run("runs/sweep")
me.sweep(3, "m.csv", "runs/sweep")
"""


@pytest.mark.slow
def test_types_are_known_to_mypy(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(medembed.__file__).parents[1]
    command = [sys.executable, "-m", "mypy", "--config-file", str(root / "pyproject.toml")]
    cached = os.environ.get("MYPY_CACHE_DIR", str(root / ".mypy_cache"))
    done = subprocess.run(
        [*command, "--cache-dir", cached, str(script)],
        capture_output=True,
        text=True,
        cwd=root,
        check=False,
    )
    # what SCRIPT itself lacks for old releases: their np.ndarray wants its parameters
    found = [line for line in done.stdout.splitlines() if '"ndarray"' not in line]
    lines = [line for line in found if ": error:" in line]
    assert len(lines) == 2, done.stdout + done.stderr
    assert "[assignment]" in lines[0]
    assert "[arg-type]" in lines[1]
