"""Time how soon commands answer, as whole processes on a demo of 60 synthetic patients.

`compare` and `report` are timed on a default sweep of real chest radiographs too (`nih`), if
`../shared/data` has them; that sweep is made first and not timed.

    .venv/bin/python bench/startup.py --out bench/results/startup.json

`medembed --help` and a bare `import click` alternate (`ratios.help_vs_import_click`).
Of every command, `commands` holds the seconds until something stands on its terminal (`first`) and
until it ends (`end`), medians of `--runs-each`. What a command could make was made before, so that
those which continue have nothing left to do, and those which never overwrite refuse. Not timed are
`prompts` and `manifest texts`, which need a checkpoint with a text tower, and `cache pull` and
`push`, which need a bucket.
"""

import argparse
import os
import pty
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import alternate, time_command, write_results

MEDEMBED = Path(sys.executable).with_name("medembed")
NIH = Path(__file__).resolve().parents[2] / "shared" / "data" / "nih"


def commands_of(home: Path) -> dict[str, list[str]]:
    """Return a command line of every command, on what a demo left in `home`."""
    manifest, images, cache = (str(home / name) for name in ("manifest.csv", "images", "cache"))
    run = str(home / "runs" / "sweep")
    model = f"{run}/models/logistic"
    image = str(next(Path(images).rglob("*.png")))
    review = home / "review.csv"
    review.write_text("sha256,new_label\n")
    embed = ["extract", manifest, "--image-root", images, "--encoder", "demo", "--cache", cache]
    return {
        "--help": ["--help"],
        "sweep --help": ["sweep", "--help"],
        "run": [
            *("run", manifest, "--image-root", images, "--encoder", "demo"),
            *("-o", str(home / "run")),
        ],
        "demo": ["demo", str(home), "--patients", "60"],
        "manifest init": [
            "manifest",
            "init",
            images,
            "--yes",
            "--force",
            "-o",
            f"{home}/again.toml",
        ],
        "manifest build": [
            *("manifest", "build", f"{home}/recipe.toml", "--image-root", images),
            *("-o", f"{home}/again.csv"),
        ],
        "manifest recipes": ["manifest", "recipes"],
        "manifest check": ["manifest", "check", manifest],
        "manifest relabel": [
            *("manifest", "relabel", manifest, str(review), "-o", f"{home}/relabelled.csv")
        ],
        "doctor": ["doctor"],
        "plan": ["plan", "--auroc", "0.9", "--prevalence", "0.4", "--width", "0.1"],
        "worklist": ["worklist", cache, manifest, "-o", f"{home}/worklist.csv"],
        "encoders": ["encoders"],
        "extract": embed,
        "extract --dry-run": [*embed, "--dry-run"],
        "cache info": ["cache", "info", cache],
        "cache verify": ["cache", "verify", cache],
        "cache compact": ["cache", "compact", cache],
        "cache export": ["cache", "export", cache, manifest, "-o", f"{home}/rows.parquet"],
        "autoencoder": [
            *("autoencoder", manifest, "--image-root", images, "--size", "32", "--widths", "8"),
            *("--epochs", "1", "-o", f"{home}/autoencoder"),
        ],
        "sweep": ["sweep", cache, manifest, "-o", run],
        "ensemble": ["ensemble", run, "-o", f"{home}/ensemble"],
        "finetune": [
            *("finetune", manifest, "--image-root", images, "--encoder", "demo"),
            *("--unfreeze", "0", "--epochs", "1", "-o", f"{home}/finetuned"),
        ],
        "compare": ["compare", run],
        "report": ["report", run, "-o", str(home / "again")],
        "map": ["map", run, cache, manifest],
        "similar": ["similar", cache, manifest, "--image", "1"],
        "audit labels": ["audit", "labels", run, "--manifest", manifest, "-o", f"{home}/audit"],
        "audit shortcuts": ["audit", "shortcuts", cache, manifest, "--columns", "region"],
        "predict": ["predict", model, image, "--cache", cache],
        "predict, not cached": ["predict", model, image],
        "evaluate": [
            *("evaluate", model, cache, manifest, "--split", "test"),
            *("-o", str(home / "evaluated")),
        ],
        "completion": ["completion", "bash"],
    }


def commands_of_nih(home: Path) -> dict[str, list[str]]:
    """Sweep the real radiographs' cache into `home`; return the commands that show the run."""
    if not NIH.is_dir():
        print(f"{NIH} is not there: not measured", file=sys.stderr)
        return {}
    run = str(home / "nih")
    sweep = ["sweep", str(NIH / "cache"), str(NIH / "manifest.csv"), "-o", run, "--quiet"]
    subprocess.run([str(MEDEMBED), *sweep], check=True, stdout=subprocess.DEVNULL)
    return {
        "compare, nih": ["compare", run],
        "report, nih": ["report", run, "-o", str(home / "page")],
    }


def time_on_terminal(arguments: list[str]) -> tuple[float, float]:
    """Return the seconds until a terminal shows something, and until the command ends."""
    ours, theirs = pty.openpty()
    began = time.perf_counter()
    child = subprocess.Popen(
        [str(MEDEMBED), *arguments], stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL
    )
    os.close(theirs)
    first = None
    try:
        while os.read(ours, 65536):
            first = first or time.perf_counter() - began
    except OSError:  # Linux's end of a terminal that nobody has open any more
        pass
    os.close(ours)
    child.wait()
    end = time.perf_counter() - began
    return first or end, end


def time_commands(runs: int, place: Path) -> dict[str, dict[str, float]]:
    """Return `first` and `end` of every command, medians in seconds."""
    found = {}
    home = place / "demo"
    demo = [str(MEDEMBED), "demo", str(home), "--patients", "60", "--quiet"]
    subprocess.run(demo, check=True, stdout=subprocess.DEVNULL)
    for name, arguments in {**commands_of(home), **commands_of_nih(place)}.items():
        subprocess.run(  # makes what it can, so that nothing is left to do
            [str(MEDEMBED), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        times = [time_on_terminal(arguments) for _ in range(runs)]
        first, end = (statistics.median(column) for column in zip(*times, strict=True))
        found[name] = {"first": round(first, 3), "end": round(end, 3)}
        print(f"{name:<20}{first:>8.2f} s{end:>8.2f} s", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--runs-each", type=int, default=3, help="of the commands; 0 for none")
    parser.add_argument("--home", type=Path, help="where the demo and the sweep are made, or are")
    parser.add_argument("--out", type=Path, default=Path("bench/results/startup.json"))
    arguments = parser.parse_args()
    seconds = alternate(
        {
            "medembed --help": lambda: time_command([str(MEDEMBED), "--help"]),
            "import click": lambda: time_command([sys.executable, "-c", "import click"]),
        },
        arguments.runs,
    )
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    document = {"seconds": seconds, "ratios": {"help_vs_import_click": statistics.median(ratios)}}
    with tempfile.TemporaryDirectory() as place:
        if arguments.runs_each:
            document["commands"] = time_commands(arguments.runs_each, arguments.home or Path(place))
    write_results(arguments.out, document)


if __name__ == "__main__":
    main()
