"""One person is one person however the identifier is spelt; what looks like a slip is said."""

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from medembed.cli import main
from medembed.core.errors import ManifestError, MedembedError, RecipeError
from medembed.core.text import normalise
from medembed.dataset.checks import find_warnings
from medembed.dataset.identities import explain_likeness, key_texts, name_persons
from medembed.dataset.manifest import make_manifest, read_manifest, write_manifest
from medembed.dataset.recipes.build import BuildReport, build_manifest, load_recipe
from medembed.dataset.splits import draw_folds, draw_fraction, split_patients
from medembed.dataset.tables import normalise_column
from medembed.results.predictions import image_rows

ALIKE = [  # two spellings, and in what they differ
    ("MRN-7", "mrn-7", "case"),
    ("12", "0012", "leading zeros"),
    ("P12b", "P012b", "leading zeros"),
    ("12", "12.0", "a trailing .0"),
    ("0012", "12.00", "a trailing .0 and leading zeros"),
    ("12/3.0/x", "12/3/X", "case and a trailing .0"),
    ("Jo Doe", "JoDoe", "blanks"),
    ("A\u200bB", "AB", "blanks"),
    ("A\u00adB\u00a01", "AB1", "blanks"),
    ("\uff21\uff11\uff12", "A12", "Unicode form"),
    ("Gro\u00df", "GROSS", "case"),
    ("\ufb01n", "fin", "Unicode form"),
]
APART = [
    ("12", "120"),
    ("0.5", "0.05"),
    ("1.0.5", "1.5"),
    ("P-7", "P7"),
    ("1,05", "1,5"),
    ("0", ""),
    ("a/b", "ab"),
    ("\u0410", "A"),  # Cyrillic
]

some_text = st.text(
    st.sampled_from("0017.,/aAß é\u0301\u00a0\u200b\u00ad\uff17ﬁ_-\n")
    | st.characters(codec="utf-8"),
    max_size=8,
)


