"""Guess what columns, folders and values mean from their words, as proposals for a person.

The words are English and German, with a few in French and Spanish. Every guess is reported, and
written to a recipe that can be corrected.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from medembed.dataset.checks import REQUIRED, is_missing_word
from medembed.dataset.covariates import MAX_CATEGORIES, to_number
from medembed.dataset.identities import IDS
from medembed.dataset.targets import is_target, name_problem
from medembed.images.dicom.terms import name_region

__all__ = [
    "Meanings",
    "are_regions",
    "are_splits",
    "find_column",
    "find_covariates",
    "find_questions",
    "find_split_word",
    "guess_meanings",
    "has_role",
    "map_splits",
    "tokens_of",
]


@dataclass(frozen=True)
class Meanings:
    """The values of a label, by meaning."""

    normal: tuple[str, ...] = ()
    abnormal: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


_NORMAL = {
    *("0", "0 0", "no", "false", "neg", "negative", "normal", "healthy", "control", "absent"),
    *("unremarkable", "intact", "nad", "wnl", "nein", "unauffallig", "unauffaellig", "gesund"),
    *("negativ", "o b", "ob", "non", "sain", "normale", "negatif", "sano", "sana", "unverletzt"),
}
_ABNORMAL = {
    *("1", "1 0", "yes", "true", "pos", "positive", "abnormal", "pathological", "pathologic"),
    *("diseased", "disease", "sick", "ill", "present", "case", "finding", "malignant", "fracture"),
    *("fractured", "broken", "ja", "auffallig", "auffaellig", "krank", "pathologisch"),
    *("positiv", "fraktur", "frakturiert", "oui", "anormal", "pathologique", "positif", "si"),
    *("enfermo", "anormale", "pneumonia", "tumor", "tumour", "lesion"),
}
_UNDECIDED = {
    *("unknown", "unclear", "uncertain", "indeterminate", "equivocal", "unlabelled", "unlabeled"),
    *("unklar", "unbekannt", "fraglich", "nicht beurteilbar", "inconnu"),
}
_NOT = ("no", "non", "not", "without", "kein", "keine", "ohne", "sans", "sin", "un", "in")
_PAIRS = (
    *(("benign", "malignant"), ("benigne", "maligne"), ("gutartig", "bosartig")),
    *(("n", "y"), ("n", "j"), ("f", "t")),  # alone, such a letter may be a sex or a stage
)
_YES = {"1", "1 0", "yes", "true", "y", "x", "pos", "positive", "present", "ja", "j", "oui", "si"}
_DOUBTS = {"-1", "-1.0"}  # CheXpert's, for what a report leaves open
_TRAIN, _TEST = {"train", "training", "trn", "tr", "development", "dev"}, {"test", "testing", "tst"}
_VALID = {"val", "valid", "validation", "validierung"}

_ROLES = {
    "image": "image img file filename path filepath bild datei dateiname pfad filestem picture",
    "patient": "patient pat pid subject person proband mrn patienten paciente paziente",
    "study": "study studie exam examination untersuchung accession visit encounter",
    "region": "region bodypart part anatomy anatomicregion korperteil korperregion lokalisation "
    "location joint gelenk koerperteil koerperregion area",
    "split": "split set subset partition usage phase fold",
    "label": "label labels finding findings diagnosis diagnose befund class klasse target abnormal "
    "abnormality result ergebnis pathology pathologie fracture fractured fraktur outcome category "
    "tumor tumour lesion gt groundtruth",
}
_WORDS = {role: frozenset(words.split()) for role, words in _ROLES.items()}
# The last parts of compounds, German or run together: Patientennummer, Bilddatei, patientnumber.
_NAMING = ("nummer", "number", "kennung", "schlussel", "schluessel", "pseudonym", "name")
_FILES = ("datei", "pfad", "file", "path")
_ENDINGS = {
    "image": ("id", "nr", *_NAMING, *_FILES),
    "patient": ("id", "nr", *_NAMING),
    "study": ("id", "nr", *_NAMING),
}
_LINKS = ("", "s", "n", "en")  # between the parts of a German compound
_COMPOUNDS = {
    role: frozenset(
        word + link + ending
        for word in words
        for link in _LINKS
        for ending in _ENDINGS.get(role, ("id", "nr"))
    )
    for role, words in _WORDS.items()
}
_QUALIFIERS = {
    *("id", "ids", "nr", "no", "num", "number", "nummer", "code", "key", "name", "hash", "uid"),
    *("pseudonym", "instance", "ref", "anon", "index", "stem", "examined", "body", "visible"),
    *("type", "the", "of"),
}
_IDENTIFYING = {
    *("vorname", "nachname", "firstname", "lastname", "surname", "name", "birth", "birthdate"),
    *("dob", "geburtsdatum", "geburtstag", "geb", "address", "adresse", "phone", "telefon"),
    *("email", "ssn"),
}
_NO_COVARIATES = {
    *("id", "ids", "uid", "hash", "number", "nummer", "nr", "date", "datum", "time", "zeit"),
    *("timestamp", "xmin", "ymin", "xmax", "ymax", "bbox", "x", "y", "w", "h", "url", "comment"),
    *("comments", "kommentar", "report", "bericht"),
}


def tokens_of(name: str) -> list[str]:
    """Return the words of a name, in lower case and without accents: "PatientID" is patient, id."""
    parted = re.sub(r"([a-z])([A-Z])|([A-Z])([A-Z][a-z])", r"\1\3 \2\4", name.replace("ß", "ss"))
    bare = unicodedata.normalize("NFKD", parted.casefold())
    letters = "".join(c for c in bare if not unicodedata.combining(c))
    return re.findall(r"[^\W_]+", letters)


def has_role(name: str, role: str) -> bool:
    """Return whether a column's name says that it holds the image, patient, study and so on."""
    words, tokens = _WORDS[role], tokens_of(name)
    if "".join(tokens) in words:
        return True
    rest = [token for token in tokens if token not in words]
    is_qualified = len(rest) < len(tokens) and set(rest) <= _QUALIFIERS
    return is_qualified or not _COMPOUNDS[role].isdisjoint([*tokens, "".join(tokens)])


