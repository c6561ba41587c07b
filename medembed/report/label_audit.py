"""The directory of an audit of labels: a page, its document, and a table to fill in."""

import base64
import datetime as dt
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medembed import __version__
from medembed.core.errors import ArgumentError
from medembed.core.files import as_path, json_bytes, write_atomically
from medembed.core.text import counted, to_csv
from medembed.report.contact_sheet import label_of
from medembed.report.gallery import CODE_DIGITS, Thumbnail, make_thumbnails
from medembed.report.page import make_environment
from medembed.report.tables import Table
from medembed.results.audit_schema import LabelAuditDocument, Suspect
from medembed.results.label_audit import DOCUMENT, LabelAudit
from medembed.results.methods import DISCLAIMER

__all__ = [
    "DOCUMENT",
    "PAGE",
    "REVIEW",
    "check_audit_target",
    "summarise_audit",
    "write_label_audit",
]

PAGE, REVIEW = "index.html", "review.csv"
N_SHOWN = 100

_NOTES = (
    "Suspects: the mean of the heads' calibrated probabilities favours the other class, and at "
    "least as much as it does on average where that class is the label (confident learning). No "
    "head was trained on the study, or on its patient.",
    "Expected: suspects if all labels were right. It is the sum of 1 − q over studies where "
    "abnormal is confident, and of q where normal is; q is the probability that the right label is "
    "abnormal.",
    "Wrong labels: the estimated number, suspected or not. A study is taken to be labelled "
    "abnormal with probability (1 − missed) q + invented (1 − q), where logit q is linear in the "
    "logit of the mean; both shares and the line are fitted on train (Copas 1988). The interval "
    "resamples patients of train, 200 times.",
    "An abnormality that the encoder cannot see counts as a wrong label, because both look the "
    "same to it. The estimate is never below 0, so it is above 0 on average even if no label is "
    "wrong.",
    "Labels of test are judged by the final models. Correcting only those labels of test "
    "that a model disputes raises that model's score: read all of test again, or leave its labels "
    "alone.",
)


def check_audit_target(out: str | Path) -> Path:
    """Return the directory of an audit; refuse a file, or one that holds a review already."""
    path = as_path(out, "the directory of the audit")
    if path.exists() and not path.is_dir():
        raise ArgumentError(f"{path} is a file. Choose a directory for the audit.")
    if (path / REVIEW).exists():
        raise ArgumentError(
            f"{path / REVIEW} already exists, and may hold labels. Move it, or name another "
            "directory."
        )
    return path


def write_label_audit(
    audit: LabelAudit,
    out: str | Path,
    *,
    image_root: str | os.PathLike[str] | None = None,
    names: bool = False,
    n_shown: int = N_SHOWN,
    date: dt.date | None = None,
) -> LabelAuditDocument:
    """Write ``index.html``, ``audit.json`` and, at last, ``review.csv`` for `manifest relabel`.

    Parameters
    ----------
    audit : LabelAudit
    out : str or Path
        Directory, created if missing.
    image_root : path, optional
        Directory, or bucket's prefix, that the manifest's paths are relative to; the page then
        shows the films.
    names : bool
        Whether to name images and studies, which may identify patients, besides hashes.
    n_shown : int
        Suspects on the page; the other files have all.
    date : date, optional
        Shown on the page, by default today.

    Returns
    -------
    LabelAuditDocument
        The content of ``audit.json``.

    Raises
    ------
    ArgumentError
        `out` is a file, or has a review, which may hold labels.
    PathNotFoundError
        `image_root` is not a directory, or there is nothing below the prefix.
    StorageError
        The bucket refuses, or keeps failing.
    """
    path = check_audit_target(out)
    document = audit.document(names=names)
    shown = document.suspects[:n_shown]
    wanted = [sha256 for suspect in shown for sha256 in suspect.images]
    thumbnails: Mapping[str, Thumbnail] = {}
    if image_root is not None:
        thumbnails = make_thumbnails(audit.manifest, image_root, wanted, with_names=names)
    text = (
        make_environment()
        .get_template("label_audit.html.j2")
        .render(
            title="Labels that the scores contradict",
            synthetic=document.synthetic,
            summary=summarise_audit(document),
            counts=_tabulate(document),
            notes=_NOTES,
            cards=[_card(suspect, thumbnails) for suspect in shown],
            n_more=len(document.suspects) - len(shown),
            with_images=image_root is not None,
            n_images=len(wanted),
            n_lacking=sum(sha256 not in thumbnails for sha256 in wanted),
            disclaimer=DISCLAIMER,
            date=(date or dt.datetime.now(dt.UTC).date()).isoformat(),
            version=__version__,
        )
    )
    path.mkdir(parents=True, exist_ok=True)
    write_atomically(path / PAGE, text.encode())
    write_atomically(path / DOCUMENT, json_bytes(document.model_dump(exclude_unset=True)))
    write_atomically(path / REVIEW, _review(document.suspects, names).encode())
    return document


