import base64
import io
import json
import zlib

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from made_sweeps import make_data, make_table

from medembed.cache.embeddings import load_embeddings
from medembed.cache.store import open_cache
from medembed.cache.viewers import export_for_viewer
from medembed.cli import main
from medembed.core.errors import CacheError
from medembed.dataset.manifest import read_manifest


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    table = make_table()
    table["region"] = "left\thand"  # a tab would begin another column
    table.loc[table["patient"] == "patient003", "label"] = ""
    home = tmp_path_factory.mktemp("viewers")
    return make_data(home, {"mean": 1.5, "grid4": 0.5}, table=table)


def run(data, out, *options):
    arguments = ["cache", "export", *map(str, data), "-o", str(out), *map(str, options)]
    return CliRunner().invoke(main, arguments)


def test_tensorboard_gets_its_layout(data, tmp_path):
    out = tmp_path / "projector"
    ran = run(data, out, "--format", "tensorboard", "--json")
    assert ran.exit_code == 0, ran.output
    config = (out / "projector_config.pbtxt").read_text()
    assert config.startswith('embeddings {\n  tensor_name: "mean"\n  tensor_path: "mean.tsv"\n')
    assert config.count('metadata_path: "metadata.tsv"') == 2
    embeddings = load_embeddings(*data, pool="mean")
    written = np.loadtxt(out / "mean.tsv", delimiter="\t")
    np.testing.assert_allclose(written, embeddings.X, rtol=1e-5)
    assert np.loadtxt(out / "grid4.tsv", delimiter="\t").shape == (len(embeddings), 96)
    metadata = pd.read_csv(out / "metadata.tsv", sep="\t")
    assert list(metadata.columns) == ["sha256", "region", "label", "split"]
    assert metadata["sha256"].tolist() == embeddings.rows["sha256"].tolist()
    assert set(metadata["label"]) == {"normal", "abnormal", "unlabelled"}
    assert set(metadata["region"]) == {"left hand"}


def read_vector(field):
    content = base64.b64decode(field["$binary"]["base64"])
    return np.load(io.BytesIO(zlib.decompress(content)), allow_pickle=False)


def test_fiftyone_gets_its_layout(data, tmp_path):
    out = tmp_path / "dataset"
    assert run(data, out, "--format", "fiftyone").exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == ["metadata.json", "samples.json"]
    assert "version" not in json.loads((out / "metadata.json").read_text())
    samples = json.loads((out / "samples.json").read_text())["samples"]
    embeddings = load_embeddings(*data, pool="mean")
    for row, sample in enumerate(samples):
        own = embeddings.rows.iloc[row]
        assert sample["filepath"] == f"data/{own['sha256']}.png"
        assert sample["tags"] == [own["split"]]
        expected = None if pd.isna(own["label"]) else ("normal", "abnormal")[own["label"]]
        assert (sample["label"] or {"label": None})["label"] == expected
        np.testing.assert_array_equal(read_vector(sample["embedding_mean"]), embeddings.X[row])
    assert read_vector(samples[0]["embedding_grid4"]).shape == (96,)


@pytest.mark.parametrize("viewer", ["tensorboard", "fiftyone"])
def test_no_name_leaves_the_manifest_unless_it_is_asked_for(data, tmp_path, viewer):
    for flags, is_there in (((), False), (("--names",), True)):
        out = tmp_path / f"out{len(flags)}"
        ran = run(data, out, "--format", viewer, "--pool", "mean", *flags)
        assert ran.exit_code == 0, ran.output
        content = b"".join(path.read_bytes() for path in out.iterdir())
        assert (b"patient0" in content) == is_there
        assert (b"study1" in content) == is_there


def test_fiftyone_finds_the_images_below_a_root(data, tmp_path):
    out, root = tmp_path / "dataset", tmp_path / "images"
    root.mkdir()
    options = ("--format", "fiftyone", "--image-root", root)
    assert run(data, out, *options).exit_code == 2
    assert run(data, out, *options, "--names").exit_code == 0
    first = json.loads((out / "samples.json").read_text())["samples"][0]
    assert first["filepath"] == str(root / read_manifest(data[1]).rows["image"][0])
    assert first["image"] == read_manifest(data[1]).rows["image"][0]


def test_what_exists_is_kept_and_nothing_is_left_half_written(data, tmp_path, monkeypatch):
    out = tmp_path / "there"
    out.mkdir()
    ran = run(data, out, "--format", "tensorboard")
    assert (ran.exit_code, "exists already" in ran.stderr) == (1, True)
    assert not list(out.iterdir())
    ran = run(data, tmp_path / "nowhere" / "x", "--format", "tensorboard")
    assert ran.exit_code == 1
    assert "Nothing was left half-written" in ran.stderr

    def fail(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medembed.cache.viewers.np.savetxt", fail)
    ran = run(data, tmp_path / "full", "--format", "tensorboard")
    assert ran.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize(
    "options",
    [
        ("--format", "tensorboard", "--wide"),
        ("--format", "tensorboard", "--names", "--image-root", "."),
        ("--names",),
        ("--format", "umap"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(data, tmp_path, options):
    assert run(data, tmp_path / "x.parquet", *options).exit_code == 2


def test_an_unknown_viewer_is_refused(data, tmp_path):
    with pytest.raises(CacheError, match="one of tensorboard, fiftyone"):
        export_for_viewer(open_cache(data[0]), read_manifest(data[1]), tmp_path / "x", "atlas")
