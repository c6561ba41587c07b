"""Heads that differ in one thing: the seed, the share of patients, the depth, the layer.

What several runs of a comparison share (priors, left-out images) is counted once.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medembed.core.poolings import block_of
from medembed.evaluation.bootstrap import finite_or_none
from medembed.evaluation.intervals import (
    Variant,
    bootstrap_variants,
    holm,
    paired_difference,
    plain,
)
from medembed.evaluation.paired import Difference
from medembed.evaluation.seed_variance import seed_spread
from medembed.results.alignment import ScoredHead, TestSet
from medembed.results.comparison_schema import (
    ComparedHead,
    ComparedRun,
    LayerSeries,
    LayerTest,
    SeedSpread,
    Series,
    TrendPoint,
)
from medembed.results.predictions import PRIORS
from medembed.results.runs import Run

__all__ = [
    "compare_layers",
    "count_left_out",
    "describe_repeats",
    "drop_repeats",
    "find_depths",
    "find_efficiency",
    "find_layers",
    "find_seeds",
    "mark_repeats",
]


def drop_repeats(runs: Sequence[Run], test_set: TestSet) -> tuple[list[ScoredHead], dict[str, str]]:
    """Return the contenders with each prior once, and which run's priors stand for another's.

    All trained heads are kept, even if another directory holds a copy of their run.

    Two priors count as one if their runs share the manifest and the share of training patients, and
    if the priors give the test rows equal probabilities and, calibrated, one order. The first is
    kept, with its calibration.

    Returns
    -------
    contenders : list of ScoredHead
        In the order given.
    priors_of : dict of str to str
        For each run that loses all of its priors, the run that keeps the first of them.
    """
    manifests = {
        name: run.info.asked.manifest for run, name in zip(runs, test_set.dropped, strict=True)
    }
    kept: list[ScoredHead] = []
    first_of: dict[tuple[str, str], str] = {}
    for own in test_set.contenders:
        first = next((other for other in kept if _is_same(own, other, manifests)), None)
        if first is None:
            kept.append(own)
        else:
            first_of[own.run, own.head] = first.run
    with_priors = {own.run for own in kept if own.head in PRIORS}
    lost = {run: first for (run, _), first in reversed(first_of.items()) if run not in with_priors}
    return kept, lost


def mark_repeats(
    abouts: Sequence[ComparedRun],
    runs: Sequence[Run],
    test_set: TestSet,
    priors_of: Mapping[str, str],
) -> list[ComparedRun]:
    """Add ``priors_of``, ``left_out_of`` and ``copy_of`` to each run's description.

    Each names an earlier run: one that has the same priors, one that left out the same images, and
    one whose heads have the same names and equal predictions of the common test rows; else None.
    """
    marked: list[ComparedRun] = []
    copy_of = _find_copies(test_set)
    for i, about in enumerate(abouts):
        same = (
            other["name"]
            for other, run in zip(abouts[:i], runs, strict=False)
            if about["left_out"] and _left_out(run) == _left_out(runs[i])
        )
        marked.append(
            {
                **about,
                "priors_of": priors_of.get(about["name"]),
                "left_out_of": next(same, None),
                "copy_of": copy_of.get(about["name"]),
            }
        )
    return marked


def describe_repeats(abouts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield sentences on runs whose priors or left-out images are counted under another run."""
    for key, what in (("priors_of", "priors"), ("left_out_of", "left-out images")):
        firsts = dict.fromkeys(about[key] for about in abouts if about.get(key))
        for first in firsts:
            names = ", ".join(about["name"] for about in abouts if about.get(key) == first)
            yield f"{names}: the {what} are those of {first}, and counted once."
    for about in abouts:
        if about.get("copy_of"):
            yield (
                f"Warning: {about['name']} and {about['copy_of']} predict exactly alike: they may "
                "be one run in two directories, whose heads are compared with themselves."
            )


def count_left_out(runs: Sequence[Run]) -> tuple[int, bool]:
    """Count the images that any of the runs left out, each once.

    Returns
    -------
    n : int
        The number of images.
    is_exact : bool
        False if a run lists too few of its images to tell whether another run left out the same
        ones; `n` is then a lower bound.
    """
    found = [(run.info.data.left_out or 0, _listed(run)) for run in runs]
    union: Counter[str] = Counter()
    for _, listed in found:
        union |= listed
    distinct = {(n, tuple(sorted(listed.items()))) for n, listed in found if n}
    if len(distinct) <= 1:
        return max((n for n, _ in found), default=0), True
    is_exact = all(n == listed.total() for n, listed in found)
    return max(union.total(), *(n for n, _ in found)), is_exact


