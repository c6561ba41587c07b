"""A tree of DICOM files becomes a manifest, and no patient can be told from what is made of it."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from made_dicom import dataset, write
from made_dicom_tree import LABEL, RECIPE, build, picture, put
from pydicom.data import get_testdata_file
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.sr.codedict import codes

from medembed.cache.embeddings import load_embeddings
from medembed.cache.store import open_cache
from medembed.cli import main
from medembed.core.errors import RecipeError
from medembed.dataset.manifest import read_manifest, write_manifest
from medembed.dataset.pseudonyms import Pseudonyms, read_key
from medembed.dataset.recipes.build import build_manifest, load_recipe
from medembed.images.dicom import terms


def code(value: str, meaning: str, scheme: str = "SCT") -> Sequence:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return Sequence([item])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three patients in four studies, beside what a PACS writes too."""
    root = tmp_path / "root"
    whole = {"PatientAge": "031Y", "PatientSex": "F", "StudyInstanceUID": "1.2.3.1"}
    put(root / "A/IM0", 0, PatientID="77", BodyPartExamined="HAND", ImageLaterality="L",
        ViewPosition="PA", AccessionNumber="acc1", **whole)  # fmt: skip
    put(root / "A/IM1", 1, PatientID="77", BodyPartExamined="L WRIST", Laterality="L", **whole)
    put(root / "B/IM0.dcm", 2, PatientID="78", StudyInstanceUID="1.2.3.2", PatientAge="018M",
        AnatomicRegionSequence=code("16953009", "Ellenbogen"), AccessionNumber="acc2",
        ViewCodeSequence=code("399067008", "lateral"))  # fmt: skip
    put(root / "C/x", 3, PatientID="79", StudyInstanceUID="1.2.3.3", PatientAge="097Y",
        BodyPartExamined="SMITH JOHN")  # fmt: skip
    put(root / "C/y", 4, PatientID="78", IssuerOfPatientID="elsewhere", StudyInstanceUID="1.2.3.4")
    put(root / "C/ct", 5, PatientID="79", Modality="CT")
    put(root / "C/film", 6, PatientID="79", NumberOfFrames=5)
    shutil.copy(str(get_testdata_file("test-SR.dcm")), root / "C/report")
    shutil.copy(str(get_testdata_file("DICOMDIR")), root / "DICOMDIR")
    (root / "readme.txt").write_text("not an image, but more than 132 bytes long" * 9)
    (root / "empty").touch()
    (root / "damaged.dcm").write_bytes(bytes(128) + b"DICM" + bytes(range(256)))
    return root


def test_elements_give_regions_and_covariates(tmp_path: Path, root: Path) -> None:
    rows = build(tmp_path, root).manifest.rows.set_index("image")
    assert rows.index.tolist() == ["A/IM0", "A/IM1", "B/IM0.dcm", "C/x", "C/y"]
    assert rows["region"].tolist() == ["hand", "wrist", "elbow", "unknown", "unknown"]
    assert rows["laterality"].tolist() == ["L", "L", "", "", ""]
    assert rows["view"].tolist() == ["PA", "", "LATERAL", "", ""]
    assert rows["age"].tolist() == ["31", "31", "1.5", "90", ""]
    assert rows["sex"].tolist() == ["F", "F", "", "", ""]
    assert rows["patient"].nunique() == 4  # 78 of another issuer is another person
    assert rows["patient"].iloc[0] == rows["patient"].iloc[1]
    assert rows["study"].nunique() == 5  # hand and wrist of one study are two
    assert rows["label"].isna().all()
    assert set(rows["split"]) == {"train", "test"}


def test_what_is_no_image_is_left_out_with_its_reason(tmp_path: Path, root: Path) -> None:
    report = build(tmp_path, root, strict=True)
    reasons = dict(report.excluded)
    assert reasons.pop("damaged.dcm").startswith(("damaged DICOM", "is an object of an unknown"))
    assert reasons == {
        "C/ct": "of another modality than the recipe's",
        "C/film": "holds 5 frames; only still images are read",
        "C/report": "is Comprehensive SR Storage and holds no image",
        "DICOMDIR": "a DICOMDIR",
        "empty": "not DICOM",
        "readme.txt": "not DICOM",
    }
    document = json.loads(json.dumps(report.as_dict()))
    assert len(document["excluded"]) == 7
    shutil.rmtree(root / "A")
    shutil.rmtree(root / "B")
    with pytest.raises(RecipeError, match="no DICOM image of modality DX below"):
        build(tmp_path, root, 'modalities = ["DX"]')


