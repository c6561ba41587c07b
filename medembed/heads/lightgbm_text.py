"""LightGBM's model text, checked before LightGBM reads it.

The library trusts the text: an index out of range reads memory outside the array, and a child that
points upwards makes an endless loop. Only what `LightGBMHead` writes is accepted: one binary model
without categories or linear leaves, every node reached once (LightGBM's `src/io/tree.cpp`,
`gbdt_model_text.cpp`).

All trees are checked together, field by field, and no number becomes a Python object: this takes as
long as LightGBM's own reading, 0.2 s for 300,000 leaves.
"""

import re
from functools import cached_property
from typing import Any

import numpy as np

from medembed.core.errors import ModelError

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
#: A tree's lines, in LightGBM's order, between its number and two blank ones.
_NAMES = (
    *("num_leaves", "num_cat", "split_feature", "split_gain", "threshold", "decision_type"),
    *("left_child", "right_child", "leaf_value", "leaf_weight", "leaf_count", "internal_value"),
    *("internal_weight", "internal_count", "is_linear", "shrinkage"),
)
_N_LINES = 1 + len(_NAMES) + 2

#: LightGBM keeps whole numbers in 32 bits, and a sum over trees must stay finite.
_LARGEST_WHOLE, _LARGEST = 2**31 - 1, 1e300
#: Digits of a whole number; before or after a point; of an exponent. A number of 200 digits with a
#: two-digit exponent is not above `_LARGEST`.
_MOST_WHOLE_DIGITS, _MOST_DIGITS, _MOST_EXPONENT_DIGITS = 10, 200, 3

# The marks between runs of digits; a sign after an "e" is distinct from one before a number.
_BLANK, _LINE, _MINUS, _POINT, _E, _PLUS, _OTHER, _E_MINUS, _E_PLUS = range(_N_MARKS := 9)
_MARKS = bytes(b" \n-.e+".find(byte) % (_OTHER + 1) for byte in range(256))  # -1 becomes `_OTHER`
_OVER = (_BLANK, _LINE)
_NEXT = {  # after a mark: the marks that may follow at once, and those after digits
    _BLANK: ((_MINUS,), (*_OVER, _POINT, _E)),
    _LINE: ((_MINUS, _LINE), (*_OVER, _POINT, _E)),
    _MINUS: ((), (*_OVER, _POINT, _E)),
    _POINT: ((*_OVER, _E), (*_OVER, _E)),
    _E: ((_E_MINUS, _E_PLUS), _OVER),
    _E_MINUS: ((), _OVER),
    _E_PLUS: ((), _OVER),
}


def _code(mark: Any, has_digits: Any, following: Any) -> Any:
    """Return a mark, whether digits follow, and the mark after them as one number below 256."""
    return (mark * 2 + has_digits) * _N_MARKS + following


_IN_NUMBERS = bytes(
    _code(mark, side, following)
    for mark, sides in _NEXT.items()
    for side, marks in enumerate(sides)
    for following in marks
)


def trim_booster_text(text: str) -> str:
    """Return the text without importances and parameters, which only describe the training."""
    return text[: text.index(_END) + len(_END)] + _TAIL


def check_booster_text(text: str, n_features: int) -> int:
    """Return the number of trees, once the text is safe to hand to LightGBM.

    Raises
    ------
    ModelError
        The text is not a binary model on `n_features` columns, or a tree is damaged.
    """
    if not text.isascii() or not text.endswith("\n\n" + _END + _TAIL):
        raise ModelError("the trees are cut off, or not in LightGBM's text format")
    raw = text.encode("ascii")
    start = raw.find(b"\nTree=") + 1
    sizes = _check_header(text[:start], n_features)
    lines = _split_lines(raw[start : -len(_END + _TAIL)], sizes)
    n_leaves = _check_numbers(lines, len(sizes))
    _check_nodes(lines, n_leaves, n_features)
    return len(sizes)


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
    if not re.fullmatch(r"\d{1,10}( \d{1,10})*", fields["tree_sizes"]):
        raise ModelError("tree_sizes holds something other than numbers")
    return [int(size) for size in fields["tree_sizes"].split(" ")]


def _fields(text: str) -> dict[str, str]:
    pairs = [line.partition("=") for line in text.split("\n") if line]
    fields = {name: value for name, _, value in pairs}
    if len(fields) != len(pairs) or not all(sign for _, sign, _ in pairs):
        raise ModelError("the header holds a line twice, or one that is not name=value")
    return fields


