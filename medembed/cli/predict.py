"""`medembed predict`: apply a packaged model to images."""

import contextlib
import json
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from medembed.cli.commands import Command
from medembed.cli.console import exit_status, print_json, say, suggest
from medembed.cli.options import (
    LOCATION,
    PATH,
    Finite,
    check_point,
    device_option,
    json_option,
    limit_options,
    precision_option,
)
from medembed.cli.progress import showing_progress
from medembed.core.locations import Location
from medembed.core.text import printable

if TYPE_CHECKING:
    from medembed.prediction import Predictor
    from medembed.prediction.rows import PredictedRow

__all__ = ["predict_command", "write_table"]

COLUMNS = 80
NAME_COLUMNS = 38
OUTER = 0.05
"""Share of the training patients that lie furthest out; an equal share of similar studies does."""
_NO_REFERENCE = (
    "Not known: how far these images lie from those of training. The model keeps no statistics of "
    "them, or of too few patients; models that `medembed sweep` packages now do."
)


@click.command(
    "predict",
    cls=Command,
    starting="Loading the model",
    examples=[
        "medembed predict runs/sweep/models/mlp film.png",
        "medembed predict runs/sweep films/ --encoder google/medgemma-4b-pt -o predictions.csv",
        "medembed predict runs/sweep --manifest mura.csv --cache cache",
    ],
    sections={
        "Images": ["manifest", "image-root", "cache", "max-bytes", "max-seconds"],
        "Decisions": ["operating-point", "alpha"],
        "Encoder": ["encoder", "device", "precision"],
    },
)
@click.argument("model_path", metavar="MODEL", type=PATH)
@click.argument("images", metavar="[IMAGE]...", nargs=-1, type=PATH)
@click.option("--manifest", "manifest_path", type=PATH, help="Manifest whose images are predicted.")
@click.option(
    "--image-root",
    type=LOCATION,
    help="Directory or bucket that the manifest's paths are relative to; needed for images that "
    "are not in the cache.",
)
@click.option(
    "--cache", "caches", type=LOCATION, multiple=True,
    help="Cache to look embeddings up in first; of an ensemble one for each encoder, repeated.",
)  # fmt: skip
@click.option(
    "--encoder", "references", multiple=True,
    help="The model's encoder, if not found where the model's card says; repeated, those of an "
    "ensemble in the card's order.",
)  # fmt: skip
@click.option(
    "--explain",
    type=PATH,
    metavar="DIR",
    help="Directory for a heat map of each image; runs the encoder on all images.",
)
@click.option(
    "--alpha",
    type=Finite(0, 1, min_open=True, max_open=True),
    default=0.1,
    show_default=True,
    help="Share of prediction sets that may miss the truth.",
)
@click.option(
    "--operating-point",
    metavar="POINT",
    callback=check_point,
    help="Operating point of decisions: one stored with the model, such as sensitivity=0.95, or "
    "threshold=0.3 on calibrated probabilities; Youden's by default.",
)
@limit_options
@device_option
@precision_option
@click.option(
    "-o",
    "--output",
    type=PATH,
    metavar="FILE",
    help="Write the rows to a .csv or .xlsx file instead of the terminal.",
)
@click.option(
    "--jsonl", is_flag=True, help="Print one line of JSON per row as soon as it is ready."
)
@json_option
def predict_command(
    model_path: Path,
    images: tuple[Path, ...],
    manifest_path: Path | None,
    image_root: Location | None,
    caches: tuple[Location, ...],
    references: tuple[str, ...],
    explain: Path | None,
    alpha: float,
    operating_point: str | None,
    max_bytes: int,
    max_seconds: float,
    device: str,
    precision: str,
    output: Path | None,
    jsonl: bool,
    as_json: bool,
) -> None:
    """Apply MODEL to images: files, directories, or those of a manifest.

    MODEL is a packaged model such as RUN/models/mlp, or a run, whose best model by cross-validation
    is then used; of an ensemble, every encoder embeds the images. Each image and study gets the
    calibrated probability of abnormal, the decision at an operating point, and the prediction set.
    Each file given by name is a study of its own. The exit status is 1 if an image failed. Research
    software, not a medical device.
    """
    _check_usage(images, manifest_path, image_root, output, jsonl=jsonl, as_json=as_json)
    from medembed.images.load import Limits
    from medembed.prediction import Predictor
    from medembed.prediction.inputs import list_images

    files, unseen = list_images(images)
    for sentence in unseen:
        say(f"Warning: {sentence}")
    with showing_progress("Fetching", "bytes") as fetching:
        predictor = Predictor(
            model_path,
            encoder=references or None,
            cache=caches or None,
            device=device,
            precision=precision,
            alpha=alpha,
            operating_point=operating_point,
            limits=Limits(max_bytes, max_seconds),
            fetching=fetching,
            on_status=say,
        )
        point = predictor.point
        if predictor.path != model_path:
            say(f"Model: {predictor.path}, the best of its run by cross-validation.")
        if operating_point is not None:
            yes = predictor.card.classes[1]
            say(f"Decisions at {point.name}: {yes} at {point.threshold:.3f} or above.")
        if predictor.card.conformal is None:
            say(f"No prediction sets: {predictor.card.conformal_note or 'the model has none.'}")
        elif warning := predictor.card.conformal.warning():
            say(warning)
        models = predictor.model.members or (predictor.model,)
        if any("range" not in (model.reference or {}) for model in models):
            say(_NO_REFERENCE)
        if manifest_path is not None:
            rows = predictor.predict_manifest(manifest_path, image_root, explain=explain)
        else:
            rows = predictor.predict_images(files, explain=explain)
        with contextlib.closing(rows):
            if output is None:
                seen = _show(rows, predictor, jsonl=jsonl, as_json=as_json)
            else:
                seen = _Seen(predictor.card.classes[1])
                write_table(list(_counting(rows, seen)), output)
                say(f"Predictions: {output}")
    seen.conclude()
    if not (jsonl or as_json):
        suggest("evaluate", model_path, "CACHE", "MANIFEST", "-o", "runs/elsewhere")


