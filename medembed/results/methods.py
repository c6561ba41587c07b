"""How intervals were found, in words: below tables, on the page and under figures."""

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["OF_SHARES", "describe_absent", "describe_methods", "of_score"]

WORDS = {
    "newcombe": "AUROC by Newcombe's score method with DeLong's variance",
    "wilson": "shares by Wilson with the patients' design effect",
    "clopper-pearson": "those with fewer than five of a kind by Clopper–Pearson",
    "mover": "macro-F1 and κ from the limits of sensitivity, specificity and prevalence (MOVER)",
    "logit-t": "average precision and Brier score by Student's t on the log-odds",
    "bootstrap upper bound": "of ECE an upper bound alone, from bootstrap resamples of patients",
}
OF_SHARES = "Wilson or Clopper–Pearson, patients as clusters"
_OF_SCORE = {
    "auroc": "Newcombe's score method, patients as clusters",
    "average_precision": "Student's t on the log-odds, patients as clusters",
}


def describe_methods(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the sentence that names the method of every interval of a comparison's rows."""
    used = {
        score.get("method")
        for row in rows
        for part in (row["scores"], row.get("at_half", {}))
        for score in part.values()
        if isinstance(score, Mapping)
    }
    told = [words for method, words in WORDS.items() if method in used]
    if not told:
        return "No score has an interval."
    return f"Intervals: 95 %, patients as clusters; {'; '.join(told)}."


def describe_absent(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return why trained heads' AUROC has no interval, each reason once."""
    reasons = [
        row["scores"]["auroc"].get("reason") for row in rows if not row.get("baseline", False)
    ]
    told = dict.fromkeys(reason for reason in reasons if reason)
    return [f"No interval of AUROC: {reason}." for reason in told]


def of_score(name: str) -> str:
    """Return how the interval of a score under a figure was found."""
    return _OF_SCORE.get(name, OF_SHARES)
