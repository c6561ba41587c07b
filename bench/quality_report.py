"""The quality study's points, curves, comparison of heads with an older version, and figure."""

import csv
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from measuring import write_results
from paired_heads import compare_heads

if TYPE_CHECKING:
    from quality import Piece

__all__ = ["describe_quality", "lead_of_others", "mean_curves", "write_report"]

OURS, BEFORE = "medembed", "before"
FROM_SECONDS = 5.0
AT_MOST = 0.005
CHANCE = 0.5
STEP = 0.25
MARKS = (1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0)
TITLES = {
    OURS: "medembed",
    "autograd": "the same MLPs, autograd",
    "vmap": "the same MLPs, torch.func.vmap",
    "optuna": "Optuna, median pruner",
    "ridge": "RidgeClassifierCV",
    "logistic_cv": "LogisticRegressionCV",
}
TABLES = {
    "made": "made: 128 directions, products",
    "nih": "nih: real radiographs",
    "demo": "demo: synthetic radiographs",
    "low_rank": "made: rank 24",
    "few_columns": "made: 8 columns decide",
    "noisy": "made: much noise",
}

COLUMNS = ("tool", "table", "seed", "head", "seconds", "test_auroc")

Curves = dict[str, dict[str, dict[int, list[tuple[float, float]]]]]
Heads = dict[str, dict[tuple[str, int], dict[str, float]]]


@dataclass
class Points:
    """What a study has found so far.

    Attributes
    ----------
    curves : dict
        tool -> table -> seed -> (seconds, test AUROC) of each best so far.
    heads : dict
        "medembed" or "before" -> (table, seed) -> head -> test AUROC.
    """

    curves: Curves = field(default_factory=lambda: defaultdict(lambda: defaultdict(dict)))
    heads: Heads = field(default_factory=lambda: {OURS: {}, BEFORE: {}})

    def add(self, tool: str, table: str, seed: int, found: Mapping[str, Any]) -> None:
        """Add a scored piece, in place of what was known of this tool, table and seed."""
        if tool != BEFORE:
            self.curves[tool][table][seed] = [(at, auroc) for at, auroc in found["curve"]]
        if tool in self.heads:
            self.heads[tool][table, seed] = found["heads"]


def write_report(
    pieces: Sequence["Piece"], seconds: float, out: Path | None, against: str | None = None
) -> None:
    """Summarise all scored pieces, and the points that `out` has besides, if it is there.

    Writes JSON, CSV and SVG, or prints the JSON without `out`. `against` names the version before;
    without it, the one that `out` names.

    Raises
    ------
    SystemExit
        The points of `out` are compared with another version.
    """
    known = json.loads(out.read_text()).get("against") if out and out.exists() else None
    if against and known and against != known:
        raise SystemExit(
            f"{out} compares with {known}, not with {against}: delete it and its CSV to begin "
            "anew, or give another --out"
        )
    against = against or known
    points = Points() if out is None else read_points(out.with_suffix(".csv"))
    for piece in pieces:
        if piece.score.exists():
            points.add(piece.tool, piece.table, piece.seed, json.loads(piece.score.read_text()))
    curves, heads = points.curves, points.heads
    grid = np.arange(STEP, seconds + STEP / 2, STEP)
    shared = complete(curves)
    means = mean_curves(curves, grid, shared)
    lead = lead_of_others(means, grid)
    results = {
        "ratios": {},
        "lead": lead,
        "tables": {table: len(seeds) for table, seeds in by_table(shared).items()},
        "seconds": seconds,
        "auroc_at": {tool: at_marks(own["all"], grid) for tool, own in means.items()},
        "auroc_at_end": {
            tool: {table: round(float(own[-1]), 4) for table, own in by.items()}
            for tool, by in means.items()
        },
        "seconds_to_end": {
            tool: round(float(np.mean(ends)), 2)
            for tool, by in curves.items()
            if (ends := [curve[-1][0] for curve in all_of(by) if curve])
        },
        "against": against,
        "heads": compare_heads(heads[BEFORE], heads[OURS]),
        "synthetic": "all but nih",
    }
    if out is None:
        print(json.dumps(results, indent=2))
        return
    write_results(out, results)
    write_points(out.with_suffix(".csv"), points)
    draw(out.with_suffix(".svg"), means, grid, by_table(shared))


def at_marks(values: np.ndarray, grid: np.ndarray) -> dict[str, float]:
    marks = [at for at in MARKS if at <= grid[-1]]
    return {f"{at:g}": round(float(np.interp(at, grid, values)), 4) for at in marks}