def _check_usage(
    images: tuple[Path, ...],
    manifest_path: Path | None,
    image_root: Location | None,
    output: Path | None,
    *,
    jsonl: bool,
    as_json: bool,
) -> None:
    if bool(images) == (manifest_path is not None):
        raise click.UsageError("name images, or give --manifest M --image-root DIR")
    if image_root is not None and manifest_path is None:
        raise click.UsageError("--image-root is for --manifest; images are named by their paths")
    if jsonl + as_json + (output is not None) > 1:
        raise click.UsageError("give one of --jsonl, --json and --output")
    if output is not None and output.suffix not in (".csv", ".xlsx"):
        raise click.UsageError(f"--output {output} ends in neither .csv nor .xlsx")


class _Seen:
    """Counts rows as they go by."""

    def __init__(self, positive: str) -> None:
        self.positive = positive
        self.images = self.failed = self.studies = self.abnormal = self.trained_on = 0
        self.far = self.marginal = self.placed = self.outer = 0

    def add(self, row: "PredictedRow") -> None:
        if row["image"] is None:
            self.studies += 1
            self.abnormal += row["decision"] == self.positive
            self.marginal += row["coverage"] == "marginal"
            if row["distance_p"] is not None:
                self.placed += 1
                self.outer += row["distance_p"] <= OUTER
            return
        self.images += 1
        self.failed += row["error"] is not None
        self.trained_on += bool(row["trained_on"])
        self.far += bool(row["far"])

    def _are_others(self) -> bool:
        """Return whether p is below 0.001 for this many outlying studies to occur by chance."""
        if not self.placed:
            return False
        from scipy.stats import binom

        return float(binom.sf(self.outer - 1, self.placed, OUTER)) < 0.001

    def conclude(self) -> None:
        """Print a summary; exit with 1 if anything failed."""
        say(
            f"{self.images} images in {self.studies} studies, {self.abnormal} of them called "
            f"{self.positive}; {self.failed} images failed."
        )
        if self.trained_on:
            say(
                f"{self.trained_on} images are among those that the model was trained on (*): "
                "its predictions for these are too good."
            )
        if self.far:
            say(
                f"{self.far} of {self.images} images lie far from those that the model was trained "
                "on (!): neither probabilities, decisions nor sets hold there. Have such images "
                "labelled, and see `medembed evaluate`."
            )
        if self._are_others():
            say(
                f"Taken together, they are unlike the training images: {self.outer} of "
                f"{self.placed} studies are among the outermost {OUTER:.0%}. Neither "
                "probabilities, decisions nor sets hold for any of them; see `medembed evaluate`."
            )
        if self.marginal:
            say(
                f"The sets of {self.marginal} studies (~) are of unknown regions, or of those with "
                "too few training patients: their coverage holds over all regions together, and "
                "may be lower in a single one."
            )
        if self.failed:
            raise click.ClickException(
                f"{self.failed} of {self.images} images could not be predicted; their rows say "
                "why. All others were."
            )


def _show(
    rows: "Iterator[PredictedRow]", predictor: "Predictor", *, jsonl: bool, as_json: bool
) -> _Seen:
    classes = predictor.card.classes
    seen = _Seen(classes[1])
    if as_json:
        kept = list(_counting(rows, seen))
        print_json(kept)
        return seen
    write = _writer()
    try:
        if not jsonl:
            write("".join(f"{line}\n" for line in _heading(predictor)))
        for row in _counting(rows, seen):
            if jsonl:
                lines = [json.dumps(row, ensure_ascii=False, allow_nan=False)]
            else:
                lines = _lines(row, classes)
            write("".join(f"{line}\n" for line in lines))
    except KeyboardInterrupt as error:
        with contextlib.suppress(OSError):  # after SIGHUP there may be no terminal
            say(
                f"Stopped after {seen.images} images. Every printed line is complete; the same "
                "command starts from the beginning."
            )
        raise SystemExit(exit_status(error)) from None
    return seen


