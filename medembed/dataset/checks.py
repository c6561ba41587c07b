"""Checks of a manifest's rules, and warnings about what deserves a second look, by whole columns.

`find_table_problems` and `find_content_problems` report errors; `find_warnings` reports words for
missing values and spellings that look alike. To a program, two spellings of one name are two names,
and a word such as "nan" is a patient, a region or a category. No rule can tell whether that is a
slip or intended, so these are warnings. A million rows take seconds.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import pandas as pd

from medembed.core.text import normalise
from medembed.dataset.covariates import MAX_CATEGORIES
from medembed.dataset.identities import (
    EXACT,
    IDS,
    are_exact,
    explain_likeness,
    find_persons,
    key_texts,
)
from medembed.dataset.targets import VALUES, is_target, name_problem, target_column

__all__ = [
    "CONTENTS",
    "LABEL_LEVELS",
    "REQUIRED",
    "SPLITS",
    "cap",
    "find_content_problems",
    "find_table_problems",
    "find_warnings",
    "is_ascending",
    "is_missing_patient",
    "is_missing_word",
    "list_examples",
]

REQUIRED = ("image", "sha256", "patient", "study", "region", "label", "split")
CONTENTS = ("image", "sha256")  # which images there are, and what bytes they hold
LABEL_LEVELS = ("study", "image")
SPLITS = ("train", "test")

N_SHOWN = 20  # problems of one kind that are listed; the rest are only counted
N_ROWS_SHOWN = 4  # rows that one problem names

Kind = tuple[int, Iterable[str]]  # how many problems of one kind, and their lines


def find_table_problems(table: pd.DataFrame, label_level: str) -> list[str]:
    """Return every rule of a manifest that `table` breaks.

    Parameters
    ----------
    table : pandas.DataFrame
        Strings only; `label` is "0", "1" or "".
    label_level : str
        "study" or "image"; anything else is itself a problem.

    Returns
    -------
    list of str
        One line per problem, at most 20 of a kind, then "and N more". Rows are numbered as in a
        spreadsheet: the header is row 1.
    """
    problems = []
    if label_level not in LABEL_LEVELS:
        problems.append(f"column label_level says {label_level!r}; it must be study or image")
    every = (
        *(_paths, _duplicates, _hashes, _values, _empties),
        *(_studies, _patients, _persons, _ids, _bytes, _targets),
    )
    return problems + _find(table, REQUIRED, every, label_level)


def find_content_problems(table: pd.DataFrame) -> list[str]:
    """Return the rules that columns `image` and `sha256` break; see `find_table_problems`."""
    return _find(table, CONTENTS, (_paths, _duplicates, _hashes), "image")


def _find(
    table: pd.DataFrame, names: tuple[str, ...], checks: tuple["Check", ...], label_level: str
) -> list[str]:
    missing = [name for name in names if name not in table.columns]
    if missing:
        shown = [name if len(name) <= 40 else f"{name[:39]}…" for name in table.columns[:N_SHOWN]]
        found = ", ".join(map(repr, shown))
        more = f" and {len(table.columns) - N_SHOWN} more" * (len(table.columns) > N_SHOWN)
        return [f"missing columns: {', '.join(missing)}; the columns are {found}{more}"]
    if table.empty:
        return ["no rows"]
    columns = _Columns(table.reset_index(drop=True))
    problems = []
    for check in checks:
        for n_lines, lines in check(columns, label_level):
            problems.extend(cap(lines, n_lines))
    return problems


class _Columns:
    """A table and, for each column, codes that are equal for equal values.

    Codes are made once per column, and columns are never copied: 10 million rows of text are 2 GB.
    """

    def __init__(self, table: pd.DataFrame) -> None:
        self.table = table
        self._codes: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> "pd.Series[str]":
        return self.table[name]

    def codes(self, name: str) -> np.ndarray:
        """Return a column as numbers from 0, in the order of first appearance: (n,) int."""
        if name not in self._codes:
            self._codes[name] = pd.factorize(self.table[name], use_na_sentinel=False)[0]
        return self._codes[name]


Check = Callable[[_Columns, str], Iterator[Kind]]


def is_ascending(column: "pd.Series[str]") -> bool:
    """Return whether each value of a column of strings is greater than the one before."""
    before, after = column.iloc[:-1], column.iloc[1:]
    return bool((after.reset_index(drop=True) > before.reset_index(drop=True)).all())


def cap(lines: Iterable[str], n_lines: int) -> list[str]:
    """Return the first 20 of `n_lines` lines, and a line on how many more there are.

    `lines` may be lazy: lines that are not shown are never made.
    """
    shown = list(islice(lines, N_SHOWN))
    return shown if n_lines <= N_SHOWN else [*shown, f"… and {n_lines - N_SHOWN} more of this kind"]


def _paths(table: _Columns, _: str) -> Iterator[Kind]:
    image = table["image"]
    outside = image.str.contains(r"^/|^[A-Za-z]:|\\|(?:^|/)\.\.(?:/|$)", regex=True)
    unclean = ~outside & image.str.contains(r"^$|(?:^|/)\.?(?:/|$)|\x00", regex=True)
    yield _cells(image[outside], "may leave the image root; use / between folders and no ..")
    yield _cells(image[unclean], "is not a plain path; drop empty folders and .")


def _duplicates(table: _Columns, _: str) -> Iterator[Kind]:
    image = table["image"]
    if is_ascending(image):  # as in a manifest, where no codes are needed
        return
    codes = table.codes("image")
    twice = image[(np.bincount(codes) > 1)[codes]]
    names = sorted(twice.unique())
    yield (
        len(names),
        (
            f"image {name!r} is listed twice ({_name_rows(twice.index[twice == name])})"
            for name in names
        ),
    )


def _hashes(table: _Columns, _: str) -> Iterator[Kind]:
    sha256 = table["sha256"]
    if (sha256 != "").any():  # else built from tables only
        wrong = ~sha256.str.fullmatch(r"[0-9a-f]{64}")
        yield _cells(sha256[wrong], "is not 64 lower-case hex digits; build the manifest again")


def _values(table: _Columns, _: str) -> Iterator[Kind]:
    yield _others(table["label"], ("0", "1", ""), "is neither 0, 1 nor empty")
    remedy = "is neither train nor test; map it with split_names in the recipe"
    yield _others(table["split"], SPLITS, remedy)


def _others(column: "pd.Series[str]", allowed: tuple[str, ...], complaint: str) -> Kind:
    strange = column[~column.isin(allowed)]
    values = sorted(strange.unique())
    return len(values), (
        f"{column.name} {value!r} {complaint} ({_name_rows(strange.index[strange == value])})"
        for value in values
    )


def _empties(table: _Columns, _: str) -> Iterator[Kind]:
    for name in ("patient", "study", "region"):
        empty = table["image"][table[name] == ""]
        if len(empty):
            images = ", ".join(empty[:N_ROWS_SHOWN]) + ", …" * (len(empty) > N_ROWS_SHOWN)
            yield 1, [f"{name} is empty ({_name_rows(empty.index)}): {images}"]


def _studies(table: _Columns, label_level: str) -> Iterator[Kind]:
    yield _conflicts(table, "study", "patient", "study {!r} belongs to several patients: {}")
    yield _conflicts(table, "study", "region", "study {!r} shows several regions: {}")
    if label_level == "study":
        known = (table["label"] != "").to_numpy(bool)
        yield _conflicts(table, "study", "label", "study {!r} has more than one label: {}", known)


def _patients(table: _Columns, _: str) -> Iterator[Kind]:
    yield _conflicts(table, "patient", "split", "patient {!r} is in more than one split: {}")


def _persons(table: _Columns, _: str) -> Iterator[Kind]:
    """Find patients with different spellings in two splits."""
    spellings = table["patient"].unique()
    persons = None if are_exact(table.table) else find_persons(spellings)
    if persons is None:
        return
    persons = np.where((np.bincount(persons) > 1)[persons], persons, -1)[table.codes("patient")]
    is_torn = _find_torn(persons + 1, table.codes("split"), persons >= 0)[persons + 1]
    rows = table.table[is_torn]
    names = persons[is_torn]
    torn = np.unique(names)
    yield len(torn), (_say_apart(rows[names == person]) for person in torn)


def _say_apart(rows: pd.DataFrame) -> str:
    """Return a sentence on where the spellings of one patient occur and how they differ."""
    parts = [
        (str(patient), str(split), f"{patient!r} in {split} ({_name_first(part['image'])})")
        for (patient, split), part in rows.groupby(["patient", "split"], sort=True)
    ]
    spellings = sorted({patient for patient, _, _ in parts})
    shown = [text for _, _, text in parts[:N_ROWS_SHOWN]]
    more = f" and {len(parts) - N_ROWS_SHOWN} more" * (len(parts) > N_ROWS_SHOWN)
    return (
        f"spellings of what may be one patient are in more than one split: {', '.join(shown)}{more}"
        f"; they differ in {explain_likeness(*spellings[:2])}. Spell them alike, or set "
        f'{IDS} = "{EXACT}" in the recipe if they are different persons'
    )


def _ids(table: _Columns, _: str) -> Iterator[Kind]:
    if IDS not in table.table:
        return
    others = table.table.index[table[IDS] != EXACT]
    if 0 < len(others) < len(table.table):
        rows = _name_rows(others)
        yield 1, [f"column {IDS} says {EXACT!r} in some rows and not in others ({rows})"]


def _bytes(table: _Columns, _: str) -> Iterator[Kind]:
    hashed = (table["sha256"] != "").to_numpy(bool)
    template = "the same bytes are in more than one split: {1}"
    yield _conflicts(table, "sha256", "split", template, hashed)
    known = hashed & (table["label"] != "").to_numpy(bool)
    template = "the same bytes have more than one label: {1}"
    yield _conflicts(table, "sha256", "label", template, known)


def _targets(table: _Columns, label_level: str) -> Iterator[Kind]:
    """Hold every column `target_NAME` to the rules of the label."""
    for column in filter(is_target, map(str, table.table.columns)):
        wrong = name_problem(column.removeprefix(target_column("")))
        if wrong:
            yield 1, [f"column {column!r}: {wrong}; rename it"]
        yield _others(table[column], VALUES, "is neither 0, 1 nor empty, as a target's values are")
        known = (table[column] != "").to_numpy(bool)
        if label_level == "study":
            several = f"study {{!r}} has more than one value of {column}: {{}}"
            yield _conflicts(table, "study", column, several, known)
        known = known & (table["sha256"] != "").to_numpy(bool)
        several = f"the same bytes have more than one value of {column}: {{1}}"
        yield _conflicts(table, "sha256", column, several, known)


def _conflicts(
    table: _Columns, key: str, value: str, template: str, where: np.ndarray | None = None
) -> Kind:
    """Find each `key` with several values of `value`, and name the rows of each value."""
    keys, values = table.codes(key), table.codes(value)
    if where is None:
        where = np.ones(len(keys), bool)
    is_torn = _find_torn(keys, values, where)
    rows = table.table[is_torn[keys] & where] if is_torn.any() else table.table[:0]
    torn = sorted(rows[key].unique())
    return len(torn), (
        template.format(name, _listed(rows[rows[key] == name], value)) for name in torn
    )


def _find_torn(keys: np.ndarray, values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Return, for each key (a code up to the number of rows), whether it has several values."""
    first = np.zeros(len(keys) + 1, values.dtype)
    first[keys[where][::-1]] = values[where][::-1]
    is_torn = np.zeros(len(keys) + 1, bool)
    is_torn[keys[where & (values != first[keys])]] = True
    return is_torn


