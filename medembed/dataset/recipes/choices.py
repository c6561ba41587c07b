"""The choices of a recipe that are settled or still open, and the proposed recipe."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tomlkit

from medembed.core.errors import RecipeError
from medembed.core.text import Summarised, Summary, counted, normalise
from medembed.dataset.foreign_tables import PLAIN, TableFormat
from medembed.dataset.recipes.listing import is_unicode
from medembed.dataset.recipes.schema import Recipe, make_recipe

__all__ = ["Choices", "Proposal", "UndecidedError", "make_proposal"]


@dataclass(frozen=True)
class Choices:
    """Settled choices; None is left to be proposed, and an empty value means that there is none.

    Parameters
    ----------
    image, label : str, optional
        Columns of the table.
    normal, abnormal : tuple of str, optional
        Values of the label, or names of folders.
    empty : {"normal", "abnormal", "unknown"}, optional
        What an empty label means.
    patient, study : tuple of str, optional
        Columns that together name the patient and the study.
    region, split : str, optional
        Columns; without them there is one region, ``all``, and test is drawn by patient.
    covariates : tuple of str, optional
        Columns to copy into the manifest.
    pattern : str, optional
        The form of paths, as in `[folders]`.
    test_fraction : float, optional
        Share of the studies that is drawn for test.
    seed : int
        Seed of the draw.
    format : TableFormat
        How the table is written; empty fields are detected.
    """

    image: str | None = None
    label: str | None = None
    normal: tuple[str, ...] | None = None
    abnormal: tuple[str, ...] | None = None
    empty: str | None = None
    patient: tuple[str, ...] | None = None
    study: tuple[str, ...] | None = None
    region: str | None = None
    split: str | None = None
    covariates: tuple[str, ...] | None = None
    pattern: str | None = None
    test_fraction: float | None = None
    seed: int = 0
    format: TableFormat = PLAIN

    def without_guesses(self) -> "Choices":
        """Return the choices with open ones taken as absent, except image and label."""
        return replace(
            self,
            patient=self.patient or (),
            study=self.study or (),
            region=self.region or "",
            split=self.split or "",
            covariates=self.covariates or (),
        )


class UndecidedError(RecipeError):
    """A choice that a recipe needs cannot be determined from the data.

    Attributes
    ----------
    choice : str
        The field of `Choices` that settles it.
    question : str
    answers : tuple of str
        The possible answers.
    """

    def __init__(
        self, message: str, choice: str, question: str, answers: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.choice, self.question, self.answers = choice, question, answers


@dataclass(frozen=True, repr=False)
class Proposal(Summarised):
    """A recipe that was proposed from the data.

    Attributes
    ----------
    recipe : Recipe
    image_root : Path
        The directory with the images.
    text : str
        The recipe as TOML, with a comment on each guess.
    settled : mapping of str to str
        What was found, by names that people understand.
    warnings : list of str
        What a careful reader should know.
    notices : list of str
        Further observations.
    """

    recipe: Recipe
    image_root: Path
    text: str
    settled: Mapping[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def summarise(self) -> Summary:
        """Return a summary of what was found."""
        warned = {"warnings": counted(len(self.warnings), "warning")} if self.warnings else {}
        title = f"Recipe {self.recipe.name!r} for {self.image_root}"
        return Summary(title, {**self.settled, **warned})

    def as_dict(self) -> dict[str, object]:
        """Return the proposal as JSON values."""
        return {
            "name": self.recipe.name,
            "layout": self.recipe.layout,
            "image_root": str(self.image_root),
            "settled": dict(self.settled),
            "warnings": self.warnings,
            "notices": self.notices,
            "recipe": self.text,
        }


HEAD = """
Proposed by medembed from what it found. Read it, correct it, and build the manifest:

  medembed manifest build RECIPE.toml --image-root DIR -o MANIFEST.csv
"""
ABOUT = """
Where the images come from, and how they may be used:
licence = ""
citation = ""
url = ""
"""


def make_proposal(
    document: Mapping[str, Any],
    root: Path,
    *,
    comments: Mapping[str, str],
    settled: Mapping[str, str],
    warnings: list[str],
    notices: list[str],
) -> Proposal:
    """Return a proposal of a recipe, written with its comments and read like any other.

    Parameters
    ----------
    document : mapping
        The recipe's keys and sections.
    root : Path
    comments : mapping of str to str
        The comment above a key, such as ``table.patient``, or a section.
    settled, warnings, notices
        The attributes of the `Proposal`.

    Raises
    ------
    RecipeError
        A name of a file or column is not valid Unicode, or the recipe contradicts itself.
    """
    text = _write(document, comments)
    if not is_unicode(text):
        raise RecipeError(
            f"a name below {root} is not valid Unicode, which a recipe requires. Rename the file."
        )
    recipe = make_recipe(text, Path(f"{document['name']}.toml"))
    return Proposal(recipe, root, text, settled, warnings, notices)


def _write(document: Mapping[str, Any], comments: Mapping[str, str]) -> str:
    whole = tomlkit.document()
    _comment(whole, HEAD)
    for name, value in document.items():
        if not isinstance(value, Mapping):
            _comment(whole, comments.get(name, ""))
            whole.add(name, value)
    _comment(whole, ABOUT)
    for name, value in document.items():
        if isinstance(value, Mapping):
            whole.add(tomlkit.nl())
            whole.add(name, _section(value, comments, name))
    return tomlkit.dumps(whole)


def _section(values: Mapping[str, Any], comments: Mapping[str, str], name: str) -> Any:
    if any(isinstance(value, Mapping) for value in values.values()):
        return _sections(values, comments, name)
    section = tomlkit.table()
    _comment(section, comments.get(name, ""))
    for key, value in values.items():
        _comment(section, comments.get(f"{name}.{key}", ""))
        several = isinstance(value, list | tuple)
        section.add(key, _listed(value) if several else value)
    return section


def _sections(values: Mapping[str, Any], comments: Mapping[str, str], name: str) -> Any:
    """Return sections of sections, such as `[targets.NAME]`, under one comment."""
    above = tomlkit.table(is_super_table=True)
    for i, (key, value) in enumerate(values.items()):
        if i:
            above.add(tomlkit.nl())
        told = {f"{name}.{key}": comments.get(name, "")} if not i else {}
        above.add(key, _section(value, {**comments, **told}, f"{name}.{key}"))
    return above


def _listed(values: Any) -> Any:
    array = tomlkit.array()
    array.extend(values)
    return array.multiline(sum(map(len, values)) > 70)


def _comment(container: Any, text: str) -> None:
    for line in text.strip().splitlines():
        shown = normalise("".join(c if c.isprintable() else "\ufffd" for c in line))
        indent = line[: len(line) - len(line.lstrip())]
        container.add(tomlkit.comment(f"{indent}{shown}") if shown else tomlkit.comment(""))