def all_of(by: Mapping[str, Mapping[int, Any]]) -> list[Any]:
    return [curve for seeds in by.values() for curve in seeds.values()]


def complete(curves: Curves) -> set[tuple[str, int]]:
    """Return the tables and seeds that every tool has: means are over these alone."""
    sets = [{(table, seed) for table in by for seed in by[table]} for by in curves.values()]
    return set.intersection(*sets) if sets else set()


def by_table(shared: set[tuple[str, int]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for table in TABLES:
        if seeds := sorted(seed for name, seed in shared if name == table):
            found[table] = seeds
    return found


def at_times(curve: Sequence[tuple[float, float]], grid: np.ndarray) -> np.ndarray:
    """Return the last value at or before each time, chance before the first."""
    times = np.array([at for at, _ in curve])
    values = np.array([CHANCE, *(value for _, value in curve)])
    return np.asarray(values[np.searchsorted(times, grid, side="right")])


def mean_curves(
    curves: Curves, grid: np.ndarray, shared: set[tuple[str, int]]
) -> dict[str, dict[str, np.ndarray]]:
    """Return, for every tool, the mean over seeds of each table, and over the tables as "all"."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for tool, by in curves.items():
        found[tool] = {
            table: np.mean([at_times(by[table][seed], grid) for seed in seeds], axis=0)
            for table, seeds in by_table(shared).items()
        }
        if found[tool]:
            found[tool]["all"] = np.mean(list(found[tool].values()), axis=0)
    return {tool: own for tool, own in found.items() if own}


def lead_of_others(
    means: Mapping[str, Mapping[str, np.ndarray]], grid: np.ndarray
) -> dict[str, Any]:
    """Return the most that each other tool is above medembed from 5 s on, and when."""
    late = grid >= FROM_SECONDS
    if OURS not in means or not late.any():
        return {}
    leads = {}
    for tool, own in means.items():
        if tool == OURS:
            continue
        above = (own["all"] - means[OURS]["all"])[late]
        place = int(above.argmax())
        leads[tool] = {"auroc": round(float(above[place]), 4), "at": float(grid[late][place])}
    largest = max((own["auroc"] for own in leads.values()), default=None)
    return {"from_seconds": FROM_SECONDS, "tools": leads, "largest": largest}


def write_points(path: Path, points: Points) -> None:
    """Write all points; rows of heads have no seconds, those of tools without a result no AUROC."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for tool, by in points.curves.items():
            for table, seeds in by.items():
                for seed, curve in seeds.items():
                    for at, auroc in curve or [("", "")]:
                        writer.writerow([tool, table, seed, "", at, auroc])
        for tool, pairs in points.heads.items():
            for (table, seed), scores in pairs.items():
                for head, auroc in scores.items():
                    writer.writerow([tool, table, seed, head, "", auroc])


def read_points(path: Path) -> Points:
    """Read what `write_points` wrote; nothing if the file is not there."""
    points = Points()
    if not path.exists():
        return points
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if tuple(rows.fieldnames or ()) != COLUMNS:
            raise SystemExit(
                f"{path} has the columns {', '.join(rows.fieldnames or ())}, and points have "
                f"{', '.join(COLUMNS)}: delete it to begin anew, or give another --out"
            )
        for row in rows:
            pair, tool = (row["table"], int(row["seed"])), row["tool"]
            if row["head"]:
                points.heads[tool].setdefault(pair, {})[row["head"]] = float(row["test_auroc"])
                continue
            curve = points.curves[tool][pair[0]].setdefault(pair[1], [])
            if row["seconds"]:
                curve.append((float(row["seconds"]), float(row["test_auroc"])))
    return points


def draw(
    path: Path,
    means: Mapping[str, Mapping[str, np.ndarray]],
    grid: np.ndarray,
    tables: Mapping[str, Sequence[int]],
) -> None:
    """Draw the mean over tables, and each table below, as an SVG whose bytes repeat."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "medembed"
    from matplotlib import pyplot

    from medembed.report.figures.plotting import LIGHT, LINES

    figure = pyplot.figure(figsize=(9, 9.5), layout="constrained")
    cells = figure.add_gridspec(2 + -(-len(tables) // 3), 3)
    panels = {"all": figure.add_subplot(cells[:2, :])}
    for place, table in enumerate(tables):
        panels[table] = figure.add_subplot(cells[2 + place // 3, place % 3])
    tools = [tool for tool in TITLES if tool in means]
    for table, axes in panels.items():
        for tool in tools:
            k = list(TITLES).index(tool)
            axes.plot(
                grid,
                np.where(means[tool][table] > CHANCE, means[tool][table], np.nan),
                color=LIGHT.series[k % len(LIGHT.series)],
                ls=LINES[k % len(LINES)],
                drawstyle="steps-post",
                lw=2.2 if tool == OURS else 1.2,
                label=TITLES[tool],
            )
        axes.set_xscale("log")
        axes.set_xticks([at for at in MARKS if at <= grid[-1]])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
        ends = [means[tool][table][-1] for tool in tools]
        if ends:
            axes.set_ylim(min(ends) - 0.06, max(ends) + 0.01)
        axes.grid(color=LIGHT.faint, lw=0.6)
    n = sum(map(len, tables.values()))
    panels["all"].axvline(FROM_SECONDS, color=LIGHT.ink, lw=0.8, ls=":")
    panels["all"].set_title(
        f"Mean over {len(tables)} tables, {n} pairs of table and seed", loc="left"
    )
    panels["all"].set_ylabel("best test AUROC so far")
    panels["all"].set_xlabel("seconds since the first fit, two cores")
    panels["all"].legend(loc="lower right", frameon=False, fontsize=9)
    for table in tables:
        panels[table].set_title(TABLES[table], loc="left", fontsize=9)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


def describe_quality(results: Mapping[str, Any]) -> list[str]:
    """Return the study as lines of Markdown, or none without results."""
    if not results:
        return []
    pairs = sum(results["tables"].values())
    times = list(next(iter(results["auroc_at"].values())))
    verdict, largest = "", results["lead"].get("largest")
    if largest is not None:
        missed = ", missed" if largest > AT_MOST else ""
        verdict = (
            f" From {FROM_SECONDS:g} s on the most that another tool is above medembed is "
            f"{largest:+.4f} (wanted: at most {AT_MOST:g}{missed})."
        )
    lines = [
        "## Quality against time",
        "",
        f"By `bench/quality.py`: best test AUROC so far, mean of {pairs} pairs of table and seed",
        f"({', '.join(f'{name} × {n}' for name, n in results['tables'].items())}), each tool with",
        f"{results['seconds']:g} s since its first fit; .5 before its first result.{verdict}",
        "What every tool found when, and each head's score: [CSV](results/quality.csv).",
        "",
        "![Best test AUROC so far against seconds, by tool](results/quality.svg)",
        "",
        f"| tool | {' | '.join(f'at {at} s' for at in times)} | last improvement, mean |",
        f"|---|{'---|' * (len(times) + 1)}",
    ]
    for tool, own in results["auroc_at"].items():
        values = " | ".join(f"{value:.3f}" for value in own.values())
        end = results["seconds_to_end"].get(tool)
        lines.append(f"| {TITLES[tool]} | {values} | {'none' if end is None else f'{end:.1f} s'} |")
    return [*lines, "", *_describe_heads(results["heads"], results.get("against"))]


def _describe_heads(heads: Mapping[str, Mapping[str, Any]], against: str | None) -> list[str]:
    if not heads:
        return []
    version = "an earlier version" if against is None else f"the version of {against}"
    lines = [
        f"Each head against {version}, on the same tables and seeds; *p* is the chance of",
        "a difference as low if the new one is not worse (one-sided paired t-test and Wilcoxon's).",
        "",
        "| head | pairs | before | now | difference (95 %) | p, worse | p, Wilcoxon |",
        "|---|---|---|---|---|---|---|",
    ]
    for head, own in heads.items():
        low, high = own["interval"]
        lines.append(
            f"| {head} | {own['pairs']} | {own['before']:.4f} | {own['now']:.4f} "
            f"| {own['difference']:+.4f} ({low:+.4f} to {high:+.4f}) "
            f"| {own['p_worse']:.2g} | {own['p_worse_wilcoxon']:.2g} |"
        )
    return [*lines, "", *_describe_tables(heads)]


def _describe_tables(heads: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [
        "The same by table. Holm's method corrects *p* for the tables of a head.",
        "",
        "| head | table | pairs | difference (95 %) | p, worse | p, Holm |",
        "|---|---|---|---|---|---|",
    ]
    for head, compared in heads.items():
        for table, own in compared["tables"].items():
            low, high = own["interval"]
            lines.append(
                f"| {head} | {TABLES[table]} | {own['pairs']} "
                f"| {own['difference']:+.4f} ({low:+.4f} to {high:+.4f}) "
                f"| {own['p_worse']:.2g} | {own['p_worse_holm']:.2g} |"
            )
    return [*lines, ""]
