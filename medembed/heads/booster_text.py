"""LightGBM's model text, checked before LightGBM reads it.

The library trusts the text: an index out of range reads foreign memory, a child that points upwards
never ends. Only what `LightGBMHead` writes is accepted: one binary model without categories or
linear leaves, every node reached once (LightGBM's `src/io/tree.cpp`, `gbdt_model_text.cpp`).
"""

import re

from medembed.errors import ModelError

__all__ = ["check_booster_text", "trim_booster_text"]

_END = "end of trees\n"
_TAIL = "\npandas_categorical:null\n"
_HEADER = {
    "version": "v4",
    "num_class": "1",
    "num_tree_per_iteration": "1",
    "label_index": "0",
    "objective": "binary sigmoid:1",
}
_PER_SPLIT = {
    "split_feature": int,
    "split_gain": float,
    "threshold": float,
    "decision_type": int,
    "left_child": int,
    "right_child": int,
    "internal_value": float,
    "internal_weight": float,
    "internal_count": int,
}
_PER_LEAF = {"leaf_value": float, "leaf_weight": float, "leaf_count": int}
#: LightGBM keeps whole numbers in 32 bits, and a sum over trees must stay finite.
_LARGEST = {int: 2**31 - 1, float: 1e300}
_WHOLE = {"num_leaves", "num_cat", "is_linear", "shrinkage"}


def trim_booster_text(text: str) -> str:
    """Return the text without what only describes the training: importances and parameters."""
    return text[: text.index(_END) + len(_END)] + _TAIL


def check_booster_text(text: str, n_features: int) -> int:
    """Return the number of trees, once the text is safe to hand to LightGBM.

    Raises
    ------
    ModelError
        The text is not that of a binary model on `n_features` columns, or a tree is damaged.
    """
    if not text.isascii() or not text.endswith("\n\n" + _END + _TAIL):
        raise ModelError("the trees are cut off, or not LightGBM's text")
    header, *trees = re.split(r"(?=^Tree=)", text[: -len(_END + _TAIL)], flags=re.MULTILINE)
    sizes = _check_header(header, n_features)
    # LightGBM cuts the text by these sizes before it reads a tree
    if sizes != [len(tree) for tree in trees] or not trees:
        raise ModelError("the trees' sizes are not those that their header tells")
    for k, tree in enumerate(trees):
        _check_tree(tree, k, n_features)
    return len(trees)


def _check_header(text: str, n_features: int) -> list[int]:
    first, _, rest = text.partition("\n")
    fields = _fields(rest)
    expected = {
        **_HEADER,
        "max_feature_idx": str(n_features - 1),
        "feature_names": " ".join(f"Column_{k}" for k in range(n_features)),
    }
    wrong = [name for name, value in expected.items() if fields.get(name) != value]
    if first != "tree" or wrong or set(fields) != {*expected, "feature_infos", "tree_sizes"}:
        raise ModelError(
            f"the header is not that of a binary LightGBM model on {n_features} columns "
            f"({', '.join(wrong) or 'unknown lines'})"
        )
    infos = fields["feature_infos"].split(" ")
    if len(infos) != n_features or not all(re.fullmatch(r"none|\[\S+:\S+\]", i) for i in infos):
        raise ModelError("feature_infos does not describe every column")
    return [int(size) for size in _numbers("tree_sizes", fields["tree_sizes"], int)]


def _check_tree(text: str, number: int, n_features: int) -> None:
    first, _, rest = text.partition("\n")
    fields = _fields(rest)
    if first != f"Tree={number}" or not set(fields) <= {*_PER_SPLIT, *_PER_LEAF, *_WHOLE}:
        raise ModelError(f"tree {number} is not where it belongs or holds unknown lines")
    if fields.get("num_cat") != "0" or fields.get("is_linear", "0") != "0":
        raise ModelError(f"tree {number} holds categories or linear leaves")
    n_leaves = int(_numbers("num_leaves", fields.get("num_leaves", ""), int, 1)[0])
    _numbers("shrinkage", fields.get("shrinkage", ""), float, 1)
    if n_leaves == 1:
        # a tree without a split is one value; the other lines are then empty or absent
        _numbers("leaf_value", fields.get("leaf_value", ""), float, 1)
        if any(fields.get(name) for name in _PER_SPLIT):
            raise ModelError(f"tree {number} has splits but one leaf")
        return
    for name, kind in _PER_LEAF.items():
        _numbers(name, fields.get(name, ""), kind, n_leaves)
    splits = {
        name: _numbers(name, fields.get(name, ""), kind, n_leaves - 1)
        for name, kind in _PER_SPLIT.items()
    }
    _check_nodes(splits, number, n_leaves, n_features)


def _check_nodes(
    splits: dict[str, list[float]], number: int, n_leaves: int, n_features: int
) -> None:
    if not all(0 <= feature < n_features for feature in splits["split_feature"]):
        raise ModelError(f"tree {number} splits on a column outside 0 to {n_features - 1}")
    # bit 0 is a category, bit 1 the side of missing values, bits 2 and 3 what counts as missing
    if not all(kind in (0, 2, 4, 6, 8, 10) for kind in splits["decision_type"]):
        raise ModelError(f"tree {number} holds a decision of unknown kind")
    children = [*splits["left_child"], *splits["right_child"]]
    parents = [*range(n_leaves - 1)] * 2
    is_below = all(c < 0 or c > p for c, p in zip(children, parents, strict=True))
    # leaf k is written as ~k; the root, node 0, is nobody's child
    if not is_below or sorted(children) != [*range(-n_leaves, 0), *range(1, n_leaves - 1)]:
        raise ModelError(f"tree {number} has a node that is not reached exactly once")


def _fields(text: str) -> dict[str, str]:
    pairs = [line.partition("=") for line in text.split("\n") if line]
    fields = {name: value for name, _, value in pairs}
    if len(fields) != len(pairs) or not all(sign for _, sign, _ in pairs):
        raise ModelError("the trees hold a line twice, or one that is no name=value")
    return fields


def _numbers(name: str, text: str, kind: type, n: int | None = None) -> list[float]:
    pattern = r"-?\d{1,10}" if kind is int else r"-?\d[\d.]{0,400}(e[+-]?\d{1,3})?"
    words = text.split(" ")
    if not all(re.fullmatch(pattern, word) for word in words):
        raise ModelError(f"{name} holds something else than numbers")
    if n is not None and len(words) != n:
        raise ModelError(f"{name} holds {len(words)} numbers, not {n}")
    try:
        values = [kind(word) for word in words]
    except ValueError:
        raise ModelError(f"{name} holds something else than numbers") from None
    if not all(abs(value) <= _LARGEST[kind] for value in values):
        raise ModelError(f"{name} holds a number that is not finite, or absurdly large")
    return values
