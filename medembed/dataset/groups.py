"""Stand-ins for patients in datasets that have no patient ids."""

import pandas as pd

__all__ = ["join_same_bytes", "name_runs"]


def name_runs(names: "pd.Series[str]", states: pd.DataFrame, *, max_gap: int) -> "pd.Series[str]":
    """Group images whose numbers follow each other: they often show one person.

    Parameters
    ----------
    names : pandas.Series of str, (n,)
        File names or stems. An image's number is the last run of digits in its stem, and images are
        neighbours only where the text before it is the same.
    states : pandas.DataFrame, (n, k)
        A change of any column between neighbours ends a run.
    max_gap : int
        Largest difference between neighbouring numbers of one run.

    Returns
    -------
    pandas.Series of str, (n,)
        The stem of the run's first image, on the index of `names`. An image without a number is a
        group of its own.
    """
    stems = names.str.replace(r"\.[^./]*$", "", regex=True)
    parts = stems.str.extract(r"^(?P<prefix>.*?)(?P<number>\d+)(?P<rest>\D*)$")
    keys = parts.assign(stem=stems)
    keys["number"] = pd.to_numeric(keys["number"]).astype("float64")
    state = states.astype(str).agg("\x00".join, axis=1) if len(states.columns) else ""
    ordered = keys.assign(state=state).sort_values(["prefix", "number", "rest", "stem"])
    near = ordered["number"].diff().le(max_gap)  # false where there is no number
    same = ordered[["prefix", "state"]].eq(ordered[["prefix", "state"]].shift()).all(axis=1)
    first = ordered["stem"].where(~(near & same)).ffill()
    return first.reindex(names.index)


def join_same_bytes(groups: "pd.Series[str]", sha256: "pd.Series[str]") -> "pd.Series[str]":
    """Join the groups of images whose files have the same bytes.

    Returns
    -------
    pandas.Series of str
        On the index of `groups`; joined groups take the name that sorts first among them.
    """
    parent = {name: name for name in groups}

    def find(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    same = sha256[sha256 != ""]
    same = same[same.duplicated(keep=False)]
    for _, members in groups[same.index].groupby(same):
        roots = sorted({find(name) for name in members})
        for root in roots[1:]:
            parent[root] = roots[0]
    return groups.map(find)
