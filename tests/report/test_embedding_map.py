import json
import shutil

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from made_sweeps import make_data, make_table

from medembed.cache.embeddings import load_embeddings
from medembed.cache.spec import keys_from_hex
from medembed.cache.store import create_cache, open_cache
from medembed.cli import main
from medembed.core.errors import RunError
from medembed.dataset.manifest import Manifest, read_manifest
from medembed.evaluation.projection import project
from medembed.report import figures
from medembed.report.embedding_map import map_run
from medembed.results.embedding_map import FILE, read_map
from medembed.results.runs import open_run
from medembed.sweeps import sweep


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    home = tmp_path_factory.mktemp("map")
    cache, manifest = make_data(home, {"mean": 4.0, "max": 0.5})
    sweep(cache, manifest, home / "run", heads="logistic", n_configs=1, n_folds=3, jobs=1)
    return home


@pytest.fixture
def home(made, tmp_path):
    """Return a copy, whose run a test may change."""
    shutil.copytree(made, tmp_path / "home")
    return tmp_path / "home"


def inputs(home):
    return home / "run", home / "cache", home / "manifest.csv"


def test_a_map_holds_each_image_and_pooling_by_hash(home):
    found = map_run(*inputs(home))
    rows = read_manifest(home / "manifest.csv").rows
    for pooling in ("mean", "max"):
        own = found.rows[found.rows["pooling"] == pooling]
        assert own["sha256"].tolist() == sorted(rows["sha256"])
    kept = read_map(open_run(home / "run"))
    pd.testing.assert_frame_equal(kept.rows, found.rows)
    assert kept.info == found.info
    content = (home / "run" / FILE).read_bytes()
    assert b"patient0" not in content
    assert b"study" not in content
    embeddings = load_embeddings(home / "cache", home / "manifest.csv", pool="mean")
    order = np.argsort(embeddings.rows["sha256"])
    points = project(embeddings.X[order]).points
    mean = found.rows[found.rows["pooling"] == "mean"][["x", "y"]]
    np.testing.assert_array_equal(mean.to_numpy(), points)


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_order_of_manifest_and_cache_changes_no_coordinate(home, method):
    run, cache, manifest = inputs(home)
    first = map_run(run, cache, manifest, method=method).rows
    known, opened = read_manifest(manifest), open_cache(cache)
    turned = Manifest(known.rows[::-1].reset_index(drop=True), known.label_level)
    info = json.loads((run / "run.json").read_text())
    info["asked"]["manifest"] = turned.digest()
    (run / "run.json").write_text(json.dumps(info))
    other = create_cache(home / "other", opened.spec, opened.recorded)
    keys = keys_from_hex(known.rows["sha256"].tolist())
    for part in np.array_split(np.random.default_rng(0).permutation(len(keys)), 4):
        other.commit(keys[part], opened.read(keys[part], ["mean", "max"]))
    pd.testing.assert_frame_equal(first, map_run(run, other, turned, method=method).rows)


def test_the_map_of_a_targets_run_has_the_answers_to_the_target(home):
    run, cache, manifest = inputs(home)
    rows = read_manifest(manifest).rows.copy()
    rows["target_metal"] = np.resize(["0", "1", "1", ""], len(rows))
    with_target = Manifest(rows, read_manifest(manifest).label_level)
    info = json.loads((run / "run.json").read_text())
    info["asked"] |= {"manifest": with_target.digest(), "target": "metal"}
    (run / "run.json").write_text(json.dumps(info))
    found = map_run(run, cache, with_target).rows.query("pooling == 'mean'")
    expected = dict(zip(rows["sha256"], rows["target_metal"], strict=True))
    answers = found["label"].astype("string").fillna("").tolist()
    assert answers == [expected[sha256] for sha256 in found["sha256"]]


def test_report_draws_the_map_of_a_run_that_has_one(home, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "_OF_ROWS", {})  # the other figures take a minute
    monkeypatch.setattr(figures, "_OF_RESULT", {})
    run = str(home / "run")
    CliRunner().invoke(main, ["report", run, "-o", str(tmp_path / "before")])
    assert not (tmp_path / "before" / "figures" / "map.svg").exists()
    ran = CliRunner().invoke(main, ["map", *map(str, inputs(home)), "--json"])
    assert ran.exit_code == 0, ran.output
    document = json.loads(ran.stdout)
    assert set(document["explained"]) == {"mean", "max"}
    assert "report" in ran.stderr
    CliRunner().invoke(main, ["report", run, "-o", str(tmp_path / "after")])
    assert "by principal components" in (tmp_path / "after" / "index.html").read_text()
    table = pd.read_csv(tmp_path / "after" / "figures" / "map.csv")
    assert len(table) == 2 * document["images"]


def test_the_map_of_another_manifest_is_refused(home, tmp_path):
    table = make_table(n_patients=40)
    _, other = make_data(tmp_path / "other", table=table)
    with pytest.raises(RunError, match="made from another manifest"):
        map_run(home / "run", home / "cache", other)
    assert not (home / "run" / FILE).exists()


@pytest.mark.parametrize("damage", ["text", "cut", "no metadata", "NaN", "version", "label"])
def test_a_damaged_map_is_one_error(home, damage):
    map_run(*inputs(home))
    path = home / "run" / FILE
    table = pq.read_table(path)
    frame, metadata = table.to_pandas(), dict(table.schema.metadata)
    if damage == "text":
        path.write_bytes(b"no map")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        if damage == "NaN":
            frame.loc[3, "x"] = np.nan
        if damage == "label":
            frame.loc[3, "label"] = 7
        if damage == "version":
            info = json.loads(metadata[b"medembed"]) | {"version": 2}
            metadata[b"medembed"] = json.dumps(info).encode()
        kept = {} if damage == "no metadata" else {b"medembed": metadata[b"medembed"]}
        changed = table.from_pandas(frame, preserve_index=False)
        pq.write_table(changed.replace_schema_metadata(kept), path)
    with pytest.raises(RunError, match="medembed map"):
        read_map(open_run(home / "run"))
