import hashlib
import json
import os

import numpy as np
import pytest
import safetensors.numpy

from medembed.errors import ModelError, PathNotFoundError
from medembed.heads import packaging
from medembed.heads.booster_text import check_booster_text
from medembed.heads.linear import LogisticHead
from medembed.heads.mlp import MLPHead
from medembed.heads.packaging import load_model, save_model
from medembed.heads.trees import LightGBMHead

HEADS = {
    "logistic": LogisticHead(class_weight={0: 1.0, 1: 2.0}),
    "mlp": MLPHead(hidden=(8, 4), epochs=2),
    "lightgbm": LightGBMHead(n_trees=12, num_leaves=6),
}
CARD = {"spec": {"encoder": "ab"}, "threshold": 0.4, "codes": ["0f", "1e"]}


@pytest.fixture(scope="module")
def data():
    generator = np.random.default_rng(0)
    X = generator.normal(size=(300, 12)).astype(np.float32)
    return X, (X[:, 0] + generator.normal(size=300) > 0).astype(int)


@pytest.fixture(scope="module")
def fitted(data):
    return {name: head.fit(*data) for name, head in HEADS.items()}


@pytest.fixture(params=sorted(HEADS))
def saved(request, fitted, tmp_path):
    save_model(tmp_path / "model", fitted[request.param], CARD)
    return tmp_path / "model"


def read_document(directory):
    return json.loads((directory / "model.json").read_text())


def rewrite(directory, **changes):
    document = read_document(directory) | changes
    (directory / "model.json").write_text(json.dumps(document))


def forge(directory, data):
    """Replace the payload and record its hash, as a stranger would."""
    entry = read_document(directory)["payload"]
    (directory / entry["file"]).write_bytes(data)
    entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(directory, payload=entry)


def payload_path(directory):
    return directory / read_document(directory)["payload"]["file"]


def test_a_loaded_head_predicts_the_same_bytes(saved, fitted, data):
    model = load_model(saved)
    original = fitted[read_document(saved)["head"]]
    assert model.head.predict_proba(data[0]).tobytes() == original.predict_proba(data[0]).tobytes()
    assert model.head.get_params() == original.get_params()
    assert model.head.best_epoch_ == original.best_epoch_
    assert model.card == CARD


