"""Reporting checklists: what the runs answer is filled in, the rest stands open for people."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medembed.core.errors import RunError
from medembed.core.files import write_atomically
from medembed.core.text import to_markdown
from medembed.report.checklist_items import CHECKLISTS, Item
from medembed.report.checklist_methods import METHODS
from medembed.report.checklist_results import RESULTS
from medembed.report.checklist_study import Study

__all__ = ["NOT_RECORDED", "fill_checklist", "render_checklist", "write_checklists"]

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
"""What is said of a fact that is not missing, but is not there."""
_STATUSES = ("answered", "partly", "open")


def fill_checklist(name: str, study: Study) -> dict[str, Any]:
    """Fill in the items of a checklist that a study answers.

    Returns
    -------
    dict
        ``name``, ``title``, ``source`` (of the guideline), ``counts`` of statuses, and ``items``:
        ``item`` (its number), ``section``, ``asks`` (in our words), ``status`` ("answered",
        "partly", "open"), ``answer`` and ``source`` (where it stands; None where nothing bears on
        the item), ``by`` (who answers what is left; None where nothing is).

    Raises
    ------
    RunError
        There is no checklist of that name.
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
    """Write a filled checklist as Markdown; all text of runs is text there."""
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
    """Write ``checklist-NAME.md`` into `out`; those of an earlier page that has others go.

    Returns
    -------
    list of dict
        As `fill_checklist`, and ``path``.
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
