"""Targets of a manifest: columns of 0, 1 and empty, under the rules of the label."""

import pandas as pd
import pytest
from made_sweeps import make_table

from medembed.core.errors import ManifestError, TrainingDataError
from medembed.dataset.covariate_bands import find_groupings
from medembed.dataset.covariates import fit_covariates
from medembed.dataset.manifest import make_manifest, read_manifest, write_manifest
from medembed.dataset.targets import check_targets, count_target, list_targets, select_target


def table_with(**columns):
    table = make_table(12)
    return table.assign(**{name: [v] * len(table) for name, v in columns.items()})


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_targets_survive_a_round_trip(tmp_path, suffix):
    table = table_with(target_metal="", age="3")
    table.loc[:2, "target_metal"] = ["0", "1", "1"]
    manifest = make_manifest(table, "image")
    path = tmp_path / f"manifest.{suffix}"
    write_manifest(manifest, path)
    read = read_manifest(path)
    assert read.digest() == manifest.digest()
    assert list_targets(read.rows.columns) == ["label", "metal"]
    n = len(table)
    assert count_target(read.rows, "metal") == {"positive": 2, "negative": 1, "unknown": n - 3}
    chosen = select_target(read.rows, "metal")["label"]
    assert chosen.dtype == "Int8"
    assert chosen.head(4).tolist() == [0, 1, 1, pd.NA]
    assert "targets" in manifest.summarise().facts
    assert manifest.summarise().facts["covariates"] == "age"


def test_a_value_other_than_0_1_and_empty_is_a_problem():
    with pytest.raises(ManifestError, match=r"target_metal 'yes' is neither 0, 1 nor empty"):
        make_manifest(table_with(target_metal="yes"), "image")


@pytest.mark.parametrize("name", ["target_Metal", "target_", "target_a-b", "target_label"])
def test_a_name_that_no_directory_or_option_could_have_is_a_problem(name):
    with pytest.raises(ManifestError, match=f"column '{name}'"):
        make_manifest(table_with(**{name: "1"}), "image")


def test_views_of_a_study_may_differ_in_a_target_only_where_labels_are_of_images():
    table = table_with(target_metal="0")
    table.loc[1, "target_metal"] = "1"  # studies of the first patients: 1, 2, 3 views
    assert table["study"].tolist()[:3] == ["study0", "study1", "study1"]
    make_manifest(table, "image")
    with pytest.raises(ManifestError, match=r"study 'study1' has more than one value of target_m"):
        make_manifest(table, "study")


def test_equal_bytes_with_two_values_of_a_target_are_a_problem():
    table = table_with(target_metal="0")
    table.loc[1, "sha256"] = table.loc[2, "sha256"]
    make_manifest(table, "image")
    table.loc[1, "target_metal"] = "1"
    with pytest.raises(ManifestError, match="same bytes have more than one value of target_metal"):
        make_manifest(table, "image")


def test_a_target_is_no_covariate():
    table = table_with(target_metal="0", device="a")
    table.loc[:5, ["target_metal", "device"]] = ["1", "b"]
    rows = make_manifest(table, "image").rows
    with pytest.raises(TrainingDataError, match="target_metal is a target, not a covariate"):
        fit_covariates(rows, ["target_metal"])
    groupings, left_out = find_groupings(rows)
    assert [grouping.column for grouping in groupings] == ["device"]
    assert not left_out


def test_an_unknown_target_is_named_with_the_nearest():
    columns = ["image", "label", "target_metal"]
    assert check_targets(["metal", "label", "metal"], columns) == ["metal", "label"]
    with pytest.raises(ManifestError, match=r"no target 'mettal'\. Did you mean 'metal'"):
        check_targets(["mettal"], columns)
    with pytest.raises(ManifestError, match="Its targets are label, metal"):
        check_targets(["target_metal_"], columns)
