"""Test rows by a column of the manifest: scores within each group, and the gaps between groups."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, cast

import numpy as np
import pandas as pd

from medembed.core.errors import RunError
from medembed.dataset.covariate_bands import (
    NOT_KNOWN,
    OTHERS,
    OUTSIDE,
    SEVERAL,
    Grouping,
    group_rows,
    parse_grouping,
)
from medembed.dataset.manifest import Manifest, require_hashes
from medembed.evaluation.intervals import plain
from medembed.evaluation.unpaired import MOST_PAIRED, Gap, find_gaps, score_groups
from medembed.results.alignment import ScoredHead, TestSet
from medembed.results.comparison_schema import (
    ColumnGroups,
    ComparedHead,
    GapDocument,
    Group,
    GroupedHead,
    Groupings,
    HeadName,
)
from medembed.results.runs import Run
from medembed.results.significance import SIGNIFICANCE, row_name

__all__ = [
    "Groups",
    "compare_groups",
    "describe_gaps",
    "explain_other_manifest",
    "find_test_rows",
    "join_column",
    "join_groups",
]

DIGITS = 12
"""Digits of a manifest's digest that messages show: enough to tell two apart."""
NAMED_GAPS = 6


@dataclass(frozen=True)
class Groups:
    """The group of each test row.

    Attributes
    ----------
    grouping : Grouping
        The column, and the edges of its bands.
    names : ndarray of str, shape (n,)
        The group of each of the test set's units, in their order.
    order : list of str
        The categories or bands that have rows.
    rest : list of str
        Which of `SEVERAL`, `OUTSIDE` and `NOT_KNOWN` have rows; they are shown, but not in gaps.
    empty : list of str
        Bands without rows.
    n_absent : int
        Images that the manifest lacks, of runs that do not record their manifest.
    """

    grouping: Grouping
    names: np.ndarray
    order: list[str]
    rest: list[str]
    empty: list[str]
    n_absent: int


def join_groups(runs: Sequence[Run], test_set: TestSet, manifest: Manifest, by: str) -> Groups:
    """Return the group of each test row by ``COLUMN[:BANDS]`` of the manifest.

    Rows are joined by the SHA-256 of their images, see `join_column`.

    Raises
    ------
    RunError
        A run was made from another manifest, or this manifest has none of the test images.
    ManifestError
        The manifest has no hashes or no such column, or the column cannot be grouped.
    """
    other = explain_other_manifest(runs, test_set, manifest)
    if other is not None:
        raise RunError(other)
    grouping = parse_grouping(by, [str(name) for name in manifest.rows.columns])
    return join_column(test_set, find_test_rows(test_set, manifest), grouping)


def explain_other_manifest(
    runs: Sequence[Run], test_set: TestSet, manifest: Manifest
) -> str | None:
    """Return a message on a run that was made from another manifest, or None."""
    digest = manifest.digest()
    for run, name in zip(runs, test_set.dropped, strict=True):
        own = run.info.asked.manifest  # not recorded by every run
        if own is not None and own != digest:
            return (
                f"run {name} was made from another manifest: the digest of its own begins "
                f"{own[:DIGITS]}, and that of the one given {digest[:DIGITS]}. Give "
                "--manifest the one that the run was made from, or make the run again from this."
            )
    return None


def find_test_rows(test_set: TestSet, manifest: Manifest) -> pd.DataFrame:
    """Return the manifest's rows of the test set's images.

    Raises
    ------
    ManifestError
        The manifest has no hashes.
    RunError
        The manifest has none of these images.
    """
    require_hashes(manifest)
    images = {image for images in test_set.units["images"] for image in images.split()}
    rows = manifest.rows[manifest.rows["sha256"].isin(images)]
    if rows.empty:
        raise RunError(
            "the manifest has none of the test images of these runs. Give --manifest the one that "
            "they were made from."
        )
    return rows


def join_column(test_set: TestSet, rows: pd.DataFrame, grouping: Grouping) -> Groups:
    """Return the group of each test row.

    A study is in the group of its images, or in `SEVERAL` if they are in different groups. Images
    without a value are ignored if other images of the study have one.

    Parameters
    ----------
    test_set : TestSet
    rows : DataFrame
        What `find_test_rows` returned.
    grouping : Grouping

    Raises
    ------
    ManifestError
        The column cannot be grouped like this, see `covariate_bands.group_rows`.
    """
    of_rows, order = group_rows(rows, grouping)
    known = rows["sha256"][of_rows != NOT_KNOWN]
    places = of_rows[known.index].groupby(known).agg(set).to_dict()
    units = [images.split() for images in test_set.units["images"]]
    names = np.array([_name([places.get(own, set()) for own in images]) for images in units])
    there = set(names)
    listed = set(rows["sha256"])
    return Groups(
        grouping,
        names,
        [name for name in order if name in there],
        [name for name in (SEVERAL, OUTSIDE, NOT_KNOWN) if name in there],
        [name for name in grouping.bands if name not in there],
        len({own for images in units for own in images} - listed),
    )