def find_column(table: pd.DataFrame, role: str, taken: Iterable[str]) -> str:
    """Return the first column whose name has a role; "" if there is none."""
    barred = set(taken)
    return next(
        (name for name in map(str, table) if name not in barred and has_role(name, role)), ""
    )


def guess_meanings(values: Sequence[str]) -> Meanings | None:
    """Return which values mean normal and abnormal, or None if their words do not say."""
    keys = {value: " ".join(tokens_of(value)) for value in values}
    unknown = [v for v in values if keys[v] in _UNDECIDED or _is_missing(v, keys)]
    rest = [value for value in values if value not in unknown]
    normal = [value for value in rest if _is_normal(keys[value], set(keys.values()))]
    abnormal = [value for value in rest if value not in normal]
    if not normal or not abnormal:
        found = sorted(keys[value] for value in rest)
        pair = next((pair for pair in _PAIRS if sorted(pair) == found), None)
        if pair is None:
            return None
        normal = [value for value in rest if keys[value] == pair[0]]
        abnormal = [value for value in rest if keys[value] == pair[1]]
    has_grades = any(key.isdecimal() for v in abnormal if (key := keys[v]) not in _ABNORMAL)
    is_sure = len(rest) == 2 or all(keys[v] in _ABNORMAL for v in abnormal)
    is_sure |= not any(keys[value].isdecimal() for value in rest)
    if has_grades or not is_sure:
        return None
    return Meanings(tuple(normal), tuple(abnormal), tuple(unknown))


def _is_missing(value: str, keys: Mapping[str, str]) -> bool:
    """Return whether a value means unknown; "none" is a finding if there are others."""
    return is_missing_word(value) and not (value.lower() == "none" and len(keys) > 1)


