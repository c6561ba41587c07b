"""Heads that differ in one thing: the seed, the share of training patients, the depth."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from medembed.evaluation.intervals import plain
from medembed.evaluation.seed_variance import seed_spread
from medembed.results.alignment import ScoredHead, TestSet
from medembed.results.runs import Run

__all__ = ["find_depths", "find_efficiency", "find_seeds"]

SPREAD_SCORES = ("auroc", "macro_f1")


def find_seeds(
    runs: Sequence[Run], test_set: TestSet, n_resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Tell the spread over seeds apart from that of sampling, for heads trained with several.

    They are the same head of runs that asked the same but for the seed, or heads of one run whose
    names end with their seed ("unfreeze-2-s1").

    Returns
    -------
    list of dict
        ``head``, ``runs``, ``n_seeds``, and for AUROC and macro-F1 a dict of ``mean``,
        ``seed_sd`` (standard deviation over seeds) and ``sampling_sd`` (that of the bootstrap over
        patients, its mean over seeds). Empty where every head has one seed.
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
            **{
                name: plain(_spread(test_set, own, name, n_resamples, seed))
                for name in SPREAD_SCORES
            },
        }
        for (head, _), own in groups.items()
        if len({contender.seed for contender in own}) == len(own) > 1
    ]


def find_efficiency(
    rows: Sequence[dict[str, Any]], runs: Sequence[Run], test_set: TestSet
) -> list[dict[str, Any]]:
    """Return each head's scores by the share of training patients, where it was given several.

    Runs of one encoder are one series, those of another another.

    Returns
    -------
    list of dict
        ``head`` and ``points``, fewest patients first: ``run``, ``train_fraction``,
        ``n_train_patients``, ``auroc``, ``macro_f1``.
    """
    encoders = _name_encoders(runs, test_set)
    return _series(rows, "train_fraction", ("train_fraction", "n_train_patients"), encoders)


def find_depths(
    rows: Sequence[dict[str, Any]], runs: Sequence[Run], test_set: TestSet
) -> list[dict[str, Any]]:
    """Return each head's scores by the number of encoder blocks trained with it.

    Runs of one encoder are one series, those of another another: a CNN of which everything was
    trained is no depth of a vision transformer.

    Returns
    -------
    list of dict
        ``head`` (without its depth: "unfreeze" of "unfreeze-2", "unfreeze-s1" of "unfreeze-2-s1";
        with its encoder's name where there are several series of that head; "lora8" of "lora8-2",
        adapters in so many blocks, is another head) and ``points``,
        shallowest first: ``run``, ``depth``, ``auroc``, ``macro_f1``.
    """
    return _series(rows, "depth", ("depth",), _name_encoders(runs, test_set))


def _name_encoders(runs: Sequence[Run], test_set: TestSet) -> dict[str, str]:
    """Return the encoder of each run, by the run's name: its source, and revision if it has one."""
    known = [run.info.get("encoder") or {} for run in runs]
    words = [[str(own[name]) for name in ("source", "revision") if own.get(name)] for own in known]
    return dict(zip(test_set.dropped, ("@".join(own) for own in words), strict=True))


def _series(
    rows: Sequence[dict[str, Any]], by: str, names: tuple[str, ...], encoders: dict[str, str]
) -> list[dict[str, Any]]:
    heads: dict[tuple[str, str], list[dict[str, Any]]] = {}
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
                {name: row[name] for name in ("run", *names)}
                | {score: row["scores"][score] for score in SPREAD_SCORES}
                for row in sorted(own, key=lambda row: (row[by], row["run"]))
            ],
        }
        for (head, encoder), own in found.items()
    ]


def _without_seed(run: Run, contender: ScoredHead) -> str:
    asked = {name: value for name, value in run.info["asked"].items() if name != "seed"}
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
