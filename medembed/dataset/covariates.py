"""Manifest columns encoded as numbers, to be appended to an embedding.

A column whose known values are all numbers is encoded as its value, or the training median if that
is unknown; a column of words as one number, 0 or 1, for each word seen in training. Both end with
an indicator of missing values. Everything is learnt from the rows given to `fit_covariates`.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

import numpy as np
import pandas as pd

from medembed.core.errors import TrainingDataError
from medembed.core.text import normalise
from medembed.dataset.identities import IDS
from medembed.dataset.targets import is_target

__all__ = [
    "LARGEST",
    "MAX_CATEGORIES",
    "NOT_COVARIATES",
    "CategoricalColumn",
    "CovariateEncoder",
    "NumericColumn",
    "fit_covariates",
    "is_covariate",
    "to_number",
]

MAX_CATEGORIES = 64  # more of them are names of persons or images
NOT_COVARIATES = ("image", "sha256", "patient", "study", "label", "split", IDS, "label_level")
LARGEST = float(np.finfo(np.float32).max)
MISSING = ""


@dataclass(frozen=True)
class NumericColumn:
    """A covariate of numbers; `fill`, the training median, replaces unknown values."""

    name: str
    fill: float

    @property
    def names(self) -> list[str]:
        """The columns that come out."""
        return [self.name, f"{self.name} is missing"]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return (n, 2) float64: the value and whether it is unknown."""
        known = sorted(set(texts) - {MISSING})
        numbers = _numbers(self.name, known)
        word = next((text for text in known if text not in numbers), None)
        if word is not None:
            raise TrainingDataError(
                f"covariate {self.name} is of unknown kind: in training it held numbers only, and "
                f"now text, such as {short(word)}. Write numbers in this column of the manifest "
                "and leave unknown fields empty, or train without this covariate."
            )
        block = np.zeros((len(texts), 2))
        block[:, 0] = [numbers.get(text, self.fill) for text in texts]
        block[:, 1] = [text == MISSING for text in texts]
        return block

    def as_dict(self) -> dict[str, object]:
        """Return JSON values."""
        return {"name": self.name, "kind": "numeric", "fill": self.fill}


@dataclass(frozen=True)
class CategoricalColumn:
    """A covariate of words; `categories` are those seen in training, in ascending order."""

    name: str
    categories: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """The columns that come out."""
        return [*(f"{self.name}={word}" for word in self.categories), f"{self.name} is missing"]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return (n, categories + 1) float64 zeros and ones; an unseen category is all zeros."""
        number = next(iter(_numbers(self.name, sorted(set(texts) - {MISSING}))), None)
        if number is not None:
            raise TrainingDataError(
                f"covariate {self.name} is of unknown kind: in training it held text only, such as "
                f"{short(self.categories[0])}, and now numbers, such as {short(number)}. "
                "Write the same categories in this column of the manifest, or train without this "
                "covariate."
            )
        words = (*self.categories, MISSING)
        # Categories of an older model may be in another Unicode form than those of a manifest.
        place = {normalise(word): i for i, word in enumerate(words)}
        place |= {word: i for i, word in enumerate(words)}
        block = np.zeros((len(texts), len(words)))
        seen = [(row, place[text]) for row, text in enumerate(texts) if text in place]
        if seen:
            block[tuple(np.array(seen).T)] = 1
        return block

    def as_dict(self) -> dict[str, object]:
        """Return JSON values."""
        return {"name": self.name, "kind": "categorical", "categories": list(self.categories)}


@dataclass(frozen=True)
class CovariateEncoder:
    """The encoding of manifest columns as numbers, learnt by `fit_covariates`."""

    columns: tuple[NumericColumn | CategoricalColumn, ...]

    @property
    def names(self) -> list[str]:
        """The names of the encoded columns, such as "age", "age is missing", "sex=F"."""
        return [name for column in self.columns for name in column.names]

    def transform(self, rows: pd.DataFrame) -> np.ndarray:
        """Return the encoded covariates of a manifest's rows, labelled or not.

        Returns
        -------
        numpy.ndarray of float32, (n_rows, len(names))
            Always finite.

        Raises
        ------
        TrainingDataError
            A column is missing, holds text although it held numbers in training or the reverse, or
            holds a number that is not finite.
        """
        blocks = [np.zeros((len(rows), 0))]
        for column in self.columns:
            if column.name not in rows:
                raise TrainingDataError(
                    f"covariate {column.name} is not a column of the manifest, and the classifier "
                    "reads it. Add the column (a field may be empty where the value is unknown), "
                    "or train without this covariate."
                )
            blocks.append(column.encode(_texts(rows[column.name])))
        return np.hstack(blocks).astype(np.float32)

    def as_dict(self) -> dict[str, object]:
        """Return JSON values."""
        return {"columns": [column.as_dict() for column in self.columns]}


def is_covariate(column: str) -> bool:
    """Return whether a manifest's column is a covariate: not one of its own, and no target."""
    return column not in NOT_COVARIATES and not is_target(column)


