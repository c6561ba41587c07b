"""`manifest texts`: free text becomes covariates, and another data set's by the same components."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from made_sweeps import QUICK, make_data, make_table
from made_words import make_siglip

import medembed as me
from medembed.cli import main
from medembed.core.errors import EncoderError, ManifestError, PathNotFoundError
from medembed.core.prompts import normalise
from medembed.dataset.manifest import make_manifest, read_manifest, write_manifest
from medembed.encoders.text_tower import load_text_tower
from medembed.extraction.free_text import add_text_covariates, basis_path
from medembed.results.runs import open_run

WORDS = ("a normal hand", "a fracture", "an implant", "a normal wrist", "a fracture an implant")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and a manifest with a text for each study, of which some are empty or long."""
    home = tmp_path_factory.mktemp("texts")
    make_siglip(home / "siglip")
    table = make_table(48)
    code = pd.factorize(table["study"])[0]
    table["indication"] = [WORDS[own % 5] if own % 7 else "" for own in code]
    table.loc[code == 1, "indication"] = " ".join(["a fracture"] * 200)
    make_data(home, {"mean": 1.0}, table=table)
    return home


def run(home: Path, *more: str) -> list[str]:
    words = ["manifest", "texts", str(home / "manifest.csv"), "--column", "indication"]
    return [*words, "--encoder", str(home / "siglip"), *more]


def test_texts_become_places_on_the_components_of_train(home: Path) -> None:
    out = home / "with.csv"
    ran = CliRunner().invoke(main, [*run(home), "-o", str(out), "--components", "3", "--json"])
    assert ran.exit_code == 0, ran.output
    document = json.loads(ran.stdout)
    assert document["columns"] == ["indication_1", "indication_2", "indication_3"]
    assert "it may hold the answer" in ran.stderr
    rows = read_manifest(out).rows
    assert rows[read_manifest(home / "manifest.csv").rows.columns].equals(
        read_manifest(home / "manifest.csv").rows
    )
    tower = load_text_tower(home / "siglip")
    long = " ".join(["a fracture"] * 200)
    assert tower.count_tokens(long) > tower.max_tokens
    short = sorted(set(rows["indication"]) - {"", long})
    vectors = normalise(tower.embed(short))
    found = rows.drop_duplicates("indication").set_index("indication").loc[short]
    places = found[document["columns"]].astype(float).to_numpy()
    gaps = np.linalg.norm(places[:, None] - places[None], axis=2)
    exact = np.linalg.norm(vectors[:, None] - vectors[None], axis=2)
    assert (gaps <= exact + 1e-5).all()  # a projection
    assert np.corrcoef(gaps.ravel(), exact.ravel())[0, 1] > 0.95
    assert (rows.loc[rows["indication"] == "", "indication_1"] == "").all()
    assert (rows.loc[rows["indication"] == long, "indication_1"] != "").all()


def test_a_model_reads_the_columns_and_another_data_sets(home: Path, tmp_path: Path) -> None:
    ours = add_text_covariates(
        home / "manifest.csv", "indication", home / "siglip", tmp_path / "ours.csv", n_components=2
    )
    names = ["indication_1", "indication_2"]
    run = me.sweep(
        home / "cache",
        tmp_path / "ours.csv",
        tmp_path / "run",
        heads="logistic,metadata",
        covariates=names,
        **QUICK,
    )
    assert set(open_run(run.path).predictions()["head"]) >= {"logistic", "metadata"}
    theirs = read_manifest(home / "manifest.csv").rows.iloc[:9].assign(split="test")
    write_manifest(make_manifest(theirs.astype(str), "study"), tmp_path / "theirs.csv")
    found = add_text_covariates(
        tmp_path / "theirs.csv", "indication", home / "siglip", tmp_path / "theirs-2.csv",
        like=tmp_path / "ours.csv",
    )  # fmt: skip
    both = found.rows.merge(ours.rows, on="image", suffixes=("", "_ours"))
    assert len(both) == 9
    assert (both["indication_1"] == both["indication_1_ours"]).all()
    assert (
        basis_path(tmp_path / "theirs-2.csv").read_bytes()
        == basis_path(tmp_path / "ours.csv").read_bytes()
    )


def test_what_cannot_be_done_is_refused_before_anything_is_written(
    home: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.csv"
    given = (home / "manifest.csv", "indication", home / "siglip", out)
    for column in ("age", "label", "target_x"):
        with pytest.raises(ManifestError, match="is not a covariate of the manifest"):
            add_text_covariates(given[0], column, *given[2:])
    with pytest.raises(PathNotFoundError, match="there are no components of texts"):
        add_text_covariates(*given, like=tmp_path / "none.csv")
    (tmp_path / "bad.texts.safetensors").write_bytes(b"\x08" + b"\x00" * 30)
    with pytest.raises(ManifestError, match="does not hold components"):
        add_text_covariates(*given, like=tmp_path / "bad.csv")
    make_siglip(tmp_path / "other", seed=3)
    add_text_covariates(given[0], "indication", tmp_path / "other", tmp_path / "other.csv")
    with pytest.raises(EncoderError, match="has another"):
        add_text_covariates(*given, like=tmp_path / "other.csv")
    with pytest.raises(ManifestError, match=r"has a column 'indication_1' already"):
        add_text_covariates(tmp_path / "other.csv", *given[1:])
    assert not out.exists()
    assert not basis_path(out).exists()


def test_a_report_is_warned_of(home: Path, tmp_path: Path) -> None:
    rows = read_manifest(home / "manifest.csv").rows.rename(columns={"indication": "Report"})
    write_manifest(me.Manifest(rows, "study"), tmp_path / "m.csv")
    words = ["manifest", "texts", str(tmp_path / "m.csv"), "--column", "Report", "--encoder"]
    ran = CliRunner().invoke(main, [*words, str(home / "siglip"), "-o", str(tmp_path / "n.csv")])
    assert ran.exit_code == 0, ran.output
    assert "Warning: Report may have been written after the film was read" in ran.stderr
    assert "--heads logistic,metadata" in ran.stderr
