"""The table and CSV of a shortcut audit."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medembed.core.errors import ArgumentError
from medembed.core.files import write_atomically
from medembed.core.poolings import IMAGE_STATISTICS
from medembed.core.text import counted, to_csv
from medembed.report.tables import MISSING, NOT_ESTIMABLE, Table, format_interval, format_p

__all__ = ["check_output", "tabulate_shortcuts", "write_shortcuts"]

_BOUNDS = ("low", "high")
ALL = "(all images)"
_WORDS = {
    "embedding": "label by embedding",
    "metadata": "label by the columns",
    IMAGE_STATISTICS: "label by the film's look",
}
_NOTES = (
    "by the film's look: by brightness, size, sharpness and border alone. "
    "encoded: AUROC with which the column can be read from the embedding; 0.5 is not at all. "
    "label, column alone: AUROC of the label by the column, without any image. "
    "lost: AUROC of the label that is lost when the groups' means are taken out of the embedding, "
    "and when only images of one group are compared. gap: AUROC of the label in one group less "
    "that in another.",
    "p is corrected by Holm over the columns, for each question. A loss is also seen where the "
    "column belongs to the disease.",
)


def tabulate_shortcuts(document: Mapping[str, Any]) -> Table:
    """Return the table of an audit's JSON document."""
    sections: list[list[list[str]]] = [
        [
            [ALL, _WORDS.get(name, name), format_interval(own), MISSING]
            for name, own in document["baselines"].items()
        ]
    ]
    notes = [f"{name} cannot be had: {why}." for name, why in document["lacking"].items()]
    for name, own in document["columns"].items():
        sections.append(_rows(name, own))
        if own["reason"] is not None:
            notes.append(f"{name}: not estimable; {own['reason']}.")
        elif own["gap"]["reason"] is not None:
            notes.append(f"{name}: the gap is not estimable; {own['gap']['reason']}.")
        if own["left_out"]:
            told = counted(own["left_out"], "image")
            notes.append(f"{name}: {told} without a value, or in a group that is too small.")
    title = (
        f"Shortcuts in {document['pooling']}: {counted(document['images'], 'image')} of "
        f"{counted(document['patients'], 'patient')} of train, {document['folds']} folds"
    )
    columns = ["Column", "Number", "AUROC [95 %]", "p"]
    return Table(title, columns, 2, sections, [*notes, *_NOTES], n_spanning=1)


def _rows(name: str, own: Mapping[str, Any]) -> list[list[str]]:
    encoded, used, gap = own["encoded"], own["used"], own["gap"]
    if encoded is None:
        return [[name, NOT_ESTIMABLE, MISSING, MISSING]]
    residualised, matched = used["residualised"]["lost"], used["matched"]["lost"]
    p = [format_p(part["p_holm"]) for part in (encoded, residualised, gap)]
    return [
        [name, "encoded", format_interval(encoded), p[0]],
        ["", "label, column alone", format_interval(own["alone"]), MISSING],
        ["", "lost, residualised", _format_difference(residualised), p[1]],
        ["", "lost, matched", _format_difference(matched), MISSING],
        ["", f"gap, {gap['a']} − {gap['b']}", _format_difference(gap), p[2]],
    ]


def _format_difference(found: Mapping[str, Any]) -> str:
    if found["difference"] is None:
        return NOT_ESTIMABLE
    value = f"{found['difference']:+.3f}"
    if found["low"] is None:
        return value
    return f"{value} [{found['low']:+.3f}, {found['high']:+.3f}]"


def check_output(out: Path) -> None:
    """Raise ArgumentError unless `out` is a directory, or can become one."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ArgumentError(
            f"{there} is not a directory, and the tables go into one. Name another."
        )


def write_shortcuts(document: Mapping[str, Any], out: Path) -> list[Path]:
    """Write `shortcuts.csv`, a row per column and number, and `groups.csv`; return both paths.

    Full precision; the label's AUROC on the images of a column is the number `label`.
    """
    numbers: list[Sequence[Any]] = [("column", "number", "a", "b", "value", *_BOUNDS, "p_holm")]
    numbers += [
        ("", _WORDS.get(name, name), None, None, *(own[end] for end in ("value", *_BOUNDS)), None)
        for name, own in document["baselines"].items()
    ]
    groups: list[Sequence[Any]] = [
        ("column", "group", "n", "n_abnormal", "n_patients", "auroc", *_BOUNDS)
    ]
    for name, own in document["columns"].items():
        numbers += [(name, *line) for line in _numbers(own)]
        for group in own["groups"]:
            auroc = group["auroc"] or dict.fromkeys(("value", *_BOUNDS))
            counts = (group["name"], group["n"], group["n_abnormal"], group["n_patients"])
            groups.append((name, *counts, *(auroc[end] for end in ("value", *_BOUNDS))))
    paths = [out / "shortcuts.csv", out / "groups.csv"]
    out.mkdir(parents=True, exist_ok=True)
    for path, lines in zip(paths, (numbers, groups), strict=True):
        write_atomically(path, to_csv(lines).encode())
    return paths


def _numbers(own: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    encoded, used, gap = own["encoded"], own["used"], own["gap"]
    if encoded is None:
        return []
    lines: list[tuple[str, Mapping[str, Any], str]] = [
        ("encoded", encoded, "value"),
        ("label", used["score"], "value"),
        ("label, column alone", own["alone"], "value"),
        ("lost, residualised", used["residualised"]["lost"], "difference"),
        ("lost, matched", used["matched"]["lost"], "difference"),
        ("gap", gap, "difference"),
    ]
    return [
        (
            *(number, part.get("a"), part.get("b"), part[value]),
            *(part[end] for end in _BOUNDS),
            part.get("p_holm"),
        )
        for number, part, value in lines
    ]