def _is_normal(key: str, others: set[str]) -> bool:
    if key in _NORMAL or key == "none":
        return True
    first, _, rest = key.partition(" ")
    if first in _NOT[:-2] and rest:
        return True
    return any(key.startswith(word) and key[len(word) :] in others - {key} for word in _NOT)


def are_splits(values: Iterable[str]) -> bool:
    """Return whether values name a split for training and one for test."""
    keys = {"".join(tokens_of(value)) for value in values}
    return bool(keys) and keys <= _TRAIN | _TEST | _VALID and bool(keys & _TRAIN) and len(keys) > 1


def map_splits(values: Iterable[str]) -> dict[str, str]:
    """Return what each name of a split means: validation is test if there is no other."""
    keys = {value: "".join(tokens_of(value)) for value in values}
    has_test = bool(set(keys.values()) & _TEST)
    means = dict.fromkeys(_TRAIN, "train") | dict.fromkeys(_TEST, "test")
    means |= dict.fromkeys(_VALID, "train" if has_test else "test")
    return {value: means[key] for value, key in keys.items()}


def are_regions(values: Sequence[str]) -> bool:
    """Return whether all values are names of body parts."""
    return bool(values) and all(name_region(_without_mark(v)) != "unknown" for v in values)


def _without_mark(value: str) -> str:
    """Return a body part without a prefix such as MURA's: XR_HAND and HAND_AP stay readable."""
    words = [word for word in tokens_of(value) if word not in ("xr", "xray", "radiograph")]
    return " ".join(words)


def find_covariates(table: pd.DataFrame, taken: Iterable[str]) -> list[str]:
    """Return columns that scores can be grouped by: numbers, or a few categories; no names."""
    barred = {*taken, *REQUIRED, IDS, "label_level", "name"}
    names = (name for name in map(str, table) if name not in barred and not is_target(name))
    return [name for name in names if _is_covariate(table[name], name)]


def _is_covariate(column: "pd.Series[str]", name: str) -> bool:
    tokens = set(tokens_of(name))
    if tokens & (_IDENTIFYING | _NO_COVARIATES) or has_role(name, "patient"):
        return False
    if any(token.endswith((*_NAMING, "datum")) for token in tokens):
        return False
    values = column[column != ""].unique()
    if len(values) < 2:
        return len(values) == 1 and bool((column == "").any())
    if len(values) <= min(MAX_CATEGORIES, max(len(column) // 2, 2)):
        return True
    numbers = [to_number(value.replace(",", ".")) for value in values]
    is_code = all(value.isdecimal() and len(value) > 5 for value in values)
    return not is_code and all(number is not None for number in numbers)


def find_questions(table: pd.DataFrame, columns: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the `[targets.NAME]` sections of those columns that answer a question by yes or no.

    A column of one word for yes and empty fields is such a column too; empty then means no.
    """
    found: dict[str, dict[str, Any]] = {}
    for column in columns:
        values = sorted(set(table[column]) - {""})
        doubts = [value for value in values if value in _DOUBTS]
        rest = [value for value in values if value not in doubts]
        answers: dict[str, Any] | None = None
        if len(rest) == 1 and " ".join(tokens_of(rest[0])) in _YES:
            answers = {"positive": rest, "empty": "negative"}
        elif (means := guess_meanings(rest)) is not None and len(rest) - len(means.unknown) == 2:
            answers = {"positive": [*means.abnormal], "negative": [*means.normal]}
            doubts = [*doubts, *means.unknown]
        name = "_".join(re.findall("[a-z0-9]+", " ".join(tokens_of(column))))
        if answers and name not in found and name_problem(name) is None:
            uncertain = {"uncertain_values": doubts} if doubts else {}
            found[name] = {"column": column, **answers, **uncertain}
    return found


def find_split_word(name: str) -> str:
    """Return the one word of a name that is a split's: "train" of train_labels; "" without one."""
    words = [token for token in tokens_of(name) if token in _TRAIN | _TEST | _VALID]
    return words[0] if len(words) == 1 else ""