def _cells(column: "pd.Series[str]", complaint: str) -> Kind:
    return len(column), (
        f"row {_number(position)}: {column.name} {text!r} {complaint}"
        for position, text in column.items()
    )


def _listed(rows: pd.DataFrame, column: str) -> str:
    """Return each value with its first image and rows: "test (b.png, row 7), train (…)"."""
    return ", ".join(
        f"{value} ({_name_first(part['image'])})" for value, part in rows.groupby(column, sort=True)
    )


def _name_first(images: "pd.Series[str]") -> str:
    """Return the first of some images, and their rows: "a.png, rows 2, 7"."""
    return f"{images.iloc[0]}, {_name_rows(images.index)}"


def _name_rows(index: pd.Index) -> str:
    """Return spreadsheet rows, at most four, for positions from 0: "rows 2, 7"."""
    shown = ", ".join(str(_number(position)) for position in index[:N_ROWS_SHOWN])
    hidden = len(index) - N_ROWS_SHOWN
    noun = "row" if len(index) == 1 else "rows"
    return f"{noun} {shown}" + (f" and {hidden} more" if hidden > 0 else "")


def _number(position: object) -> int:
    return int(str(position)) + 2  # the header is row 1


# In lower case: what pandas, R, Excel, SQL and people write for a missing value.
MISSING_WORDS = frozenset(
    [
        *("nan", "na", "n/a", "n.a.", "#n/a", "<na>", "nat", "none", "null", "(null)", "nil"),
        *("-", "--", "---", ".", "?", "??", "???", "missing", "not available", "not specified"),
    ]
)
# What de-identification and defaults leave in place of a patient: only letters and digits.
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
        Rows of a manifest, with a RangeIndex; all columns but `label` hold strings.
    """
    others = (str(name) for name in rows if name not in (*REQUIRED, IDS))
    covariates = [name for name in others if not is_target(name)]
    found = _warn_of_words(rows, "patient", is_missing_patient)
    found += _warn_of_words(rows, "study", is_missing_word)
    found += _warn_of_words(rows, "region", is_missing_word)
    for name in covariates:
        found += _warn_of_words(rows, name, _is_missing_value)
    if not are_exact(rows):
        remedy = f'Spell them alike, or set {IDS} = "{EXACT}" in the recipe if they are two persons'
        found += _warn_of_spellings(rows, "patient", remedy=remedy)
    found += _warn_of_spellings(rows, "study", within=("patient", "region"))
    for name in ("region", *covariates):
        found += _warn_of_spellings(rows, name)
    return found + _warn_of_share(rows)


def is_missing_word(text: str) -> bool:
    """Return whether a text is a word that usually means that a value is missing."""
    return text.lower() in MISSING_WORDS


def is_missing_patient(text: str) -> bool:
    """Return whether a text is such a word, or a usual replacement of a removed patient's name."""
    return is_missing_word(text) or "".join(filter(str.isalnum, text.lower())) in PLACEHOLDERS