def _split_lines(trees: bytes, sizes: list[int]) -> dict[str, bytes]:
    """Return the values after `name=`, by name: a line per tree, each between two line ends."""
    lines = trees.split(b"\n")[:-1]
    if len(lines) != len(sizes) * _N_LINES:
        raise ModelError("a tree lacks a line, or holds an unknown one")
    ends = np.flatnonzero(np.frombuffer(trees, np.uint8) == ord("\n"))[_N_LINES - 1 :: _N_LINES]
    # LightGBM cuts the text by these sizes before it reads a tree
    if not np.array_equal(np.diff(ends, prepend=-1), sizes):
        raise ModelError("the trees' sizes are not those in the header")
    wrong = [k for k, line in enumerate(lines[::_N_LINES]) if line != b"Tree=%d" % k]
    if wrong or any(lines[_N_LINES - 2 :: _N_LINES]) or any(lines[_N_LINES - 1 :: _N_LINES]):
        raise ModelError(f"tree {(wrong or [0])[0]} is not where it belongs or holds unknown lines")
    return {
        name: _without_name(name, lines[place::_N_LINES]) for place, name in enumerate(_NAMES, 1)
    }


def _without_name(name: str, lines: list[bytes]) -> bytes:
    first, *values = b"\n".join([b"", *lines]).split(f"\n{name}=".encode("ascii"))
    if first or len(values) != len(lines):
        raise ModelError(f"a tree has another line where {name} belongs")
    return b"\n".join([b"", *values, b""])


def _check_numbers(lines: dict[str, bytes], n_trees: int) -> np.ndarray:
    """Return each tree's number of leaves, after checking that its lines have matching lengths."""
    for name in ("num_cat", "is_linear"):
        if lines[name] != b"\n0" * n_trees + b"\n":
            raise ModelError(f"a tree holds categories or linear leaves: {name} is not 0")
    once = np.ones(n_trees, np.int64)
    leaves = _Numbers("num_leaves", lines, whole=True)
    leaves.require(once)
    n_leaves = leaves.values
    _Numbers("leaf_value", lines).require(n_leaves)
    # LightGBM leaves out the weight of a tree with a single leaf
    or_none = np.where(n_leaves == 1, 0, n_leaves)
    _Numbers("leaf_weight", lines).require(n_leaves, or_none)
    _Numbers("leaf_count", lines, whole=True).require(n_leaves, or_none)
    _Numbers("internal_count", lines, whole=True).require(n_leaves - 1)
    for name in ("split_gain", "threshold", "internal_value", "internal_weight"):
        _Numbers(name, lines).require(n_leaves - 1)
    _Numbers("shrinkage", lines).require(once)
    return n_leaves


def _check_nodes(lines: dict[str, bytes], n_leaves: np.ndarray, n_features: int) -> None:
    """Check that decisions are of a known kind and that nodes and leaves are reached once."""
    n_splits = n_leaves - 1
    splits = {}
    for name in ("split_feature", "decision_type", "left_child", "right_child"):
        numbers = _Numbers(name, lines, whole=True)
        numbers.require(n_splits)
        splits[name] = numbers.values
    tree = np.repeat(np.arange(len(n_leaves)), n_splits)

    def refuse(wrong: np.ndarray, what: str, owners: np.ndarray = tree) -> None:
        if wrong.any():
            raise ModelError(f"tree {owners[wrong.argmax()]} {what}")

    feature, kind = splits["split_feature"], splits["decision_type"]
    refuse(
        (feature < 0) | (feature >= n_features), f"splits on a column outside 0 to {n_features - 1}"
    )
    # bit 0 is a category, bit 1 the side of missing values, bits 2 and 3 what counts as missing
    refuse((kind < 0) | (kind > 10) | (kind & 1 == 1), "holds a decision of unknown kind")
    # Nodes and leaves of all trees in one array each. Leaf k is written as ~k; the root, node 0, is
    # no node's child.
    first_split, first_leaf = np.cumsum(n_splits) - n_splits, np.cumsum(n_leaves) - n_leaves
    node = np.arange(len(tree)) - np.repeat(first_split, n_splits)
    n_below = np.repeat(n_leaves, n_splits)
    unreached = "has a node that is not reached exactly once"
    is_reached = np.zeros(len(tree) + int(n_leaves.sum()), bool)
    is_reached[first_split[n_splits > 0]] = True
    is_reached[len(tree) + first_leaf[n_splits == 0]] = True
    splits_below, leaves_below = np.repeat(first_split, n_splits), np.repeat(first_leaf, n_splits)
    for child in (splits["left_child"], splits["right_child"]):
        is_leaf = child < 0
        is_below = np.where(is_leaf, ~child < n_below, (child > node) & (child < n_below - 1))
        refuse(~is_below, unreached)
        place = np.where(is_leaf, len(tree) + leaves_below + ~child, splits_below + child)
        is_reached[place] = True
    # There are as many children as leaves and nodes without the roots: if all are reached, each is
    # reached once.
    owners = np.concatenate([tree, np.repeat(np.arange(len(n_leaves)), n_leaves)])
    refuse(~is_reached, unreached, owners)