def key_of(text: str) -> str:
    """What README says, character by character."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = "".join(
        c for c in text if not c.isspace() and unicodedata.category(c) not in ("Cc", "Cf")
    )
    parts = []
    for part in text.split("/"):
        whole = re.fullmatch(r"([0-9]+)\.00?", part)
        parts.append(whole[1] if whole else part)
    kept: list[str] = []
    text = "/".join(parts)
    for i, c in enumerate(text):
        before = kept[-1] if kept else ""
        follows = text[i + 1 : i + 2]
        number_begins = not (before.isascii() and before.isdigit()) and before not in (".", ",")
        if c == "0" and number_begins and follows.isascii() and follows.isdigit():
            continue
        kept.append(c)
    return "".join(kept)


@settings(deadline=None, max_examples=100)
@given(st.lists(some_text, min_size=1, max_size=8))
@example(["1.0/2.0/3.0", "00/001/x00", "0000", "\uff10\uff17", "a001b002"])
def test_keys_are_those_of_the_rules(texts: list[str]) -> None:
    assert key_texts(texts).tolist() == [key_of(text) for text in texts]


@settings(deadline=None, max_examples=100)
@given(st.lists(some_text, min_size=1, max_size=8))
@example(["P0\u00a0", "\u200b", "e\u0301", "\x0b", "\x1fx", " "])
def test_a_column_is_spelt_as_each_text_is(texts: list[str]) -> None:
    column = pd.Series(texts, index=range(5, 5 + len(texts)), name="a", dtype=str)
    spelt = normalise_column(column)
    assert spelt.tolist() == [normalise(text) for text in texts]
    assert spelt.index.equals(column.index)
    again = normalise_column(spelt)
    assert again.equals(spelt)
    assert again is spelt or spelt.dtype == object  # pandas 2 keeps texts as objects


@pytest.mark.parametrize(("a", "b", "differ"), ALIKE)
def test_spellings_of_one_person_have_one_key(a: str, b: str, differ: str) -> None:
    assert len(set(key_texts([a, b]))) == 1
    assert explain_likeness(a, b) == differ


def test_columns_in_pieces_or_empty_are_keyed_too() -> None:
    pieces = [pd.Series(["A1", "b"], dtype=str), pd.Series(["a01", "\u00e9"], dtype=str)]
    joined = pd.concat(pieces, ignore_index=True)
    assert key_texts(pd.Index(joined)).tolist() == ["a1", "b", "a1", "\u00e9"]
    assert name_persons(pd.DataFrame({"patient": joined})).tolist() == ["A1", "b", "A1", "\u00e9"]
    assert normalise_column(joined + " ").tolist() == joined.tolist()
    for empty in (joined[:0], pd.Series([], dtype=str), pd.Series([], dtype=object)):
        assert name_persons(pd.DataFrame({"patient": empty})).tolist() == []
        assert normalise_column(empty).tolist() == []


@pytest.mark.parametrize(("a", "b"), APART)
def test_other_identifiers_have_other_keys(a: str, b: str) -> None:
    assert len(set(key_texts([a, b]))) == 2


# ---- manifests ----------------------------------------------------------------------------------


def table(**changes: list[str]) -> pd.DataFrame:
    """Four images of four patients, two on either side, sound unless changed."""
    columns = {
        "image": ["a.png", "b.png", "c.png", "d.png"],
        "sha256": [f"{i:064x}" for i in range(4)],
        "patient": ["p", "q", "r", "s"],
        "study": ["1", "2", "3", "4"],
        "region": ["hand"] * 4,
        "label": ["1", "0", "0", "1"],
        "split": ["train", "train", "test", "test"],
        "sex": ["F", "M", "F", ""],
    }
    return pd.DataFrame({**columns, **changes}, dtype=str)


def save(rows: pd.DataFrame, path: Path) -> Path:
    """Write what another program would."""
    rows = rows.assign(label_level="study")
    if path.suffix == ".parquet":
        rows.to_parquet(path, index=False)
    else:
        rows.to_csv(path, index=False)
    return path


@pytest.mark.parametrize(("a", "b", "differ"), ALIKE)
def test_spellings_of_a_patient_in_two_splits_are_refused(a: str, b: str, differ: str) -> None:
    with pytest.raises(ManifestError) as caught:
        make_manifest(table(patient=["p", a, b, "s"]), "study")
    (problem,) = caught.value.problems
    assert f"{a!r} in train (b.png, row 3)" in problem
    assert f"{b!r} in test (c.png, row 4)" in problem
    assert f"they differ in {differ}." in problem
    assert 'ids = "exact"' in problem


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_every_reading_refuses_them_and_evens_out_the_rest(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    torn = table(patient=["p", "x9", "X9", "s"])
    with pytest.raises(ManifestError, match="'X9' in test"):
        read_manifest(save(torn, path))
    done = CliRunner().invoke(main, ["manifest", "check", str(path), "--json"])
    assert done.exit_code == 1
    assert "'X9' in test" in json.loads(done.stdout)["problems"][0]
    odd = table(
        patient=["e\u0301 ", "\u00e9", "\u00a0r", "s\u200b"],
        region=["hand ", "hand", "hand\u00a0", "\u2003hand"],
        label=["1 ", "0", " 0", "1"],
        split=["train ", "train", "test", "test"],
        sex=["F", "F ", "M", "\u00a0"],
        study=[" 1", "2", "3", "4"],
    )
    rows = read_manifest(save(odd, path)).rows
    assert rows["patient"].tolist() == ["\u00e9", "\u00e9", "r", "s"]
    assert set(rows["region"]) == {"hand"}
    assert rows["sex"].tolist() == ["F", "F", "M", ""]
    assert rows["label"].tolist() == [1, 0, 0, 1]
    write_manifest(read_manifest(path), path)
    pd.testing.assert_frame_equal(read_manifest(path).rows, rows)
    with pytest.raises(ManifestError, match="patient 'p' is in more than one split"):
        read_manifest(save(table(patient=["p", "q", "p\u00a0", "s"]), path))
    with pytest.raises(ManifestError, match=r"patient is empty \(row 3\): b\.png"):
        read_manifest(save(table(patient=["p", "\u00a0\u200b", "r", "s"]), path))


def test_many_spellings_are_capped_and_rows_named() -> None:
    n = 60
    names = [f"{'P' if i % 2 else 'p'}{i // 2}" for i in range(n)]
    rows = pd.DataFrame({name: [""] * n for name in table()}, dtype=str).assign(
        image=[f"{i:03d}.png" for i in range(n)], patient=names, study=names, region="hand",
        label="0", split=["train", "test"] * (n // 2),
    )  # fmt: skip
    with pytest.raises(ManifestError) as caught:
        make_manifest(rows, "study")
    assert len(caught.value.problems) == 21
    assert caught.value.problems[-1] == "… and 10 more of this kind"


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_manifest_records_that_identifiers_are_exact(tmp_path: Path, suffix: str) -> None:
    rows = table(patient=["p", "x9", "X9", "s"]).assign(ids="exact")[["ids", *table().columns]]
    manifest = make_manifest(rows, "study")
    path = tmp_path / f"m{suffix}"
    write_manifest(manifest, path)
    again = read_manifest(path)
    pd.testing.assert_frame_equal(again.rows, manifest.rows)
    assert again.digest() == manifest.digest() != make_manifest(table(), "study").digest()
    assert again.rows.columns[-1] == "ids"
    if suffix == ".csv":
        assert path.read_text().split("\n")[0].endswith(",sex,ids,label_level")
    assert name_persons(again.rows).tolist() == ["p", "x9", "X9", "s"]
    assert find_warnings(again.rows) == []
    done = CliRunner().invoke(main, ["manifest", "check", str(path), "--strict", "--json"])
    assert json.loads(done.stdout) == {"problems": [], "warnings": []}
    assert done.exit_code == 0


def test_what_some_rows_say_of_identifiers_holds_for_none() -> None:
    rows = table(patient=["p", "x9", "X9", "s"]).assign(ids=["exact", "", "exact", "exact"])
    with pytest.raises(ManifestError) as caught:
        make_manifest(rows, "study")
    found = "\n".join(caught.value.problems)
    assert "column ids says 'exact' in some rows and not in others (row 3)" in found
    assert "'X9' in test" in found
    assert len(make_manifest(table().assign(ids=list("1234")), "study").rows) == 4  # a covariate


# ---- folds, fractions, clusters -----------------------------------------------------------------


def cohort(n_patients: int = 40) -> pd.DataFrame:
    rng = np.random.default_rng(3)
    rows = [
        (f"pat{p}", f"pat{p}/{s}", str(rng.choice(["hand", "wrist"])), int(rng.random() < 0.4))
        for p in range(n_patients)
        for s in range(rng.integers(2, 5))
    ]
    return pd.DataFrame(rows, columns=["patient", "study", "region", "label"])


def respelt(rows: pd.DataFrame) -> pd.DataFrame:
    """Spell every second study's patient otherwise, in a way that comes later in the alphabet."""
    ways = (lambda t: t.replace("pat", "pat\u200b"), lambda t: t.replace("pat", "pa\uff54"))
    patients = [ways[i // 2 % 2](text) if i % 2 else text for i, text in enumerate(rows["patient"])]
    return rows.assign(patient=patients)


@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_drawn_by_patient_is_drawn_by_person(seed: int) -> None:
    rows = cohort()
    spelt = respelt(rows)
    assert spelt["patient"].nunique() > rows["patient"].nunique()
    split = split_patients(rows, fraction=0.3, seed=seed)
    assert (split_patients(spelt, fraction=0.3, seed=seed) == split).all()
    folds = draw_folds(rows, n_folds=4, seed=seed)
    assert (draw_folds(spelt, n_folds=4, seed=seed) == folds).all()
    kept = draw_fraction(rows, folds, fraction=0.4, seed=seed)
    assert (draw_fraction(spelt, folds, fraction=0.4, seed=seed) == kept).all()
    exact = spelt.assign(ids="exact")
    apart = exact.assign(fold=draw_folds(exact, n_folds=4, seed=seed))
    assert (apart.groupby(rows["patient"])["fold"].nunique() > 1).any()


def test_a_persons_rows_are_one_cluster() -> None:
    rows = cohort().assign(sha256="", split="test")
    folds = np.full(len(rows), -1)
    codes = image_rows(rows, folds)["patient"]
    assert image_rows(respelt(rows), folds)["patient"].tolist() == codes.tolist()
    assert image_rows(respelt(rows).assign(ids="exact"), folds)["patient"].nunique() > len(
        codes.unique()
    )


# ---- warnings -----------------------------------------------------------------------------------


def warnings_of(level: str = "study", **changes: list[str]) -> str:
    return "\n".join(find_warnings(make_manifest(table(**changes), level).rows))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"patient": ["nan", "q", "r", "s"]}, ["patient: words", "'nan' (a.png, row 2)"]),
        ({"patient": ["12/N/A", "1/x", "2/x", "3/x"]}, ["patient: words", "'12/N/A'"]),
        ({"patient": ["p", "q", "ANONYMOUS", "s"]}, ["'ANONYMOUS' (c.png, row 4)"]),
        ({"patient": ["p", "q", "De-Identified", "s"]}, ["'De-Identified'"]),
        ({"study": ["p/null", "q/1", "r/1", "s/1"]}, ["study: words", "'p/null'"]),
        ({"region": ["hand", "hand", "None", "?"]}, ["region: words", "in 2 rows", "'None'"]),
        ({"sex": ["F", "-", "N/A", "<NA>"]}, ["sex: words", "in 3 rows", "'-' (b.png, row 3)"]),
        ({"patient": ["p1", "P01", "r", "s"]}, ["'P01' (b.png, row 3) and 'p1' (a.png, row 2)",
                                               "case and leading zeros", 'ids = "exact"']),
        ({"region": ["Hand", "hand", "h and", "HAND"]}, ["region: 1 value is spelt in several",
                                                        "and others differ in case"]),
        ({"sex": ["F", "f", "m", ""]}, ["sex: 1 value", "'F' (a.png, row 2) and 'f'"]),
        ({"study": ["E1", "e01", "3", "4"], "patient": ["p", "p", "r", "s"]}, ["study: 1 value"]),
    ],
)  # fmt: skip
def test_what_looks_like_a_slip_is_said(changes: dict[str, list[str]], parts: list[str]) -> None:
    found = warnings_of(**changes)
    assert len(found.split("\n")) == 1
    for part in parts:
        assert part in found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"region": ["unknown", "hand", "wrist", "hand"]},  # as layout dicom has it
        {"sex": ["none", "plate", "screw", ""]},
        {"sex": ["7", "07", "7.0", "70"]},  # numbers are compared as such
        {"study": ["e1", "E1", "3", "4"]},  # of two patients
        {"image": ["x/1.png", "x/01.png", "2.png", "3.png"], "patient": ["p", "p", "r", "s"],
         "study": ["x/1", "x/01", "2", "3"]},  # where a data set names no studies
        {"image": ["none/1.png", "b.png", "c.png", "d.png"], "study": ["none/1", "b", "c", "d"]},
        {"patient": ["anon1", "anon2", "subject3", "nancy"]},
    ],
)  # fmt: skip
def test_what_is_meant_is_not_doubted(changes: dict[str, list[str]]) -> None:
    assert warnings_of(**changes) == ""


