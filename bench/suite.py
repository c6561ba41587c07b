"""Run the benchmarks one after the other, write RESULTS.md, or check against committed results.

    .venv/bin/python bench/suite.py                       # make bench: everything, 90 minutes
    .venv/bin/python bench/suite.py --only startup,cache  # some parts; the others are kept
    .venv/bin/python bench/suite.py --check               # make bench-check
    .venv/bin/python bench/suite.py --render              # rewrite RESULTS.md from the JSON files

Every part is a script of this folder, run in a separate process, that alternates medembed with its
alternatives and writes JSON. `--check` runs the parts into a temporary folder and compares the
ratios with the committed ones: a ratio that is worse by more than 20 %, twice, fails. The check
needs an idle machine of the kind that produced the committed figures; `--against` takes others.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coverage_table import describe_coverage
from quality_report import describe_quality

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TOLERANCE = 0.2
NOT_MEASURED = "not measured"
GPU_FILE = "gpu.json"
GPU_FIGURES = (
    ("ratios.forward_vs_peak", "arithmetic of the tower at 896 px", "bf16 peak, 8192³", "×"),
    ("ratios.compiled_vs_eager", "compiled by block", "as it is", "×"),
    ("ratios.extraction_vs_forward", "images a second, end to end", "forward pass alone", "×"),
    ("ratios.extraction_vs_transformers_loop", "the same", "loop over transformers", "×"),
    ("ratios.best_images_per_second", "images a second at 896 px, forward", "", ""),
    ("steps.peak.tflops", "bf16 product of 8192³", "", "TFLOP/s"),
    ("steps.canary.distances.mean", "distance of `mean` in bf16", "limit 0.02", ""),
    ("steps.canary.distances.max", "distance of `max` in bf16", "limit 0.02", ""),
    ("steps.canary.distances.grid4", "distance of `grid4` in bf16", "limit 0.02", ""),
    ("steps.in_flight.equal", "of 20 overlapping batches equal to each alone", "20", ""),
    ("steps.workers.rows", "rows of a cache after a worker was killed", "512", ""),
)


@dataclass(frozen=True)
class Figure:
    """One number of a part's JSON, and its wanted limit; see suite.toml."""

    key: str
    what: str
    against: str = ""
    better: str = "higher"
    wanted: float | None = None
    unit: str = "×"

    @property
    def is_ratio(self) -> bool:
        """Whether the figure is a ratio, which carries over to similar machines."""
        return self.unit == "×"

    def is_missed(self, value: float) -> bool:
        """Return whether a value is on the wrong side of the wanted limit."""
        if self.wanted is None:
            return False
        return value < self.wanted if self.better == "higher" else value > self.wanted


@dataclass(frozen=True)
class Part:
    """A script with its arguments, and the figures of the JSON that it writes."""

    name: str
    title: str
    command: str
    file: str
    figures: tuple[Figure, ...]
    takes_folder: bool = False


def read_parts() -> tuple[Part, ...]:
    """Return the parts in suite.toml."""
    tables = tomllib.loads((HERE / "suite.toml").read_text(encoding="utf-8"))["part"]
    parts = []
    for table in tables:
        figures = tuple(Figure(**figure) for figure in table.pop("figure"))
        parts.append(Part(**table, figures=figures))
    return tuple(parts)


PARTS = read_parts()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help=f"of {','.join(part.name for part in PARTS)}")
    parser.add_argument("--check", action="store_true", help="compare, and change nothing")
    parser.add_argument("--render", action="store_true", help="run nothing")
    parser.add_argument("--against", type=Path, default=RESULTS, help="results to compare with")
    parser.add_argument("--fresh", type=Path, help="with --check: results to take as measured")
    given = parser.parse_args()
    parts = choose(parser, given.only)
    if given.check:
        sys.exit(check(parts, given.against, given.fresh))
    if not given.render:
        run(parts, RESULTS)
    (HERE / "RESULTS.md").write_text(render(RESULTS))
    print(f"{HERE.name}/RESULTS.md")


def choose(parser: argparse.ArgumentParser, only: str | None) -> Sequence[Part]:
    """Return the requested parts, in their order."""
    known = {part.name: part for part in PARTS}
    names = only.split(",") if only else list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--only {unknown[0]}: choose among {', '.join(known)}")
    return [known[name] for name in known if name in names]


def run(parts: Sequence[Part], folder: Path) -> None:
    """Run every part to its end, even if others fail; exit 1 if one failed."""
    failed = []
    for number, part in enumerate(parts, 1):
        print(f"[{number}/{len(parts)}] {part.title} …", file=sys.stderr, flush=True)
        script, *options = part.command.split()
        out = folder if part.takes_folder else folder / part.file
        start = time.monotonic()
        command = [sys.executable, str(HERE / script), *options, "--out", str(out)]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            failed.append(part.name)
        print(f"    {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; results of the others are written")


