"""The first sentences of page and evaluation: each claim is held to the numbers it is made of."""

import re
from functools import partial

import made_runs
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_runs import make_images

from medembed.report.headline import judge_priors, rank_heads, write_headline
from medembed.results.ablations import count_left_out
from medembed.results.comparison import compare_runs

FAST = {"n_resamples": 50}
make_run = partial(made_runs.make_run, complete=False)
PRIORS = ("region-prior", "class-prior")


def make_row(head, auroc, *, interval=True, reason=None):
    ends = (auroc - 0.05, auroc + 0.05) if interval and auroc is not None else (None, None)
    score = dict(zip(("value", "low", "high"), (auroc, *ends), strict=True))
    score |= {} if reason is None else {"reason": reason}
    return {"run": "run", "head": head, "baseline": head in PRIORS, "scores": {"auroc": score}}


def make_result(rows, p_holm, *, n_patients=60, synthetic=False, n_abnormal=20):
    """Make of rows, best first, what `compare_runs` would return; `p_holm` is by pair of names."""
    pairs = [
        {"a": a["head"], "b": b["head"], "p_holm": p_holm.get((a["head"], b["head"]))}
        for i, a in enumerate(rows)
        for b in rows[i + 1 :]
        if i == 0 or not (a["baseline"] or b["baseline"])
    ]
    test = {"n": 75, "n_abnormal": n_abnormal, "n_patients": n_patients}
    return {
        "level": "study",
        "test": test,
        "runs": [{"name": "run"}],
        "synthetic": synthetic,
        "rows": rows,
        "paired": pairs,
    }


def make_scores(internal, external, low, high, *, note=None):
    """Make the `scores.json` of an evaluation, as far as a headline reads it."""
    if note:
        return {"drop": {"basis": None, "note": note, "scores": {}}}
    value = None if None in (internal, external) else external - internal
    difference = {"difference": value, "low": low, "high": high}
    own = {"internal": {"value": internal}, "external": {"value": external}}
    return {
        "drop": {
            "basis": "samples",
            "note": None,
            "scores": {"auroc": own | {"difference": difference}},
        }
    }


A, B, C, D = (
    make_row(name, value) for name, value in zip("ABCD", (0.9, 0.85, 0.8, 0.7), strict=True)
)
EQUAL = make_row("E", 0.9)
REGION, GOOD_REGION = make_row("region-prior", 0.6), make_row("region-prior", 0.93)
NONE = make_row(
    "A", 0.9, interval=False, reason="2 patients with abnormal rows; an interval needs 5"
)
SHOWN = {("A", "region-prior"): 0.001}

