"""Several rows that speak of one image or study become one, or are refused."""

import numpy as np
import pandas as pd

from medembed.dataset.recipes.listing import count_of, first_names, refuse

__all__ = ["EQUAL", "merge_rows"]

EQUAL, ANY = "equal", "any"  # what `rows` of a recipe may say
WORDS = {"0": "normal", "1": "abnormal", "": "unknown"}
RANKS = ("0", "", "1")  # Kleene's "or" is the highest of them
FIXED = ("patient", "study", "region", "split")  # of which an image has one


def merge_rows(
    rows: pd.DataFrame,
    key: str,
    *,
    source: str,
    rule: str = EQUAL,
    section: str = "table",
    noun: str = "image",
) -> tuple[pd.DataFrame, list[str]]:
    """Keep one row for each value of column `key`.

    Parameters
    ----------
    rows : pandas.DataFrame
        Strings, with the table's RangeIndex; column `label` holds "0", "1" and "". Column `name`
        is not compared, and rows whose `key` is empty are left as they are.
    key : str
    rule : {"equal", "any"}
        "equal": rows of one image must say the same. "any": the image is abnormal if any of its
        rows is, else unknown if any is (the "or" of Kleene's logic), else normal; a covariate in
        which they differ becomes empty. Patient, study, region and split must be equal always.
    source, section, noun : str
        What messages call the table, the recipe's section that has the rule, and what a row is of.

    Returns
    -------
    pandas.DataFrame
        The first row of each image, on its index.
    list of str
        What was settled, a notice for each kind.

    Raises
    ------
    RecipeError
        Rows of one image differ where they must not; names the column.
    """
    is_repeat = rows[key].duplicated() & (rows[key] != "")
    if not is_repeat.any():
        return rows, []
    shared = rows[rows[key].duplicated(keep=False) & (rows[key] != "")]
    torn = _differing(shared, key)
    for column in FIXED:
        _refuse_torn(shared, key, column, torn.pop(column, []), source, (
            f"rows of one {noun} differ in {column}; correct the table:"
        ))  # fmt: skip
    if rule != ANY:
        for column, keys in torn.items():
            _refuse_torn(shared, key, column, keys, source, _way_out(column, section, noun))
    first = rows[~is_repeat].copy()
    for column, keys in torn.items():
        at = first[key].map(set(keys).__contains__).astype(bool)
        labels = first.loc[at, key].map(_any_label(shared, key))
        first.loc[at, column] = labels if column == "label" else ""
    return first, _notices(shared, key, torn, source, noun)


def _differing(shared: pd.DataFrame, key: str) -> dict[str, list[str]]:
    """Return the keys in which rows differ, by column."""
    codes, names = pd.factorize(shared[key])
    first = np.unique(codes, return_index=True)[1]
    torn = {}
    for column in shared.columns.drop([key, "name"], errors="ignore"):
        values = pd.factorize(shared[column])[0]
        differs = np.unique(codes[values != values[first][codes]])
        if len(differs):
            torn[column] = list(names[differs])
    return torn


def _refuse_torn(
    shared: pd.DataFrame, key: str, column: str, keys: list[str], source: str, remedy: str
) -> None:
    lines = (f"{name}: {_each_value(shared[shared[key] == name], column)}" for name in keys)
    refuse(lines, source, remedy, len(keys))


def _each_value(rows: pd.DataFrame, column: str) -> str:
    """Say where each value first stands: "normal in row 2, abnormal in row 3"."""
    first = rows.drop_duplicates(column)
    values = [WORDS[v] if column == "label" else repr(v) for v in first[column]]
    named = [f"{v} in row {i + 2}" for v, i in zip(values, first.index.tolist(), strict=True)]
    return first_names(named)


def _way_out(column: str, section: str, noun: str) -> str:
    if column == "label":
        return (
            f"rows of one {noun} differ in label. Correct the table, or say that it is "
            f'abnormal if any of its rows is, with rows = "{ANY}" in [{section}]:'
        )
    return (
        f"rows of one {noun} differ in {column}. Take {column} out of `covariates`, or leave it "
        f'empty for these images, with rows = "{ANY}" in [{section}]:'
    )


def _any_label(shared: pd.DataFrame, key: str) -> "pd.Series[str]":
    """Return the label of each image, by its key."""
    ranks = shared["label"].map(RANKS.index).groupby(shared[key], sort=False).max()
    return ranks.map(dict(enumerate(RANKS)))


def _notices(
    shared: pd.DataFrame, key: str, torn: dict[str, list[str]], source: str, noun: str
) -> list[str]:
    notices = []
    columns = [name for name in shared.columns if name != "name"]
    equal = shared[shared.duplicated(columns)]
    if len(equal):
        names = first_names(equal[key].drop_duplicates().tolist())
        notices.append(
            f"{count_of(len(equal), 'row')} of {source} only repeat another of the same {noun}, "
            f"and count once: {names}"
        )
    for column, keys in torn.items():
        became = "abnormal if any row is" if column == "label" else "now empty"
        notices.append(
            f"{count_of(len(keys), noun)} of {source} differ in {column} from row to row, "
            f"{became}: {first_names(keys)}"
        )
    return notices