def summarise_audit(document: LabelAuditDocument) -> str:
    """Return one sentence: how many suspects, and how many are expected."""
    unit = "study" if document.level == "study" else "image"
    n, low, high = len(document.suspects), document.errors_low, document.errors_high
    limits = "" if low is None or high is None else f" ({low:,.0f} to {high:,.0f})"
    return (
        f"{len(document.heads)} head{'s' if len(document.heads) > 1 else ''} of "
        f"{document.run} contradict{'' if len(document.heads) > 1 else 's'} the label of {n:,} of "
        f"{counted(document.studies, unit)}. About {document.expected:,.0f} would be "
        "contradicted if all labels were right. The estimated number of wrong labels is "
        f"{document.errors:,.0f}{limits}."
    )


def _tabulate(document: LabelAuditDocument) -> Table:
    sections: dict[str, list[list[str]]] = {}
    for part in document.parts:
        numbers = (f"{part.studies:,}", f"{part.suspects:,}", f"{part.expected:,.1f}",
                   f"{part.errors:,.1f}")  # fmt: skip
        region = "all" if part.region is None else part.region
        sections.setdefault(part.split, []).append([part.split, region, *numbers])
    unit = "Studies" if document.level == "study" else "Images"
    columns = ["Split", "Region", unit, "Suspects", "Expected", "Wrong labels"]
    title = f"{unit} by split and region"
    return Table(title, columns, 2, list(sections.values()), n_spanning=1)


def _card(suspect: Suspect, thumbnails: Mapping[str, Thumbnail]) -> dict[str, Any]:
    views = []
    names = suspect.names or [sha256[:CODE_DIGITS] for sha256 in suspect.images]
    for sha256, name in zip(suspect.images, names, strict=True):
        view: dict[str, Any] = {"name": name, "data": None}
        if own := thumbnails.get(sha256):
            view["data"] = f"data:image/jpeg;base64,{base64.b64encode(own.jpeg).decode()}"
            view |= {"width": own.width, "height": own.height}
        views.append(view)
    agreeing = sum((p > 0.5) != (suspect.label == 1) for p in suspect.scores.values())
    return {
        "title": f"{suspect.rank}. Labelled {label_of(suspect.label)}, {suspect.region}, "
        f"{suspect.split}",
        "detail": f"Probability of abnormal {suspect.probability:.3f}; {agreeing} of "
        f"{counted(len(suspect.scores), 'head')} against the label",
        "views": views,
    }


def _review(suspects: Sequence[Suspect], names: bool) -> str:
    """Return the table to fill in: a row per image, those of the first suspect first."""
    columns = ["rank", "sha256", "split", "region", "label", "probability"]
    lines: list[list[Any]] = [[*columns, *(("image", "study") if names else ()), "new_label"]]
    for own in suspects:
        for sha256, name in zip(own.images, own.names or [""] * len(own.images), strict=True):
            line = [own.rank, sha256, own.split, own.region, own.label, round(own.probability, 6)]
            lines.append([*line, *((name, own.study) if names else ()), ""])
    return to_csv(lines)