def shares(counts: dict[str, int]) -> list[str]:
    patients = [name for name, n in counts.items() for _ in range(n)]
    rows = pd.DataFrame({"patient": patients, "region": "hand"}, dtype=str)
    numbers = rows.index.astype(str)
    return find_warnings(rows.assign(image=numbers + ".png", study=numbers, sha256="", split=""))


def test_a_patient_for_an_improbable_share_is_named() -> None:
    usual = {f"p{i}": 1 + i % 3 for i in range(60)}
    (line,) = shares({**usual, "4711": 40})
    assert line.startswith("patient '4711' has 40 of the 160 studies, and the others 2 in the")
    assert "there is no other" in shares({"4711": 20})[0]
    assert shares({"4711": 19}) == []  # a small set
    assert shares({**usual, "4711": 12}) == []  # a small share
    assert shares({f"p{i}": 25 for i in range(6)}) == []  # all have many
    assert len(shares({**usual, "a-default": 60, "another": 50})) == 2


def test_check_prints_warnings_and_strict_refuses_them(tmp_path: Path) -> None:
    path = save(table(region=["Wrist", "wrist", "hand", "hand"]), tmp_path / "m.csv")
    run = CliRunner().invoke
    done = run(main, ["manifest", "check", str(path), "--json"])
    assert done.exit_code == 0
    document = json.loads(done.stdout)
    assert document["problems"] == []
    assert len(document["warnings"]) == 1
    assert "Warning: region: 1 value is spelt in several ways" in done.stderr
    done = run(main, ["manifest", "check", str(path), "--strict", "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout) == document
    assert "1 warning(s), listed above, which --strict refuses" in done.stderr


# ---- recipes ------------------------------------------------------------------------------------

HEAD = """
name = "mine"
licence = "none"
citation = "none"
url = "https://example.org"
{top}
"""
TABLE = (
    HEAD
    + """
layout = "table"
label_level = "image"
[table]
file = "labels.csv"
image = "file"
patient = ["site", "gr\u00f6\u00dfe"]
study = "exam"
covariates = ["sex"]
[region]
column = "part"
[label]
column = "finding"
normal = ["no\u00a0"]
abnormal = ["yes"]
[split]
{split}
"""
)
FOLDERS = (
    HEAD
    + """
layout = "folders"
label_level = "image"
[folders]
pattern = "{{split}}/{{region}}/{{patient}}_{{label}}_*.png"
[label]
normal = ["0"]
abnormal = ["1"]
"""
)


def film(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 9), "u1")).save(path)


