"""Which columns of a stream's values are patient, study, region, label and split of a manifest."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pandas as pd

from medembed.core.errors import ManifestError, RecipeError
from medembed.dataset.identities import EXACT, IDS
from medembed.dataset.recipes.choices import Choices
from medembed.dataset.recipes.guesses import are_splits, find_column, find_covariates, map_splits
from medembed.dataset.recipes.label_proposals import choose_label, show_counts, show_values
from medembed.dataset.recipes.labels import need_columns
from medembed.dataset.recipes.table_proposals import (
    NO_PATIENTS,
    ONE_REGION,
    choose_fraction,
    tells_label,
)
from medembed.dataset.splits import join_same_bytes, split_patients
from medembed.dataset.tables import normalise_columns

__all__ = ["SettledRows", "settle_rows"]

N_NAMED = 20
MEANINGS = {"normal": "0", "abnormal": "1", "unknown": ""}


@dataclass
class SettledRows:
    """Rows of a manifest, and what was settled about them.

    Attributes
    ----------
    rows : pandas.DataFrame
        The columns of a manifest, all strings.
    label_level : {"study", "image"}
        "study" if every study has one label.
    warnings, notices : list of str
        As of a `BuildReport`.
    """

    rows: pd.DataFrame
    label_level: str = "image"
    warnings: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def settle_rows(
    images: pd.DataFrame, values: pd.DataFrame, choices: Choices, source: str
) -> SettledRows:
    """Return the rows of a manifest, from what a stream says of its images.

    Parameters
    ----------
    images : pandas.DataFrame
        Strings: `image`, `sha256`, `place` (for messages), `split` ("" if the stream has none).
    values : pandas.DataFrame
        Strings, on the same index: all that the stream says.
    choices : Choices
        Columns that were named. Without them a column called `patient` (which there has to be),
        `study` (else each image is one), `region` (else there is one) and `split` (else that of
        the files) is taken, and the label is guessed as `manifest init` does.
    source : str
        The stream, for messages.

    Raises
    ------
    RecipeError
        A column that was named does not exist, none names the patient, or the meaning of label or
        split is not clear.
    ManifestError
        Rows lack a patient, study, region or split; all are listed.
    """
    table = normalise_columns(values, ())
    named = (choices.label, choices.region, choices.split)
    several = (choices.patient, choices.study, choices.covariates)
    every = [*filter(None, named), *(name for names in several for name in names or ())]
    need_columns(table, every, source, "Name one of them.")
    found = SettledRows(images[["image", "sha256"]].copy())
    rows, taken = found.rows, set(every)
    rows["region"] = _find(table, choices.region, "region", ONE_REGION)
    patient = _find_patient(table, choices, source)
    study = ("study",) if choices.study is None and "study" in table else choices.study or ()
    person = patient or study  # without patients each study, or else each image, counts as one
    rows["patient"] = _join(table, person) if person else rows["image"]
    rows["study"] = _within(_join(table, study), rows) if study else rows["image"]
    taken |= {"patient", "study", "region", "label", "split", *patient, *study}
    means = _read_label(found, table, choices, source, taken)
    rows["label"] = means.map(MEANINGS)
    if study and (means.groupby(rows["study"]).nunique() <= 1).all():
        found.label_level = "study"
    if not patient:
        each = ("study", "two studies") if study else ("image", "two films")
        found.warnings.append(NO_PATIENTS.format(*each))
        rows["patient"] = join_same_bytes(rows["patient"], rows["sha256"])
        if not study:
            rows[IDS] = EXACT  # names of files are never spellings of one person
    _split(found, images, table, choices, source)
    _refuse_empty(rows, images["place"], source)
    for name in _choose_covariates(found, table, means, choices, taken):
        rows[name] = table[name]
    return found


def _find(table: pd.DataFrame, chosen: str | None, name: str, otherwise: str) -> "pd.Series[str]":
    column = name if chosen is None and name in table else chosen
    return table[column] if column else pd.Series(otherwise, table.index)


def _find_patient(table: pd.DataFrame, choices: Choices, source: str) -> tuple[str, ...]:
    if choices.patient is not None:
        return choices.patient
    if "patient" in table:
        return ("patient",)
    likely = find_column(table, "patient", ())
    hint = f" Column {likely!r} looks like it does: --patient {likely!r}." if likely else ""
    listed = ", ".join(map(repr, table.columns)) or "none"
    raise RecipeError(
        f"no column of {source} is called patient; its columns are {listed}. Name the column that "
        "identifies the patient with --patient, or give --patient '' where none does: each study, "
        f"or each image without studies, then counts as a patient.{hint}"
    )


def _join(table: pd.DataFrame, names: Sequence[str]) -> "pd.Series[str]":
    """Return columns joined by slashes; "" where one of them is empty."""
    joined = table[names[0]]
    for name in names[1:]:
        joined = joined + "/" + table[name]
    return joined.where((table[list(names)] != "").all(axis=1), "")


def _within(study: "pd.Series[str]", rows: pd.DataFrame) -> "pd.Series[str]":
    """Return studies named with patient and region too, where their own names occur again."""
    for other in ("patient", "region"):
        pairs = pd.DataFrame({"study": study, "other": rows[other]}).drop_duplicates()
        if pairs["study"].duplicated().any():
            study = (rows[other] + "/" + study).where(study != "", "")
    return study


def _read_label(
    found: SettledRows, table: pd.DataFrame, choices: Choices, source: str, taken: set[str]
) -> "pd.Series[str]":
    """Return normal, abnormal or unknown for each row, and note what the values mean."""
    if choices.label == "":
        return pd.Series("unknown", table.index)
    if choices.label is None and "label" in table:
        choices = replace(choices, label="label")
    barred = taken - {"label"}
    label = choose_label(table, choices, source, barred)
    taken.add(label.column)
    words = label.meanings
    if not words.normal and not choices.empty and (table[label.column] == "").any():
        raise RecipeError(
            f"no value of column {label.column!r} of {source} means normal: it holds "
            f"{show_counts(table[label.column].value_counts().to_dict())}. Say what an empty one "
            "means with --empty normal or --empty unknown, or name what is normal with --normal."
        )
    unknown = f", unknown: {show_values(words.unknown)}" if words.unknown else ""
    meanings = ", ".join(
        f"{show_values(values)} means {name}" if values else f"no value means {name}"
        for name, values in (("normal", words.normal), ("abnormal", words.abnormal))
    )
    found.notices.append(
        f"label {label.column!r}: {meanings}{unknown}; empty is read as {label.empty}"
    )
    return label.read(table)


def _split(
    found: SettledRows, images: pd.DataFrame, table: pd.DataFrame, choices: Choices, source: str
) -> None:
    rows = found.rows
    names = _find(table, choices.split, "split", "")
    what = f"column {choices.split or 'split'!r}"
    if choices.split is None and (names == "").all():
        names, what = images["split"], "the names of the files"
    own = [name for name in names.unique() if name]
    if choices.test_fraction is None and (choices.split or len(own) > 1):
        if not are_splits(own) and not set(own) <= {"train", "test"}:
            raise RecipeError(
                f"{what} of {source} gives the splits {show_counts(names.value_counts().to_dict())}"
                ", which are not those of training and test. Name a column with --split, or draw "
                "test by patient with --test-fraction 0.2."
            )
        means = map_splits(own)
        rows["split"] = names.map(means).fillna("")
        others = [f"{name} is {one}" for name, one in means.items() if name != one]
        if others:
            found.notices.append(f"splits: {', '.join(others)}")
        return
    known = rows.assign(label=pd.to_numeric(rows["label"]).astype("Int8"))
    classes = [rows["patient"][rows["label"] == one].nunique() for one in ("0", "1")]
    fraction = choices.test_fraction or choose_fraction(rows["patient"].nunique(), min(classes))
    rows["split"] = split_patients(known, fraction=fraction, seed=choices.seed)
    only = f"the data set has one split, {own[0]!r}" if own else "the data set has no splits"
    why = "" if choices.test_fraction else f": {only}"
    found.notices.append(
        f"the test set is drawn by patient ({fraction * 100:.3g} % of studies){why}"
    )


def _refuse_empty(rows: pd.DataFrame, places: "pd.Series[str]", source: str) -> None:
    asked = ("patient", "study", "region", "split")
    lacking = rows[(rows[list(asked)] == "").any(axis=1)]
    if lacking.empty:
        return
    listed = [
        f"{places[row]}: no {', '.join(name for name in asked if not lacking.at[row, name])}"
        for row in lacking.index[:N_NAMED].tolist()
    ]
    more = [f"and {len(lacking) - N_NAMED} more"] if len(lacking) > N_NAMED else []
    raise ManifestError(
        f"{len(lacking)} image(s) of {source} lack what a manifest needs. Choose other columns "
        "with --patient, --study, --region or --split:",
        [*listed, *more],
    )


def _choose_covariates(
    found: SettledRows,
    table: pd.DataFrame,
    means: "pd.Series[str]",
    choices: Choices,
    taken: set[str],
) -> Sequence[str]:
    if choices.covariates is not None:
        return [name for name in choices.covariates if name not in (*found.rows, "label_level")]
    every = find_covariates(table, taken)
    telling = [name for name in every if tells_label(table[name], means)]
    if telling:
        verbs = "reveals the label and was" if len(telling) == 1 else "reveal the label and were"
        found.notices.append(f"{', '.join(map(repr, telling))} {verbs} left out of the covariates")
    return [name for name in every if name not in telling]
