"""`[expected]` of a recipe: the counts that its data set is known to have."""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from medembed.dataset.checks import SPLITS
from medembed.dataset.manifest import Manifest, count_rows

__all__ = ["compare_counts"]

N_TELLING = 4  # counts of a part of a data set that are named
FEW = 2  # differences that are named one by one, whichever way they go


@dataclass(frozen=True)
class _Difference:
    where: str  # "", "train", "train, hand"
    name: str
    expected: int
    found: int

    def describe(self) -> str:
        prefix = f"{self.where}: " if self.where else ""
        return f"{prefix}{self.expected} {self.name} expected, {self.found} found"

    def describe_part(self) -> str:
        suffix = f" in {self.where}" if self.where else ""
        return f"{self.found} of {self.expected} {self.name}{suffix}"


def compare_counts(expected: dict[str, Any], manifest: Manifest) -> list[str]:
    """Hold a manifest's counts to `[expected]`.

    Returns
    -------
    list of str
        A warning for each count that differs; one for all of them where every count is less than
        expected, as in a part of the data set.
    """
    differences = [
        _Difference(where, name.replace("_", " "), value, counts[name])
        for where, wanted, counts in _parts(expected, manifest.rows)
        for name, value in wanted.items()
        if counts[name] != value
    ]
    if len(differences) <= FEW or any(d.found > d.expected for d in differences):
        return [difference.describe() for difference in differences]
    first, *others = sorted(differences, key=lambda difference: bool(difference.where))
    told = ", ".join(difference.describe_part() for difference in others[: N_TELLING - 1])
    n_more = len(others) - (N_TELLING - 1)
    more = f"; {n_more} more counts are lower too" if n_more > 0 else ""
    return [f"{first.describe()}: a part of the data set, with {told}{more}"]


def _parts(
    expected: dict[str, Any], rows: pd.DataFrame, where: str = ""
) -> list[tuple[str, dict[str, int], dict[str, int]]]:
    """Pair each section of `[expected]` with the counts of the rows that it speaks of."""
    wanted = {name: value for name, value in expected.items() if isinstance(value, int)}
    parts = [(where, wanted, count_rows(rows))]
    for split in SPLITS:
        if split in expected:
            parts += _parts(expected[split], rows[rows["split"] == split], split)
    for region, counts in expected.get("region", {}).items():
        name = f"{where}, {region}" if where else region
        parts += _parts(counts, rows[rows["region"] == region], name)
    return parts
