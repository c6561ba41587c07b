"""Labels find their DICOM images, or it is said why not; one rendering of a film is kept."""

from pathlib import Path
from typing import Any

import pytest
from made_dicom_tree import LABEL, put
from made_dicom_tree import build as build_any
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from medembed.core.errors import RecipeError
from medembed.dataset.recipes.build import BuildReport

N_IMAGES = 6


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def fill(root: Path, **elements: list[Any]) -> None:
    """Write six images of six patients; each element has a value for each."""
    for i in range(N_IMAGES):
        own = {keyword: values[i] for keyword, values in elements.items()}
        put(root / f"p{i}/im{i}.dcm", i, PatientID=f"p{i}", StudyInstanceUID=f"1.2.{i}", **own)


def build(
    folder: Path, root: Path, keys: list[str], match: str, *findings: str, extra: str = ""
) -> BuildReport:
    """Build with a table of these keys; every other finding is a fracture."""
    findings = findings or tuple(("none", "fracture")[i % 2] for i in range(len(keys)))
    rows = [f'"{key}",{finding}' for key, finding in zip(keys, findings, strict=True)]
    (folder / "labels.csv").write_text("\n".join(["key,finding", *rows, ""]))
    section = f'identifiers = "keep"\ntable = "labels.csv"\ncolumn = "key"\nmatch = "{match}"'
    return build_any(folder, root, f"{section}\n{extra}", LABEL)


LABELS = [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("match", "key"),
    [
        ("accession", " A{i}\u00a0"),
        ("study", "1.2.{i} "),
        ("instance", "\ufeff1.2.826.{i}"),
        ("file", "p{i}\\im{i}.dcm"),
        ("file", "./p{i}/im{i}.dcm"),
        ("file", " im{i}"),
    ],
)
def test_keys_are_compared_without_what_is_around_them(
    tmp_path: Path, root: Path, match: str, key: str
) -> None:
    fill(root, AccessionNumber=[f"A{i} " for i in range(N_IMAGES)])
    report = build(tmp_path, root, [key.format(i=i) for i in range(N_IMAGES)], match)
    assert report.manifest.rows["label"].tolist() == LABELS


@pytest.mark.parametrize(
    ("match", "keys", "said"),
    [
        ("accession", [str(i) for i in range(N_IMAGES)],
         "'0' in the table is '0000' of an image: a spreadsheet has dropped leading zeros"),
        ("accession", [f"{i}.0" for i in range(1, 7)],
         "'1.0' in the table is '0001' of an image: a spreadsheet has dropped leading zeros"),
        ("study", [f"9.9.{i}" for i in range(N_IMAGES)],
         "StudyInstanceUID .* The first in the table is '9.9.0', that of the first image '1.2.0'"),
        ("instance", ["1.2.0", "1.2.1", "1.2.2", "1.2.3", "1.2.4", "1.2.5"],
         "first image '1.2.826.0'. Correct `column` or `match`"),
        ("file", [f"P{i}/IM{i}.DCM" for i in range(N_IMAGES)],
         "'P0/IM0.DCM' in the table and the file 'p0/im0.dcm' differ in upper and lower case"),
        ("file", [f"im{i}.png" for i in range(N_IMAGES)], "differ in the suffix"),
        ("file", [f"x/p{i}/im{i}.dcm" for i in range(N_IMAGES)], "Take 'x/' off the paths"),
        ("accession", [" "] * N_IMAGES, "column 'key' is empty"),
    ],
)  # fmt: skip
def test_a_table_of_which_no_key_matches_is_an_error_that_shows_both_sides(
    tmp_path: Path, root: Path, match: str, keys: list[str], said: str
) -> None:
    fill(root, AccessionNumber=[f"{i:04}" for i in range(N_IMAGES)])
    with pytest.raises(RecipeError, match=rf"labels\.csv: .*{said}"):
        build(tmp_path, root, keys, match)


def test_images_without_the_identifier_are_told_from_keys_that_are_wrong(
    tmp_path: Path, root: Path
) -> None:
    fill(root)
    with pytest.raises(RecipeError, match=r"no image below .* has an AccessionNumber"):
        build(tmp_path, root, ["1", ""], "accession")


def test_an_empty_key_is_of_no_image(tmp_path: Path, root: Path) -> None:
    fill(root, AccessionNumber=["a", "", "c", "d", "e", "f"])
    rows = build(tmp_path, root, ["a", "", "", "d"], "accession").manifest.rows
    assert rows["label"].isna().tolist() == [False, True, True, False, True, True]


def test_numbers_that_were_rounded_are_named_beside_those_that_match(
    tmp_path: Path, root: Path
) -> None:
    numbers = [str(1234567890123450 + i) for i in range(N_IMAGES)]
    fill(root, AccessionNumber=[*numbers[:3], "7", "8", "9"])
    report = build(tmp_path, root, ["1.23457E+15", "7", "8", "9"], "accession")
    assert report.warnings[1] == (
        "1 names in labels.csv match no image that was found. '1.23457E+15' in the table is "
        f"'{numbers[0]}' of an image: a spreadsheet has rounded the number. Export the table again "
        "with this column as text."
    )
    with pytest.raises(RecipeError, match=r"differ in label.*\n.*1\.23457E\+15: normal in row 2"):
        build(tmp_path, root, ["1.23457E+15", "1.23457E+15", "7"], "accession")