def check(parts: Sequence[Part], against: Path, fresh: Path | None) -> int:
    """Compare fresh ratios with the committed ones; return the exit status.

    A part with a worse ratio is measured again: a regression is worse both times, while other load
    on the machine rarely is.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = fresh or Path(name)
        if fresh is None:
            run(parts, folder)
        found = list(regressions(parts, against, folder))
        if found and fresh is None:
            print(*(f"{one.line}; measuring again" for one in found), sep="\n", file=sys.stderr)
            suspects = {(one.part.name, one.figure.key) for one in found}
            again = list(dict.fromkeys(one.part for one in found))
            run(again, folder)
            found = list(regressions(again, against, folder))
            found = [one for one in found if (one.part.name, one.figure.key) in suspects]
    for one in found:
        print(one.line)
    if not found:
        print(f"no ratio is worse by more than {TOLERANCE:.0%}")
    return int(bool(found))


@dataclass(frozen=True)
class Regression:
    """A ratio that is worse than the committed one, and the line that reports it."""

    part: Part
    figure: Figure
    line: str


def regressions(parts: Sequence[Part], against: Path, fresh: Path) -> Iterator[Regression]:
    """Yield every ratio that is worse than the committed one by more than the tolerance."""
    for part in parts:
        before, now = read(against / part.file), read(fresh / part.file)
        for figure in part.figures:
            old, new = look_up(before, figure.key), look_up(now, figure.key)
            if not figure.is_ratio or old is None:
                continue
            text = f"{part.name}: {figure.key} was {old:g} and is"
            if new is None:
                yield Regression(part, figure, f"{text} {NOT_MEASURED}")
                continue
            worse = old / new if figure.better == "higher" else new / old
            if worse > 1 + TOLERANCE:
                yield Regression(part, figure, f"{text} {new:g}")


def read(path: Path) -> dict[str, Any]:
    """Return a part's results, empty if there are none."""
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def look_up(results: dict[str, Any], key: str) -> float | None:
    """Return the number at a dotted key, or None."""
    value = _follow(results, key)
    return float(value) if isinstance(value, int | float) else None


def look_up_reason(results: dict[str, Any], key: str) -> str | None:
    """Return the text at a dotted key that takes the place of a number."""
    value = _follow(results, key)
    return value if isinstance(value, str) else None


def _follow(results: dict[str, Any], key: str) -> Any:
    value: Any = results
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def render(folder: Path) -> str:
    """Return the tables of all figures, ratios first, with their origin."""
    lines = [
        "# Benchmarks",
        "",
        "Made by `make bench` from the JSON files in `results/`; each script says in its first",
        "lines what is timed, against what, and how often. Ratios are medians of alternated runs;",
        "sweeps ran once. All data are synthetic unless called real. Figures of sweeps stand for",
        "AVX2 first, which is what most laptops have: the last table names each part's processor",
        "and what it multiplied in.",
        "",
        "| part | what | against | measured | wanted | runs |",
        "|---|---|---|---|---|---|",
    ]
    for part in PARTS:
        results = read(folder / part.file)
        lines += [_row(part, figure, results) for figure in part.figures]
    coverage = describe_coverage(read(folder / "coverage.json"))
    return (
        "\n".join(
            [
                *(*lines, "", *_startup(folder), *_gpu(folder), *_growth(folder)),
                *describe_quality(read(folder / "quality.json")),
                *(*coverage, *_noise(folder), *_machines(folder)),
            ]
        )
        + "\n"
    )


def _startup(folder: Path) -> list[str]:
    """Return how soon each command answers, from `startup.py`, as lines."""
    commands = read(folder / "startup.json").get("commands")
    if not commands:
        return []
    lines = ["## How soon commands answer", ""]
    lines += [
        "Seconds until something stands on the terminal, and until the end, with nothing left"
    ]
    lines += ["to do, by `bench/startup.py`; at most 1 s is wanted for the first.", ""]
    lines += ["| `medembed …` | first output | end |", "|---|---|---|"]
    lines += [f"| {k} | {own['first']:.2f} s | {own['end']:.2f} s |" for k, own in commands.items()]
    return [*lines, ""]


