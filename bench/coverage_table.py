"""The tables of RESULTS.md about intervals and tests, from the counts of `coverage.py`."""

from collections import defaultdict
from itertools import product
from typing import Any

import numpy as np

__all__ = ["describe_coverage", "name_cell", "parse_cells", "summarise"]

PREVALENCES, AUROCS, SIZES = (0.5, 0.1, 0.03), (0.6, 0.85, 0.97), (40, 100, 400)
WANTED, AT_MOST = 0.93, 0.97

TITLES = {
    "auroc": "AUROC",
    "average_precision": "AP",
    "brier": "Brier",
    "slope": "slope",
    "intercept": "intercept",
    "sensitivity": "sens.",
    "specificity": "spec.",
    "accuracy": "acc.",
    "ppv": "PPV",
    "npv": "NPV",
    "macro_f1": "macro-F1",
    "kappa": "κ",
    "ece": "ECE, bound",
}
LEAST_SHOWN = 0.1


def describe_coverage(results: dict[str, Any]) -> list[str]:
    """Return lines of Markdown, or none without results."""
    if not results:
        return []
    cells = results["cells"]
    n = [cell["scores"]["auroc"]["datasets"] for cell in cells.values()]
    n_tests = [cell.get("tests_batches", 0) * results["batch"] for cell in cells.values()]
    return [
        "## Intervals and tests",
        "",
        "By `bench/coverage.py`: made-up patients with one to three studies; decisions at Youden's",
        f"threshold. {min(n):,.0f} data sets a cell, {min(n_tests):,} of the tests; two standard",
        f"errors of 95 % are {200 * (0.0475 / min(n)) ** 0.5:.1f} points. A score counts where at",
        "least a tenth of a cell's data sets show an interval, which takes five patients of each",
        "class, of those that a share is of.",
        "",
        *_by_score(results["summary"]),
        "",
        *_by_cell(cells),
        "",
        *_tests(cells),
        "",
        *_others(cells),
        "",
    ]


def name_cell(cell: tuple[float, float, int]) -> str:
    return "|".join(f"{part:g}" for part in cell)


def parse_cells(text: str | None) -> list[tuple[float, float, int]]:
    every = [(p, a, n) for p, a, n in product(PREVALENCES, AUROCS, SIZES)]
    if text is None:
        return every
    wanted = {text_of.replace(",", "|") for text_of in text.split(";")}
    return [cell for cell in every if name_cell(cell) in wanted]


def rate(own: dict[str, float], suffix: str = "") -> float:
    """Return the coverage of one score in a cell."""
    return own[f"held{suffix}"] / own[f"shown{suffix}"]


def summarise(cells: dict[str, Any]) -> dict[str, Any]:
    """Return, per score, the lowest coverage over counted cells and the highest over firm ones.

    A cell counts if at least a tenth of its data sets show an interval; it is firm if a tenth show
    one with `ENOUGH` patients of each class.
    """
    found: dict[str, dict[str, Any]] = {}
    names = dict.fromkeys(name for cell in cells.values() for name in cell.get("scores", {}))
    for name in names:
        every = {key: cell["scores"][name] for key, cell in cells.items() if name in cell["scores"]}
        shown = {
            key: rate(own)
            for key, own in every.items()
            if own.get("shown", 0) >= 0.1 * own["datasets"]
        }
        firm = {
            key: rate(own, "_enough")
            for key, own in every.items()
            if own.get("shown_enough", 0) >= 0.1 * own["datasets"]
        }
        if not shown:
            continue
        found[name] = {
            "cells": len(shown),
            "lowest": round(min(shown.values()), 4),
            "lowest_in": min(shown, key=lambda key: shown[key]),
            "mean": round(float(np.mean(list(shown.values()))), 4),
            "below": [key for key, share in shown.items() if share < WANTED],
            "highest_firm": round(max(firm.values()), 4) if firm else None,
            "above": [key for key, share in firm.items() if share > AT_MOST],
            "without_width": int(sum(own.get("no_width", 0) for own in every.values())),
        }
    return found


