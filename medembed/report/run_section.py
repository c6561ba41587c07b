"""What the page shows about one run: where it comes from, what it chose, what it left out."""

from dataclasses import dataclass, replace

from medembed.core.text import counted
from medembed.dataset.targets import name_classes
from medembed.report.tables import Table
from medembed.results.run_schema import CV_METHOD, Data, InputImage, RowCounts, RunInfo
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
        _tabulate_data(info.data, name, name_classes(info.asked.target).positive),
        _tabulate_winners(info, name),
        left_out,
        sentence,
        info.command,
    )


def _facts(info: RunInfo) -> dict[str, str]:
    asked, encoder = info.asked, info.encoder
    return {
        "Target": _text(asked.target),
        "Encoder": _text(encoder.source),
        "Revision": _text(encoder.revision),
        "Encoder fingerprint": _text(encoder.fingerprint)[:CODE_DIGITS],
        "Input": _input(encoder.preprocessing),
        "Precision": _text(encoder.precision),
        "Pooling": _text(asked.pooling),
        "Manifest digest": _text(asked.manifest)[:CODE_DIGITS],
        "Labels are per": _text(info.data.label_level),
        "Licence": _text(info.data.licence),
        "Folds": _text(asked.n_folds),
        "Configurations per head": _counts(asked.n_configs),
        "Covariates": ", ".join(asked.covariates),
        "Share of training patients": _share(asked.share),
        "Chosen by": _text(asked.metric),
        "Seed": _text(info.seed),
        "Started": _text(info.times.started),
        "Ended": _text(info.times.ended),
        "Versions": ", ".join(f"{name} {number}" for name, number in info.versions.items()),
    }


def _counts(value: int | dict[str, int] | None) -> str:
    """Write configurations per head: a number of all of them, or one of each."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(number)}" for name, number in value.items())
    return _text(value)


def _share(fraction: float) -> str:
    return "" if fraction == 1 else f"{fraction:.3g}"


def _input(preprocessing: InputImage) -> str:
    if not preprocessing.size:
        return ""
    details = filter(None, (preprocessing.fit, preprocessing.resample))
    return ", ".join([" × ".join(map(str, preprocessing.size)), *details])


def _tabulate_data(data: Data, name: str, positive: str) -> Table:
    parts: dict[str, RowCounts] = {**data.splits, "all": data}
    rows = [
        [split, *(_text(getattr(part, column) or 0) for column in DATA_COLUMNS)]
        for split, part in parts.items()
    ]
    named = {"abnormal": positive}
    headings = [named.get(own, own).capitalize().replace("_", " ") for own in DATA_COLUMNS]
    return Table(f"Images of {name}", ["Split", *headings], 1, [rows])


def _tabulate_winners(info: RunInfo, name: str) -> Table:
    rows = []
    for entry in info.leaderboard:
        chosen = entry.params or {}
        params = ", ".join(f"{key} = {value}" for key, value in chosen.items())
        params = params or "the head's defaults"
        method = entry.cv_method if "cv_method" in entry.model_fields_set else info.cv_method
        mark, tried = "" if method == CV_METHOD else "†", entry.n_tried
        cv = "failed" if entry.cv is None else f"{entry.cv:.3f}{mark}"
        cv += "" if entry.cv is None or tried is None else f" (best of {tried:,})"
        details = params if entry.cv is not None else _text(entry.error)
        seconds = "" if entry.seconds is None else f"{entry.seconds:.1f}"
        rows.append([entry.head, details, cv, seconds])
    columns = ["Head", "Parameters", "Cross-validated", "Seconds"]
    return Table(f"Winning configurations of {name}", columns, 2, [rows])


def _tabulate_left_out(info: RunInfo, name: str) -> tuple[Table, str]:
    images = info.left_out
    rows = [
        [_text(own.sha256)[:CODE_DIGITS], _text(own.split), _text(own.stage), _text(own.reason)]
        for own in images
    ]
    n, n_test = max(info.data.left_out or 0, len(images)), info.data.left_out_test or 0
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


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
