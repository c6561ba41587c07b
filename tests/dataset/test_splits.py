"""Splits and folds: patients stay whole, strata stay balanced, row order means nothing."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medembed.core.errors import RecipeError, TrainingDataError
from medembed.dataset.splits import draw_folds, draw_fraction, split_patients


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


folds_and_rows = st.tuples(some_rows, st.integers(1, 3)).map(
    # any folds at all, as long as they keep patients whole
    lambda drawn: (drawn[0], drawn[0]["patient"].str[1:].astype(int).to_numpy() % drawn[1])
)


def classes_by_fold(rows: pd.DataFrame, folds: np.ndarray) -> dict[int, set[int]]:
    labels = rows.groupby("study")["label"].max().reindex(rows["study"]).to_numpy()
    table = pd.DataFrame({"fold": folds, "label": labels}).dropna()
    return {fold: set(part["label"]) for fold, part in table.groupby("fold")}


@settings(deadline=None, max_examples=100)
@given(
    drawn=folds_and_rows,
    smaller=st.floats(0, 1, exclude_min=True),
    larger=st.floats(0, 1, exclude_min=True),
    seed=st.integers(0, 5),
)
def test_a_smaller_fraction_lies_within_a_larger_and_keeps_patients_and_classes(
    drawn: tuple[pd.DataFrame, np.ndarray], smaller: float, larger: float, seed: int
) -> None:
    rows, folds = drawn
    smaller, larger = sorted([smaller, larger])
    few = draw_fraction(rows, folds, fraction=smaller, seed=seed)
    many = draw_fraction(rows, folds, fraction=larger, seed=seed)
    assert few.dtype == bool
    assert few.shape == (len(rows),)
    assert not (few & ~many).any()
    assert rows.assign(kept=few).groupby("patient")["kept"].nunique().eq(1).all()
    assert classes_by_fold(rows[few], folds[few]) == classes_by_fold(rows, folds)


@settings(deadline=None, max_examples=60)
@given(drawn=folds_and_rows, fraction=st.floats(0, 1, exclude_min=True), seed=st.integers(0, 5))
def test_a_fraction_does_not_depend_on_the_order_of_rows(
    drawn: tuple[pd.DataFrame, np.ndarray], fraction: float, seed: int
) -> None:
    rows, folds = drawn
    kept = draw_fraction(rows, folds, fraction=fraction, seed=seed)
    shuffled = rows.sample(frac=1, random_state=seed)
    again = draw_fraction(shuffled, folds[shuffled.index], fraction=fraction, seed=seed)
    assert dict(zip(shuffled.index, again, strict=True)) == dict(enumerate(kept))


def test_the_whole_fraction_keeps_every_row() -> None:
    rows = cohort(40)
    assert draw_fraction(rows, draw_folds(rows, n_folds=3), fraction=1).all()


def test_another_seed_draws_another_fraction_and_the_same_seed_the_same() -> None:
    rows = cohort(60)
    folds = draw_folds(rows, n_folds=3)
    first = draw_fraction(rows, folds, fraction=0.3, seed=0)
    assert (first == draw_fraction(rows, folds, fraction=0.3, seed=0)).all()
    assert (first != draw_fraction(rows, folds, fraction=0.3, seed=1)).any()


def test_a_fraction_holds_its_share_of_each_fold_and_class_and_no_more() -> None:
    n = 200
    rows = pd.DataFrame(
        {
            "patient": [f"p{i}" for i in range(n)],
            "study": [f"s{i}" for i in range(n)],
            "region": "hand",
            "label": [int(i < n // 2) for i in range(n)],
        }
    )
    folds = np.zeros(n, dtype=np.int64)
    kept = draw_fraction(rows, folds, fraction=0.07)  # 0.07 * 100 is a little more than 7
    assert rows["label"][kept].value_counts().to_dict() == {0: 7, 1: 7}


def test_a_fold_keeps_its_only_patient_with_both_classes() -> None:
    # All others are abnormal; without the first patient no normal study would be left.
    rows = pd.DataFrame(
        {
            "patient": ["p0", "p0", *(f"p{i}" for i in range(1, 20))],
            "study": [f"s{i}" for i in range(21)],
            "region": "hand",
            "label": [0, *[1] * 20],
        }
    )
    for seed in range(5):
        kept = draw_fraction(rows, np.zeros(21, dtype=int), fraction=0.1, seed=seed)
        assert set(rows["label"][kept]) == {0, 1}


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan"), float("inf")])
def test_a_train_fraction_that_is_none_is_refused(fraction: float) -> None:
    rows = cohort(5)
    with pytest.raises(TrainingDataError, match=f"--train-fraction is {fraction}; it must be"):
        draw_fraction(rows, np.zeros(len(rows), dtype=int), fraction=fraction)


def test_folds_that_tear_a_patient_apart_are_refused() -> None:
    rows = cohort(1).head(1).loc[[0, 0]]
    with pytest.raises(TrainingDataError, match="1 patients are in two folds"):
        draw_fraction(rows, np.array([0, 1]), fraction=0.5)
