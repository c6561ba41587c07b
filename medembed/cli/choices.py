"""The choices that a recipe needs, as options and as questions on a terminal."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from medembed.cli.console import is_quiet, is_terminal, printable, say
from medembed.cli.options import Command, Finite, seed_option

if TYPE_CHECKING:
    from medembed.dataset.recipes.choices import Choices, Proposal, UndecidedError

__all__ = ["CHOICES", "choice_options", "is_interactive", "read_choices", "settle"]

NONE = "-"  # the answer that there is no such column
_OPTIONS = (
    click.option("--image", metavar="COL", help="Column with the image's path, name or stem."),
    click.option("--label", metavar="COL", help="Column with the label."),
    click.option(
        "--normal",
        metavar="V",
        multiple=True,
        help="Label value or folder that means normal; repeatable.",
    ),
    click.option(
        "--abnormal",
        metavar="V",
        multiple=True,
        help="Label value or folder that means abnormal; repeatable. If only one of the two "
        "options is given, all other values mean the opposite.",
    ),
    click.option(
        "--empty",
        type=click.Choice(["normal", "abnormal", "unknown"]),
        help="What an empty label means.",
    ),
    click.option(
        "--patient",
        metavar="COL",
        multiple=True,
        help="Column that identifies the patient; repeatable if several do so together.",
    ),
    click.option(
        "--study",
        metavar="COL",
        multiple=True,
        help="Column that identifies the study; repeatable.",
    ),
    click.option("--region", metavar="COL", help="Column with the body part."),
    click.option("--split", metavar="COL", help="Column with the split, train or test."),
    click.option(
        "--covariate",
        "covariates",
        metavar="COL",
        multiple=True,
        help="Column to keep in the manifest, such as age; repeatable.",
    ),
    click.option("--encoding", help="Encoding of the table, such as cp1250; detected by default."),
    click.option("--delimiter", help="Delimiter of the table; detected by default."),
    click.option("--sheet", help="Sheet of an Excel file; by default the first that is not empty."),
    click.option(
        "--pattern",
        metavar="PATTERN",
        help="Form of the paths, such as '{split}/{label}/{patient}_*'.",
    ),
    click.option(
        "--test-fraction",
        type=Finite(0, 1, min_open=True, max_open=True),
        metavar="F",
        help="Share of studies to draw for test, by patient.  [default: 0.2, or up to 0.4 if "
        "test would be too small to score]",
    ),
)
CHOICES = (
    *("image", "label", "normal", "abnormal", "empty", "patient", "study", "region", "split"),
    *("covariates", "pattern", "test_fraction", "encoding", "delimiter", "sheet"),
)
"""What the options are called."""
_QUESTIONS = {
    "image": "Column that names the image",
    "label": "Column with the label",
    "normal": "Values that mean normal",
    "abnormal": "Values that mean abnormal",
    "patient": "Column that identifies the patient",
    "study": "Column that identifies the study",
    "region": "Column with the body part",
    "split": "Column with the split, train or test",
    "covariates": "Columns to keep",
    "pattern": "Form of the paths, such as '{label}/{patient}_*'",
    "test_fraction": "Share of the studies for test",
}
_CHANGEABLE = {
    "table": tuple(name for name in _QUESTIONS if name != "pattern"),
    "folders": ("normal", "abnormal", "pattern", "test_fraction"),
    "dicom": ("image", "label", "normal", "abnormal", "test_fraction"),
}
"""What a person may change, by the recipe's layout."""
_SEVERAL = ("normal", "abnormal", "patient", "study", "covariates")


def choice_options(command: Command) -> Command:
    """Add an option for each choice that a recipe needs."""
    for option in (seed_option, *reversed(_OPTIONS)):
        command = option(command)
    return command


def read_choices(given: dict[str, Any]) -> "Choices":
    """Return the choices of the options that were given; the others stay open."""
    from medembed.dataset.foreign_tables import TableFormat
    from medembed.dataset.recipes.choices import Choices

    own = {name: given[name] for name in CHOICES if given[name] not in (None, ())}
    blank = {n: tuple(filter(None, v)) for n, v in own.items() if isinstance(v, tuple)}
    written = {name: own.pop(name, "") for name in ("encoding", "delimiter", "sheet")}
    if len(written["delimiter"]) > 1:
        raise click.UsageError("--delimiter must be one character.")
    return Choices(**{**own, **blank}, seed=given["seed"], format=TableFormat(**written))


