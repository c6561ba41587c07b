"""What a careful reader should look at in a manifest: words for missing values, and look-alikes.

Two spellings of one thing are two things to every program, and a word such as "nan" is a patient, a
region or a category. No rule tells a slip from what is meant, so these are warnings.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from medembed.core.text import normalise
from medembed.dataset.checks import REQUIRED, name_first
from medembed.dataset.covariates import MAX_CATEGORIES
from medembed.dataset.identities import EXACT, IDS, are_exact, explain_likeness, key_texts

__all__ = ["find_warnings", "is_missing_patient", "is_missing_word", "list_examples"]

# In lower case: what pandas, R, Excel, SQL and people write where a value is missing.
MISSING_WORDS = frozenset(
    [
        *("nan", "na", "n/a", "n.a.", "#n/a", "<na>", "nat", "none", "null", "(null)", "nil"),
        *("-", "--", "---", ".", "?", "??", "???", "missing", "not available", "not specified"),
    ]
)
# What de-identification and defaults leave in place of a patient: letters and digits alone.
PLACEHOLDERS = frozenset(
    [
        *("anonymous", "anonymised", "anonymized", "anonym", "anon", "anonymouspatient"),
        *("deidentified", "redacted", "removed", "withheld", "masked", "hidden", "unidentified"),
        *("unnamed", "noname", "noid", "patient", "patientid", "subject", "unknown"),
        *("xxx", "xxxx", "xxxxx"),
    ]
)
N_EXAMPLES = 3

# An identifier probably stands for many patients if it has at least 20 studies, more than a tenth
# of all studies, and more than 10 times the other patients' median.
MANY_STUDIES = 20
LARGE_SHARE = 0.1
LARGE_MULTIPLE = 10


def find_warnings(rows: pd.DataFrame) -> list[str]:
    """Return what looks wrong in a manifest's rows: a line for each kind and column.

    Parameters
    ----------
    rows : pandas.DataFrame
        Of a manifest, with a RangeIndex; all but `label` strings.
    """
    covariates = [str(name) for name in rows if name not in (*REQUIRED, IDS)]
    found = _warn_of_words(rows, "patient", is_missing_patient)
    found += _warn_of_words(rows, "study", is_missing_word)
    found += _warn_of_words(rows, "region", is_missing_word)
    for name in covariates:
        found += _warn_of_words(rows, name, _is_missing_value)
    if not are_exact(rows):
        remedy = f'Spell them alike, or say {IDS} = "{EXACT}" in the recipe if they are two persons'
        found += _warn_of_spellings(rows, "patient", remedy=remedy)
    found += _warn_of_spellings(rows, "study", within=("patient", "region"))
    for name in ("region", *covariates):
        found += _warn_of_spellings(rows, name)
    return found + _warn_of_share(rows)


def is_missing_word(text: str) -> bool:
    """Tell whether a text is a word that usually means that a value is missing."""
    return text.lower() in MISSING_WORDS


def is_missing_patient(text: str) -> bool:
    """Tell whether a text is such a word, or what stands where a patient's name was taken out."""
    return is_missing_word(text) or "".join(filter(str.isalnum, text.lower())) in PLACEHOLDERS


def list_examples(examples: Sequence[str], n: int | None = None) -> str:
    """Join the first three, and say how many more there are; `n` counts those not made too."""
    more = (len(examples) if n is None else n) - N_EXAMPLES
    return "; ".join(examples[:N_EXAMPLES]) + (f"; and {more} more" if more > 0 else "")


def _is_missing_value(text: str) -> bool:
    return is_missing_word(text) and text != "none"  # as of implants: none, plate, screw


