"""Files of format version 1 are read for ever; those of a version to come are refused by it.

`assets/make_format_1.py` wrote them once.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from medembed.cache.embeddings import load_embeddings
from medembed.cache.shards import read_shard
from medembed.cache.store import open_cache
from medembed.cli import main
from medembed.core.errors import MedembedError
from medembed.heads.packaging import load_model
from medembed.results.runs import open_run

ASSETS = Path(__file__).parent / "assets" / "format-1"
TOLERANCE = 1e-6  # of a probability: other releases of numpy and LightGBM add in another order


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Copy the files, so that none can be touched."""
    return Path(shutil.copytree(ASSETS, tmp_path / "format-1"))


@pytest.fixture
def expected() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((ASSETS / "expected.json").read_text())
    return document


def run(*arguments: object) -> Any:
    ran = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert ran.exit_code == 0, ran.output
    return json.loads(ran.stdout)


def test_a_cache_of_version_1_is_read(place: Path, expected: dict[str, Any]) -> None:
    data = load_embeddings(place / "cache", place / "manifest.csv", pool="mean+max")
    assert data.X.tolist() == expected["X"]
    assert data.rows["sha256"].tolist() == expected["sha256"]
    assert data.failed["reason"].tolist() == ["synthetic: there is no image"]
    card = run("cache", "info", place / "cache")
    assert (card["rows"], card["shards"], card["version"]) == (47, 2, 1)
    assert run("cache", "verify", place / "cache")["problems"] == []


def test_a_shard_of_version_1_is_read(expected: dict[str, Any]) -> None:
    path = min((ASSETS / "cache" / "shards").iterdir())
    keys, rows = read_shard(path, spec=open_cache(ASSETS / "cache").spec)
    assert rows["grid4"].shape == (len(keys), 16, 3)
    where = [expected["sha256"].index(key.tobytes().hex()) for key in keys]
    assert np.array_equal(rows["mean"], np.array(expected["X"])[where, :3])


def test_a_cache_of_version_1_is_appended_to_and_compacted(
    place: Path, expected: dict[str, Any]
) -> None:
    cache = open_cache(place / "cache")
    rows = {name: np.ones((1, *shape)) for name, shape in cache.spec.poolings.items()}
    cache.commit(np.zeros((1, 32), np.uint8), rows)
    assert run("cache", "compact", place / "cache")["rows"] == 48
    again = load_embeddings(place / "cache", place / "manifest.csv", pool="mean+max")
    assert again.X.tolist() == expected["X"]


def test_a_run_of_version_1_is_compared_as_it_was(place: Path) -> None:
    there = json.loads((place / "run" / "scores.json").read_text())
    again = run("compare", place / "run")
    assert [row["head"] for row in again["rows"]] == [row["head"] for row in there["rows"]]
    for now, then in zip(again["rows"], there["rows"], strict=True):
        value = then["scores"]["auroc"]["value"]
        assert now["scores"]["auroc"]["value"] == pytest.approx(value)  # its interval is of today


@pytest.mark.parametrize("head", ["lightgbm", "logistic", "mlp"])
def test_a_model_of_version_1_predicts_as_it_did(
    head: str, place: Path, expected: dict[str, Any]
) -> None:
    model = load_model(place / "run" / "models" / head)
    probabilities = model.head.predict_proba(np.array(expected["X"], np.float32)[:, :3])[:, 1]
    assert probabilities == pytest.approx(expected["probabilities"][head], abs=TOLERANCE)


@pytest.mark.parametrize(
    ("file", "opened"),
    [
        ("cache/cache.json", lambda place: open_cache(place / "cache")),
        ("run/run.json", lambda place: open_run(place / "run")),
        ("run/models/mlp/model.json", lambda place: load_model(place / "run/models/mlp")),
    ],
)
def test_an_unknown_version_is_refused_by_its_number(file: str, opened: Any, place: Path) -> None:
    opened(place)
    document = json.loads((place / file).read_text())
    (place / file).write_text(json.dumps(document | {"version": 7}))
    with pytest.raises(MedembedError, match=r"version '?7.*this medembed reads"):
        opened(place)


def test_a_shard_of_an_unknown_version_is_refused_by_its_number(place: Path) -> None:
    path = min((place / "cache" / "shards").iterdir())
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"version": 1', b'"version": 7', 1))
    with pytest.raises(MedembedError, match="format version 7; this medembed reads version 1"):
        read_shard(path, verify=False)
