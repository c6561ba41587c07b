"""Splits and folds: patients stay whole, strata stay balanced, row order means nothing."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medembed.dataset.splits import draw_folds, split_patients
from medembed.errors import RecipeError, TrainingDataError


def cohort(n_patients: int, seed: int = 0) -> pd.DataFrame:
    """One to three studies of one to three views; regions and labels of uneven shares."""
    rng = np.random.default_rng(seed)
    rows = []
    for patient in range(n_patients):
        for study in range(rng.integers(1, 4)):
            region = rng.choice(["elbow", "hand", "wrist"], p=[0.1, 0.3, 0.6])
            label = int(rng.random() < 0.35)
            view = (f"p{patient}", f"p{patient}/{study}", region, label)
            rows += [view] * rng.integers(1, 4)
    return pd.DataFrame(rows, columns=["patient", "study", "region", "label"])


def studies(rows: pd.DataFrame, part: np.ndarray) -> pd.DataFrame:
    return rows.assign(part=part).drop_duplicates("study")


some_rows = st.lists(
    st.tuples(
        st.integers(0, 12), st.integers(0, 2), st.sampled_from("ab"), st.sampled_from([0, 1, None])
    ),
    min_size=1,
    max_size=40,
).map(
    lambda drawn: pd.DataFrame(
        {
            "patient": [f"p{p}" for p, *_ in drawn],
            "study": [f"p{p}/{region}{s}" for p, s, region, _ in drawn],
            "region": [region for *_, region, _ in drawn],
            "label": pd.array([label for *_, label in drawn], dtype="Int8"),
        }
    )
)


@settings(deadline=None, max_examples=60)
@given(rows=some_rows, fraction=st.floats(0.05, 0.95), seed=st.integers(0, 5))
def test_a_split_keeps_patients_whole_in_any_order(
    rows: pd.DataFrame, fraction: float, seed: int
) -> None:
    split = split_patients(rows, fraction=fraction, seed=seed)
    assert set(split) <= {"train", "test"}
    assert rows.assign(split=split).groupby("patient")["split"].nunique().eq(1).all()
    shuffled = rows.sample(frac=1, random_state=seed)
    again = split_patients(shuffled, fraction=fraction, seed=seed)
    assert dict(zip(shuffled.index, again, strict=True)) == dict(enumerate(split))


@settings(deadline=None, max_examples=60)
@given(rows=some_rows, n_folds=st.integers(2, 4), seed=st.integers(0, 5))
def test_folds_keep_patients_whole_or_are_refused(
    rows: pd.DataFrame, n_folds: int, seed: int
) -> None:
    try:
        fold = draw_folds(rows, n_folds=n_folds, seed=seed)
    except TrainingDataError:
        return
    assert rows.assign(fold=fold).groupby("patient")["fold"].nunique().eq(1).all()
    assert set(fold) == set(range(n_folds))
    for i in range(n_folds):
        assert set(rows["label"][fold == i].dropna()) == {0, 1}
    shuffled = rows.sample(frac=1, random_state=seed)
    again = draw_folds(shuffled, n_folds=n_folds, seed=seed)
    assert dict(zip(shuffled.index, again, strict=True)) == dict(enumerate(fold))


def test_folds_hold_every_stratum_in_equal_shares() -> None:
    rows = cohort(600)
    table = studies(rows, draw_folds(rows, n_folds=5))
    counts = pd.crosstab([table["region"], table["label"]], table["part"])
    assert (counts.max(axis=1) - counts.min(axis=1)).max() <= 2


def test_a_split_holds_the_asked_fraction_of_every_stratum() -> None:
    rows = cohort(600)
    table = studies(rows, split_patients(rows, fraction=0.2, seed=3))
    counts = pd.crosstab([table["region"], table["label"]], table["part"])
    assert ((counts["test"] - 0.2 * counts.sum(axis=1)).abs() <= 2).all()
    n_views = rows.groupby("patient")["study"].nunique()
    by_part = n_views.groupby(table.groupby("patient")["part"].first()).mean()
    assert by_part["test"] == pytest.approx(by_part["train"], abs=0.2)  # not only small patients


def test_another_seed_draws_other_folds_and_the_same_seed_the_same() -> None:
    rows = cohort(60)
    first = draw_folds(rows, n_folds=3, seed=0)
    assert (first == draw_folds(rows, n_folds=3, seed=0)).all()
    assert (first != draw_folds(rows, n_folds=3, seed=1)).any()


def test_a_stratum_of_one_study_neither_warns_nor_fails() -> None:
    rows = cohort(60)
    rows.loc[rows.index[0], "region"] = "hip"
    assert len(draw_folds(rows, n_folds=5)) == len(rows)


def test_as_many_patients_of_a_class_as_folds_are_enough() -> None:
    rows = pd.DataFrame(
        {
            "patient": [f"p{i}" for i in range(40)],
            "study": [f"s{i}" for i in range(40)],
            "region": ["abcde"[i % 5] for i in range(40)],
            "label": [int(i < 5) for i in range(40)],
        }
    )
    fold = draw_folds(rows, n_folds=5)
    assert sorted(fold[:5]) == [0, 1, 2, 3, 4]


def test_a_rare_class_goes_to_the_folds_that_lack_it() -> None:
    # Balance by region alone would put both patients with normal studies into one fold.
    patients = ["p0"] * 3 + ["p1"] * 2 + ["p2"] * 3 + ["p3"]
    rows = pd.DataFrame(
        {
            "patient": patients,
            "study": [f"s{i}" for i in range(9)],
            "region": list("abcbabbcc"),
            "label": [1, 1, 1, 0, 1, 1, 1, 0, 1],
        }
    )
    fold = draw_folds(rows, n_folds=2)
    assert fold[3] != fold[7]


@pytest.mark.parametrize(
    ("labels", "n_folds", "message"),
    [
        ([0, 1, 0], 5, "3 patients cannot fill 5 folds"),
        ([0, 0, 0, 0], 2, "no training study is abnormal"),
        ([1, 1, 1, None], 2, "no training study is normal"),
        ([0, 0, 0, 1], 2, "abnormal studies come from 1 patients, too few for 2 folds"),
        ([0, 1], 1, "1 folds were asked for"),
    ],
)
def test_data_that_cannot_be_folded_are_refused_with_the_reason(
    labels: list[int | None], n_folds: int, message: str
) -> None:
    n = len(labels)
    rows = pd.DataFrame(
        {
            "patient": [f"p{i}" for i in range(n)],
            "study": [f"s{i}" for i in range(n)],
            "region": ["hand"] * n,
            "label": pd.array(labels, dtype="Int8"),
        }
    )
    with pytest.raises(TrainingDataError, match=message):
        draw_folds(rows, n_folds=n_folds)


def test_a_fraction_outside_zero_and_one_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"fraction is 1\.5"):
        split_patients(cohort(5), fraction=1.5)
