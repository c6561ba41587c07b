"""LightGBM's text is checked whole, as fast as it is read, and nothing but its own passes."""

import re
import sys

import lightgbm
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from medembed.core.errors import ModelError
from medembed.heads.lightgbm_text import check_booster_text, trim_booster_text

N_FEATURES = 4


def train(n_trees: int, n_leaves: int, n_rows: int = 400) -> str:
    """Return the text of a model that LightGBM trained."""
    generator = np.random.default_rng(0)
    X = generator.normal(size=(n_rows, N_FEATURES))
    y = generator.integers(0, 2, n_rows)
    parameters = {
        "objective": "binary",
        "verbosity": -1,
        "num_threads": 1,
        "num_leaves": n_leaves,
        "min_data_in_leaf": 1,
        "min_sum_hessian_in_leaf": 0.0,
    }
    booster = lightgbm.train(parameters, lightgbm.Dataset(X, y), n_trees)
    return trim_booster_text(booster.model_to_string())


def with_sizes(text: str) -> str:
    """Tell the trees' true sizes in the header, so that only the change itself is wrong."""
    body = text.partition("end of trees")[0]
    starts = [found.start() for found in re.finditer(r"^Tree=", body, re.MULTILINE)]
    sizes = " ".join(str(size) for size in np.diff([*starts, len(body)]))
    return re.sub("tree_sizes=.*", f"tree_sizes={sizes}", text, count=1)


@pytest.fixture(scope="module")
def text() -> str:
    return train(5, 6)


def put(text: str, name: str, value: str, tree: int = 0, place: int = 0) -> str:
    """Put a value at one place of a tree's line, and tell the trees' true sizes."""
    start = [found.end() for found in re.finditer(f"^{name}=", text, re.MULTILINE)][tree]
    line, newline, rest = text[start:].partition("\n")
    words = line.split(" ")
    words[place] = value
    return with_sizes(text[:start] + " ".join(words) + newline + rest)


@pytest.mark.parametrize(("n_trees", "n_leaves"), [(1, 2), (1, 300), (40, 3), (7, 31)])
def test_what_lightgbm_writes_passes(n_trees: int, n_leaves: int) -> None:
    text = train(n_trees, n_leaves)
    assert check_booster_text(text, N_FEATURES) == n_trees
    assert lightgbm.Booster(model_str=text).num_trees() == n_trees


def test_trees_of_one_leaf_pass_beside_others(text: str) -> None:
    stump = (
        "Tree=5\nnum_leaves=1\nnum_cat=0\nsplit_feature=\nsplit_gain=\nthreshold=\n"
        "decision_type=\nleft_child=\nright_child=\nleaf_value=-0.25\nleaf_weight=\n"
        "leaf_count=60\ninternal_value=\ninternal_weight=\ninternal_count=\nis_linear=0\n"
        "shrinkage=1\n\n\n"
    )
    mixed = with_sizes(text.replace("end of trees", f"{stump}end of trees"))
    assert check_booster_text(mixed, N_FEATURES) == 6
    assert lightgbm.Booster(model_str=mixed).num_trees() == 6
    with pytest.raises(ModelError, match="split_feature holds 1 numbers, not 0, in tree 5"):
        check_booster_text(put(mixed, "split_feature", "0", tree=5), N_FEATURES)


def plainly(word: str, *, whole: bool) -> bool:
    """Tell whether a word is a number, by a pattern and Python's own reading."""
    pattern = r"-?\d{1,10}" if whole else r"-?\d{1,200}(\.\d{0,200})?(e[+-]?\d{1,3})?"
    most = 2**31 - 1 if whole else 1e300
    return bool(re.fullmatch(pattern, word)) and abs(int(word) if whole else float(word)) <= most


def passes(text: str) -> bool:
    try:
        return check_booster_text(text, N_FEATURES) == 5
    except ModelError:
        return False


WORDS = st.one_of(
    st.text("0123456789.e+-", max_size=12),
    st.text("0123456789.e+- \t_xnifa\n", max_size=8),
    st.floats().map(repr),
    st.integers(-(2**33), 2**33).map(str),
    st.builds("{}e{}".format, st.integers(-99, 99), st.integers(-400, 400)),
    st.builds("{}.{}e+{:03}".format, st.integers(0, 99), st.integers(0, 99), st.integers(0, 320)),
    st.integers(1, 420).map("7".__mul__),
)


@given(WORDS, st.sampled_from(["leaf_value", "threshold", "split_gain"]), st.integers(0, 4))
@example("1e+300", "leaf_value", 0)
@example("1.5e+300", "leaf_value", 4)
@example("0e999", "threshold", 1)
@example("1.2.3", "leaf_value", 2)
@example("1e5.5", "leaf_value", 2)
@example("5.", "split_gain", 3)
@example("-", "leaf_value", 0)
@settings(max_examples=300, deadline=None)
def test_numbers_are_told_from_other_words(text: str, word: str, name: str, place: int) -> None:
    assert passes(put(text, name, word, 2, place)) == plainly(word, whole=False)


