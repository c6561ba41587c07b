"""Covariates: columns of a manifest become finite numbers of a width that training fixed."""

import json
import math
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medembed.core.errors import ModelError, TrainingDataError
from medembed.dataset.covariates import (
    MAX_CATEGORIES,
    NOT_COVARIATES,
    CategoricalColumn,
    NumericColumn,
    fit_covariates,
)
from medembed.results.model_card import read_covariates


def table(**columns: list[Any]) -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in columns.items()})


def is_word(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return bool(text.strip())
    return "_" in text


unknown = st.sampled_from([None, math.nan, pd.NA, "", " ", "\t\n"])
number = st.one_of(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(0, 120))
number_cell = st.one_of(unknown, number, number.map(str), number.map(lambda n: f" {n} "))
word_cell = st.one_of(unknown, st.text(max_size=5).filter(is_word))


@st.composite
def training_and_other_rows(draw: st.DrawFn) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two tables with columns `age` and `sex`, both with a known value in the first."""
    ages, sexes = st.lists(number_cell, min_size=1, max_size=8), st.lists(word_cell, max_size=8)
    age, sex = [draw(number), *draw(ages)], ["F", *draw(sexes)]
    n = min(len(age), len(sex))
    m = draw(st.integers(0, 8))
    other_age = draw(st.lists(number_cell, min_size=m, max_size=m))
    other_sex = draw(st.lists(word_cell, min_size=m, max_size=m))
    return table(age=age[:n], sex=sex[:n]), table(age=other_age, sex=other_sex)


@settings(deadline=None, max_examples=150)
@given(rows=training_and_other_rows())
def test_what_comes_out_is_finite_and_as_wide_as_training_said(
    rows: tuple[pd.DataFrame, pd.DataFrame],
) -> None:
    train, other = rows
    encoder = fit_covariates(train, ["age", "sex"])
    for given_rows in (train, other):
        X = encoder.transform(given_rows)
        assert X.shape == (len(given_rows), len(encoder.names))
        assert X.dtype == np.float32
        assert np.isfinite(X).all()
        one_hot = X[:, 2:]  # categories of sex and whether it is missing: at most one holds
        assert set(np.unique(one_hot)) <= {0, 1}
        assert (one_hot.sum(axis=1) <= 1).all()


@settings(deadline=None, max_examples=100)
@given(rows=training_and_other_rows(), seed=st.integers(0, 5))
def test_the_order_of_rows_means_nothing(
    rows: tuple[pd.DataFrame, pd.DataFrame], seed: int
) -> None:
    train, _ = rows
    encoder = fit_covariates(train, ["age", "sex"])
    shuffled = train.sample(frac=1, random_state=seed)
    assert fit_covariates(shuffled, ["age", "sex"]) == encoder
    assert (encoder.transform(shuffled) == encoder.transform(train)[shuffled.index]).all()


@settings(deadline=None, max_examples=100)
@given(rows=training_and_other_rows())
def test_an_encoder_survives_json(rows: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    encoder = fit_covariates(rows[0], ["sex", "age"])
    text = json.dumps(encoder.as_dict(), allow_nan=False)
    again = read_covariates(json.loads(text))
    assert again == encoder
    assert again.names == encoder.names


def test_numbers_and_words_come_out_as_documented() -> None:
    rows = table(age=["40", "", "50", "90"], sex=["F", "M", None, " F "], region=["hand"] * 4)
    encoder = fit_covariates(rows, ["age", "sex", "region"])
    assert encoder.names == [
        *("age", "age is missing"),
        *("sex=F", "sex=M", "sex is missing"),
        *("region=hand", "region is missing"),
    ]
    assert encoder.transform(rows).tolist() == [
        [40, 0, 1, 0, 0, 1, 0],
        [50, 1, 0, 1, 0, 1, 0],  # 50 is the median
        [50, 0, 0, 0, 1, 1, 0],
        [90, 0, 1, 0, 0, 1, 0],
    ]


def test_text_and_number_cells_of_one_value_are_encoded_alike() -> None:
    as_text = table(age=["40", "0.5", "1e2", ""])
    as_numbers = pd.DataFrame({"age": [40, 0.5, 100, math.nan]})
    assert fit_covariates(as_text, ["age"]) == fit_covariates(as_numbers, ["age"])
    whole = pd.DataFrame({"age": pd.array([40, None], dtype="Int16")})
    assert fit_covariates(whole, ["age"]).transform(whole).tolist() == [[40, 0], [40, 1]]


def test_zeros_and_ones_are_numbers() -> None:
    assert fit_covariates(table(cast=["0", "1", "1"]), ["cast"]).columns == (
        NumericColumn("cast", 1.0),
    )


def test_digits_joined_by_an_underscore_are_a_word() -> None:
    assert fit_covariates(table(site=["1_2", "3_4"]), ["site"]).columns == (
        CategoricalColumn("site", ("1_2", "3_4")),
    )


def test_an_unseen_category_gives_zeros() -> None:
    encoder = fit_covariates(table(sex=["F", "M"]), ["sex"])
    assert encoder.transform(table(sex=["X", "f", ""])).tolist() == [
        [0, 0, 0],
        [0, 0, 0],
        [0, 0, 1],
    ]


def test_medians_and_categories_are_those_of_training_alone() -> None:
    train = table(age=["10", "20", "30"], sex=["F", "F", "F"])
    encoder = fit_covariates(train, ["age", "sex"])
    other = table(age=["", "1000", "2000"], sex=["M", "M", "M"])
    assert encoder.transform(other)[:, 0].tolist() == [20, 1000, 2000]
    assert encoder.names[2:] == ["sex=F", "sex is missing"]


def test_no_names_give_no_columns() -> None:
    encoder = fit_covariates(table(age=["1"]), [])
    assert encoder.transform(table(age=["1", "2"])).shape == (2, 0)


def test_as_many_categories_as_the_limit_are_encoded() -> None:
    words = [f"w{i:02d}" for i in range(MAX_CATEGORIES)]
    encoder = fit_covariates(table(site=words), ["site"])
    assert (encoder.transform(table(site=words))[:, :-1] == np.eye(MAX_CATEGORIES)).all()
    assert read_covariates(encoder.as_dict()) == encoder


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["41", "old"], "covariate age is of unknown kind: it holds numbers, such as '41', and"),
        (["41", "old"], "text, such as 'old'. Write one kind in this column of the manifest"),
        ([41, "4_1"], "numbers, such as '41', and text, such as '4_1'"),
        (["", None, math.nan, " "], "covariate age is unknown in every labelled training row"),
        ([], "covariate age is unknown in every labelled training row"),
        (["1", "inf"], "covariate age holds 'inf', which is not a finite number"),
        (["1", -math.inf], "covariate age holds '-inf', which is not a finite number"),
        (["F", "nan"], "covariate age holds 'nan', which is not a finite number"),
        (["1", "1e39"], "covariate age holds '1e39', which is not a finite number of single prec"),
        (
            [f"w{i}" for i in range(65)],
            "covariate age has 65 categories, and at most 64 are encoded: it looks like an "
            "identifier, not a covariate, and nothing that identifies a patient may leave the "
            "manifest. Group its values, or leave it out of --covariates.",
        ),
    ],
)
def test_a_column_that_cannot_be_encoded_is_refused_with_the_reason(
    values: list[Any], message: str
) -> None:
    with pytest.raises(TrainingDataError, match=re.escape(message)):
        fit_covariates(table(age=values), ["age"])


@pytest.mark.parametrize("name", NOT_COVARIATES)
def test_what_names_a_row_or_answers_it_is_no_covariate(name: str) -> None:
    with pytest.raises(TrainingDataError, match=f"^{name} is not a covariate: image, sha256"):
        fit_covariates(table(**{name: ["a"]}), [name])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["agee"],
            "covariate 'agee' is not a column of the manifest; did you mean age? "
            "Its covariates are: region, age. Name one of these in --covariates",
        ),
        (["weight"], "'weight' is not a column of the manifest; Its covariates are: region, age"),
        (["age", "region", "age"], "covariate age is given twice"),
    ],
)
def test_names_that_do_not_fit_the_manifest_are_refused(names: list[str], message: str) -> None:
    rows = table(image=["a.png"], region=["hand"], age=["1"], label=["0"])
    with pytest.raises(TrainingDataError, match=re.escape(message)):
        fit_covariates(rows, names)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            table(age=["old"], sex=["F"]),
            "covariate age is of unknown kind: in training it held numbers only, and now text, "
            "such as 'old'. Write numbers",
        ),
        (
            table(age=["1"], sex=["1"]),
            "covariate sex is of unknown kind: in training it held text only, such as 'F', and "
            "now numbers, such as '1'. Write the same categories",
        ),
        (table(age=["1e400"], sex=["F"]), "covariate age holds '1e400', which is not a finite"),
        (table(age=["1"], sex=["inf"]), "covariate sex holds 'inf', which is not a finite"),
        (table(age=["1"]), "covariate sex is not a column of the manifest, and the classifier"),
    ],
)
def test_rows_of_another_kind_than_training_are_refused(rows: pd.DataFrame, message: str) -> None:
    encoder = fit_covariates(table(age=["1", "2"], sex=["F", "M"]), ["age", "sex"])
    with pytest.raises(TrainingDataError, match=re.escape(message)):
        encoder.transform(rows)


NUMERIC = {"name": "age", "kind": "numeric", "fill": 1.0}
WORDS = {"name": "sex", "kind": "categorical", "categories": ["F", "M"]}
DEEP: list[Any] = []
for _ in range(2000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        *((value, "must be a table") for value in (None, 3, [], "columns")),
        ({}, "columns is missing"),
        ({"columns": [NUMERIC], "more": 1}, "unknown key 'more'; known: columns"),
        ({"columns": {"age": NUMERIC}}, "columns must be a list"),
        ({"columns": [NUMERIC, NUMERIC]}, "columns must have different names, not ['age', 'age']"),
        ({"columns": DEEP}, "columns[0] must be a table"),
        *(
            ({"columns": [{**NUMERIC, key: value}]}, message)
            for key, value, message in [
                ("fill", math.nan, "a finite number, not nan"),
                ("fill", math.inf, "a finite number, not inf"),
                ("fill", 1e39, "at most 3.40282e+38, not 1e+39"),
                ("fill", 10**400, "a number, not 1000"),
                ("fill", "1", "a number, not '1'"),
                ("fill", True, "a number, not True"),
                ("fill", None, "a number, not None"),
                (
                    "kind",
                    "other",
                    "columns[0].kind must be one of 'numeric', 'categorical', not 'other'",
                ),
                ("kind", ["numeric"], "columns[0].kind must be"),
                ("name", 3, "columns[0].name must be text, not 3"),
                ("name", "patient", "columns[0].name must be a covariate, not 'patient'"),
                ("more", 1, "columns[0] has an unknown key 'more'"),
            ]
        ),
        ({"columns": [{"name": "age", "kind": "numeric"}]}, "columns[0].fill is missing"),
        *(
            ({"columns": [{**WORDS, "categories": value}]}, "columns[0].categories")
            for value in [
                *(None, "FM", {}, [], [1], [None], [["F"]], [""], [" F"]),
                *(["M", "F"], ["F", "F"], ["1"], ["nan"], [f"w{i:02d}" for i in range(65)], DEEP),
            ]
        ),
        ({"columns": [{**WORDS, "fill": 1.0}]}, "columns[0] has an unknown key 'fill'"),
    ],
)
def test_a_document_that_no_encoder_wrote_is_refused(document: Any, message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        read_covariates(document)
    assert str(caught.value).startswith("the model's covariates are damaged: ")
    assert str(caught.value).endswith("Train or copy the model again.")


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["columns", "name", "kind", "fill", "categories", "x"]), inner
        ),
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=300)
@given(
    document=st.one_of(
        json_values,
        st.builds(
            lambda key, value: {"columns": [{**NUMERIC, key: value}, {**WORDS, key: value}]},
            st.sampled_from(["name", "kind", "fill", "categories"]),
            json_values,
        ),
    )
)
def test_any_document_is_read_back_whole_or_refused(document: Any) -> None:
    try:
        encoder = read_covariates(document)
    except ModelError:
        return
    assert encoder.as_dict() == document