def test_a_key_file_is_made_once_and_names_everyone_alike(tmp_path: Path, root: Path) -> None:
    key = tmp_path / "my.key"
    for name in ("one.csv", "two.csv"):
        write_manifest(build(tmp_path, root, key_file=key).manifest, tmp_path / name)
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    assert key.stat().st_mode & 0o777 == 0o600
    names = Pseudonyms(read_key(key))
    rows = build(tmp_path, root, key_file=key).manifest.rows
    assert rows["patient"][0] == names.name("patient", "77")
    assert rows["patient"][4] == names.name("patient", "elsewhere/78")
    assert rows["study"][0] == "hand/" + names.name("study", "1.2.3.1")
    text = (tmp_path / "one.csv").read_text()
    assert key.read_text().strip() not in text
    assert "1.2.3" not in text
    other = build(tmp_path, root).manifest.rows["patient"]
    assert not set(other) & set(rows["patient"])
    key.write_bytes(b"short")
    with pytest.raises(RecipeError, match="holds 5 bytes; a key has at least 16"):
        build(tmp_path, root, key_file=key)


def test_identifiers_are_kept_where_that_is_asked_for(tmp_path: Path, root: Path) -> None:
    rows = build(tmp_path, root, 'identifiers = "keep"').manifest.rows
    assert rows["patient"].tolist() == ["77", "77", "78", "79", "elsewhere/78"]
    assert rows["study"][0] == "hand/1.2.3.1"
    assert rows["age"][3] == "97"


@pytest.mark.parametrize(
    ("match", "names"),
    [
        ("file", ["A/IM0", "A/IM1", "IM0.dcm", "x"]),
        ("instance", [f"1.2.826.{i}" for i in range(4)]),
        ("study", ["1.2.3.1", "1.2.3.1", "1.2.3.2", "1.2.3.3"]),
        ("accession", ["acc1", "nothing", "acc2", "nowhere"]),
    ],
)
def test_labels_are_joined_by(tmp_path: Path, root: Path, match: str, names: list[str]) -> None:
    findings = ["none", "none", "fracture", "none"]
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("who", "finding"), *zip(names, findings, strict=True)])
    section = f'table = "labels.csv"\ncolumn = "who"\nmatch = "{match}"'
    report = build(tmp_path, root, section, LABEL)
    warnings = [w for w in report.warnings if not w.startswith(("train has no", "test has no"))]
    labels = [
        None if label is None else int(label)
        for label in report.manifest.rows["label"].astype(object).where(lambda x: x.notna(), None)
    ]
    if match == "accession":
        assert labels == [0, None, 1, None, None]
        assert warnings == [
            "3 images are in no row of labels.csv: A/IM1, C/x, C/y",
            "2 names in labels.csv match no image that was found",
        ]
    else:
        assert labels == [0, 0, 1, 0, None]
        assert warnings == ["1 images are in no row of labels.csv: C/y"]
    with (tmp_path / "labels.csv").open("a") as file:
        file.write(f"{names[0]},fracture\n")
    with pytest.raises(RecipeError, match=r'differ in label.* rows = "any" in \[dicom\]'):
        build(tmp_path, root, section, LABEL)
    either = build(tmp_path, root, f'{section}\nrows = "any"', LABEL)
    assert either.manifest.rows["label"][0] == 1
    assert any("differ in label from row to row" in notice for notice in either.notices)


def test_spellings_of_a_patient_get_one_hash_and_are_told_by_files(tmp_path: Path) -> None:
    root = tmp_path / "root"
    names = ["MRN 0077", "mrn77", "MRN77\u00a0", "MRN78", "Anonymous"]
    for i, name in enumerate(names):
        made = {"PatientID": name, "StudyInstanceUID": f"1.2.3.{i}", "BodyPartExamined": "HAND"}
        put(root / f"{i}.dcm", i, SpecificCharacterSet="ISO_IR 192", **made)
    report = build(tmp_path, root)
    patients = report.manifest.rows["patient"].tolist()
    assert [patients.index(name) for name in patients] == [0, 0, 0, 3, 4]
    joined, word = report.warnings
    assert joined.endswith("keeps them apart: 0.dcm and 1.dcm")
    assert "mrn" not in joined.lower()
    assert word == "Patient ID of 1 images is a word that names nobody: 'Anonymous'"
    with pytest.raises(RecipeError, match="names nobody"):
        build(tmp_path, root, strict=True)
    kept = build(tmp_path, root, 'identifiers = "keep"').manifest.rows
    assert kept["patient"].tolist() == ["MRN 0077", "mrn77", "MRN77", "MRN78", "Anonymous"]
    assert kept["split"][:3].nunique() == 1

    (tmp_path / "labels.csv").write_text(
        "who,finding,set\n0,none,train\n1,none,test\n2,none,test\n3,none,train\n4,none,test\n"
    )
    section = 'table = "labels.csv"\ncolumn = "who"'
    path = tmp_path / "recipe.toml"
    text = RECIPE.format(dicom=section, label=LABEL).replace("fraction = 0.3", 'column = "set"')
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        build_manifest(load_recipe(path), root)
    assert "  - 1.dcm and 0.dcm" in str(caught.value)
    assert "two splits" in str(caught.value)
    assert "mrn" not in str(caught.value).lower()
    path.write_text('ids = "exact"' + text, encoding="utf-8")
    rows = build_manifest(load_recipe(path), root).manifest.rows
    assert rows["patient"].nunique() == 5
    assert rows["ids"].eq("exact").all()