def _find_copies(test_set: TestSet) -> dict[str, str]:
    """Return, for each run whose heads all predict like an earlier run's, that earlier run."""
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
    return Counter(str(image.sha256) for image in run.info.left_out)


def _left_out(run: Run) -> tuple[Any, ...]:
    """Return what identifies a run's left-out images: those listed, the count, and the manifest."""
    data, listed = run.info.data, _listed(run)
    counts = (data.left_out or 0, data.left_out_test or 0)
    if counts[0] == listed.total():
        return (*counts, listed)
    return (*counts, listed, run.info.asked.manifest)


SPREAD_SCORES = ("auroc", "macro_f1")


def find_seeds(
    runs: Sequence[Run], test_set: TestSet, n_resamples: int, seed: int
) -> list[SeedSpread]:
    """Return the spread over seeds and that of sampling, for heads trained with several seeds.

    Such heads have one name in runs that differ only in their seed, or belong to one run and have
    names that end with the seed ("unfreeze-2-s1").

    Returns
    -------
    list of dict
        ``head``, ``runs``, ``n_seeds``, and for AUROC and macro-F1 a dict of ``mean``,
        ``seed_sd`` (standard deviation over seeds) and ``sampling_sd`` (that of the bootstrap over
        patients, averaged over seeds). Empty if every head has one seed.
    """
    asked = dict(zip(test_set.dropped, runs, strict=True))
    groups: dict[tuple[str, str], list[ScoredHead]] = {}
    for contender in test_set.contenders:
        if not contender.is_baseline:
            question = _without_seed(asked[contender.run], contender)
            head = contender.head.removesuffix(f"-s{contender.seed}")
            groups.setdefault((head, question), []).append(contender)
    return [
        {
            "head": head,
            "runs": list(dict.fromkeys(contender.run for contender in own)),
            "n_seeds": len(own),
            "auroc": plain(_spread(test_set, own, "auroc", n_resamples, seed)),
            "macro_f1": plain(_spread(test_set, own, "macro_f1", n_resamples, seed)),
        }
        for (head, _), own in groups.items()
        if len({contender.seed for contender in own}) == len(own) > 1
    ]


def find_efficiency(
    rows: Sequence[ComparedHead], runs: Sequence[Run], test_set: TestSet
) -> list[Series]:
    """Return each head's scores by the share of training patients, if there are several shares.

    The runs of each encoder form a series of their own.

    Returns
    -------
    list of dict
        ``head`` and ``points``, fewest patients first: ``run``, ``train_fraction``,
        ``n_train_patients``, ``auroc``, ``macro_f1``.
    """
    encoders = _name_encoders(runs, test_set)
    return _series(rows, "train_fraction", ("train_fraction", "n_train_patients"), encoders)


def find_depths(
    rows: Sequence[ComparedHead], runs: Sequence[Run], test_set: TestSet
) -> list[Series]:
    """Return each head's scores by the number of encoder blocks trained with it.

    The runs of each encoder form a series of their own: a CNN that was trained as a whole is not
    one of a vision transformer's depths.

    Returns
    -------
    list of dict
        ``head`` (without its depth: "unfreeze" of "unfreeze-2", "unfreeze-s1" of "unfreeze-2-s1";
        with its encoder's name if that head has several series; "lora8" of "lora8-2", with adapters
        in two blocks, is a head of its own) and ``points``,
        shallowest first: ``run``, ``depth``, ``auroc``, ``macro_f1``.
    """
    return _series(rows, "depth", ("depth",), _name_encoders(runs, test_set))


def _name_encoders(runs: Sequence[Run], test_set: TestSet) -> dict[str, str]:
    """Return the encoder of each run, by the run's name: its source, and its revision if known."""
    known = (run.info.encoder for run in runs)
    words = [filter(None, (own.source, own.revision)) for own in known]
    return dict(zip(test_set.dropped, ("@".join(own) for own in words), strict=True))


def _series(
    rows: Sequence[Mapping[str, Any]], by: str, names: tuple[str, ...], encoders: dict[str, str]
) -> list[Series]:
    heads: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if not row["baseline"] and row[by] is not None:
            head = row["head"]
            if by == "depth":
                head = re.sub(rf"-{row['depth']}(?=$|-s\d+$)", "", head)
            heads.setdefault((head, encoders[row["run"]]), []).append(row)
    found = {key: own for key, own in heads.items() if len({row[by] for row in own}) > 1}
    times = Counter(head for head, _ in found)
    return [
        {
            "head": head if times[head] == 1 else f"{head} of {encoder}",
            "points": [
                cast(
                    "TrendPoint",
                    {name: row[name] for name in ("run", *names)}
                    | {score: row["scores"][score] for score in SPREAD_SCORES},
                )
                for row in sorted(own, key=lambda row: (row[by], row["run"]))
            ],
        }
        for (head, encoder), own in found.items()
    ]