CASES = {
    "worse": (
        make_result([A, B], {("A", "B"): 0.01}),
        "A has the highest AUROC, 0.900 (95 % interval 0.850 to 0.950). Every other head is worse, "
        "by the paired test.",
    ),
    "mix": (
        make_result([A, B, C, D], {("A", "B"): 0.4, ("A", "D"): 0.001}),
        "A has the highest AUROC, 0.900 (95 % interval 0.850 to 0.950). Not distinguishable from "
        "it: B. Worse, by the paired test: D. Not tested against it: C.",
    ),
    "too few": (
        make_result([NONE, B], {}, n_patients=5),
        "5 test patients: heads cannot be compared (2 patients with abnormal rows; an interval "
        "needs 5). A has the highest AUROC, 0.900 (no interval).",
    ),
    "one patient": (
        make_result([NONE, B], {}, n_patients=1),
        "1 test patient: heads cannot be compared",
    ),
    "one head": (
        make_result([A], {}),
        "A has an AUROC of 0.900 (95 % interval 0.850 to 0.950). It is the only trained head.",
    ),
    "equal": (
        make_result([A, EQUAL], {("A", "E"): 1.0}),
        "A and E have the same AUROC, 0.900: none is best.",
    ),
    "shared lead": (
        make_result([A, EQUAL, B], {("A", "E"): 1.0, ("A", "B"): 0.01}),
        "A and E share the highest AUROC, 0.900. Every other head is worse than A, by the paired "
        "test.",
    ),
    "one class": (
        make_result([make_row("A", None)], {}, n_abnormal=0),
        "All 75 test studies are normal, so AUROC is not estimable and no head is best.",
    ),
    "prior as good": (
        make_result([A, B, REGION], {("A", "B"): 0.4, ("A", "region-prior"): 0.2}),
        "A has the highest AUROC, 0.900 (95 % interval 0.850 to 0.950). Not distinguishable from "
        "it: B. A is not shown to be better than the region's prior (AUROC 0.600), p = 0.200.",
    ),
    "prior ahead": (
        make_result([GOOD_REGION, A, B], {("region-prior", "A"): 0.3, ("A", "B"): 0.001}),
        "A has the highest AUROC, 0.900 (95 % interval 0.850 to 0.950). Every other head is worse, "
        "by the paired test. No head is better than the region's prior (AUROC 0.930).",
    ),
    "prior better": (
        make_result([GOOD_REGION, A], {("region-prior", "A"): 0.01}),
        "A has an AUROC of 0.900 (95 % interval 0.850 to 0.950). It is the only trained head. The "
        "region's prior (AUROC 0.930) is better than A, by the paired test.",
    ),
    "priors alone": (make_result([REGION], {}), "No head was trained: there are only priors."),
    "nothing": (make_result([], {}), "No study has a label, so nothing could be scored."),
    "synthetic": (
        make_result([A], {}, synthetic=True),
        "A has an AUROC of 0.900 (95 % interval 0.850 to 0.950). It is the only trained head. The "
        "images are synthetic, so this says nothing about medicine.",
    ),
}  # fmt: skip
ELSEWHERE = {
    "drop": (
        make_scores(0.81, 0.47, -0.42, -0.26),
        "A: AUROC 0.810 → 0.470 elsewhere, better than the region's prior (0.600). The drop of "
        "0.340 is shown by its interval, −0.420 to −0.260.",
    ),
    "no drop": (
        make_scores(0.81, 0.8, -0.05, 0.03),
        "A drop is not shown: the interval of the difference, −0.050 to +0.030, holds 0.",
    ),
    "rise": (make_scores(0.81, 0.9, 0.02, 0.16), "The rise of 0.090 is shown"),
    "no interval": (make_scores(0.81, 0.5, None, None), "Whether that is a drop is not known"),
    "its own test": (
        make_scores(0, 0, 0, 0, note="9 of the images are of its own test."),
        "A: AUROC 0.900 (95 % interval 0.850 to 0.950) on these images, better than the region's "
        "prior (0.600). 9 of the images",
    ),
    "one class elsewhere": (
        make_scores(0.81, None, None, None),
        "AUROC elsewhere is not estimable",
    ),
    "no labels": ({"drop": None}, "Whether it is lower than on the model's own test is not known."),
}


@pytest.mark.parametrize(("result", "expected"), CASES.values(), ids=CASES)
def test_each_case_has_its_own_sentences(result, expected):
    assert write_headline(result).text.startswith(expected)
    if len(expected) > 60:
        assert write_headline(result).text == expected


