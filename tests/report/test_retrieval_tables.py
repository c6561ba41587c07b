import json

import pytest
from click.testing import CliRunner
from made_sweeps import make_data, make_table

from medembed.cli import main
from medembed.sweeps import sweep


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    home = tmp_path_factory.mktemp("retrieval")
    table = make_table(n_patients=64)
    number = table["patient"].str.removeprefix("patient").astype(int)
    table["region"] = (number % 8 < 4).map({True: "hand", False: "wrist"})
    made = make_data(home, {"mean": 1.5, "max": 0.5}, table=table)
    sweep(*made, home / "run", heads=("logistic", "knn"), n_configs=2, n_folds=3, jobs=1)
    return home


def run(home, *options):
    arguments = ["compare", str(home / "run"), *map(str, options)]
    return CliRunner().invoke(main, arguments)


def test_compare_shows_retrieval_by_each_pooling(data):
    options = ("--retrieval", data / "cache", "--manifest", data / "manifest.csv")
    found = json.loads(run(data, *options, "--json").stdout)["retrieval"]
    assert [own["pooling"] for own in found] == ["mean+max", "mean", "max"]
    assert set(found[0]["label"]["regions"]) == {"hand", "wrist"}
    best = found[1]["label"]["overall"]
    assert best["p_at_10"]["low"] > best["chance"]
    shown = run(data, *options).stdout
    assert "Retrieval by the cosine of mean+max" in shown
    assert "without those of its own" in shown
    assert max(map(len, shown.splitlines())) <= 120


@pytest.mark.parametrize("by", [(), ("--by", "region")])
@pytest.mark.parametrize("kind", ["table", "markdown", "latex", "csv"])
def test_every_format_shows_retrieval_or_says_where_it_is(data, tmp_path, by, kind):
    options = ("--retrieval", data / "cache", "--manifest", data / "manifest.csv", *by)
    ran = run(data, *options, "--format", kind, "--tables", tmp_path / "tables")
    assert ran.exit_code == 0, ran.output
    if kind == "csv":
        assert "retrieval is in --json and in the files of --tables" in ran.stderr
    else:
        assert ran.stdout.count("Retrieval by the cosine of") == 3
    lines = (tmp_path / "tables" / "retrieval.csv").read_text().splitlines()
    assert lines[0].startswith("pooling,same,queries,n,n_patients,chance,p_at_1,p_at_1_low")
    assert len(lines) == 1 + 3 * 8


def test_retrieval_wants_the_runs_own_manifest(data, tmp_path):
    assert run(data, "--retrieval", data / "cache").exit_code == 2
    _, other = make_data(tmp_path / "other", n_patients=60)
    ran = run(data, "--retrieval", data / "cache", "--manifest", other)
    assert ran.exit_code == 1
    assert "was made from another manifest" in ran.stderr


def test_a_model_that_keeps_vectors_says_so(data):
    readme = (data / "run" / "models" / "knn" / "README.md").read_text()
    assert "holds a vector of every training image" in readme
    other = (data / "run" / "models" / "logistic" / "README.md").read_text()
    assert "Handle with care" not in other