def test_saving_what_was_loaded_gives_the_same_files(saved, tmp_path):
    model = load_model(saved)
    save_model(tmp_path / "again", model.head, model.card)
    for name in os.listdir(saved):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_a_failed_write_leaves_nothing(fitted, tmp_path, monkeypatch):
    def fail(path, data):
        if path.name == "model.json":
            raise OSError("disk full")
        path.write_bytes(data)

    monkeypatch.setattr(packaging, "write_atomically", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(tmp_path / "model", fitted["mlp"], {})
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_not_overwritten_unless_asked(fitted, tmp_path):
    save_model(tmp_path / "model", fitted["mlp"], {})
    with pytest.raises(ModelError, match="exists already"):
        save_model(tmp_path / "model", fitted["logistic"], {})
    save_model(tmp_path / "model", fitted["logistic"], {}, replace=True)
    assert isinstance(load_model(tmp_path / "model").head, LogisticHead)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_replacement_leaves_the_old_model(fitted, tmp_path, monkeypatch):
    save_model(tmp_path / "model", fitted["mlp"], CARD)
    rename = os.rename

    def fail(source, target):
        if str(target) == str(tmp_path / "model") and "old" not in str(source):
            raise OSError("no such luck")
        rename(source, target)

    monkeypatch.setattr(packaging.os, "rename", fail)
    with pytest.raises(OSError, match="no such luck"):
        save_model(tmp_path / "model", fitted["logistic"], {}, replace=True)
    assert load_model(tmp_path / "model").card == CARD
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_only_a_model_is_replaced(fitted, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    with pytest.raises(ModelError, match="is not a model"):
        save_model(tmp_path / "notes", fitted["mlp"], {}, replace=True)
    assert (tmp_path / "notes" / "diary.txt").read_text() == "mine"


def test_what_cannot_be_saved_is_said(fitted, data, tmp_path):
    with pytest.raises(ModelError, match="not fitted"):
        save_model(tmp_path / "a", MLPHead(), {})
    words = LogisticHead().fit(data[0], np.array(["no", "yes"])[data[1]])
    with pytest.raises(ModelError, match=r"classes \['no', 'yes'\]"):
        save_model(tmp_path / "a", words, {})
    with pytest.raises(ModelError, match="not JSON"):
        save_model(tmp_path / "a", fitted["mlp"], {"score": float("nan")})
    with pytest.raises(PathNotFoundError, match="is not a directory"):
        save_model(tmp_path / "b" / "a", fitted["mlp"], {})
    assert list(tmp_path.iterdir()) == []


def test_no_model_is_not_found(tmp_path):
    with pytest.raises(PathNotFoundError, match=r"model\.json is not there"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format": "zip"}, "not a medembed-model"),
        ({"version": 2}, "version 2 of medembed-model; this medembed reads 1"),
        ({"extra": 1}, "does not hold exactly"),
        ({"head": "mpl"}, "did you mean mlp"),
        ({"head": ["mlp"]}, "head is not a name"),
        ({"params": {"exec": "rm"}}, "no parameter 'exec'"),
        ({"n_features": 0}, "n_features=0"),
        ({"best_epoch": "many"}, "best_epoch='many'"),
        ({"card": None}, "does not hold exactly"),
        ({"payload": {"file": "../x", "bytes": 1, "sha256": ""}}, "neither of head.safetensors"),
        ({"payload": None}, "payload does not hold"),
    ],
)
def test_a_foreign_card_is_refused(saved, changes, text):
    rewrite(saved, **changes)
    with pytest.raises(ModelError, match=text):
        load_model(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "null"])
def test_a_card_that_is_not_ours_is_refused(saved, text):
    (saved / "model.json").write_text(text)
    with pytest.raises(ModelError, match=r"model\.json is not"):
        load_model(saved)


def test_a_single_flipped_bit_is_found(saved):
    path = payload_path(saved)
    whole = path.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(whole), 20):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << (at % 8)
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match="damaged"):
            load_model(saved)


def test_a_missing_cut_or_linked_payload_is_refused(saved, tmp_path):
    path = payload_path(saved)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ModelError, match=f"has {len(whole) - 1} bytes, {len(whole)} are recorded"):
        load_model(saved)
    path.unlink()
    with pytest.raises(ModelError, match="missing or not a plain file"):
        load_model(saved)
    (tmp_path / "elsewhere").write_bytes(whole)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="missing or not a plain file"):
        load_model(saved)


