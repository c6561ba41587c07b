"""What the page shows about one run: where it comes from, what it chose, what it left out."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from medembed.core.text import counted
from medembed.report.tables import Table
from medembed.results.run_schema import CV_METHOD
from medembed.results.runs import Run

__all__ = ["RunSection", "describe_run"]

DATA_COLUMNS = ("images", "studies", "patients", "abnormal", "unlabelled", "left_out")
CODE_DIGITS = 16


@dataclass(frozen=True)
class RunSection:
    """What the page shows about one run, as text.

    Attributes
    ----------
    name : str
        How the page calls it.
    facts : dict of str to str
        Encoder, data, seed and the like, in order.
    data : Table
        Counts of each split.
    winners : Table
        The configuration that each head won with.
    left_out : Table
        Images without embeddings; no rows where there are none.
    left_out_sentence : str
        How many they are.
    command : str
        What makes the run again.
    """

    name: str
    facts: dict[str, str]
    data: Table
    winners: Table
    left_out: Table
    left_out_sentence: str
    command: str


def describe_run(run: Run, name: str, left_out_of: str | None = None) -> RunSection:
    """Return the section of a run.

    Parameters
    ----------
    run : Run
        The run.
    name : str
        How the page calls it.
    left_out_of : str, optional
        The run whose section lists the images that this one, too, has left out.
    """
    info = run.info
    left_out, sentence = _tabulate_left_out(info, name)
    if left_out_of:
        left_out, sentence = replace(left_out, sections=[]), f"The images of {left_out_of}."
    return RunSection(
        name,
        {key: value for key, value in _facts(info).items() if value},
        _tabulate_data(info.get("data", {}), name),
        _tabulate_winners(info.get("leaderboard", []), info.get("cv_method"), name),
        left_out,
        sentence,
        info.get("command", ""),
    )


def _facts(info: Mapping[str, Any]) -> dict[str, str]:
    asked, data = info.get("asked", {}), info.get("data", {})
    encoder, times = info.get("encoder", {}), info.get("times", {})
    versions = info.get("versions", {})
    return {
        "Target": _text(asked.get("target")),
        "Encoder": _text(encoder.get("source")),
        "Revision": _text(encoder.get("revision")),
        "Encoder fingerprint": _text(encoder.get("fingerprint"))[:CODE_DIGITS],
        "Input": _input(encoder.get("preprocessing", {})),
        "Precision": _text(encoder.get("precision")),
        "Pooling": _text(asked.get("pooling")),
        "Manifest digest": _text(asked.get("manifest"))[:CODE_DIGITS],
        "Labels are per": _text(data.get("label_level")),
        "Licence": _text(data.get("licence")),
        "Folds": _text(asked.get("n_folds")),
        "Configurations per head": _counts(asked.get("n_configs")),
        "Covariates": ", ".join(asked.get("covariates", [])),
        "Share of training patients": _share(asked.get("train_fraction", 1.0)),
        "Chosen by": _text(asked.get("metric")),
        "Seed": _text(info.get("seed")),
        "Started": _text(times.get("started")),
        "Ended": _text(times.get("ended")),
        "Versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }


def _counts(value: Any) -> str:
    """Write configurations per head: a number of all of them, or one of each."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(number)}" for name, number in value.items())
    return _text(value)


def _share(fraction: float) -> str:
    return "" if fraction == 1 else f"{fraction:.3g}"


def _input(preprocessing: Mapping[str, Any]) -> str:
    size = preprocessing.get("size")
    if not size:
        return ""
    details = [_text(preprocessing.get(name)) for name in ("fit", "resample")]
    return ", ".join([" × ".join(map(str, size)), *filter(None, details)])


def _tabulate_data(data: Mapping[str, Any], name: str) -> Table:
    parts = {**data.get("splits", {}), "all": data}
    rows = [
        [split, *(_text(part.get(column, 0)) for column in DATA_COLUMNS)]
        for split, part in parts.items()
    ]
    headings = [column.capitalize().replace("_", " ") for column in DATA_COLUMNS]
    return Table(f"Images of {name}", ["Split", *headings], 1, [rows])


def _tabulate_winners(leaderboard: list[dict[str, Any]], cv_method: Any, name: str) -> Table:
    rows = []
    for entry in leaderboard:
        chosen = entry.get("params") or {}
        params = ", ".join(f"{key} = {value}" for key, value in chosen.items())
        params = params or "the head's defaults"
        older = entry.get("cv_method", cv_method) != CV_METHOD
        cv = "failed" if entry.get("cv") is None else f"{entry['cv']:.3f}{'†' if older else ''}"
        tried = entry.get("n_tried")
        cv += "" if entry.get("cv") is None or tried is None else f" (best of {tried:,})"
        details = params if entry.get("cv") is not None else _text(entry.get("error"))
        seconds = entry.get("seconds")
        rows.append([entry["head"], details, cv, "" if seconds is None else f"{seconds:.1f}"])
    columns = ["Head", "Parameters", "Cross-validated", "Seconds"]
    return Table(f"Winning configurations of {name}", columns, 2, [rows])


def _tabulate_left_out(info: Mapping[str, Any], name: str) -> tuple[Table, str]:
    images = info.get("left_out", [])
    data = info.get("data", {})
    rows = [
        [
            _text(image.get("sha256"))[:CODE_DIGITS],
            *(_text(image.get(key)) for key in ("split", "stage", "reason")),
        ]
        for image in images
    ]
    n, n_test = max(data.get("left_out", 0), len(images)), data.get("left_out_test", 0)
    sentence = (
        f"{counted(n, 'image')} could not be embedded, {n_test:,} of them in test. They were "
        "neither trained on nor scored. Images go by the first digits of their SHA-256."
    )
    if not n:
        sentence = "No image was left out."
    elif n > len(images):
        listed = (
            f"The first {len(images):,} are shown." if images else "Which ones is not recorded."
        )
        sentence += f" {listed}"
    columns = ["Image (SHA-256)", "Split", "Stage", "Reason"]
    return Table(f"Images left out of {name}", columns, 4, [rows]), sentence


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