def is_interactive() -> bool:
    """Return whether a person can be asked."""
    return is_terminal(sys.stdin) and is_terminal(sys.stderr) and not is_quiet()


def settle(
    propose: Callable[["Choices"], "Proposal"], choices: "Choices", *, ask: bool
) -> "Proposal":
    """Return a proposal; with `ask`, a person settles what is open and can correct the rest."""
    from medembed.core.errors import MedembedError
    from medembed.dataset.recipes.choices import UndecidedError

    proposal = None
    while True:
        try:
            proposal = propose(choices)
            accepted = choices
            _describe(proposal)
        except UndecidedError as error:
            if not ask:
                raise
            choices = _set(choices, error.choice, _pick(error))
            continue
        except MedembedError as error:
            if proposal is None:
                raise
            say(f"That does not work: {error}")
        if not ask or not (name := _ask_for_change(proposal.recipe.layout)):
            return proposal
        choices = _set(accepted, name, _ask(name))


def _describe(proposal: "Proposal") -> None:
    say(str(proposal))
    for warning in proposal.warnings:
        say(f"Warning: {warning}")
    for notice in proposal.notices:
        say(f"Note: {notice}")


def _ask_for_change(layout: str) -> str:
    """Ask what to change; return "" if nothing is to be changed."""
    known = _CHANGEABLE.get(layout, ())
    names = ", ".join(name.replace("_", "-") for name in known)
    say()
    say(click.wrap_text(f"To change one of these, enter its name: {names}.", 80))
    while True:
        answer = click.prompt("Enter writes the recipe", default="", show_default=False, err=True)
        name = str(answer).strip().replace("-", "_")
        if not name or name in known:
            return name
        say(f"{answer!r} is not one of these names.")


def _ask(name: str) -> Any:
    hint = f"{NONE} for none" + ("; separate several by commas" if name in _SEVERAL else "")
    kind = Finite(0, 1, min_open=True, max_open=True) if name == "test_fraction" else str
    answer = click.prompt(f"{_QUESTIONS[name]} ({hint})", type=kind, err=True)
    return _read_answer(name, answer)


def _pick(error: "UndecidedError") -> Any:
    """Ask for the choice that an error leaves open, by its number in a list or by its text."""
    say(str(error).partition(" Name what is abnormal")[0])
    for number, answer in enumerate(error.answers, 1):
        say(f"  {number}  {answer}")
    several = " Separate several by commas." if error.choice in _SEVERAL else ""
    while True:
        text = str(click.prompt(printable(f"{error.question}{several}"), err=True)).strip()
        parts = _split(text) if error.choice in _SEVERAL and text not in error.answers else [text]
        found = [_find_answer(part, error.answers) for part in parts]
        if all(found):
            return tuple(found) if error.choice in _SEVERAL else found[0]
        say("Answer with a number or a name from the list.")


def _find_answer(text: str, answers: tuple[str, ...]) -> str:
    if text in answers:
        return text
    return answers[int(text) - 1] if text.isdecimal() and 0 < int(text) <= len(answers) else ""


def _read_answer(name: str, answer: Any) -> Any:
    if name == "test_fraction":
        return answer
    text = str(answer).strip()
    if name in _SEVERAL:
        return () if text == NONE else tuple(_split(text))
    return "" if text == NONE else text


def _split(text: str) -> list[str]:
    return [part for own in text.split(",") if (part := own.strip())]


def _set(choices: "Choices", name: str, value: Any) -> "Choices":
    """Return the choices with one changed; a new label reopens what its values mean."""
    from dataclasses import replace

    again: dict[str, Any] = {"normal": None, "abnormal": None} if name == "label" else {}
    again |= {"normal": None} if name == "abnormal" else {}
    again |= {"abnormal": None} if name == "normal" else {}
    again |= {"split": ""} if name == "test_fraction" else {}
    again |= {"test_fraction": None} if name == "split" and value else {}
    return replace(choices, **{**again, name: value})
