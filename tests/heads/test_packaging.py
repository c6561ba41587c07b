import hashlib
import json
import os

import numpy as np
import pytest
import safetensors.numpy

from medembed.core.errors import ModelError, PathNotFoundError
from medembed.heads import model_files, packaging
from medembed.heads.knn import KNNHead
from medembed.heads.lightgbm import LightGBMHead
from medembed.heads.lightgbm_text import check_booster_text
from medembed.heads.linear import LogisticHead
from medembed.heads.mlp import MLPHead
from medembed.heads.packaging import load_model, save_model, update_card

HEADS = {
    "logistic": LogisticHead(class_weight={0: 1.0, 1: 2.0}),
    "mlp": MLPHead(hidden=(8, 4), epochs=2),
    "lightgbm": LightGBMHead(n_trees=12, num_leaves=6),
    "knn": KNNHead(9, whiten=4),
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
        ({"extra": 1}, "unknown key 'extra'"),
        ({"head": "mpl"}, "did you mean mlp"),
        ({"head": ["mlp"]}, "head must be text"),
        ({"params": {"exec": "rm"}}, "no parameter 'exec'"),
        ({"n_features": 0}, "n_features must be at least 1, not 0"),
        ({"best_epoch": "many"}, "best_epoch must be a whole number, not 'many'"),
        ({"card": None}, "card must be a table"),
        ({"payload": {"file": "../x", "bytes": 1, "sha256": ""}}, "payload.file must be"),
        ({"payload": None}, "payload must be a table"),
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


@pytest.mark.parametrize("n_jobs", [100_000, True])
def test_threads_that_no_machine_has_are_refused(n_jobs, fitted, tmp_path):
    """OpenMP ends the process where it is asked for a hundred thousand."""
    save_model(tmp_path / "model", fitted["lightgbm"], {})
    document = read_document(tmp_path / "model")
    rewrite(tmp_path / "model", params={**document["params"], "n_jobs": n_jobs})
    with pytest.raises(ModelError, match=f"n_jobs={n_jobs} is out of range"):
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


# What lies beside the payload


REFERENCE = {"mean": np.arange(4.0), "counts": np.array([3, 4]), "spread": np.ones((2, 3), "f4")}


@pytest.fixture
def referenced(fitted, tmp_path):
    texts = {"README.md": "# A model\n"}
    save_model(tmp_path / "model", fitted["mlp"], CARD, reference=REFERENCE, texts=texts)
    return tmp_path / "model"


def forge_reference(directory, data):
    (directory / "reference.safetensors").write_bytes(data)
    entry = {"file": "reference.safetensors", "bytes": len(data)}
    rewrite(directory, reference=entry | {"sha256": hashlib.sha256(data).hexdigest()})


def test_a_reference_comes_back_as_it_was(referenced):
    found = load_model(referenced).reference
    assert set(found) == set(REFERENCE)
    for name, array in REFERENCE.items():
        assert (found[name].dtype, found[name].tolist()) == (array.dtype, array.tolist())
    assert (referenced / "README.md").read_text() == "# A model\n"


def test_a_model_of_before_has_no_reference(saved):
    document = read_document(saved)
    del document["reference"]
    (saved / "model.json").write_text(json.dumps(document))
    assert load_model(saved).reference is None


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.array([1.0, np.inf]), "not finite"),
        (np.array([True]), "not finite"),
    ],
)
def test_a_reference_of_other_values_is_refused(array, text, referenced):
    forge_reference(referenced, safetensors.numpy.save({"mean": array}))
    with pytest.raises(ModelError, match=text):
        load_model(referenced)


def test_a_damaged_or_missing_reference_is_refused(referenced):
    path = referenced / "reference.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ModelError, match=r"reference\.safetensors is damaged"):
        load_model(referenced)
    path.unlink()
    with pytest.raises(ModelError, match=r"reference\.safetensors is missing"):
        load_model(referenced)
    rewrite(referenced, reference={"file": "head.safetensors", "bytes": 1, "sha256": ""})
    with pytest.raises(ModelError, match=r"reference\.file must be .reference\.safetensors"):
        load_model(referenced)


def test_a_card_is_updated_and_the_payload_stays(referenced, data):
    before = {path.name: path.read_bytes() for path in referenced.iterdir()}
    update_card(referenced, {"README.md": "# Scored\n"}, threshold=0.6, scores={"auroc": 0.9})
    model = load_model(referenced)
    assert model.card == CARD | {"threshold": 0.6, "scores": {"auroc": 0.9}}
    after = {path.name: path.read_bytes() for path in referenced.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"README.md", "model.json"}
    assert set(after) == set(before)


def test_an_update_that_fails_leaves_the_card(referenced, tmp_path):
    before = (referenced / "model.json").read_bytes()
    with pytest.raises(ModelError, match="not JSON"):
        update_card(referenced, threshold=float("nan"))
    with pytest.raises(ModelError, match=r"no file '\.\./x'"):
        update_card(referenced, {"../x": "y"})
    assert (referenced / "model.json").read_bytes() == before
    with pytest.raises(PathNotFoundError):
        update_card(tmp_path, threshold=0.5)
    (referenced / "model.json").write_text('{"format": "zip"}')
    with pytest.raises(ModelError, match="not a medembed-model"):
        update_card(referenced, threshold=0.5)