class _Numbers:
    """The numbers of one field in all trees' lines, found by the marks between their digits.

    Parameters
    ----------
    name : str
        The field: a key of `lines`, which `_split_lines` returns.
    whole : bool
        Whether numbers consist of a sign and digits only.

    Raises
    ------
    ModelError
        The lines hold something other than numbers separated by single blanks, or a number that is
        not finite or absurdly large.
    """

    def __init__(self, name: str, lines: dict[str, bytes], *, whole: bool = False) -> None:
        self._name, self._bytes = name, np.frombuffer(lines[name], np.uint8)
        # in uint8 all that sorts before "0" becomes large
        self._places = np.flatnonzero(self._bytes - np.uint8(ord("0")) > 9)
        marks = bytearray(self._bytes[self._places]).translate(_MARKS)
        self._marks = np.frombuffer(marks, np.uint8)
        self._n_digits = np.diff(self._places) - 1
        most = int(self._n_digits.max())
        if whole:
            self._check(int(self._marks.max()) <= _MINUS and most <= _MOST_WHOLE_DIGITS)
        else:
            exponents = self._mark_exponents()
            self._limit(most <= _MOST_DIGITS)
        has_digits = (self._n_digits > 0).view(np.uint8)
        codes = _code(self._marks[:-1], has_digits, self._marks[1:])
        self._check(not codes.tobytes().translate(None, _IN_NUMBERS))
        if whole and most == _MOST_WHOLE_DIGITS:
            self._limit(bool((abs(self.values) <= _LARGEST_WHOLE).all()))
        elif not whole:
            self._limit_exponents(exponents)

    def require(self, n: np.ndarray, otherwise: np.ndarray | None = None) -> None:
        """Raise ModelError unless tree k's line holds n[k] numbers, or otherwise[k]."""
        wrong = self._n_of_line != n
        if otherwise is not None:
            wrong &= self._n_of_line != otherwise
        if wrong.any():
            tree = int(wrong.argmax())
            raise ModelError(
                f"{self._name} holds {self._n_of_line[tree]} numbers, not {n[tree]}, in tree {tree}"
            )

    @cached_property
    def values(self) -> np.ndarray:
        """Whole numbers, line after line: int64."""
        ends = np.flatnonzero((self._marks[1:] <= _LINE) & (self._n_digits > 0)) + 1
        n_digits, last = self._n_digits[ends - 1], self._places[ends] - 1
        values = np.zeros(len(ends), np.int64)
        for k in range(n_digits.max(initial=0)):
            # index -1 is before the text: it has no digits to count
            digits = self._bytes.take(last - k, mode="wrap") - np.uint8(ord("0"))
            values += np.int64(10**k) * (digits * (n_digits > k))
        return np.where(self._marks[ends - 1] == _MINUS, -values, values)

    @cached_property
    def _n_of_line(self) -> np.ndarray:
        """Return how many numbers each line holds, (n_trees,)."""
        lines = np.flatnonzero(self._marks == _LINE)
        n_ends = np.add.reduceat(self._marks[:-1] <= _LINE, lines[:-1], dtype=np.int64)
        return np.where(np.diff(self._places[lines]) == 1, 0, n_ends)

    def _mark_exponents(self) -> np.ndarray:
        """Mark the signs of exponents apart from those of numbers; return the exponents' marks."""
        starts = np.flatnonzero(self._marks == _E)
        starts += self._n_digits[starts] == 0
        for sign, mark in ((_MINUS, _E_MINUS), (_PLUS, _E_PLUS)):
            self._marks[starts[self._marks[starts] == sign]] = mark
        return starts

    def _limit_exponents(self, starts: np.ndarray) -> None:
        """Check the few numbers that have a long exponent one by one."""
        n_digits = self._n_digits[starts]
        self._check(int(n_digits.max(initial=0)) <= _MOST_EXPONENT_DIGITS)
        for k in starts[(n_digits == _MOST_EXPONENT_DIGITS) & (self._marks[starts] != _E_MINUS)]:
            first = k
            while self._marks[first] > _LINE:
                first -= 1
            word = self._bytes[self._places[first] + 1 : self._places[k + 1]].tobytes()
            self._limit(abs(float(word)) <= _LARGEST)

    def _check(self, is_right: bool) -> None:
        if not is_right:
            raise ModelError(f"{self._name} holds something other than numbers")

    def _limit(self, is_within: bool) -> None:
        if not is_within:
            raise ModelError(f"{self._name} holds a number that is not finite, or absurdly large")