def _by_score(summary: dict[str, Any]) -> list[str]:
    lines = [
        "| score | cells | mean | lowest, in | highest with 20 patients of each class "
        f"| below {100 * WANTED:.0f} % | above {100 * AT_MOST:.0f} % | without width |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, own in summary.items():
        firm = own["highest_firm"]
        lines.append(
            f"| {name.replace('_', ' ')} | {own['cells']} | {_percent(own['mean'])} "
            f"| {_percent(own['lowest'])}, {own['lowest_in'].replace('|', ' ')} "
            f"| {'–' if firm is None else _percent(firm)} | {len(own['below'])} "
            f"| {len(own['above'])} | {own['without_width']} |"
        )
    return lines


def _by_cell(cells: dict[str, Any]) -> list[str]:
    lines = [
        "Coverage in percent by prevalence, AUROC and patients; in brackets where fewer than half",
        "of the data sets show an interval, – where fewer than a tenth do.",
        "",
        f"| cell | {' | '.join(TITLES.values())} |",
        "|---|" + "---|" * len(TITLES),
    ]
    for cell in parse_cells(None):
        scores = cells[name_cell(cell)]["scores"]
        shown = " | ".join(_cell(scores.get(name)) for name in TITLES)
        lines.append(f"| {name_cell(cell).replace('|', ' ')} | {shown} |")
    return lines


def _cell(own: dict[str, float] | None) -> str:
    if own is None or own.get("shown", 0) < LEAST_SHOWN * own["datasets"]:
        return "–"
    text = f"{100 * rate(own):.1f}"
    return text if own["shown"] >= own["datasets"] / 2 else f"({text})"


def _tests(cells: dict[str, Any]) -> list[str]:
    lines = [
        "False positives in percent, at 5 %: for two heads of equal AUROC; for any of the six",
        "pairs of four such heads after Holm's correction; for two heads by the bootstrap, on",
        "fewer data sets; for AUROC, and for the worst other score, between 300 patients and the",
        "cell's.",
        "",
        "| cell | pair | family | pair, bootstrap | drop of AUROC | worst other drop |",
        "|---|---|---|---|---|---|",
    ]
    for cell in parse_cells(None):
        tests = cells[name_cell(cell)].get("tests", {})
        most = max((own["n"] for own in tests.values()), default=0)

        def share(name: str, tests: Any = tests, most: int = most) -> float | None:
            own = tests.get(name, {"n": 0})
            least = 10 if name.endswith("bootstrap") else LEAST_SHOWN * most
            return own["found"] / own["n"] if own["n"] >= max(least, 1) else None

        drops = [name for name in tests if name.startswith("drop") and name != "drop of auroc"]
        known = [found for name in drops if (found := share(name)) is not None]
        told = [share("pair"), share("family"), share("pair:bootstrap"), share("drop of auroc")]
        told.append(max(known) if known else None)
        shown = " | ".join("–" if own is None else f"{100 * own:.1f}" for own in told)
        lines.append(f"| {name_cell(cell).replace('|', ' ')} | {shown} |")
    return lines


def _others(cells: dict[str, Any]) -> list[str]:
    """Return rejected methods pooled over cells, by the expected patients of a class."""
    pooled: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for key, cell in cells.items():
        prevalence, _, size = (float(part) for part in key.split("|"))
        group = "few" if prevalence * size < 20 else "more"
        for name, own in cell.get("others", {}).items():
            pooled[name][group][0] += own.get("held", 0)
            pooled[name][group][1] += own.get("shown", 0)
    lines = [
        "Methods that were not chosen, on fewer data sets: coverage in percent, pooled over cells",
        "with less than 20 abnormal patients expected, and over the others.",
        "",
        "| method | few abnormal patients | 20 or more |",
        "|---|---|---|",
    ]
    for name, own in sorted(pooled.items()):
        shares = [own[group] for group in ("few", "more")]
        shown = " | ".join(f"{100 * held / n:.1f} of {n:.0f}" if n else "–" for held, n in shares)
        lines.append(f"| {name.replace('_', ' ')} | {shown} |")
    return lines


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
