"""Best test AUROC against seconds: the default sweep, other tools, and an older version of it.

    .venv/bin/python bench/quality.py race --place PIECES          # idle: everything else may wait
    .venv/bin/python bench/quality.py race --place PIECES --for 200    # again until it says 0 left
    .venv/bin/python bench/quality.py score --place PIECES             # its time does not count
    .venv/bin/python bench/quality.py report --place PIECES --out bench/results/quality.json

A piece is one tool on one table and seed, kept as a file of PIECES; a stage only does what is
missing, so a study can be made in parts and goes on after it was killed. `quality_tables.py` says
what the tables are, `quality_tools.py` what the tools do. `--against COMMIT` (or the path of a
checkout, of which only `medembed/` is used) adds that version of the program as the tool `before`,
which does not race: `score` sweeps with it, and `report` compares the test AUROC of each head, old
against new, pair by pair.

`report` writes, beside the JSON, the figure as SVG and every point as CSV. It starts from the
points which that CSV has: a study can be divided among machines and days; delete the CSV to begin
anew. The mean over tables and seeds is of step functions: before its first result a tool counts .5,
after its last one what it had.
`lead` is the most that another tool is above medembed from 5 s on, and wanted to be at most .005.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from measuring import machine, progress
from quality_tables import SHARED, TABLES, prepare

HERE = Path(__file__).parent
TOOLS = ("medembed", "autograd", "vmap", "optuna", "ridge", "logistic_cv")
BEFORE = "before"
THREADS = {"medembed": None, BEFORE: None, "optuna": 1}


class Piece(NamedTuple):
    """One tool on one table and seed, and its files."""

    table: str
    seed: int
    tool: str
    place: Path

    @property
    def race(self) -> Path:
        """What the tool found when."""
        return self._file("race.json")

    @property
    def score(self) -> Path:
        """What that scores on test."""
        return self._file("score.json")

    @property
    def run(self) -> Path:
        """Where medembed sweeps."""
        return self._file("run")

    def _file(self, kind: str) -> Path:
        return self.place / "pieces" / f"{self.table}-{self.seed}-{self.tool}.{kind}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("tables", "race", "score", "report"))
    parser.add_argument("--place", type=Path, required=True, help="where the pieces are kept")
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=20, help="budget of a tool")
    parser.add_argument(
        "--for", type=float, dest="limit", help="begin no piece after these seconds"
    )
    parser.add_argument("--against", help="a commit or a checkout, as the tool `before`")
    parser.add_argument("--shared", type=Path, default=SHARED, help="the folder that holds nih/")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    given.place.mkdir(parents=True, exist_ok=True)
    (given.place / "pieces").mkdir(exist_ok=True)
    pieces = list(plan(given))
    if given.stage == "report":
        from quality_report import write_report

        version = given.against and Path(given.against).name
        write_report(pieces, given.seconds, given.out, version)
        return
    if given.stage == "tables":
        for name in dict.fromkeys(piece.table for piece in pieces):
            for seed in range(given.seeds):
                prepare(name, seed, tables_of(given.place), given.shared)
        return
    run(given, pieces)


def plan(given: argparse.Namespace) -> Iterator[Piece]:
    """Yield all pieces, so that what is done first has every tool."""
    tools = given.tools.split(",")
    names = given.tables.split(",")
    for asked, known in ((tools, (*TOOLS, BEFORE)), (names, tuple(TABLES))):
        if unknown := [name for name in asked if name not in known]:
            raise SystemExit(f"{unknown[0]} is unknown: choose among {', '.join(known)}")
    if given.against and BEFORE not in tools:
        tools.append(BEFORE)
    if BEFORE in tools and not given.against and given.stage != "report":
        raise SystemExit(f"{BEFORE} is the program of --against; give it")
    for seed in range(given.seeds):
        for name in names:
            yield from (Piece(name, seed, tool, given.place) for tool in tools)


def tables_of(place: Path) -> Path:
    folder = place / "tables"
    folder.mkdir(exist_ok=True)
    return folder


def run(given: argparse.Namespace, pieces: list[Piece]) -> None:
    """Race or score what is missing, and say what is left; exit 3 if something is."""
    start = time.monotonic()
    if given.stage == "race":
        todo = [piece for piece in pieces if not piece.race.exists() and piece.tool != BEFORE]
    else:
        raced = [piece for piece in pieces if piece.race.exists() or piece.tool == BEFORE]
        todo = [piece for piece in raced if not piece.score.exists()]
    done = 0
    for piece in todo:
        if given.limit is not None and time.monotonic() - start > given.limit:
            break
        began = time.monotonic()
        if given.stage == "race":
            race(given, piece)
        else:
            score(given, piece)
        done += 1
        name = f"{piece.table} {piece.seed} {piece.tool}"
        progress(f"[{done}/{len(todo)}] {name}: {time.monotonic() - began:.1f} s")
    print(f"{len(todo) - done} left")
    if done < len(todo):
        sys.exit(3)


def race(given: argparse.Namespace, piece: Piece) -> None:
    shutil.rmtree(piece.run, ignore_errors=True)  # of a race that was killed
    start = time.perf_counter()
    found = call(given, piece, "race")
    seconds = time.perf_counter() - start
    kept = {"found": found, "process_seconds": round(seconds, 2), "machine": machine()}
    write(piece.race, {**kept, "seconds": given.seconds})


def score(given: argparse.Namespace, piece: Piece) -> None:
    found = [] if piece.tool == BEFORE else json.loads(piece.race.read_text())["found"]
    write(piece.score, call(given, piece, "score", json.dumps(found)))


def write(path: Path, values: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values) + "\n")
    partial.replace(path)


def call(given: argparse.Namespace, piece: Piece, stage: str, text: str = "") -> Any:
    """Run a stage of a tool in a process of its own; return the JSON of its last line."""
    cache, manifest = prepare(piece.table, piece.seed, tables_of(given.place), given.shared)
    tool = "medembed" if piece.tool == BEFORE else piece.tool
    command = [sys.executable, str(HERE / "quality_tools.py"), stage, tool, str(cache)]
    command += [str(manifest), str(piece.run), "--seed", str(piece.seed)]
    command += ["--seconds", str(given.seconds)]
    environment = dict(os.environ)
    environment.pop("OMP_NUM_THREADS", None)
    if threads := THREADS.get(piece.tool, 2):
        environment["OMP_NUM_THREADS"] = str(threads)
    if piece.tool == BEFORE:
        environment["PYTHONPATH"] = str(checkout(given.against, given.place))
    done = subprocess.run(
        command, input=text, stdout=subprocess.PIPE, text=True, env=environment, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def checkout(against: str, place: Path) -> Path:
    """Return a folder with that version of `medembed/`, taken from git if it is a commit."""
    path = Path(against)
    if (path / "medembed").is_dir():
        return path.absolute()
    folder = place.absolute() / f"medembed-{against}"
    if not folder.is_dir():
        partial = folder.with_suffix(".partial")
        partial.mkdir(exist_ok=True)
        archive = subprocess.run(
            ["git", "-C", str(HERE.parent), "archive", against, "medembed", "data_manifests"],
            stdout=subprocess.PIPE,
            check=True,
        )
        subprocess.run(["tar", "-x", "-C", str(partial)], input=archive.stdout, check=True)
        partial.rename(folder)
    return folder


if __name__ == "__main__":
    main()