def list_examples(examples: Sequence[str], n: int | None = None) -> str:
    """Return the first three and how many more there are; `n` counts all, if some are not made."""
    more = (len(examples) if n is None else n) - N_EXAMPLES
    return "; ".join(examples[:N_EXAMPLES]) + (f"; and {more} more" if more > 0 else "")


def _is_missing_value(text: str) -> bool:
    return is_missing_word(text) and text != "none"  # may be a category: none, plate, screw


def _warn_of_words(rows: pd.DataFrame, name: str, test: Callable[[str], bool]) -> list[str]:
    """Return a warning of values that pass `test`, whole or in a part between slashes."""
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
        f"{list_examples(places, len(words))}. Leave such fields empty, or fill in the value"
    ]


def _has_part(value: str, test: Callable[[str], bool]) -> bool:
    return any(map(test, value.split("/"))) or "/n/a/" in f"/{value.lower()}/"


def _warn_of_spellings(
    rows: pd.DataFrame,
    name: str,
    within: tuple[str, ...] = (),
    remedy: str = "Spell them alike",
) -> list[str]:
    """Return a warning of values that look alike; with `within`, in rows that agree in these."""
    values = pd.Index(rows[name].unique())
    if name not in REQUIRED:
        values = values[~_are_numbers(values)]
        if len(values) > MAX_CATEGORIES:
            return []  # numbers are not categories: spellings do not matter
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
    """Return warnings of patients with an improbable share of studies; see the constants above."""
    n_studies = rows.drop_duplicates("study")["patient"].value_counts()
    total = int(n_studies.sum())
    large = n_studies[(n_studies >= MANY_STUDIES) & (n_studies > LARGE_SHARE * total)]
    found = []
    for name, n in large.items():
        usual = n_studies.drop(name).median()  # NaN if there is no other
        if not n <= LARGE_MULTIPLE * usual:
            others = f"the others {usual:g} in the median" if usual > 0 else "there is no other"
            found.append(
                f"patient {name!r} has {n} of the {total} studies, and {others}: is this one "
                "person, or a placeholder for many? All of its images stay on one side of every "
                "split"
            )
    return found


def _place(rows: pd.DataFrame, name: str, value: str) -> str:
    """Return a quoted value with its first image and rows."""
    return f"{value!r} ({_name_first(rows['image'][rows[name] == value])})"


def _is_stand_in(value: str, image: str) -> bool:
    """Return whether a value is only its image's name, as in a data set without studies."""
    image = normalise(image)
    names = (image, image.rpartition("/")[2])
    return value in (*names, *(name.rpartition(".")[0] for name in names))


def _are_numbers(values: pd.Index) -> np.ndarray:
    return np.asarray(pd.to_numeric(pd.Series(values), errors="coerce").notna())


def _plural(n: int, noun: str) -> str:
    return noun if n == 1 else f"{noun}s"
