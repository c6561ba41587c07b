"""What several runs of one comparison have in common is counted once: priors, left-out images."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medembed.results.alignment import ScoredHead, TestSet
from medembed.results.runs import Run

__all__ = ["count_left_out", "describe_repeats", "drop_repeats", "mark_repeats"]


def drop_repeats(runs: Sequence[Run], test_set: TestSet) -> tuple[list[ScoredHead], dict[str, str]]:
    """Return the contenders with each prior once, and whose priors stand for another run's.

    A run's trained heads are all kept, also where another directory holds the same run.

    Two priors are one where their runs have one manifest and one share of its training patients,
    and the priors give the test rows equal probabilities and, calibrated, one order. The first is
    kept, with its calibration.

    Returns
    -------
    contenders : list of ScoredHead
        In the order given.
    priors_of : dict of str to str
        For each run that loses all of its priors, the run that keeps the first of them.
    """
    manifests = {
        name: run.info["asked"].get("manifest")
        for run, name in zip(runs, test_set.dropped, strict=True)
    }
    kept: list[ScoredHead] = []
    first_of: dict[tuple[str, str], str] = {}
    for own in test_set.contenders:
        first = next((other for other in kept if _is_same(own, other, manifests)), None)
        if first is None:
            kept.append(own)
        else:
            first_of[own.run, own.head] = first.run
    with_priors = {own.run for own in kept if own.is_baseline}
    lost = {run: first for (run, _), first in reversed(first_of.items()) if run not in with_priors}
    return kept, lost


def mark_repeats(
    abouts: Sequence[dict[str, Any]],
    runs: Sequence[Run],
    test_set: TestSet,
    priors_of: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Add ``priors_of``, ``left_out_of`` and ``copy_of`` to what is said of each run.

    They name the run before it that has the same priors, the same images left out, or heads of the
    same names that predict the very same of the common test rows; or they are None.
    """
    marked, copy_of = [], _find_copies(test_set)
    for i, about in enumerate(abouts):
        same = (
            other["name"]
            for other, run in zip(abouts[:i], runs, strict=False)
            if about["left_out"] and _left_out(run) == _left_out(runs[i])
        )
        own = {"left_out_of": next(same, None), "copy_of": copy_of.get(about["name"])}
        marked.append({**about, "priors_of": priors_of.get(about["name"]), **own})
    return marked


def describe_repeats(abouts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Say of which runs' priors and left-out images stand once, under another run's name."""
    for key, what in (("priors_of", "priors"), ("left_out_of", "left-out images")):
        firsts = dict.fromkeys(about[key] for about in abouts if about.get(key))
        for first in firsts:
            names = ", ".join(about["name"] for about in abouts if about.get(key) == first)
            yield f"{names}: the {what} are those of {first}, and counted once."
    for about in abouts:
        if about.get("copy_of"):
            yield (
                f"Warning: {about['name']} predicts the very same as {about['copy_of']}: it may be "
                "one run in two directories, whose heads are compared with themselves."
            )


def count_left_out(runs: Sequence[Run]) -> tuple[int, bool]:
    """Count the images that any of the runs left out, each once.

    Returns
    -------
    n : int
        How many.
    is_exact : bool
        False where a run lists too few of its images to tell whether another's are the same; `n`
        is then a lower bound.
    """
    found = [(int(run.info.get("data", {}).get("left_out", 0)), _listed(run)) for run in runs]
    union: Counter[str] = Counter()
    for _, listed in found:
        union |= listed
    distinct = {(n, tuple(sorted(listed.items()))) for n, listed in found if n}
    if len(distinct) <= 1:
        return max((n for n, _ in found), default=0), True
    is_exact = all(n == listed.total() for n, listed in found)
    return max(union.total(), *(n for n, _ in found)), is_exact


def _find_copies(test_set: TestSet) -> dict[str, str]:
    """Return, of each run whose heads all predict what those of a run before it do, that run."""
    heads: dict[str, dict[str, NDArray[np.float64]]] = {name: {} for name in test_set.dropped}
    for own in test_set.contenders:
        heads[own.run][own.head] = own.raw
    found: dict[str, str] = {}
    names = list(heads)
    for i, name in enumerate(names):
        for first in names[:i]:
            a, b = heads[name], heads[first]
            if a.keys() == b.keys() and all(np.array_equal(a[head], b[head]) for head in a):
                found.setdefault(name, first)
    return found


def _is_same(a: ScoredHead, b: ScoredHead, manifests: Mapping[str, Any]) -> bool:
    return (
        a.is_baseline
        and (a.head, a.train_fraction) == (b.head, b.train_fraction)
        and a.run != b.run
        and manifests[a.run] == manifests[b.run]
        and np.array_equal(a.raw, b.raw)
        and np.array_equal(_ranks(a.probability), _ranks(b.probability))
    )


def _ranks(values: NDArray[np.float64]) -> NDArray[np.intp]:
    return np.asarray(np.unique(values, return_inverse=True)[1])


def _listed(run: Run) -> Counter[str]:
    return Counter(str(image.get("sha256")) for image in run.info.get("left_out", []))


def _left_out(run: Run) -> tuple[Any, ...]:
    """Return what tells left-out images apart; beyond those that are listed, the manifest does."""
    data, listed = run.info.get("data", {}), _listed(run)
    counts = (data.get("left_out", 0), data.get("left_out_test", 0))
    if counts[0] == listed.total():
        return (*counts, listed)
    return (*counts, listed, run.info["asked"].get("manifest"))
