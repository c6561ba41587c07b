"""How a column of a manifest becomes groups: categories, bands, and what is never shown."""

import string

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medembed.core.errors import ManifestError
from medembed.dataset.covariate_bands import (
    NOT_KNOWN,
    OUTSIDE,
    Grouping,
    find_groupings,
    group_rows,
    parse_grouping,
)

COLUMNS = ["image", "sha256", "patient", "study", "region", "label", "split", "age", "sex", "a:1-2"]
EDGES = st.lists(
    st.integers(-400, 400).map(lambda n: n / 4), min_size=2, max_size=6, unique=True
).map(sorted)


def table(values, *, column="age", n_per_patient=1):
    patients = [f"p{i // n_per_patient}" for i in range(len(values))]
    return pd.DataFrame({"patient": patients, column: list(values)}, dtype=str)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sex", Grouping("sex")),
        ("region", Grouping("region")),
        ("age:0-5-10-18", Grouping("age", (0.0, 5.0, 10.0, 18.0))),
        ("age:-5--1.5-0", Grouping("age", (-5.0, -1.5, 0.0))),
        ("a:1-2", Grouping("a:1-2")),
        ("a:1-2:3-4", Grouping("a:1-2", (3.0, 4.0))),
        ("\u00a0sex ", Grouping("sex")),
    ],
)
def test_columns_and_bands_are_read(text, expected):
    assert parse_grouping(text, COLUMNS) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sexe", "Did you mean sex?"),
        ("height", "not a column of the manifest. Columns to group by: region, age, sex"),
        ("patient", "is not a covariate"),
        ("patient:0-5", "is not a covariate"),
        ("label", "is not a covariate"),
        ("views", "leave it out"),
        ("", "not a column"),
        (":0-5", "not a column"),
        ("age:", "at least two edges"),
        ("age:5", "at least two edges"),
        ("age:5-", "at least two edges"),
        ("age:5-x", "at least two edges"),
        ("age:5-nan", "at least two edges"),
        ("age:5-5", "do not ascend"),
        ("age:5-3-9", "do not ascend"),
    ],
)
def test_what_cannot_be_grouped_by_says_what_can(text, words):
    with pytest.raises(ManifestError, match=None) as raised:
        parse_grouping(text, COLUMNS)
    assert words in str(raised.value)


@settings(deadline=None, max_examples=100)
@given(EDGES, st.lists(st.integers(-500, 500).map(lambda n: n / 4), min_size=1, max_size=30))
def test_bands_are_those_of_pandas_with_the_last_edge_in_the_last_band(edges, values):
    names, order = group_rows(
        table([str(value) for value in values]), Grouping("age", tuple(edges))
    )
    codes = pd.cut(values, edges, right=False, labels=False)
    for value, name, code in zip(values, names, codes, strict=True):
        if value == edges[-1]:
            assert name == order[-1]
        else:
            assert name == (OUTSIDE if np.isnan(code) else order[int(code)])


@settings(deadline=None, max_examples=50)
@given(EDGES)
def test_edges_are_written_and_read_back(edges):
    text = "-".join(f"{edge:g}" for edge in edges)
    assert parse_grouping(f"age:{text}", COLUMNS).edges == tuple(edges)


def test_the_edges_of_bands_and_what_is_outside_them():
    values = ["-1", "0", "4.9", "5", "18", "18.5", ""]
    names, order = group_rows(table(values), Grouping("age", (0.0, 5.0, 18.0)))
    assert order == ["[0, 5)", "[5, 18]"]
    expected = [OUTSIDE, order[0], order[0], order[1], order[1], OUTSIDE, NOT_KNOWN]
    assert names.tolist() == expected


def test_few_numbers_are_categories_in_their_order_and_spelt_once():
    names, order = group_rows(table(["10", "2", "2.0", "02", "-0", "0"] * 5), Grouping("age"))
    assert order == ["0", "2", "10"]
    assert names.tolist()[:6] == ["10", "2", "2", "2", "0", "0"]


def test_many_numbers_want_bands_and_some_that_fit_are_proposed():
    rows = table([str(i % 40 + 0.5) for i in range(200)])
    with pytest.raises(ManifestError, match="40 different numbers") as raised:
        group_rows(rows, Grouping("age"))
    proposed = str(raised.value).rpartition("--by ")[2]
    grouping = parse_grouping(proposed, COLUMNS)
    names, order = group_rows(rows, grouping)
    assert names.value_counts()[order].tolist() == pytest.approx([50] * 4, abs=15)
    assert OUTSIDE not in set(names)


@pytest.mark.parametrize("word", ["abc", "inf", "nan", "1_2", "045Y"])
def test_a_word_among_numbers_has_no_band(word):
    with pytest.raises(ManifestError, match="not a finite number"):
        group_rows(table(["1", word]), Grouping("age", (0.0, 5.0)))


def test_what_may_name_a_patient_is_refused():
    names = [f"{a}{b}" for a in string.ascii_letters for b in "xy"]
    with pytest.raises(ManifestError, match="104 categories, more than 64"):
        group_rows(table(names * 3), Grouping("age"))
    with pytest.raises(ManifestError, match="8 different values in 8 patients"):
        group_rows(table([*"abcdefgh"] * 2).assign(patient=[*"abcdefgh"] * 2), Grouping("age"))
    few, order = group_rows(table([*"ab"] * 8), Grouping("age"))
    assert order == ["a", "b"]
    assert len(few) == 16


def test_a_category_that_is_called_like_a_group_of_ours_is_told_apart():
    names, order = group_rows(table(["several", "", "not known"] * 4), Grouping("age"))
    assert order == ["“not known”", "“several”"]
    assert names.tolist()[1] == NOT_KNOWN


def test_the_page_shows_categories_and_quartiles_and_says_what_it_leaves_out():
    n = 80
    rows = pd.DataFrame({"patient": [f"p{i // 2}" for i in range(n)], "region": "hand"})
    rows["sex"] = [*"FM"] * (n // 2)
    rows["age"] = [str(i % 20) for i in range(n)]
    rows["visit"] = [str(i % 3) for i in range(n)]
    rows["accession"] = [str(1000 + i) for i in range(n)]
    rows["name"] = [f"name {i // 2}" for i in range(n)]
    rows["ward"] = [f"ward {i % 13}" for i in range(n)]
    rows["scanner"], rows["note"] = "A", ""
    found, left_out = find_groupings(rows)
    assert [own.column for own in found] == ["sex", "age", "visit"]
    assert found[1].bands == ["< 4", "[4, 9)", "[9, 14)", "≥ 14"]
    names, _ = group_rows(rows, found[1])
    assert names.value_counts()[found[1].bands].tolist() == [16, 20, 20, 24]
    assert left_out == {
        "accession": "has 80 different values in 40 patients, so it may identify patients",
        "name": "has 40 different values in 40 patients, so it may identify patients",
        "ward": "has 13 categories, more than 12",
        "scanner": "has one value",
        "note": "has no known value",
    }


def test_quartiles_of_skewed_numbers_leave_no_band_empty():
    values = ["0"] * 70 + [str(i) for i in range(1, 31)]
    rows = table(values, n_per_patient=1).assign(patient=[f"p{i}" for i in range(100)])
    found, _ = find_groupings(rows)
    names, order = group_rows(rows, found[0])
    assert set(names) == set(order)
    assert len(order) >= 2
