"""What words of columns, folders and values are taken for, in the languages that films come in."""

import pandas as pd
import pytest

from medembed.dataset.recipes.guesses import (
    are_regions,
    are_splits,
    find_covariates,
    find_split_word,
    guess_meanings,
    has_role,
    map_splits,
)


@pytest.mark.parametrize(
    ("values", "normal", "unknown"),
    [
        (["Fractured", "Non_fractured"], "Non_fractured", ""),
        (["x", "non_x"], "non_x", ""),
        (["0", "1"], "0", ""),
        (["0.0", "1.0"], "0.0", ""),
        (["No Finding", "Pneumonia", "Mass"], "No Finding", ""),
        (["auffällig", "unauffällig"], "unauffällig", ""),
        (["ja", "nein", "unklar"], "nein", "unklar"),
        (["yes", "no", "N/A"], "no", "N/A"),
        (["none", "fracture"], "none", ""),
        (["benign", "malignant"], "benign", ""),
        (["TRUE", "FALSE"], "FALSE", ""),
        (["y", "n"], "n", ""),
        (["sain", "pathologique"], "sain", ""),
    ],
)
def test_words_say_what_is_normal(values: list[str], normal: str, unknown: str) -> None:
    found = guess_meanings(values)
    assert found is not None
    assert found.normal == (normal,)
    assert found.unknown == ((unknown,) if unknown else ())
    assert {*found.normal, *found.abnormal, *found.unknown} == set(values)


@pytest.mark.parametrize(
    "values",
    [["M", "F"], ["A", "B"], ["0", "1", "2"], ["1", "2"], ["fracture", "wrist"], ["1"], []],
)
def test_what_words_do_not_say_is_not_guessed(values: list[str]) -> None:
    assert guess_meanings(values) is None


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *(("PatientID", "patient"), ("Patienten-Nr", "patient"), ("pat_id", "patient")),
        *(("Patient Age", ""), ("patient_sex", ""), ("fracture_count", ""), ("age", "")),
        *(("StudyInstanceUID", "study"), ("exam", "study"), ("accession no.", "study")),
        *(("Körperteil", "region"), ("BodyPartExamined", "region"), ("set", "split")),
        *(("Image Index", "image"), ("Dateiname", "image"), ("Finding Labels", "label")),
        *(("fracture_visible", "label"), ("BEFUND", "label")),
        *(("Patientennummer", "patient"), ("Patientenkennung", "patient")),
        *(("PATIENTNUMBER", "patient"), ("Patientenname", "patient"), ("Patientenalter", "")),
        *(("Untersuchungsnummer", "study"), ("UntersuchungsID", "study"), ("Bildpfad", "image")),
        *(("Bilddatei", "image"), ("Bildqualität", ""), ("Untersuchungsart", "")),
    ],
)
def test_names_of_columns_have_at_most_one_role(name: str, role: str) -> None:
    roles = ("image", "patient", "study", "region", "split", "label")
    assert [own for own in roles if has_role(name, own)] == ([role] if role else [])


def test_splits_and_regions_are_known_by_all_their_names() -> None:
    assert are_splits(["train", "valid"])
    assert not are_splits(["train"])
    assert not are_splits(["train", "hand"])
    assert map_splits(["Training", "val", "Test"]) == {
        "Training": "train",
        "val": "train",
        "Test": "test",
    }
    assert map_splits(["train", "val"])["val"] == "test"
    assert find_split_word("train_labels") == "train"
    assert are_regions(["XR_HAND", "left knee"])
    assert not are_regions(["hand", "mixed"])


def test_covariates_are_numbers_and_few_categories_of_nobody() -> None:
    n = 200
    rows = pd.DataFrame(
        {
            "age": [f"{i / 2:.1f}".replace(".", ",") for i in range(n)],
            "sex": ["M", "F"] * (n // 2),
            "Nachname": ["Meier", "Huber"] * (n // 2),
            "Patientenname": ["Meier", "Huber"] * (n // 2),
            "Fallnummer": ["A1", "A2"] * (n // 2),
            "Prüfdatum": ["3.11.2021", "4.11.2021"] * (n // 2),
            "patient_id": ["1", "2"] * (n // 2),
            "accession": [str(10**7 + i) for i in range(n)],
            "note": [f"text {i}" for i in range(n)],
            "constant": ["x"] * n,
            "label": ["0", "1"] * (n // 2),
        }
    )
    assert find_covariates(rows, ()) == ["age", "sex"]