def compare_groups(rows: Sequence[ComparedHead], test_set: TestSet, own: Groups) -> Groupings:
    """Return every head's scores within each group, and tests of the trained heads' gaps.

    Parameters
    ----------
    rows : sequence of dict
        The rows of a comparison: the heads in its order.
    test_set : TestSet
    own : Groups

    Returns
    -------
    dict
        ``groups``: ``column``, ``bands`` (edges, null for an open end; null for categories),
        ``groups`` (each ``name``, ``n``, ``n_abnormal``, ``n_patients``), ``rows`` (each ``run``,
        ``head`` and ``groups``: by name the scores of `unpaired`), ``notes``; and ``gaps``, of each
        trained head: ``run``, ``head``, ``score``, ``a``, ``b``, ``difference``, ``low``, ``high``,
        ``p``, ``p_holm`` (over all gaps of the head), ``method``, and ``reason`` if the gap cannot
        be estimated.
    """
    members = {name: own.names == name for name in (*own.order, *own.rest)}
    contenders = {(one.run, one.head): one for one in test_set.contenders}
    scored: list[GroupedHead] = []
    gaps: list[GapDocument] = []
    for row in rows:
        contender = contenders[row["run"], row["head"]]
        found = _score(test_set, contender, members)
        blocks = {name: {k: v.interval() for k, v in one.items()} for name, one in found.items()}
        who: HeadName = {"run": row["run"], "head": row["head"]}
        scored.append({**who, "groups": plain(blocks)})
        if not row["baseline"]:
            one = {name: found[name] for name in own.order}
            gaps += [
                cast("GapDocument", {**who, **_as_dict(gap)})
                for gap in find_gaps(one, _score_others(test_set, contender, own), OTHERS)
            ]
    edges = own.grouping.edges
    groups: ColumnGroups = {
        "column": own.grouping.column,
        "bands": None if edges is None else [e if isfinite(e) else None for e in edges],
        "groups": [_count(test_set, name, chosen) for name, chosen in members.items()],
        "rows": scored,
        "notes": _describe(own, test_set.level),
    }
    return {"groups": groups, "gaps": gaps}


def describe_gaps(gaps: Sequence[GapDocument], *, several: bool) -> str:
    """Return a sentence on which gaps are more than chance."""
    tested = [(gap["p_holm"], gap) for gap in gaps if gap["p_holm"] is not None]
    if not gaps:
        return "Gaps: there are no two groups to compare."
    if not tested:
        return "Gaps: none could be tested; the groups are too small."
    found = [(p, gap) for p, gap in tested if p < SIGNIFICANCE]
    what = f"of {len(tested):,} gap{'s'[: len(tested) > 1]} that could be tested"
    if not found:
        return f"Gaps: none {what} is significant at {SIGNIFICANCE} after Holm's correction."
    told = [
        f"{row_name(gap, several=several)}, {gap['score']}, {gap['a']} − {gap['b']} "
        f"{gap['difference']:+.3f}"
        for _, gap in sorted(found, key=lambda own: own[0])[:NAMED_GAPS]
    ]
    more = f"; and {len(found) - NAMED_GAPS:,} more" if len(found) > NAMED_GAPS else ""
    verb = "is" if len(found) == 1 else "are"
    return (
        f"Gaps: {len(found):,} {what} {verb} significant at {SIGNIFICANCE} after Holm's "
        f"correction: {'; '.join(told)}{more}."
    )


def _name(places: Sequence[set[str]]) -> str:
    found = set().union(*places)
    if not found:
        return NOT_KNOWN
    return str(*found) if len(found) == 1 else SEVERAL


def _score(test_set: TestSet, contender: ScoredHead, members: dict[str, np.ndarray]) -> Any:
    return score_groups(
        test_set.y, contender.probability, contender.threshold, test_set.patients, members
    )


def _score_others(test_set: TestSet, contender: ScoredHead, own: Groups) -> Any:
    """Return, for each group, scores of all other groups together, if gaps need them."""
    if len(own.order) <= MOST_PAIRED:
        return {}
    grouped = np.isin(own.names, own.order)
    members = {name: grouped & (own.names != name) for name in own.order}
    return _score(test_set, contender, members)


def _as_dict(gap: Gap) -> dict[str, Any]:
    found = gap.found.as_dict()
    method = found.pop("method")
    told = {"score": gap.score, "a": gap.a, "b": gap.b, **found, "p_holm": plain(gap.p_holm)}
    return {**told, "method": method} | ({} if gap.reason is None else {"reason": gap.reason})


def _count(test_set: TestSet, name: str, chosen: np.ndarray) -> Group:
    return {
        "name": name,
        "n": int(chosen.sum()),
        "n_abnormal": int(test_set.y[chosen].sum()),
        "n_patients": len(np.unique(test_set.patients[chosen])),
    }


def _describe(own: Groups, level: str) -> list[str]:
    """Return the sentences about groups that stand under their table."""
    notes = []
    if SEVERAL in own.rest:
        notes.append(f"{SEVERAL}: studies whose images are in different groups.")
    if OUTSIDE in own.rest:
        notes.append(f"{OUTSIDE}: values below the lowest or above the highest edge.")
    if NOT_KNOWN in own.rest:
        notes.append(f"{NOT_KNOWN}: the manifest's field is empty.")
    if own.empty:
        plural = "studies" if level == "study" else "images"
        notes.append(f"No test {plural} in {', '.join(own.empty)}.")
    if own.n_absent:
        notes.append(
            f"{own.n_absent:,} test images are not in the manifest, and a run does not say which "
            "manifest it was made from."
        )
    if len(own.order) > MOST_PAIRED:
        notes.append(f"More than {MOST_PAIRED} groups: gaps compare each with {OTHERS} together.")
    return notes