@pytest.mark.parametrize("name", ["logistic", "mlp"])
@pytest.mark.parametrize("kind", ["nan", "shape", "dtype", "name", "scale"])
def test_tensors_that_do_not_fit_are_refused_even_with_the_right_hash(name, kind, fitted, tmp_path):
    save_model(tmp_path / "model", fitted[name], {})
    arrays = safetensors.numpy.load(payload_path(tmp_path / "model").read_bytes())
    arrays = {key: array.copy() for key, array in arrays.items()}
    mean = arrays["mean"]
    if kind == "nan":
        mean[0] = np.nan
    elif kind == "scale":
        arrays["scale"][0] = 0
    else:
        changed = {"shape": mean[:-1], "dtype": mean.astype(np.int64), "name": mean}[kind]
        del arrays["mean"]
        arrays["Mean" if kind == "name" else "mean"] = changed
    forge(tmp_path / "model", safetensors.numpy.save(arrays))
    with pytest.raises(ModelError, match=r"tensor mean|tensor scale|the model holds"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("params", [{"hidden": [10**12]}, {"hidden": "wide"}, {"hidden": [-1]}])
def test_parameters_that_are_not_the_tensors_are_refused(params, fitted, tmp_path):
    save_model(tmp_path / "model", fitted["mlp"], {})
    rewrite(tmp_path / "model", params=params)
    with pytest.raises(ModelError, match="cannot be used"):
        load_model(tmp_path / "model")


def test_bytes_that_are_no_safetensors_are_refused(fitted, tmp_path):
    save_model(tmp_path / "model", fitted["mlp"], {})
    for data in (b"", b"\x80\x04N.", b"\xff" * 64):
        forge(tmp_path / "model", data)
        with pytest.raises(ModelError, match=r"head\.safetensors cannot be read"):
            load_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("split_feature=", "split_feature=9"),
        ("left_child=2", "left_child=0"),
        ("left_child=2", "left_child=99"),
        ("decision_type=2", "decision_type=1"),
        ("num_cat=0", "num_cat=1"),
        ("num_leaves=6", "num_leaves=7"),
        ("max_feature_idx=11", "max_feature_idx=12"),
        ("objective=binary sigmoid:1", "objective=regression"),
        ("leaf_value=", "leaf_value=inf "),
        ("is_linear=0", "is_linear=1"),
        ("tree_sizes=", "tree_sizes=9"),
        ("Tree=1\n", "Tree=7\n"),
        ("end of trees", "end of tree"),
        ("shrinkage=", "code="),
    ],
)
def test_hostile_trees_never_reach_lightgbm(old, new, fitted, tmp_path, monkeypatch):
    save_model(tmp_path / "model", fitted["lightgbm"], {})
    path = payload_path(tmp_path / "model")
    text = path.read_text()
    assert old in text
    changed = text.replace(old, new, 1)
    if not old.startswith(("tree_sizes", "Tree")):
        changed = with_sizes(changed)
    forge(tmp_path / "model", changed.encode())
    monkeypatch.setattr(LightGBMHead, "_take", lambda self, text: pytest.fail("was handed on"))
    with pytest.raises(ModelError, match="cannot be used"):
        load_model(tmp_path / "model")


def test_a_circle_of_nodes_beside_the_tree_is_refused(fitted):
    text = fitted["lightgbm"]._payload()
    # the first tree's nodes 3 and 4 are swapped for a leaf: node 4 becomes its own child
    left, right = "left_child=2 3 -1 -2 -5\n", "right_child=1 -3 -4 4 -6\n"
    assert left in text
    assert right in text
    circle = text.replace(left, "left_child=2 3 -1 -2 4\n", 1)
    circle = circle.replace(right, "right_child=1 -3 -4 -5 -6\n", 1)
    with pytest.raises(ModelError, match="tree 0 has a node that is not reached exactly once"):
        check_booster_text(with_sizes(circle), 12)


def with_sizes(text):
    """Tell the trees' true sizes in the header, so that only the change itself is wrong."""
    body = text.partition("end of trees")[0]
    starts = [k for k in range(len(body)) if body.startswith("Tree=", k)]
    sizes = np.diff([*starts, len(body)])
    head, _, rest = text.partition("tree_sizes=")
    return f"{head}tree_sizes={' '.join(map(str, sizes))}\n{rest.partition(chr(10))[2]}"


def test_with_true_sizes_the_unchanged_text_is_accepted(fitted):
    text = fitted["lightgbm"]._payload()
    assert with_sizes(text) == text
    assert check_booster_text(text, 12) == 12


def test_trees_without_a_split_survive(data, tmp_path):
    X, y = data
    stump = LightGBMHead(n_trees=2).fit(X[:8], np.r_[y[:6], 0, 1])
    save_model(tmp_path / "model", stump, {})
    loaded = load_model(tmp_path / "model").head
    assert np.array_equal(loaded.predict_proba(X), stump.predict_proba(X))