def _counting(rows: "Iterator[PredictedRow]", seen: _Seen) -> "Iterator[PredictedRow]":
    for row in rows:
        seen.add(row)
        yield row


def _writer() -> Callable[[str], None]:
    """Return a function that writes text to stdout at once; the rest is flushed after Ctrl-C."""
    stream = sys.stdout.buffer

    def write(text: str) -> None:
        data = text.encode("utf-8", "backslashreplace")
        while data:  # an unbuffered stdout may take a part
            data = data[stream.write(data) :]
        stream.flush()

    return write


def write_table(rows: "list[PredictedRow]", path: Path) -> None:
    """Write rows as a table, complete or not at all: a line per image and per study of several.

    Text that a spreadsheet would evaluate is prefixed with an apostrophe.
    """
    import io

    import pandas as pd

    from medembed.core.files import write_atomically
    from medembed.core.text import to_csv_cell

    flat = []
    for row in rows:
        if row["image"] is None and row["n_views"] == 1:
            continue  # its image's row says it
        point = row["operating_point"] or {"name": None, "threshold": None}
        members = None if row["set"] is None else " or ".join(row["set"]) or "neither"
        names = {"operating_point": point["name"], "threshold": point["threshold"]}
        known = {k: value for k, value in row.items() if k not in ("operating_point", "set")}
        before = {k: known[k] for k in ("image", "study", "probability", "decision")}
        flat.append({**before, **names, "set": members} | known)
    table = pd.DataFrame(flat).map(to_csv_cell)
    file = io.BytesIO()
    if path.suffix == ".csv":
        table.to_csv(file, index=False)
    else:
        table.to_excel(file, index=False, engine="openpyxl")
    write_atomically(path, file.getvalue())


def _heading(predictor: "Predictor") -> list[str]:
    share = f"{100 * (1 - predictor.alpha):.4g} % set"
    wide, decided = _widths(predictor.card.classes)
    yes = predictor.card.classes[1]
    names = f"{'image or = study':<{NAME_COLUMNS}} {yes:>{wide}}  {'decision':<{decided}} {share}"
    return [names, "-" * COLUMNS]


def _widths(classes: tuple[str, str]) -> tuple[int, int]:
    """Return the widths of the columns of probabilities and decisions."""
    return max(9, len(classes[1])), max(9, *map(len, classes))


def _lines(row: "PredictedRow", classes: tuple[str, str]) -> list[str]:
    """Return the lines for a row; none for a study with one view, which its image's row shows."""
    if row["image"] is None:
        if row["n_views"] == 1:
            return []
        failed = f", {row['n_failed']} failed" if row["n_failed"] else ""
        name, views = row["study"], f" ({row['n_views']} views{failed})"
        start = "= " + _fit(name, NAME_COLUMNS - 2 - len(views)) + views
    else:
        start = _fit(row["image"], NAME_COLUMNS)
    start = _pad(start, NAME_COLUMNS)
    if row["error"] is not None:
        return [f"{start} {'—':>{_widths(classes)[0]}}", *_indented(row["error"])]
    marks = ("*" if row["trained_on"] else "") + ("!" if row["far"] else "")
    inside = row["set"]
    words = "—" if inside is None else " or ".join(inside) or "neither"
    words += " ~" if row["coverage"] == "marginal" else ""
    wide, decided = _widths(classes)
    answer = f"{row['probability']:>{wide}.3f}{marks:<2}{row['decision']:<{decided}}"
    line = f"{start} {answer} {words}".rstrip()
    more = row.get("explanation")
    return [line] if not more else [line, *_indented(more)]


def _indented(text: str) -> list[str]:
    return textwrap.wrap(
        printable(text, keep=""), COLUMNS, initial_indent="    ", subsequent_indent="    "
    )


def _fit(text: str, columns: int) -> str:
    """Cut a long name in the middle, because its end is more telling."""
    text = printable(text, keep="")
    if _columns(text) <= columns:
        return text
    head, tail = "", ""
    while _columns(head + text[len(head)]) <= (columns - 1) // 3:
        head += text[len(head)]
    while _columns(head + tail + text[-1 - len(tail)]) <= columns - 1:
        tail = text[-1 - len(tail)] + tail
    return f"{head}…{tail}"


def _pad(text: str, columns: int) -> str:
    return text + " " * (columns - _columns(text))


def _columns(text: str) -> int:
    """Return the number of columns that a text takes on a terminal."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(bool(unicodedata.combining(c)) for c in text)