def fit_covariates(rows: pd.DataFrame, names: Sequence[str]) -> CovariateEncoder:
    """Return an encoder with the medians and categories of covariates.

    Parameters
    ----------
    rows : pandas.DataFrame
        Only the labelled training rows of a manifest. None, NaN and blank text mean unknown; blanks
        around a value are dropped.
    names : sequence of str
        The columns to encode, in this order.

    Raises
    ------
    TrainingDataError
        A name is not a covariate or is given twice; a column has no known value, mixes
        numbers and text, holds a number that is not finite, or has more than `MAX_CATEGORIES`
        categories.
    """
    _check_names(names, [str(name) for name in rows.columns])
    return CovariateEncoder(tuple(_fit(name, _texts(rows[name])) for name in names))


def _fit(name: str, texts: list[str]) -> NumericColumn | CategoricalColumn:
    known = sorted(set(texts) - {MISSING})
    if not known:
        raise TrainingDataError(
            f"covariate {name} is unknown in every labelled training row. Fill the manifest's "
            "column, or leave it out of --covariates."
        )
    numbers = _numbers(name, known)
    words = [text for text in known if text not in numbers]
    if numbers and words:
        raise TrainingDataError(
            f"covariate {name} is of unknown kind: it holds numbers, such as "
            f"{short(next(iter(numbers)))}, and text, such as {short(words[0])}. Write one "
            "kind in this column of the manifest and leave unknown fields empty, or leave it out "
            "of --covariates."
        )
    if numbers:
        return NumericColumn(name, float(np.median([numbers[text] for text in texts if text])))
    if len(words) > MAX_CATEGORIES:
        raise TrainingDataError(
            f"covariate {name} has {len(words)} categories, and at most {MAX_CATEGORIES} are "
            "encoded: it looks like an identifier, not a covariate, and nothing that identifies a "
            "patient may leave the manifest. Group its values, or leave it out of --covariates."
        )
    return CategoricalColumn(name, tuple(words))


def _check_names(names: Sequence[str], there: list[str]) -> None:
    covariates = [name for name in there if is_covariate(name)]
    for i, name in enumerate(names):
        if is_target(name):
            raise TrainingDataError(
                f"{name} is a target, not a covariate: it may give the label away. Leave it out of "
                "--covariates."
            )
        if name in NOT_COVARIATES:
            raise TrainingDataError(
                f"{name} is not a covariate: {', '.join(NOT_COVARIATES)} say which image a row is "
                "and what it is used for, and no classifier may learn from them. Leave it out of "
                "--covariates."
            )
        if name not in covariates:
            near = difflib.get_close_matches(name, covariates, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise TrainingDataError(
                f"covariate {name!r} is not a column of the manifest; {hint}"
                f"Its covariates are: {', '.join(covariates) or 'none'}. Name one of these in "
                "--covariates, or add the column."
            )
        if name in names[:i]:
            raise TrainingDataError(
                f"covariate {name} is given twice. Name each column once in --covariates."
            )


def _texts(column: "pd.Series[Any]") -> list[str]:
    texts = [MISSING if pd.isna(value) else str(value) for value in column.astype(object)]
    spelt = {text: normalise(text) for text in set(texts)}
    return [spelt[text] for text in texts]


def _numbers(name: str, texts: Iterable[str]) -> dict[str, float]:
    """Return the numbers among known texts; refuse those that float32 cannot hold."""
    found = {}
    for text in texts:
        number = to_number(text)
        if number is None:
            continue
        if not abs(number) <= LARGEST:  # true of NaN as well
            raise TrainingDataError(
                f"covariate {name} holds {short(text)}, which is not a finite number of "
                "single precision. Leave the field empty where the value is unknown, or correct it."
            )
        found[text] = number
    return found


def to_number(text: str) -> float | None:
    """Return a field as a number, which may not be finite, or None if it is a word."""
    try:
        # Python reads 1_2 as twelve; in a table it is a name.
        return None if "_" in text else float(text)
    except ValueError:
        return None
