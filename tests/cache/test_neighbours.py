import numpy as np
import pandas as pd
import pytest
from made_sweeps import make_data, make_table
from sklearn.neighbors import NearestNeighbors

from medembed.cache.compaction import compact
from medembed.cache.embeddings import load_embeddings
from medembed.cache.neighbours import find_similar
from medembed.cache.spec import CacheSpec, keys_from_hex
from medembed.cache.store import create_cache, open_cache
from medembed.core.errors import ArgumentError, CacheError, MissingRowsError, ShardError
from medembed.dataset.manifest import Manifest, make_manifest, read_manifest

SIGNALS = {"mean": 1.5, "max": 0.5}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"), SIGNALS)


@pytest.mark.parametrize("pool", [None, "max"])
def test_similar_films_are_the_nearest_of_other_patients(data, pool):
    embeddings = load_embeddings(*data, pool=pool)
    row = embeddings.rows.iloc[7]
    found = find_similar(*data, row["sha256"], k=12, pool=pool)
    others = (embeddings.rows["patient"] != row["patient"]).to_numpy()
    oracle = NearestNeighbors(n_neighbors=12, metric="cosine").fit(embeddings.X[others])
    distance, places = oracle.kneighbors(embeddings.X[7:8])
    expected = embeddings.rows[others].iloc[places[0]]["sha256"].tolist()
    assert found.rows["sha256"].tolist() == expected
    np.testing.assert_allclose(found.rows["similarity"], 1 - distance[0], atol=2e-6)
    assert found.n_own == (~others).sum()
    assert found.n_compared == others.sum()
    assert "12 similar films" in repr(found)


def test_an_embedding_from_elsewhere_is_compared_with_all(data):
    embeddings = load_embeddings(*data)
    found = find_similar(*data, embeddings.X[3], k=1)
    assert found.rows["sha256"].tolist() == [embeddings.rows["sha256"][3]]
    assert found.rows["similarity"].tolist() == [1.0]
    assert found.n_own == 0


def test_more_films_than_there_are_of_others_are_all_of_them(data):
    embeddings = load_embeddings(*data)
    own = int((embeddings.rows["patient"] == embeddings.rows["patient"][0]).sum())
    found = find_similar(*data, embeddings.rows["sha256"][0], k=10_000)
    assert len(found.rows) == len(embeddings) - own


def test_order_of_manifest_and_shards_changes_nothing(tmp_path):
    table = make_table()
    keys = keys_from_hex(table["sha256"].tolist())
    # few distinct vectors: nearly all neighbours are ties
    X = np.random.default_rng(0).integers(0, 2, (len(table), 3)).astype(np.float16)
    spec = CacheSpec("ab" * 32, {"size": [8, 8]}, {"mean": (3,)}, "float16")
    cache = create_cache(tmp_path / "cache", spec, {"source": "demo"})
    for part in np.array_split(np.random.default_rng(1).permutation(len(table)), 5):
        cache.commit(keys[part], {"mean": X[part]})
    manifest = make_manifest(table, "study")
    turned = Manifest(manifest.rows[::-1].reset_index(drop=True), "study")
    query = table["sha256"][int(X.any(axis=1).argmax())]
    first = find_similar(cache, manifest, query, k=20)
    assert (
        first.rows["sha256"].tolist()
        == find_similar(cache, turned, query, k=20).rows["sha256"].tolist()
    )
    compact(cache.path, cache.spec)
    again = find_similar(open_cache(cache.path), manifest, query, k=20)
    pd.testing.assert_frame_equal(first.rows, again.rows)


def test_spellings_of_a_patient_and_copies_of_a_film_are_the_querys_own(tmp_path):
    table = make_table()
    table["patient"] = table["patient"].str.replace("patient", "P ")
    table.loc[0, "patient"] = "p 000"  # the second spelling of a person
    table.loc[1:2, "patient"] = "P 000"
    data = make_data(tmp_path / "data", SIGNALS, table=table)
    manifest = read_manifest(data[1])
    rows = manifest.rows
    copy = rows.iloc[[0]].assign(image="another/copy.png", patient="P 999", study="another")
    joined = Manifest(pd.concat([rows, copy], ignore_index=True), "study")
    found = find_similar(data[0], joined, rows["sha256"].iloc[0], k=1000)
    persons = set(found.rows["patient"])
    assert not {"p 000", "P 000", "P 999"} & persons
    assert found.rows["sha256"].is_unique


def test_what_cannot_be_compared_is_refused(data, tmp_path):
    with pytest.raises(MissingRowsError):
        find_similar(*data, "ab" * 32)
    with pytest.raises(CacheError, match="no pooling 'pooler'"):
        find_similar(*data, load_embeddings(*data).rows["sha256"][0], pool="pooler")
    with pytest.raises(ArgumentError, match="do not fit rows of 12 columns"):
        find_similar(*data, np.ones(5))
    with pytest.raises(ArgumentError, match="not a finite number"):
        find_similar(*data, np.full(12, np.nan))


def test_a_damaged_shard_is_refused_and_not_compared(tmp_path):
    cache, manifest = make_data(tmp_path / "data", SIGNALS)
    [shard] = (cache / "shards").glob("*.h5")
    content = bytearray(shard.read_bytes())
    content[-200] ^= 1
    shard.write_bytes(content)
    sha256 = read_manifest(manifest).rows["sha256"][0]
    query = np.ones(12)
    with pytest.raises(ShardError, match="its bytes hash to"):
        find_similar(cache, manifest, query, sha256=sha256)