def _warn_of_words(rows: pd.DataFrame, name: str, test: Callable[[str], bool]) -> list[str]:
    """Name the values of a column that pass `test`, whole or in a part between slashes."""
    firsts = rows.drop_duplicates(name)
    split = name in ("patient", "study")  # several columns may have made them
    words = sorted(
        value
        for value, image in zip(firsts[name], firsts["image"], strict=True)
        if (test(value) or (split and "/" in value and _has_part(value, test)))
        and not _is_stand_in(value, image)
    )
    if not words:
        return []
    n = int(rows[name].isin(words).sum())
    places = [_place(rows, name, word) for word in words[:N_EXAMPLES]]
    return [
        f"{name}: words that usually mean that there is none, in {n} {_plural(n, 'row')}: "
        f"{list_examples(places, len(words))}. Leave such a field empty, or write what it is"
    ]


def _has_part(value: str, test: Callable[[str], bool]) -> bool:
    return any(map(test, value.split("/"))) or "/n/a/" in f"/{value.lower()}/"


def _warn_of_spellings(
    rows: pd.DataFrame,
    name: str,
    within: tuple[str, ...] = (),
    remedy: str = "Spell them alike",
) -> list[str]:
    """Name values of a column that look alike; with `within`, only in rows that agree in these."""
    values = pd.Index(rows[name].unique())
    if name not in REQUIRED:
        values = values[~_are_numbers(values)]
        if len(values) > MAX_CATEGORIES:
            return []  # no category: nothing is learnt from it
    keys = pd.Series(key_texts(values), index=values)
    keys = keys[keys.duplicated(keep=False)]
    if keys.empty:
        return []
    some = rows[rows[name].isin(keys.index)].drop_duplicates([name, *within])
    by = [some[name].map(keys), *(some[other] for other in within)]
    sets: dict[tuple[str, ...], list[str]] = {}
    for value, image, *key in zip(some[name], some["image"], *by, strict=True):
        if not _is_stand_in(value, image):
            sets.setdefault(tuple(key), []).append(value)
    alike = sorted(sorted(spellings) for spellings in sets.values() if len(spellings) > 1)
    if not alike:
        return []
    n = len(alike)
    places = [_say_alike(rows, name, spellings) for spellings in alike[:N_EXAMPLES]]
    return [
        f"{name}: {n} {_plural(n, 'value')} {'is' if n == 1 else 'are'} spelt in several ways: "
        f"{list_examples(places, n)}. {remedy}"
    ]


def _say_alike(rows: pd.DataFrame, name: str, spellings: list[str]) -> str:
    places = [_place(rows, name, spelling) for spelling in spellings[:N_EXAMPLES]]
    *others, last = [*places, "others"] if len(spellings) > N_EXAMPLES else places
    return f"{', '.join(others)} and {last} differ in {explain_likeness(*spellings[:2])}"


def _warn_of_share(rows: pd.DataFrame) -> list[str]:
    """Name patients with an improbable share of the studies; see the constants above."""
    n_studies = rows.drop_duplicates("study")["patient"].value_counts()
    total = int(n_studies.sum())
    large = n_studies[(n_studies >= MANY_STUDIES) & (n_studies > LARGE_SHARE * total)]
    found = []
    for name, n in large.items():
        usual = n_studies.drop(name).median()  # NaN where there is no other
        if not n <= LARGE_MULTIPLE * usual:
            others = f"the others {usual:g} in the median" if usual > 0 else "there is no other"
            found.append(
                f"patient {name!r} has {n} of the {total} studies, and {others}: is it one person, "
                "or what many were given in place of a name? All of its images stay on one side of "
                "every split"
            )
    return found


def _place(rows: pd.DataFrame, name: str, value: str) -> str:
    """Quote a value, with its first image and its rows."""
    return f"{value!r} ({name_first(rows['image'][rows[name] == value])})"


def _is_stand_in(value: str, image: str) -> bool:
    """Tell whether a value is only its image's name, as where a data set names no studies."""
    image = normalise(image)
    names = (image, image.rpartition("/")[2])
    return value in (*names, *(name.rpartition(".")[0] for name in names))


def _are_numbers(values: pd.Index) -> np.ndarray:
    return np.asarray(pd.to_numeric(pd.Series(values), errors="coerce").notna())


def _plural(n: int, noun: str) -> str:
    return noun if n == 1 else f"{noun}s"