def test_a_directory_with_other_files_is_refused(saved):
    (saved / ".DS_Store").write_bytes(b"\x00")  # what a file manager leaves is not read
    load_model(saved)
    (saved / "head.pkl").write_bytes(b"\x80\x04N.")
    with pytest.raises(ModelError, match=r"holds 'head\.pkl', which is not part of a model"):
        load_model(saved)


@pytest.mark.parametrize("name", ["model.json", "README.md", "reference.safetensors"])
@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
def test_only_plain_files_are_read(name, kind, saved, tmp_path):
    data = (saved / name).read_bytes() if (saved / name).exists() else b""
    (saved / name).unlink(missing_ok=True)
    (tmp_path / "elsewhere").write_bytes(data)
    if kind == "link":
        (saved / name).symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(saved / name)
    else:
        (saved / name).mkdir()
    with pytest.raises(ModelError, match="not a plain file"):
        load_model(saved)


@pytest.mark.parametrize("name", ["model.json", "head.safetensors", "reference.safetensors"])
def test_a_file_larger_than_a_models_is_not_read(name, referenced, monkeypatch):
    size = (referenced / name).stat().st_size
    monkeypatch.setitem(model_files._LIMITS, name, size - 1)
    with pytest.raises(ModelError, match=f"more than {size - 1:,} are not read"):
        load_model(referenced)


@pytest.mark.parametrize(
    ("card", "text"),
    [
        ("[" * 70 + "]" * 70, "nested more than 64 levels"),
        ("[" + "[]," * 200_000 + "0]", "more than 200,000 lists and tables"),
        ("NaN", "NaN is not a finite number"),
        ("-Infinity", "-Infinity is not a finite number"),
        ("1e999", "1e999 is not a finite number"),
        ("9" * 5000, "not JSON"),
        ('{"a": 1, "a": 2}', "a key twice"),
        ('"\\ud800"', "half of a surrogate pair"),
        ('"\xff"', "not JSON"),
    ],
)
def test_hostile_json_is_refused(card, text, saved):
    document = read_document(saved) | {"card": {"x": "HERE"}}
    content = json.dumps(document).replace('"HERE"', card)
    (saved / "model.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match=text):
        load_model(saved)


def header(**tensors):
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


def tensor(shape, start=0, end=0, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "content",
    [
        (1 << 62).to_bytes(8, "little") + b"{}",
        header(mean=tensor([1 << 40], 0, 1 << 42)),
        header(mean=tensor([1 << 40])),
        header(mean=tensor([1 << 62, 1 << 62])),
        header(mean=tensor([0, 1 << 62])),
        header(mean=tensor([0, 1 << 62, 1 << 62])),
        header(mean=tensor([-1])),
        header(mean=tensor([1], 4, 0)) + bytes(4),
        header(mean=tensor([1], 0, 2, "BF16")) + bytes(2),
        header(mean=tensor([1], 0, 1, "F8_E4M3")) + bytes(1),
        header(mean=tensor([1], 0, 4), scale=tensor([1], 0, 4)) + bytes(4),
        header(mean=tensor([1], 0, 4)) + bytes(8),
        header(mean=tensor([1] * 100, 0, 4)) + bytes(4),
    ],
    ids=range(13),
)
def test_absurd_headers_of_tensors_are_refused(content, referenced):
    whole = payload_path(referenced).read_bytes()
    forge(referenced, content)
    with pytest.raises(ModelError, match="cannot be used"):
        load_model(referenced)
    forge(referenced, whole)
    forge_reference(referenced, content)
    if b'"shape": [0' not in content:  # a reference may hold nothing, and that is read as nothing
        with pytest.raises(ModelError, match="cannot be used"):
            load_model(referenced)


@pytest.mark.parametrize("n_features", [10**12, 10**400, True, 12.0])
def test_columns_without_end_are_refused_at_once(n_features, saved):
    rewrite(saved, n_features=n_features)
    with pytest.raises(ModelError, match="n_features must be"):
        load_model(saved)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("leaf_value", "1e999"),
        ("leaf_value", "1e301"),
        ("leaf_value", "nan"),
        ("leaf_value", "0x10"),
        ("leaf_value", "1_0"),
        ("threshold", "-inf"),
        ("threshold", "1.2.3"),
        ("threshold", "9" * 500),
        ("leaf_count", "2147483648"),
        ("leaf_count", "99999999999999999999"),
        ("split_feature", "4294967296"),
        ("left_child", "-2147483649"),
    ],
)
def test_hostile_numbers_in_trees_are_refused(name, value, fitted):
    text = fitted["lightgbm"]._payload()
    first = text.index(f"\n{name}=") + len(name) + 2
    changed = text[:first] + value + text[text.index(" ", first) :]
    with pytest.raises(ModelError, match=name):
        check_booster_text(with_sizes(changed), 12)


def test_a_tree_of_two_thousand_million_leaves_is_refused(fitted):
    text = fitted["lightgbm"]._payload().replace("num_leaves=6", "num_leaves=2000000000", 1)
    with pytest.raises(ModelError, match="leaf_value holds 6 numbers"):
        check_booster_text(with_sizes(text), 12)