@pytest.mark.parametrize(("scores", "expected"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_an_evaluation_says_what_became_of_the_model(scores, expected):
    found = write_headline(make_result([A, REGION], SHOWN), {"run": scores})
    assert expected in found.text
    place = "on these images" if (scores["drop"] or {}).get("note") else "elsewhere"
    assert found.title == f"How does the model do {place}?"
    assert "only trained head" not in found.text


def test_a_model_that_is_no_better_than_the_prior_elsewhere_is_called_so():
    for p, words in ((0.4, "no better than"), (0.01, "worse than")):
        result = make_result([GOOD_REGION, A], {("region-prior", "A"): p})
        found = write_headline(result, {"run": make_scores(0.95, 0.9, -0.1, 0.0)})
        assert f"elsewhere, {words} the region's prior (0.930)." in found.text
    undecided = make_result([A, REGION], {("A", "region-prior"): 0.4})
    text = write_headline(undecided, {"run": make_scores(0.95, 0.9, -0.1, 0.0)}).text
    assert "not shown to be better than the region's prior (0.600)." in text


def test_the_title_suits_what_is_on_the_page():
    rows = [{**A, "run": "a"}, {**B, "run": "b"}]
    both = make_result(rows, {}) | {"runs": [{"name": "a"}, {"name": "b"}]}
    scores = make_scores(0.81, 0.47, -0.42, -0.26)
    titles = [
        write_headline(make_result([A, B], {})).title,
        write_headline(make_result([A, REGION], {})).title,
        write_headline(both, {"a": scores, "b": scores}).title,
        write_headline(both, {"b": scores}).title,
    ]
    assert titles == [
        "Classifying radiographs: which head is best?",
        "Classifying radiographs: how good is A?",
        "How do the models do elsewhere?",
        "Trained here or elsewhere: which head is best?",
    ]
    assert "b/B: AUROC 0.810 → 0.470 elsewhere." in write_headline(both, {"b": scores}).text


def test_many_evaluations_are_counted_and_many_names_cut():
    rows = [make_row(f"h{i}", 0.9 - i / 100) for i in range(9)]
    names = [f"r{i}" for i in range(9)]
    rows = [row | {"run": name} for row, name in zip(rows, names, strict=True)]
    p = {("r0/h0", f"r{i}/h{i}"): 0.5 for i in range(1, 9)}
    result = make_result(rows, {}) | {"runs": [{"name": name} for name in names]}
    result["paired"] = [{"a": a, "b": b, "p_holm": own} for (a, b), own in p.items()]
    text = write_headline(result, {n: make_scores(0.8, 0.7, -0.2, -0.1) for n in names}).text
    assert "6 more models were tried elsewhere" in text
    assert "r5/h5 and 3 others." in text


probabilities = st.one_of(st.none(), st.floats(0, 1))


@st.composite
def results(draw):
    """Draw heads and priors with any scores and any p; ties are frequent."""
    values = st.one_of(st.none(), st.integers(40, 100).map(lambda k: k / 100))
    rows = [
        make_row(f"h{i}", draw(values), interval=draw(st.booleans()))
        for i in range(draw(st.integers(0, 5)))
    ]
    rows += [make_row(name, draw(values)) for name in draw(st.sets(st.sampled_from(PRIORS)))]
    if any(row["scores"]["auroc"]["value"] is not None for row in rows):  # both classes are there
        rows = [row for row in rows if row["scores"]["auroc"]["value"] is not None]
    rows.sort(key=lambda row: -(row["scores"]["auroc"]["value"] or -1))
    result = make_result(rows, {}, n_patients=draw(st.integers(1, 50)))
    for pair in result["paired"]:
        pair["p_holm"] = draw(probabilities)
    return result


@given(results())
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_no_sentence_claims_what_was_not_shown(result):
    text = write_headline(result).text
    p_of = {frozenset((pair["a"], pair["b"])): pair["p_holm"] for pair in result["paired"]}
    value_of = {row["head"]: row["scores"]["auroc"]["value"] for row in result["rows"]}
    trained = [row["head"] for row in result["rows"] if not row["baseline"]]
    best = trained[0] if trained else None

    def named(sentence):
        found = re.search(rf"{sentence}: ([^.]*)\.", text)
        return set(re.findall(r"h\d", found[1])) if found else set()

    worse = named("Worse, by the paired test")
    if "Every other head is worse" in text:
        worse = {head for head in trained if value_of[head] != value_of[best]}
    for head in worse:
        assert p_of[frozenset((best, head))] < 0.05
        assert value_of[head] < value_of[best]
    for head in named("Not distinguishable from \\w+"):
        assert p_of[frozenset((best, head))] >= 0.05
    for head in named("Not tested against \\w+"):
        assert p_of[frozenset((best, head))] is None
    if "cannot be compared" in text:
        assert all(p_of[frozenset((best, head))] is None for head in trained[1:])
    if "share the highest" in text or "have the same AUROC" in text:
        assert value_of[trained[0]] == value_of[trained[1]]
    for prior, name in (
        ("region-prior", "[Tt]he region's prior"),
        ("class-prior", "[Tt]he class prior"),
    ):
        p = p_of.get(frozenset((best, prior)))
        if re.search(rf"No head is better than {name}", text):
            assert p >= 0.05 or value_of[best] == value_of[prior]
            assert value_of[best] <= value_of[prior]
        if re.search(rf"{name} \(AUROC [\d.]+\) is better than", text):
            assert p < 0.05
            assert value_of[prior] > value_of[best]
        if re.search(rf"is not shown to be better than {name}", text):
            assert p >= 0.05
    for verdict in judge_priors(result):
        is_shown = verdict.p is not None and verdict.p < 0.05
        differs = verdict.head_auroc != verdict.prior_auroc
        assert (verdict.standing in ("better", "worse")) == (is_shown and differs)
    ranking = rank_heads(result)
    if ranking is not None:  # every trained head stands in exactly one place
        placed = [
            ranking.best,
            *ranking.equal,
            *ranking.worse,
            *ranking.undecided,
            *ranking.untested,
        ]
        assert sorted(placed) == sorted(trained)


@given(st.floats(0.3, 1), st.floats(0.3, 1), st.floats(-0.4, 0.4), st.floats(-0.4, 0.4))
def test_a_drop_is_shown_only_by_an_interval_below_zero(internal, external, a, b):
    low, high = sorted((a, b))
    text = write_headline(
        make_result([A], {}), {"run": make_scores(internal, external, low, high)}
    ).text
    assert ("The drop" in text) == (high < 0)
    assert ("The rise" in text) == (low > 0)
    assert ("A drop is not shown" in text) == (low <= 0 <= high)


def test_real_comparisons_say_what_their_own_tests_say(tmp_path):
    images = make_images(n_patients=80)
    run = make_run(tmp_path / "run", images, {"good": 0.5, "fair": 1.2, "noise": 40.0})
    result = compare_runs([run], **FAST)
    ranking = rank_heads(result)
    p_of = {row["head"]: row["versus_best"] for row in result["rows"]}
    assert ranking.best == "good"
    for head in ranking.worse:
        assert p_of[head]["p_holm"] < 0.05
    assert "noise" in ranking.worse
    few = make_images(n_patients=8)
    small = compare_runs([make_run(tmp_path / "few", few, {"a": 0.5, "b": 1.2})], **FAST)
    assert write_headline(small).text.startswith("4 test patients: heads cannot be compared (")


def test_equal_priors_of_two_runs_stand_once_and_are_tested_once(tmp_path):
    images = make_images(n_patients=80)
    lost = [
        {"sha256": f"{i:064x}", "split": "test", "stage": "decode", "reason": "x"} for i in range(3)
    ]
    data = {"images": 200, "left_out": 3, "left_out_test": 3}
    info = {"data": data, "left_out": lost}
    one = make_run(tmp_path / "one", images, {"mlp": 0.9}, info=info, seed=1)
    two = make_run(tmp_path / "two", images, {"mlp": 0.9, "gb": 1.4}, info=info, seed=1)
    result = compare_runs([one, two], **FAST)
    baselines = [row["head"] for row in result["rows"] if row["baseline"]]
    assert sorted(baselines) == sorted(PRIORS)
    assert len(result["paired"]) == 3 + 2  # pairs of three heads, and the best with each prior
    assert [run["priors_of"] for run in result["runs"]] == [None, "one"]
    assert [run["left_out_of"] for run in result["runs"]] == [None, "one"]
    assert sum("Left out" in note for note in result["notes"]) == 1
    assert "two: the priors are those of one, and counted once." in result["notes"]
    assert count_left_out([one, two]) == (3, True)
    other = make_run(
        tmp_path / "other",
        images,
        {"mlp": 0.9},
        info={
            "left_out": [*lost[:1], lost[0] | {"sha256": "f" * 64}],
            "data": data | {"left_out": 2},
        },
    )
    assert count_left_out([one, other]) == (4, True)
    cut = make_run(
        tmp_path / "cut",
        images,
        {"mlp": 0.9},
        info={"left_out": lost, "data": data | {"left_out": 700}},
    )
    assert count_left_out([one, cut]) == (700, False)
    old = make_run(tmp_path / "old", images, {"mlp": 0.9}, info={"data": {}, "left_out": []})
    assert count_left_out([old]) == (0, True)
    assert write_headline(result).text.startswith("one/mlp and two/mlp share the highest AUROC")
    assert [run["copy_of"] for run in result["runs"]] == [None, None]  # two has a head more
    again = make_run(tmp_path / "again", images, {"mlp": 0.9}, info=info, seed=1)
    copied = compare_runs([one, again], **FAST)
    assert [run["copy_of"] for run in copied["runs"]] == [None, "one"]
    assert any(note.startswith("Warning: again and one predict") for note in copied["notes"])


def test_priors_that_differ_are_all_kept(tmp_path):
    images = make_images(n_patients=80)
    other = images.copy()
    rng = np.random.default_rng(0)
    train = other["split"] == "train"
    flip = dict.fromkeys(other["patient"].unique(), 0) | {
        k: int(rng.random() < 0.3) for k in other["patient"][train].unique()
    }
    other["label"] = other["label"] ^ other["patient"].map(flip)
    one = make_run(tmp_path / "one", images, {"mlp": 0.9})
    two = make_run(tmp_path / "two", other, {"mlp": 0.9})
    result = compare_runs([one, two], **FAST)
    assert sum(row["baseline"] for row in result["rows"]) > 2
    assert [run["priors_of"] for run in result["runs"]] == [None, None]