def test_recipes_that_cannot_be_meant_are_refused(tmp_path: Path, root: Path) -> None:
    for dicom, label, said in [
        ('identifiers = "salt"', "", "identifiers must be 'hash' or 'keep', not 'salt'"),
        ('match = "name"', "", "match must be 'file', .* not 'name'"),
        ('table = "labels.csv"', "", "for labels give a table and its column"),
        ("", LABEL, "for labels give a table and its column"),
        ("", '[region]\nconstant = "x"', r"has no use for \[region\]"),
        ("colour = 1", "", "unknown key 'colour'"),
    ]:
        with pytest.raises(RecipeError, match=said):
            build(tmp_path, root, dicom, label)


def test_the_template_builds_as_it_stands(root: Path) -> None:
    assert len(build_manifest(load_recipe("dicom"), root).manifest.rows) == 5


# --- words ------------------------------------------------------------------------------------


def test_codes_are_those_of_the_standards_tables() -> None:
    """Hold our tables to pydicom's copy of CID 4031 and 4010."""
    anatomy = {c.value: c.meaning for c in codes.cid4031.concepts.values()}
    views = {c.value: c.meaning for c in codes.cid4010.concepts.values()}
    for value, name in terms._REGION_CODES.items():
        item = Dataset()
        item.AnatomicRegionSequence = code("unknown", anatomy[value], "SRT")
        assert terms.region(item) == name, anatomy[value]
    expected = {"AP": "antero-posterior", "PA": "postero-anterior", "LL": "left lateral"}
    expected |= {"RL": "right lateral", "LLO": "left oblique", "RLO": "right oblique"}
    for value, name in terms._VIEWS.items():
        if value.isdigit():
            assert views[value] == expected.get(name, views[value])
            assert name in expected or name.lower()[:4] in views[value] or name == "LATERAL"


@pytest.mark.parametrize(
    ("part", "region"),
    [
        *(("HAND", "hand"), ("Rt. Hand", "hand"), ("THUMB", "finger"), ("FINGERS", "finger")),
        *(("RADIUS/ULNA", "forearm"), ("UPPER ARM", "humerus"), ("Shoulder joint", "shoulder")),
        *(("L-SPINE", "lumbar spine"), ("LSPINE", "lumbar spine"), ("Tib/Fib", "lower leg")),
        *(("", "unknown"), ("MEIER ANNA", "unknown"), ("EXTREMITY", "extremity")),
    ],
)
def test_body_parts_are_mapped_to_regions(part: str, region: str) -> None:
    item = Dataset()
    item.add_new(0x00180015, "LO", part)
    assert terms.region(item) == region


def test_a_precise_word_goes_before_a_vague_one() -> None:
    item = Dataset()
    item.AnatomicRegionSequence = code("66019005", "Extremity")
    item.BodyPartExamined = "WRIST"
    assert terms.region(item) == "wrist"
    item.BodyPartExamined = "OTHER"
    assert terms.region(item) == "extremity"


@pytest.mark.parametrize(
    ("age", "years"),
    [("031Y", "31"), ("018M", "1.5"), ("010D", "0.03"), ("006W", "0.11"), ("31", ""), ("", "")],
)
def test_ages_are_years(age: str, years: str) -> None:
    item = Dataset()
    item.add_new(0x00101010, "LO", age)
    assert terms.age_in_years(item, cap=True) == years


# --- nothing that tells a patient ----------------------------------------------------------------

PLANTED = {
    "PN": "Quillfeather^Zebedee",
    "DA": "19231117",
    "DT": "19231117173921.98",
    "TM": "173921.98",
    "UI": "1.2.3.987654321.77",
    **dict.fromkeys(("LO", "SH", "LT", "ST", "UT", "UC", "CS", "AE", "UR"), "QUILLFEATHER ZEBEDEE"),
    "AS": "101Y",
}
TRACES = (b"quillfeather", b"zebedee", b"19231117", b"173921.98", b"987654321", b"101y")
NEEDED = {  # without which these would not be images of the recipe
    *("Modality", "SOPClassUID", "SOPInstanceUID", "PhotometricInterpretation", "VOILUTFunction"),
    *("PresentationIntentType", "PresentationLUTShape", "SpecificCharacterSet"),
    *("PatientID", "StudyInstanceUID", "BodyPartExamined"),
}