@given(WORDS, st.integers(0, 5))
@example("2147483647", 5)
@example("-2147483648", 0)
@example("0000000001", 0)
@example("00000000001", 0)
@settings(max_examples=200, deadline=None)
def test_whole_numbers_are_told_from_other_words(text: str, word: str, place: int) -> None:
    assert passes(put(text, "leaf_count", word, 4, place)) == plainly(word, whole=True)


def reached_once(left: list[int], right: list[int]) -> bool:
    """Walk a tree from its root; tell whether every node and leaf is met once, and no other."""
    met, waiting = [], [0]
    while waiting:
        node = waiting.pop()
        met.append(node)
        if len(met) > 2 * len(left) + 1 or not -len(left) - 1 <= node < len(left):
            return False
        if node >= 0:
            waiting += [left[node], right[node]]
    return sorted(met) == list(range(-len(left) - 1, len(left)))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_trees_are_told_from_other_graphs(text: str, data: st.DataObject) -> None:
    """Against a walk from the root: children of one tree among five are changed."""
    tree = data.draw(st.integers(0, 4))
    lines = [re.findall(f"^{side}_child=(.*)", text, re.MULTILINE)[tree] for side in SIDES]
    children = [int(child) for line in lines for child in line.split(" ")]
    if data.draw(st.booleans()):
        first, second = data.draw(st.tuples(*[st.integers(0, len(children) - 1)] * 2))
        children[first], children[second] = children[second], children[first]
    else:
        place = data.draw(st.integers(0, len(children) - 1))
        children[place] = data.draw(st.integers(-8, 7))
    half = len(children) // 2
    changed = text
    for side, part in zip(SIDES, (children[:half], children[half:]), strict=True):
        for place, child in enumerate(part):
            changed = put(changed, f"{side}_child", str(child), tree, place)
    expected = reached_once(children[:half], children[half:])
    goes_down = all(c < 0 or c > place % half for place, c in enumerate(children))
    assert passes(changed) == (expected and goes_down)


SIDES = ("left", "right")


@pytest.mark.parametrize("tree", [0, 3, 4])
@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("left_child", "-99", "has a node that is not reached exactly once"),
        ("right_child", "0", "has a node that is not reached exactly once"),
        ("split_feature", "4", "splits on a column outside 0 to 3"),
        ("split_feature", "-1", "splits on a column outside 0 to 3"),
        ("decision_type", "3", "holds a decision of unknown kind"),
        ("decision_type", "-2", "holds a decision of unknown kind"),
    ],
)
def test_the_tree_that_is_damaged_is_named(
    text: str, tree: int, name: str, value: str, what: str
) -> None:
    with pytest.raises(ModelError, match=f"^tree {tree} {what}$"):
        check_booster_text(put(text, name, value, tree), N_FEATURES)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Tree=2\n", "Tree=2\n\n"),
        ("num_cat=0\n", "num_cat=0\ncat_threshold=1\n"),
        ("num_cat=0\nsplit_feature", "split_feature"),
        ("leaf_weight=", "leaf_count="),
        ("shrinkage=", "shrinkage=\n"),
        (" ", "  "),
        ("shrinkage=0.1\n", "shrinkage=0.1\r\n"),
        ("Tree=3", "Tree=03"),
        ("Tree=4\n", "Tree=3\n"),
        ("num_leaves=6", "num_leaves=0"),
        ("num_leaves=6", "num_leaves=-6"),
        ("num_leaves=6", "num_leaves=6 6"),
        ("num_leaves=6", "num_leaves="),
        ("is_linear=0", "is_linear=00"),
    ],
)
def test_other_lines_than_lightgbms_are_refused(text: str, old: str, new: str) -> None:
    start = text.index("Tree=0")
    assert old in text[start:]
    for count in (1, -1):
        changed = text[:start] + text[start:].replace(old, new, count)
        with pytest.raises(ModelError):
            check_booster_text(with_sizes(changed), N_FEATURES)


def count_calls(text: str) -> int:
    """Count the calls of functions, Python's and C's, that a check takes."""
    n = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal n
        n += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        check_booster_text(text, N_FEATURES)
    finally:
        sys.setprofile(None)
    return n


def test_a_leaf_more_costs_no_call_more() -> None:
    """What takes time then is numpy's alone: a leaf is 12 numbers and was 60 calls."""
    small, large = train(1, 30, 100), train(1, 3000, 9000)
    assert large.count(" ") > 50 * small.count(" ")
    assert count_calls(large) < count_calls(small) + 50