def build(root: Path, text: str, **options: Any) -> BuildReport:
    (root.parent / "recipe.toml").write_text(text, encoding="utf-8")
    return build_manifest(load_recipe(root.parent / "recipe.toml"), root, **options)


def doubts(report: BuildReport) -> list[str]:
    """Return the warnings, but for those of splits too small to hold both classes."""
    return [warning for warning in report.warnings if "so nothing can be" not in warning]


def build_clean(root: Path, text: str) -> BuildReport:
    report = build(root, text)
    assert doubts(report) == []
    return report


def labels(root: Path, lines: list[str]) -> None:
    header = "file,site,gro\u0308\u00dfe ,exam,part,finding,set,sex"  # as a Mac and Excel write it
    (root / "labels.csv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    for i, line in enumerate(lines):
        film(root / line.partition(",")[0], i)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def test_a_tables_text_has_one_spelling(root: Path) -> None:
    labels(
        root,
        [
            "a.png,A,1,e1,wrist,yes,train,F",
            "b.png,A,1 ,e1\u00a0,wrist\u200b,yes\u00a0,train ,F ",
            "c.png,A\u00a0,2,e2,ha\u0308nd,no,test,\u00a0",
            "d.png,A,3,e3,h\u00e4nd ,no ,test,M",
        ],
    )
    report = build_clean(root, TABLE.format(top="", split='column = "set"'))
    rows = report.manifest.rows
    assert rows["patient"].tolist() == ["A/1", "A/1", "A/2", "A/3"]
    assert rows["study"].tolist() == ["e1", "e1", "e2", "e3"]
    assert rows["region"].tolist() == ["wrist", "wrist", "h\u00e4nd", "h\u00e4nd"]
    assert rows["label"].tolist() == [1, 1, 0, 0]
    assert rows["sex"].tolist() == ["F", "F", "", "M"]


def test_a_patient_of_blanks_is_refused_with_its_row(root: Path) -> None:
    lines = [f"{c}.png,A,{i},e{i},hand,no,train,F" for i, c in enumerate("abc")]
    labels(root, [*lines, "d.png,A,\u3000\u200b,e9,hand,no,test,F"])
    with pytest.raises(ManifestError, match=r"patient is empty \(row 5\): d\.png"):
        build(root, TABLE.format(top="", split='column = "set"'))


def test_spellings_in_a_tables_splits_want_exact(root: Path) -> None:
    labels(
        root, ["a.png,A,07,e1,hand,no,train,F", "b.png,a,7.0,e2,hand,yes,test,F",
               "c.png,B,1,e3,hand,yes,train,F", "d.png,B,2,e4,hand,no,test,F"],
    )  # fmt: skip
    with pytest.raises(ManifestError, match=r"'A/07' in train \(a\.png, row 2\), 'a/7\.0' in test"):
        build(root, TABLE.format(top="", split='column = "set"'))
    exact = TABLE.format(top='ids = "exact"', split='column = "set"')
    rows = build(root, exact, strict=True).manifest.rows
    assert rows["ids"].eq("exact").all()
    with pytest.raises(RecipeError, match=r"ids must be .* not 'alike'"):
        build(root, exact.replace('"exact"', '"alike"'))
    with pytest.raises(RecipeError, match="covariates names 'ids'"):
        build(root, exact.replace('["sex"]', '["ids"]'))


def test_a_drawn_split_keeps_spellings_together_and_says_so(root: Path) -> None:
    ways = ["{0:03d}", "{0}", "{0}.0"]
    lines = [
        f"{i}{w}.png,A,{way.format(i)},e{i}{w},hand,{('no', 'yes')[i % 2]},,F"
        for i in range(1, 13)
        for w, way in enumerate(ways)
    ]
    labels(root, lines)
    drawn = TABLE.format(top="", split="fraction = 0.3")
    report = build(root, drawn)
    rows = report.manifest.rows
    assert rows["patient"].nunique() == 36
    person = rows["image"].str[:-5]
    assert rows.groupby(person)["split"].nunique().eq(1).all()
    (warning,) = report.warnings
    assert warning.startswith("patient: 12 values are spelt in several ways")
    with pytest.raises(RecipeError, match="12 values are spelt in several ways"):
        build(root, drawn, strict=True)
    exact = build(root, TABLE.format(top='ids = "exact"', split="fraction = 0.3"), strict=True)
    assert exact.manifest.rows.groupby(person)["split"].nunique().gt(1).any()


def test_folders_names_have_one_spelling(root: Path) -> None:
    films = [
        "train/hand/p_0_1",
        "train/hand/p _1_2",
        "train/h\u00e4nd/q_0_1",
        "test/ha\u0308nd/r_1_1",
        "train /hand/s_1\u00a0_5",
    ]
    for i, name in enumerate(films):
        film(root / f"{name}.png", i)
    rows = build_clean(root, FOLDERS.format(top="")).manifest.rows.set_index("image")
    assert set(rows["region"]) == {"hand", "h\u00e4nd"}
    assert rows.loc["train/hand/p _1_2.png", "patient"] == "p"
    assert f"{films[3]}.png" in rows.index  # a file's own spelling stays
    assert rows.loc["train /hand/s_1\u00a0_5.png", ["patient", "label", "split"]].tolist() == [
        "s",
        1,
        "train",
    ]
    film(root / "test/hand/P_0_1.png", 9)
    with pytest.raises(ManifestError, match="'P' in test"):
        build(root, FOLDERS.format(top=""))
    film(root / "test/hand/\u00a0_0_1.png", 10)  # a patient of nothing but blanks
    (left,) = (w for w in build(root, FOLDERS.format(top='ids = "exact"')).warnings if "left" in w)
    assert "\u00a0_0_1.png" in left


@pytest.mark.parametrize("rule", ["image", "runs"])
def test_names_that_we_make_of_files_are_what_they_are(root: Path, rule: str) -> None:
    text = FOLDERS.replace("{{patient}}_{{label}}_*", "*-{{label}}") + '[groups]\nrule = "{rule}"\n'
    for i, name in enumerate(["train/hand/x1-0", "test/hand/y1-1", "train/hand/X01-0"]):
        film(root / f"{name}.png", i)
    rows = build_clean(root, text.format(top="", rule=rule)).manifest.rows
    assert rows["ids"].eq("exact").all()
    (root / "train/hand/X01-0.png").rename(root / "train/hand/z9-0.png")
    assert "ids" not in build(root, text.format(top="", rule=rule)).manifest.rows


def test_labels_that_only_others_names_are_doubted(root: Path) -> None:
    found = ["yes", "no", "Yes", "n/a", "maybe", "y es"]
    labels(root, [f"{i}.png,A,{i},e{i},hand,{f},{('train', 'test')[i % 2]},F"
                  for i, f in enumerate(found)])  # fmt: skip
    text = TABLE.format(top="", split='column = "set"')
    with pytest.raises(RecipeError, match="labels that the recipe does not know"):
        build(root, text)
    others = text.replace('abnormal = ["yes"]', 'abnormal = ["yes"]\nothers = "normal"')
    (warning,) = doubts(build(root, others))
    for part in ("count as normal", "'Yes' in 1 rows looks like 'yes'", "'y es'", "'n/a' in 1"):
        assert part in warning
    assert "maybe" not in warning
    listed = others.replace('["yes"]', '["yes", "Yes", "y es", "n/a"]')
    build_clean(root, listed)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('["yes"]', '["yes", "no "]', "'no'"),
        ('["yes"]', '["yes", "\u00a0"]', "''"),
    ],
)
def test_a_label_with_two_meanings_is_refused(root: Path, old: str, new: str, named: str) -> None:
    labels(root, ["a.png,A,1,e1,hand,yes,train,F", "b.png,A,2,e2,hand,no,test,F"])
    text = TABLE.format(top="", split='column = "set"').replace(old, new)
    with pytest.raises(RecipeError, match=f"two meanings(.|\n)*- {named}"):
        build(root, text)