def plant(made: Dataset, patient: int) -> None:
    """Put a name, number or date into every text element of the dictionary's groups to 0x50."""
    for tag, (vr, _, _, retired, keyword) in DicomDictionary.items():
        is_text = vr in PLANTED and tag & 0xFFFF and keyword and not retired
        if 0x0008 <= tag >> 16 <= 0x0050 and is_text and keyword not in NEEDED:
            made.add_new(tag, vr, PLANTED[vr])
    made.add_new(0x00091010, "LO", PLANTED["LO"])
    made.PatientID = f"QUILLFEATHER{patient}"
    made.StudyInstanceUID = f"1.2.3.987654321.{patient}"
    if patient % 3:
        made.BodyPartExamined = "HAND"
    else:
        made.add_new(0x00180015, "CS", PLANTED["CS"])


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom warns of what is planted
def test_nothing_that_tells_a_patient_is_in_what_is_made(tmp_path: Path) -> None:
    root, out = tmp_path / "images", tmp_path / "made"
    root.mkdir()
    out.mkdir()
    labels = ["study,finding"]
    for number in range(40):
        made = dataset(picture(number), BitsStored=12)
        plant(made, number // 2)
        made.SOPInstanceUID = f"1.2.3.987654321.{number}"
        (root / f"wobblethwaite{number}").write_bytes(write(made))
        labels.append(f"{made.StudyInstanceUID},{'fracture' if number // 2 % 2 else 'none'}")
    whole = (root / "wobblethwaite0").read_bytes()
    (root / "wobblethwaite_torn").write_bytes(whole[:-99])
    (tmp_path / "labels.csv").write_text("\n".join(dict.fromkeys(labels)) + "\n")
    section = 'table = "labels.csv"\ncolumn = "study"\nmatch = "study"'
    (tmp_path / "recipe.toml").write_text(RECIPE.format(dicom=section, label=LABEL))
    table, cache, sweep = out / "manifest.csv", out / "cache", out / "run"
    said = run("manifest", "build", tmp_path / "recipe.toml", "--image-root", root, "-o", table)
    said += run("extract", table, "--image-root", root, "--encoder", "demo", "--cache", cache)
    said += run("sweep", cache, table, "--out", sweep, "--heads", "logistic", "--configs", 1,
                "--folds", 3, "--jobs", 1, "--covariates", "region")  # fmt: skip
    said += run("report", sweep, "-o", out / "report", "--manifest", table, "--image-root", root)
    rows = read_manifest(table).rows
    assert (len(rows), rows["patient"].nunique(), set(rows["age"])) == (41, 20, {"90"})
    assert set(rows["region"]) == {"hand", "unknown"}
    assert "wobblethwaite_torn" in said  # it failed, and is named on the terminal
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    assert {path.suffix for path in files} >= {".csv", ".h5", ".json", ".jsonl", ".parquet"}
    for path in files:
        content = path.read_bytes().lower()
        found = [trace for trace in TRACES if trace in content]
        assert not found, f"{path.relative_to(out)} holds {found}"
        assert path == table or b"wobblethwaite" not in content, path


def test_a_named_window_reaches_the_decoders_and_is_part_of_the_spec(tmp_path: Path) -> None:
    root, table = tmp_path / "images", tmp_path / "manifest.csv"
    windows = {"WindowCenter": [2048, 1500], "WindowWidth": [4096, 300]}
    windows["WindowCenterWidthExplanation"] = ["SOFT", "BONE"]
    for number in range(2):
        who = {"PatientID": str(number), "StudyInstanceUID": f"1.2.{number}"}
        put(root / f"{number}", number, **who, **windows)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(dicom="", label=""))
    run("manifest", "build", recipe, "--image-root", root, "-o", table)

    def extract(cache: str, *options: str, code: int = 0) -> str:
        result = CliRunner().invoke(
            main,
            [
                *("extract", str(table), "--image-root", str(root), "--encoder", "demo"),
                *("--cache", str(tmp_path / cache), *options),
            ],
        )
        assert result.exit_code == code, result.output
        return result.output

    extract("first")
    extract("bone", "--window", "Bone")
    caches = [open_cache(tmp_path / name) for name in ("first", "bone")]
    assert [cache.spec.preprocessing["window"] for cache in caches] == [None, "bone"]
    first, bone = (load_embeddings(cache, read_manifest(table)).X for cache in caches)
    assert np.abs(first - bone).max() > 0.01
    assert "with window=None; this run asks for window=bone" in (
        said := extract("first", "--window", "BONE", code=1)
    )
    assert "or drop --window" in said
    assert "give --window bone" in extract("bone", code=1)
    assert extract("lung", "--window", "lung").count("VOI LUTs and windows is named 'lung'") == 2