def _without_seed(run: Run, contender: ScoredHead) -> str:
    asked = run.info.asked.model_dump(exclude_unset=True, exclude={"seed"})
    return json.dumps([asked, contender.depth], sort_keys=True)


def _spread(
    test_set: TestSet, own: Sequence[ScoredHead], score: str, n_resamples: int, seed: int
) -> dict[str, float]:
    found = seed_spread(
        test_set.y,
        [contender.probability for contender in own],
        test_set.patients,
        [contender.threshold for contender in own],
        score=score,
        n_resamples=n_resamples,
        seed=seed,
    )
    return {"mean": found.mean, "seed_sd": found.seed_sd, "sampling_sd": found.sampling_sd}


def compare_layers(
    studies: pd.DataFrame,
    probabilities: Mapping[str, NDArray[np.float64]],
    *,
    head: str,
    pooling: str,
    n_blocks: int | None = None,
) -> LayerSeries:
    """Return the AUROC of each layer, and its difference from that of the last.

    Parameters
    ----------
    studies : DataFrame
        One row per study: label, patient.
    probabilities : dict of str to array of shape (n,)
        Out-of-fold probabilities of the studies by pooling, from the first layer to the last; what
        comes last is compared with.
    head, pooling : str
        Who predicted, and what the poolings have in common, such as `mean`.
    n_blocks : int, optional
        Blocks of the encoder.

    Returns
    -------
    dict
        JSON values: ``head``, ``pooling``, ``n`` studies, ``n_patients``, ``n_blocks``; ``points``
        with ``pooling``, ``block`` (None: the tower's own output), ``auroc`` with its interval and
        ``versus_last`` (None for the last itself): ``difference``, ``low``, ``high``, ``p``,
        ``method``, and ``p_holm`` after Holm's correction over the layers; ``best`` and ``last``,
        poolings; and ``unfreeze``, the number of blocks above the best one, None where the best is
        the last, or their number is unknown. Intervals and tests take patients as clusters; see
        `evaluation.intervals.paired_differences`.
    """
    y, patients = studies["label"].to_numpy(np.int8), studies["patient"].to_numpy()
    variants = {name: Variant(own, 0.5, ("auroc",)) for name, own in probabilities.items()}
    scores = bootstrap_variants(y, variants, patients)
    *earlier, last = probabilities
    tests = {
        name: paired_difference(y, probabilities[name], probabilities[last], patients)
        for name in earlier
    }
    adjusted = dict(zip(earlier, holm([test.p for test in tests.values()]), strict=True))
    values = {name: scores[name]["auroc"].value for name in probabilities}
    best = max(values, key=lambda name: -np.inf if np.isnan(values[name]) else values[name])
    return {
        "head": head,
        "pooling": pooling,
        "n": len(studies),
        "n_patients": int(studies["patient"].nunique()),
        "n_blocks": n_blocks,
        "points": [
            {
                "pooling": name,
                "block": _block(name),
                "auroc": plain(scores[name]["auroc"]),
                "versus_last": None
                if name == last
                else _describe_test(tests[name], float(adjusted[name])),
            }
            for name in probabilities
        ],
        "best": best,
        "last": last,
        "unfreeze": _count_above(best, last, n_blocks),
    }


def find_layers(runs: Sequence[Run], names: Sequence[str]) -> list[LayerSeries]:
    """Return the scores by layer that the runs hold, each with its ``run``."""
    return [
        cast("LayerSeries", {"run": name, **series})
        for run, name in zip(runs, names, strict=True)
        for series in run.info.layers or []
    ]


def _describe_test(test: Difference, p_holm: float) -> LayerTest:
    return cast("LayerTest", {**test.as_dict(), "p_holm": finite_or_none(p_holm)})


def _block(name: str) -> int | None:
    at = block_of(name)
    return None if at is None else at[1]


def _count_above(best: str, last: str, n_blocks: int | None) -> int | None:
    block, end = _block(best), _block(last)
    if block is None or n_blocks is None or best == last or end not in (None, n_blocks):
        return None
    return n_blocks - block if n_blocks > block else None
