"""Reporting checklists: items that runs can answer are filled in, the rest is left to people.

The items of two guidelines are paraphrased briefly for orientation; the published text, which is
cited, is authoritative. An item's fact key refers to `checklist_answers`; an item without a key
can only be answered by people. "partly" marks items that a run can never answer completely.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from medembed.core.errors import RunError
from medembed.core.files import write_atomically
from medembed.core.text import to_markdown
from medembed.report.checklist_answers import METHODS, RESULTS, Study

__all__ = [
    "CHECKLISTS",
    "NOT_RECORDED",
    "Checklist",
    "Item",
    "Reach",
    "fill_checklist",
    "render_checklist",
    "write_checklists",
]

Reach = Literal["answered", "partly", "open"]


class Item(NamedTuple):
    """An item: number, question, who answers it, the related fact, and how far that answers it."""

    number: str
    asks: str
    by: str
    fact: str = ""
    reach: Reach = "open"


@dataclass(frozen=True)
class Checklist:
    """A guideline: its command-line name, title, publication and items."""

    name: str
    title: str
    source: str
    sections: tuple[tuple[str, tuple[Item, ...]], ...]


AUTHOR, READER, STATISTICIAN = "author", "radiologist", "statistician"
_I = Item

TRIPOD_AI = Checklist(
    "tripod-ai",
    "TRIPOD+AI",
    "Collins et al., BMJ 2024;385:e078378",
    (
        (
            "Title and abstract",
            (
                _I("1", "Kind of study, population and outcome in the title", AUTHOR),
                _I("2", "Abstract by its own checklist", AUTHOR),
            ),
        ),
        (
            "Introduction",
            (
                _I("3a", "Medical context, reason for a model, earlier models", READER),
                _I("3b", "Target population, purpose, users", READER, "use", "partly"),
                _I("3c", "Known inequalities between groups", READER),
                _I("4", "Aim: development, evaluation, or both", AUTHOR, "design", "partly"),
            ),
        ),
        (
            "Methods",
            (
                _I("5a", "Sources of data, how representative", AUTHOR, "data", "partly"),
                _I("5b", "Dates between which patients came", AUTHOR),
                _I("6a", "Setting, number and places of centres", AUTHOR),
                _I("6b", "Who was eligible", AUTHOR, "exclusions", "partly"),
                _I("6c", "Treatments received", READER),
                _I("7", "Preparation and quality of data", AUTHOR, "preprocessing", "partly"),
                _I(
                    "8a",
                    "Outcome: definition, how and when it was found",
                    READER,
                    "label",
                    "partly",
                ),
                _I("8b", "Who judged the outcome", READER),
                _I("8c", "Blinding of who judged the outcome", READER),
                _I("9a", "Choice of predictors", AUTHOR, "predictors", "partly"),
                _I(
                    "9b",
                    "Definition of predictors, how they were measured",
                    AUTHOR,
                    "input",
                    "partly",
                ),
                _I("9c", "Who judged predictors", READER),
                _I("10", "How the sample size was arrived at", STATISTICIAN),
                _I("11", "Missing data", STATISTICIAN, "missing", "partly"),
                _I("12a", "Use and partition of data", AUTHOR, "partition", "partly"),
                _I("12b", "Handling of predictors", STATISTICIAN, "models", "partly"),
                _I(
                    "12c",
                    "Type of model, tuning, internal validation",
                    AUTHOR,
                    "training",
                    "partly",
                ),
                _I("12d", "Heterogeneity between clusters", STATISTICIAN, "groups", "partly"),
                _I("12e", "Measures and plots of performance", STATISTICIAN, "metrics", "partly"),
                _I("12f", "Updating of the model", STATISTICIAN, "updating", "partly"),
                _I(
                    "12g", "How an evaluation made its predictions", AUTHOR, "evaluated", "answered"
                ),
                _I("13", "Class imbalance", STATISTICIAN),
                _I("14", "Fairness", AUTHOR),
                _I("15", "Output and thresholds", STATISTICIAN, "output", "partly"),
                _I("16", "Differences of evaluation from development", AUTHOR, "shift", "partly"),
                _I("17", "Ethical approval, consent", AUTHOR),
            ),
        ),
        (
            "Open science",
            (
                _I("18a", "Funding", AUTHOR),
                _I("18b", "Conflicts of interest", AUTHOR),
                _I("18c", "Protocol", AUTHOR),
                _I("18d", "Registration", AUTHOR),
                _I("18e", "Availability of data", AUTHOR, "licence", "partly"),
                _I("18f", "Availability of code", AUTHOR, "command", "partly"),
                _I("19", "Involvement of patients and the public", AUTHOR),
            ),
        ),
        (
            "Results",
            (
                _I("20a", "Flow of participants", AUTHOR, "flow", "answered"),
                _I("20b", "Characteristics of each data set", AUTHOR, "characteristics", "partly"),
                _I(
                    "20c",
                    "Distributions against those of development",
                    STATISTICIAN,
                    "shift",
                    "partly",
                ),
                _I(
                    "21",
                    "Participants and events of each analysis",
                    STATISTICIAN,
                    "sizes",
                    "partly",
                ),
                _I("22", "The full model, and how one may use it", AUTHOR, "models", "partly"),
                _I(
                    "23a",
                    "Performance with intervals, also of subgroups",
                    STATISTICIAN,
                    "performance",
                    "partly",
                ),
                _I("23b", "Heterogeneity of performance", STATISTICIAN, "groups", "partly"),
                _I("24", "Results of updating", STATISTICIAN, "updating", "partly"),
            ),
        ),
        (
            "Discussion",
            (
                _I("25", "Interpretation, also of fairness", READER),
                _I("26", "Limitations", AUTHOR),
                _I("27a", "Poor or absent input in use", READER),
                _I("27b", "What users must do and know", READER),
                _I("27c", "Next steps", AUTHOR),
            ),
        ),
    ),
)
CLAIM = Checklist(
    "claim",
    "CLAIM, 2024 update",
    "Tejani et al., Radiology: Artificial Intelligence 2024;6(4):e240300",
    (
        (
            "Title and abstract",
            (
                _I("1", "AI and its kind named in the title", AUTHOR, "training", "partly"),
                _I("2", "Structured abstract", AUTHOR),
            ),
        ),
        (
            "Introduction",
            (
                _I("3", "Background, intended use and role", READER, "use", "partly"),
                _I("4", "Aims and hypotheses", AUTHOR),
            ),
        ),
        (
            "Methods: study and data",
            (
                _I("5", "Prospective or retrospective", AUTHOR),
                _I("6", "Goal of the study", AUTHOR, "design", "partly"),
                _I("7", "Sources of data", AUTHOR, "data", "partly"),
                _I("8", "Who was included and excluded", AUTHOR, "exclusions", "partly"),
                _I("9", "Preprocessing", AUTHOR, "preprocessing", "partly"),
                _I("10", "Selection of subsets", AUTHOR, "subsets", "partly"),
                _I("11", "De-identification", AUTHOR),
                _I("12", "Missing data", STATISTICIAN, "missing", "partly"),
                _I("13", "Acquisition of images", READER),
            ),
        ),
        (
            "Methods: reference standard",
            (
                _I("14", "How the reference standard was obtained", READER, "label", "partly"),
                _I("15", "Reason for that reference standard", READER),
                _I("16", "Who annotated", READER),
                _I("17", "Annotation of the test set", READER),
                _I("18", "Agreement within and between readers", READER),
            ),
        ),
        (
            "Methods: partitions",
            (
                _I("19", "How data were assigned to partitions", AUTHOR, "partition", "partly"),
                _I("20", "At which level partitions are disjoint", AUTHOR, "disjoint", "answered"),
                _I("21", "Intended sample size", STATISTICIAN),
            ),
        ),
        (
            "Methods: model and training",
            (
                _I("22", "Description of the model", AUTHOR, "models", "partly"),
                _I("23", "Software", AUTHOR, "software", "answered"),
                _I("24", "Initial parameters", AUTHOR, "start", "partly"),
                _I("25", "Training", AUTHOR, "training", "partly"),
                _I("26", "How the final model was selected", AUTHOR, "selection", "answered"),
                _I("27", "Ensembling", AUTHOR),
            ),
        ),
        (
            "Methods: evaluation",
            (
                _I("28", "Measures of performance", STATISTICIAN, "metrics", "answered"),
                _I("29", "Uncertainty and significance", STATISTICIAN, "statistics", "answered"),
                _I("30", "Robustness", STATISTICIAN, "groups", "partly"),
                _I("31", "Explanations", READER),
                _I("32", "Evaluation on internal data", AUTHOR, "internal", "answered"),
                _I("33", "Testing on external data", AUTHOR, "external", "answered"),
                _I("34", "Registration of a trial", AUTHOR),
            ),
        ),
        (
            "Results",
            (
                _I(
                    "35",
                    "Patients or examinations included and excluded",
                    AUTHOR,
                    "flow",
                    "answered",
                ),
                _I("36", "Characteristics of each partition", AUTHOR, "characteristics", "partly"),
                _I("37", "Performance with uncertainty", STATISTICIAN, "performance", "answered"),
                _I(
                    "38", "Diagnostic accuracy with precision", STATISTICIAN, "accuracy", "answered"
                ),
                _I("39", "Cases that were classified wrongly", READER, "mistakes", "partly"),
            ),
        ),
        (
            "Discussion and other information",
            (
                _I("40", "Limitations", AUTHOR),
                _I("41", "Meaning for practice", READER),
                _I("42", "Protocol or further technical details", AUTHOR),
                _I("43", "Availability of software, model, data", AUTHOR, "command", "partly"),
                _I("44", "Funding and its role", AUTHOR),
            ),
        ),
    ),
)
CHECKLISTS = {checklist.name: checklist for checklist in (TRIPOD_AI, CLAIM)}
"""Checklists by command-line name."""


NOT_RECORDED = "not recorded"
_FACTS = {**METHODS, **RESULTS}
_ABSENT = {
    "evaluated": "no run here evaluates a model elsewhere",
    "external": "no run here evaluates a model elsewhere",
    "groups": "the test rows are of one region",
    "internal": "no run here trained a model",
    "shift": "no run here measured it",
    "updating": "no run here updates a model",
}
"""Answers for facts that do not apply to the runs, rather than being missing."""
_STATUSES = ("answered", "partly", "open")


def fill_checklist(name: str, study: Study) -> dict[str, Any]:
    """Return a checklist with the items that a study answers filled in.

    Returns
    -------
    dict
        ``name``, ``title``, ``source`` (of the guideline), ``counts`` of statuses, and ``items``:
        ``item`` (its number), ``section``, ``asks`` (paraphrased), ``status`` ("answered",
        "partly", "open"), ``answer`` and ``source`` (the file it comes from; None if no fact
        relates to the item), ``by`` (who answers the rest; None if the item is answered).

    Raises
    ------
    RunError
        The checklist is unknown.
    """
    if name not in CHECKLISTS:
        known = ", ".join(CHECKLISTS)
        raise RunError(f"checklist {name!r} is unknown. Choose one of: {known}.")
    checklist = CHECKLISTS[name]
    items = [_fill(item, section, study) for section, items in checklist.sections for item in items]
    counts = Counter(own["status"] for own in items)
    return {
        "name": checklist.name,
        "title": checklist.title,
        "source": checklist.source,
        "counts": {status: counts[status] for status in _STATUSES},
        "items": items,
    }


def render_checklist(filled: dict[str, Any]) -> str:
    """Return a filled checklist as Markdown, with text from runs escaped."""
    checklist, counts = CHECKLISTS[filled["name"]], filled["counts"]
    own = {item["item"]: item for item in filled["items"]}
    lines = [
        f"# {checklist.title}: what these runs answer",
        "",
        f"Guideline: {checklist.source}. The items stand here in our own short words; what counts "
        "is the published text.",
        "",
        f"{counts['answered']} of {len(own)} items are answered by the runs, {counts['partly']} "
        f"partly, {counts['open']} stand open. What is filled in was copied from the files named "
        "beside it: check it before it goes into a paper.",
        "",
        "Research software; not a medical device.",
    ]
    for section, items in checklist.sections:
        lines += ["", f"## {section}", "", "| Item | Asks for | Status | Answer |"]
        lines.append("|---|---|---|---|")
        lines += [_line(own[item.number]) for item in items]
    return "\n".join([*lines, ""])


def write_checklists(names: Sequence[str], study: Study, out: Path) -> list[dict[str, Any]]:
    """Write ``checklist-NAME.md`` into `out`, and remove an earlier page's other checklists.

    Returns
    -------
    list of dict
        The results of `fill_checklist`, with ``path``.
    """
    filled = [fill_checklist(name, study) for name in dict.fromkeys(names)]
    for own in filled:
        own["path"] = str(_path(out, own["name"]))
        write_atomically(Path(own["path"]), render_checklist(own).encode())
    for name in set(CHECKLISTS).difference(names):
        _path(out, name).unlink(missing_ok=True)
    return filled


def _path(out: Path, name: str) -> Path:
    return out / f"checklist-{name}.md"


def _fill(item: Item, section: str, study: Study) -> dict[str, Any]:
    fact = _FACTS[item.fact](study) if item.fact else None
    status = "open" if fact is None else item.reach
    if fact is not None and not fact.is_whole:
        status = "partly"
    answer = _ABSENT.get(item.fact, NOT_RECORDED) if item.fact else None
    return {
        "item": item.number,
        "section": section,
        "asks": item.asks,
        "status": status,
        "answer": answer if fact is None else fact.text,
        "source": None if fact is None else fact.source,
        "by": None if status == "answered" else item.by,
    }


def _line(own: dict[str, Any]) -> str:
    text = to_markdown(own["answer"] or "")
    if own["source"]:
        text += f" ({to_markdown(own['source'])})"
    if own["by"]:
        rest = "The rest to" if own["status"] == "partly" else "To"
        text += f"{'. ' if text else ''}{rest} be answered by: {own['by']}"
    cells = (own["item"], own["asks"], own["status"], text)
    return f"| {' | '.join((*map(to_markdown, cells[:3]), cells[3]))} |"