def test_rows_of_a_study_count_once_or_combine(tmp_path: Path, root: Path) -> None:
    fill(root)
    keys = [f"1.2.{i // 2}" for i in range(2 * N_IMAGES)]
    same = build(tmp_path, root, keys, "study", *("none", "none", "fracture", "fracture") * 3)
    assert same.manifest.rows["label"].tolist() == LABELS
    assert "6 rows of labels.csv only repeat another of the same StudyIn" in same.notices[0]
    with pytest.raises(RecipeError, match=r'one StudyInstanceUID differ in label.*rows = "any"'):
        build(tmp_path, root, keys, "study")
    either = build(tmp_path, root, keys, "study", extra='rows = "any"')
    assert either.manifest.rows["label"].tolist() == [1] * N_IMAGES


# --- renderings -------------------------------------------------------------------------------

FINAL, RAW = "FOR PRESENTATION", "FOR PROCESSING"


def source(uid: str) -> Sequence:
    item = Dataset()
    item.ReferencedSOPInstanceUID = uid
    return Sequence([item])


BOTH = sorted(f"{kind}{i}" for kind in ("PRE", "PRO") for i in range(3))


@pytest.mark.parametrize(
    ("raw", "final", "is_one"),
    [
        ({}, {}, True),
        ({"ViewPosition": "AP"}, {}, True),
        ({"ViewPosition": "AP"}, {"ViewPosition": "LL"}, False),
        ({"ImageLaterality": "L"}, {"ImageLaterality": "R"}, False),
        ({"BodyPartExamined": "ELBOW"}, {}, False),
        ({"IrradiationEventUID": "1.5"}, {"IrradiationEventUID": ["1.4", "1.5"]}, True),
        ({"IrradiationEventUID": "1.5"}, {"IrradiationEventUID": "1.6"}, False),
        ({"AcquisitionDate": "20260101", "AcquisitionTime": "101112.5"},
         {"AcquisitionDateTime": "20260101101112"}, True),
        ({"AcquisitionDateTime": "20260101101112"}, {"AcquisitionDateTime": "20260101101113"},
         False),
        ({"AcquisitionTime": "101112"}, {"AcquisitionTime": "101113"}, True),  # no dates
        ({"StudyInstanceUID": None}, {}, False),
    ],
)  # fmt: skip
def test_a_raw_image_is_left_out_beside_the_finished_film_of_its_exposure(
    tmp_path: Path, root: Path, raw: dict[str, Any], final: dict[str, Any], is_one: bool
) -> None:
    for i in range(3):
        for intent, own, number in ((RAW, raw, 2 * i), (FINAL, final, 2 * i + 1)):
            study = {"PatientID": f"p{i}", "StudyInstanceUID": f"1.2.{i}", "Modality": "DX"}
            elements = {"BodyPartExamined": "HAND", **study, **own}
            put(root / f"{intent[4:7]}{i}", number, PresentationIntentType=intent, **elements)
    report = build_any(tmp_path, root)
    kept = [name for name in BOTH if name.startswith("PRE")] if is_one else BOTH
    assert report.manifest.rows["image"].tolist() == kept
    reason = "FOR PROCESSING beside FOR PRESENTATION of the same exposure"
    assert [r for _, r in report.excluded] == [reason] * (3 * is_one)
    assert any(notice.startswith("3 images FOR PROCESSING kept") for notice in report.notices) == (
        not is_one
    )
    other = build_any(tmp_path, root, 'intent = "processing"')
    assert len(other.manifest.rows) == len(kept)
    assert not is_one or set(other.manifest.rows["image"]) == set(BOTH) - set(kept)
    assert len(build_any(tmp_path, root, 'intent = "both"').manifest.rows) == 6


def test_a_film_that_names_its_raw_image_shows_the_same_exposure(
    tmp_path: Path, root: Path
) -> None:
    study = {"PatientID": "p", "StudyInstanceUID": "1.2.3", "Modality": "DX"}
    for number, intent in enumerate((RAW, RAW, FINAL)):
        taken = {"AcquisitionDateTime": f"2026010110111{number}", "PresentationIntentType": intent}
        of = {"SourceImageSequence": source("1.2.826.1")} if intent == FINAL else {}
        put(root / f"{number}", number, **study, **taken, **of)
    report = build_any(tmp_path, root)
    assert report.manifest.rows["image"].tolist() == ["0", "2"]
    assert report.notices == [
        "1 image FOR PROCESSING kept, as there is none FOR PRESENTATION of the same exposure: 0"
    ]


def test_a_label_of_a_rendering_that_is_left_out_is_no_unknown_name(
    tmp_path: Path, root: Path
) -> None:
    fill(root, PresentationIntentType=[RAW, FINAL] * 3)
    for i in range(0, N_IMAGES, 2):  # the raw image of the next one
        put(root / f"p{i}/im{i}.dcm", i, PatientID=f"p{i + 1}", StudyInstanceUID=f"1.2.{i + 1}",
            PresentationIntentType=RAW)  # fmt: skip
    findings = ("none", "none", "fracture", "fracture", "none", "none")
    keys = [f"1.2.826.{i}" for i in range(N_IMAGES)]
    report = build(tmp_path, root, keys, "instance", *findings)
    assert report.manifest.rows["label"].tolist() == [0, 1, 0]
    assert [w for w in report.warnings if "labels.csv" in w] == []
    with pytest.raises(RecipeError, match=r"intent must be 'presentation', .* not 'raw'"):
        build(tmp_path, root, keys, "instance", extra='intent = "raw"')
