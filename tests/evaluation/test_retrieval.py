import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from sklearn.metrics.pairwise import cosine_similarity

from medembed.core.errors import TrainingDataError
from medembed.evaluation import retrieval
from medembed.evaluation.estimates import estimate_mean
from medembed.evaluation.retrieval import Films, score_retrieval


def make_films(n, *, seed, prefix, n_patients=20):
    generator = np.random.default_rng(seed)
    label = generator.integers(0, 2, n)
    X = generator.normal(size=(n, 5))
    X[:, 0] += label
    region = np.array(["hand", "wrist", "elbow"], object)[generator.integers(0, 3, n)]
    patient = np.array([f"p{k}" for k in generator.integers(0, n_patients, n)], object)
    name = np.array([f"{prefix}{k:04d}" for k in generator.permutation(n)])
    return Films(X.astype(np.float32), label, region, patient, name)


def by_brute_force(queries, database, kind, name):
    """Return each query's score, with scikit-learn's average precision."""
    values = []
    cosine = cosine_similarity(queries.X.astype(float), database.X.astype(float))
    for i in range(len(queries.X)):
        others = database.patient != queries.patient[i]
        relevant = (getattr(database, kind) == getattr(queries, kind)[i])[others]
        order = np.argsort(-cosine[i, others])
        if not relevant.any():
            values.append(np.nan)
        elif name == "map":
            values.append(average_precision_score(relevant, cosine[i, others]))
        elif name == "chance":
            values.append(relevant.mean())
        else:
            k = min(int(name.removeprefix("p_at_")), others.sum())
            values.append(relevant[order[:k]].mean())
    return np.array(values)


@pytest.mark.parametrize("kind", ["label", "region"])
@pytest.mark.parametrize("name", ["chance", "p_at_1", "p_at_5", "p_at_10", "map"])
@pytest.mark.parametrize("n", [150, 7])
def test_scores_are_those_of_brute_force(kind, name, n):
    queries = make_films(80, seed=0, prefix="q")
    database = make_films(n, seed=1, prefix="d")  # shares patients with the queries
    found = score_retrieval(queries, database)[kind]
    values = by_brute_force(queries, database, kind, name)
    groups = {
        "overall": {"overall": (found["overall"], np.ones(80, bool))},
        "labels": {
            word: (found["labels"][word], queries.label == k)
            for k, word in enumerate(("normal", "abnormal"))
        },
        "regions": {r: (found["regions"][r], queries.region == r) for r in ("hand", "elbow")},
    }
    for blocks in groups.values():
        for block, chosen in blocks.values():
            score = block[name] if name == "chance" else block[name]["value"]
            assert score == pytest.approx(np.nanmean(values[chosen]), abs=1e-6)
            assert block["left_out"] == np.isnan(values[chosen]).sum()


def test_the_order_of_films_changes_nothing():
    queries, database = (make_films(60, seed=s, prefix=p) for s, p in ((0, "q"), (1, "d")))
    tied = Films(**{**vars(database), "X": np.sign(database.X[:, :2])})  # mostly equal films
    tied_queries = Films(**{**vars(queries), "X": queries.X[:, :2]})
    first = score_retrieval(tied_queries, tied)
    orders = [np.random.default_rng(k).permutation(60) for k in (5, 6)]
    again = score_retrieval(tied_queries.take(orders[0]), tied.take(orders[1]))
    for kind in ("label", "region"):
        for name in ("p_at_1", "p_at_10", "map"):
            a, b = (own[kind]["overall"][name]["value"] for own in (first, again))
            assert a == pytest.approx(b, abs=1e-12)


def test_films_that_tell_nothing_are_found_as_by_chance():
    queries, database = (make_films(400, seed=s, prefix=p) for s, p in ((0, "q"), (1, "d")))
    noise = np.random.default_rng(2).normal(size=(2, 400, 5))
    blind = [Films(**{**vars(f), "X": x}) for f, x in zip((queries, database), noise, strict=True)]
    block = score_retrieval(*blind)["region"]["overall"]
    for name in ("p_at_10", "map"):
        assert block[name]["low"] - 0.02 < block["chance"] < block[name]["high"] + 0.02


def test_more_queries_than_are_ranked_are_drawn_and_counted(monkeypatch):
    queries, database = (make_films(60, seed=s, prefix=p) for s, p in ((0, "q"), (1, "d")))
    monkeypatch.setattr(retrieval, "MAX_QUERIES", 25)
    found = score_retrieval(queries, database)
    assert (found["n_queries"], found["n_drawn"]) == (60, 25)
    assert found == score_retrieval(queries.take(np.arange(60)[::-1]), database)
    assert found != score_retrieval(queries, database, seed=1)


def test_no_films_are_refused():
    films = make_films(5, seed=0, prefix="q")
    with pytest.raises(TrainingDataError, match="labelled films of test and of train"):
        score_retrieval(films, films.take(np.arange(0)))


def test_intervals_of_means_cover_with_patients_as_clusters():
    generator = np.random.default_rng(0)
    n_covered, n_rounds = 0, 400
    for _ in range(n_rounds):
        codes = generator.integers(0, 40, 120)
        own = generator.beta(4, 3, 40)  # patients differ, with mean 4 / 7
        values = np.clip(own[codes] + generator.normal(0, 0.05, 120), 0, 1)
        interval = estimate_mean(values, codes).interval()
        n_covered += interval.low <= 4 / 7 <= interval.high
    assert 0.92 <= n_covered / n_rounds <= 0.98


def test_too_few_patients_have_no_interval():
    interval = estimate_mean(np.array([0.1, 0.5, 0.7]), np.array([0, 1, 1])).interval()
    assert interval.value == pytest.approx(1.3 / 3)
    assert interval.reason == "2 patients; an interval needs 5"
    assert (
        estimate_mean(np.array([]), np.array([], int)).interval().reason == "there is no such row"
    )