def _gpu(folder: Path) -> list[str]:
    """Return the results of `gpu_check.py` as lines, "not measured" if missing."""
    results = read(folder / GPU_FILE)
    card = _follow(results, "steps.versions.card") if results.get("device") == "cuda" else None
    lines = [
        "## On a GPU",
        "",
        f"By `bench/gpu_check.py`, {f'on {card}' if card else 'which has run on no GPU yet'}.",
        "",
        "| what | against | measured |",
        "|---|---|---|",
    ]
    for key, what, against, unit in GPU_FIGURES:
        value = look_up(results, key) if card else None
        reason = look_up_reason(results, key) if card else None
        shown = reason or NOT_MEASURED if value is None else f"{_short(value)} {unit}".rstrip()
        lines.append(f"| {what} | {against} | {shown} |")
    return [*lines, ""]


def _row(part: Part, figure: Figure, results: dict[str, Any]) -> str:
    value = look_up(results, figure.key)
    if value is None:
        shown = look_up_reason(results, figure.key) or NOT_MEASURED
    else:
        shown = f"{_short(value)} {figure.unit}{' (missed)' * figure.is_missed(value)}"
    sign = "at least" if figure.better == "higher" else "at most"
    wanted = "" if figure.wanted is None else f"{sign} {figure.wanted:g} {figure.unit}"
    cells = (part.title, figure.what, figure.against, shown, wanted, f"`bench/{part.command}`")
    return f"| {' | '.join(cells)} |"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _growth(folder: Path) -> list[str]:
    results = read(folder / "growth.json")
    if not results:
        return []
    lines = ["## How cost grows", "", "Exponent b of seconds = a · n^b, by `bench/growth.py`.", ""]
    lines += ["| what | sizes and seconds | b, fitted | b, last step |", "|---|---|---|---|"]
    for what, points in results["seconds"].items():
        times = ", ".join(f"{int(n):,}: {seconds:.3g} s" for n, seconds in points.items())
        b = results["exponents"][what]
        lines.append(
            f"| {what.replace('_', ' ')} | {times} | {b['fitted']:.2f} | {b['last']:.2f} |"
        )
    return [*lines, "", *_memory(results)]


def _memory(results: dict[str, Any]) -> list[str]:
    """Return the peaks of the sweeps of `growth.py` as lines; older results have none."""
    if not results.get("memory"):
        return []
    lines = [
        "Peak of memory of all processes, the table in it, and what the sweep said beforehand."
    ]
    lines += ["", "| what | size | peak | table | said |", "|---|---|---|---|---|"]
    for what, points in results["memory"].items():
        for n, own in points.items():
            sizes = (own["peak_gb"], own["table_gb"], own["estimate_gb"])
            cells = " | ".join(f"{size:.3g} GB" for size in sizes)
            lines.append(f"| {what.replace('_', ' ')} | {int(n):,} | {cells} |")
    return [*lines, ""]


def _noise(folder: Path) -> list[str]:
    """Return the scores of a sweep's winners on pure noise, from `noise_cv.py`, as lines."""
    results = read(folder / "noise_cv.json")
    if not results:
        return []
    lines = [
        "## Cross-validated AUROC on pure noise",
        "",
        f"By `bench/noise_cv.py`: {results['sets']} made-up sets of {results['patients']} patients",
        "in which nothing is to be learnt, so that 0.5 is right; all heads on the same sets.",
        "*Chosen by* is the score that the winner was chosen by, which is too good.",
        "",
        "| head | configurations | cv, mean | standard error | chosen by |",
        "|---|---|---|---|---|",
    ]
    for head, own in results["heads"].items():
        row = f"{own['mean']:.3f} | {own['standard_error']:.3f} | {own['chosen_by']:.3f}"
        lines.append(f"| {head} | {own['n_tried']} | {row} |")
    return [*lines, ""]


def _machines(folder: Path) -> list[str]:
    lines = [
        "## Machine and versions",
        "",
        "| part | cores | processor | multiplies in | Python | versions |",
        "|---|---|---|---|---|---|",
    ]
    for part in PARTS:
        results = read(folder / part.file)
        for name, machine in _machines_of(part.name, results).items():
            versions = ", ".join(f"{lib} {number}" for lib, number in machine["versions"].items())
            row = f"| {name} | {machine['cores']}, {machine['architecture']} "
            row += f"| {machine.get('processor') or 'not recorded'} "
            row += f"| {machine.get('instructions') or 'not recorded'} "
            lines.append(f"{row}| {machine['python']} | {versions} |")
    return lines


def _machines_of(name: str, results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the machine by part of the suite, or by the part's own parts where they differ."""
    if "machines" in results:
        return {f"{name}: {own}": machine for own, machine in results["machines"].items()}
    return {name: results["machine"]} if results.get("machine") else {}


if __name__ == "__main__":
    main()