def test_a_region_flag_that_is_neither_yes_nor_no_is_refused(root: Path) -> None:
    labels(root, ["a.png,1,1,e1,hand,yes,train,F", "b.png,nan,2,e2,hand,no,test,F"])
    text = TABLE.format(top="", split='column = "set"')
    text = text.replace('column = "part"', 'one_hot = ["site", "exam"]\nseveral = "both"')
    with pytest.raises(RecipeError, match=r"neither yes nor no[^-]*- 'nan' in column 'site'"):
        build(root, text)


def test_columns_that_differ_in_blanks_alone_are_refused(root: Path) -> None:
    labels(root, ["a.png,A,1,e1,hand,yes,train,F"])
    path = root / "labels.csv"
    path.write_text(path.read_text().replace("sex", "exam "))
    with pytest.raises(MedembedError, match="two columns of one name: 'exam'"):
        build(root, TABLE.format(top="", split='column = "set"'))


def test_real_tables_draw_no_false_alarm(shared_data: Path) -> None:
    nih = build_manifest(
        load_recipe(shared_data / "nih/nih.toml"), shared_data / "nih", strict=True
    )
    assert nih.manifest.digest() == read_manifest(shared_data / "nih/manifest.csv").digest()
    report = build_manifest(load_recipe("fracatlas"), shared_data / "fracatlas")
    assert all("expected" in line or "not below" in line for line in report.warnings)
