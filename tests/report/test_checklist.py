"""Reporting checklists: every item stands there, and what is filled in is what the run says."""

import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from made_runs import make_images, make_run

from medembed.cli import main
from medembed.core.errors import RunError
from medembed.core.schema import as_json
from medembed.report import page
from medembed.report.checklist import CHECKLISTS, fill_checklist, render_checklist
from medembed.report.checklist_answers import METHODS, RESULTS, Study
from medembed.results.comparison import compare_aligned, compare_runs
from medembed.results.runs import open_run

FAST = {"n_resamples": 50}
OLD = Path(__file__).parents[1] / "assets" / "format-1" / "run"
ENCODER = {"source": "demo", "revision": "1a2b", "fingerprint": "f" * 64}
ENCODER |= {"preprocessing": {"size": [224, 224], "fit": "pad", "resample": "bilinear"}}


def make_study(runs, elsewhere=None):
    names = [run.name for run in runs]
    return Study(dict(zip(names, runs, strict=True)), compare_runs(runs, **FAST), elsewhere or {})


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    images = make_images(n_patients=120)
    n = len(images)
    counts = {"found": n + 6, "not_listed": 1, "images": n, "studies": 120, "patients": 120}
    counts["excluded"] = [{"reason": "implant", "images": 5}]
    build = {"counts": counts, "recipe": {"name": "films", "sha256": None}, "medembed": "0.1.0"}
    splits = {
        name: {"images": int((images["split"] == name).sum()), "left_out": 0}
        for name in ("train", "test")
    }
    data = {"images": n, "left_out": 0, "label_level": "study", "licence": "CC0", "splits": splits}
    info = {"data": data | {"build": build}, "encoder": ENCODER}
    path = tmp_path_factory.mktemp("runs") / "sweep"
    run = make_run(path, images, {"mlp": 0.9, "logistic": 1.5}, info=info, complete=False)
    run.update_info(
        asked={
            **as_json(run.info.asked),
            "metric": "auroc",
            "train_fraction": 1.0,
        }
    )
    return make_study([run])


def items_of(name, study):
    return {own["item"]: own for own in fill_checklist(name, study)["items"]}


def test_every_item_of_both_guidelines_stands_there_once(study):
    numbers = {
        name: [own["item"] for own in fill_checklist(name, study)["items"]] for name in CHECKLISTS
    }
    assert numbers["claim"] == [str(k) for k in range(1, 45)]
    tripod = numbers["tripod-ai"]
    assert len(tripod) == len(set(tripod)) == 52
    assert list(dict.fromkeys(int(re.match(r"\d+", own)[0]) for own in tripod)) == list(
        range(1, 28)
    )
    for name in CHECKLISTS:
        text = render_checklist(fill_checklist(name, study))
        found = re.findall(r"^\| (\d+[a-g]?) \| ", text, re.MULTILINE)
        assert found == numbers[name]


def test_every_fact_is_asked_for_and_known():
    asked = {
        item.fact
        for checklist in CHECKLISTS.values()
        for _, items in checklist.sections
        for item in items
        if item.fact
    }
    assert asked == {*METHODS, *RESULTS}


def test_what_is_open_says_who_answers_and_what_is_answered_says_where_it_stands(study):
    for name in CHECKLISTS:
        filled = fill_checklist(name, study)
        for own in filled["items"]:
            assert (own["by"] is None) == (own["status"] == "answered")
            assert (own["source"] is None) == (own["status"] == "open")
            assert own["status"] == "open" or own["answer"]
        statuses = [own["status"] for own in filled["items"]]
        assert filled["counts"] == {s: statuses.count(s) for s in ("answered", "partly", "open")}


def test_answers_are_the_numbers_of_the_run(study):
    claim, tripod = items_of("claim", study), items_of("tripod-ai", study)
    best = next(row for row in study.result["rows"] if not row["baseline"])
    auroc = best["scores"]["auroc"]
    wanted = f"{auroc['value']:.3f} [{auroc['low']:.3f}, {auroc['high']:.3f}]"
    assert wanted in claim["37"]["answer"]
    assert claim["37"]["status"] == "answered"
    assert wanted in tripod["23a"]["answer"]
    assert tripod["23a"]["status"] == "partly"  # subgroups of persons are not in it
    sensitivity = best["scores"]["sensitivity"]
    assert f"{sensitivity['k']}/{sensitivity['n']}" in claim["38"]["answer"]
    confusion = best["confusion"]
    assert f"{confusion['fp']} normal called abnormal, {confusion['fn']} " in claim["39"]["answer"]
    assert f"{best['threshold']:.3f}" in tripod["15"]["answer"]
    flow = study.result["flow"][0]
    assert f"{flow['found']} images found" in claim["35"]["answer"]
    assert f"{flow['used']['images']} used" in claim["35"]["answer"]
    assert claim["35"]["status"] == tripod["20a"]["status"] == "answered"
    assert claim["8"]["answer"] == "images excluded: 5 (implant), 1 (not listed)"
    assert claim["23"]["answer"] == "medembed 0.1.0"
    assert "224 × 224, fit pad" in claim["9"]["answer"]
    assert "demo@1a2b" in claim["24"]["answer"]
    assert claim["26"]["answer"] == "the best by auroc, on patients within the training folds"
    assert tripod["18e"]["answer"] == "CC0"
    assert claim["7"]["answer"] == "recipe films"
    assert claim["33"]["status"] == "open"
    assert claim["33"]["answer"] == "no run here evaluates a model elsewhere"


def test_an_answer_that_lacks_an_interval_or_a_build_is_partial(tmp_path):
    few = make_run(tmp_path / "few", make_images(n_patients=8), {"a": 0.5}, complete=False)
    claim = items_of("claim", make_study([few]))
    assert claim["37"]["status"] == claim["38"]["status"] == "partly"
    assert claim["35"]["status"] == "partly"
    assert claim["35"]["answer"].startswith("found: not recorded")
    assert claim["8"] == claim["8"] | {"status": "open", "answer": "not recorded"}
    assert claim["9"]["answer"] == claim["24"]["answer"] == "not recorded"
    assert claim["26"]["answer"] == "not recorded"  # no metric


def test_an_old_run_without_keys_is_not_recorded(tmp_path):
    shutil.copytree(OLD, tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    kept = {"format", "version", "kind", "asked", "times"}
    info = {name: own for name, own in json.loads(path.read_text()).items() if name in kept}
    path.write_text(json.dumps(info | {"asked": {}}))
    shutil.rmtree(tmp_path / "run" / "models")
    run = open_run(tmp_path / "run")
    claim = items_of("claim", make_study([run]))
    for number in ("3", "7", "8", "9", "10", "12", "14", "22", "23", "24", "25", "26", "43"):
        assert claim[number]["status"] == "open", number
        assert claim[number]["answer"] == "not recorded", number
    whole = items_of("claim", make_study([open_run(OLD)]))
    assert whole["23"]["status"] == "answered"
    assert whole["26"]["answer"] == "not recorded"  # its folds decided what they scored


def test_runs_are_told_apart_where_they_differ(tmp_path, study):
    images = make_images(n_patients=120)
    one = make_run(tmp_path / "one", images, {"a": 1.0}, info={"encoder": ENCODER}, complete=False)
    two = make_run(tmp_path / "two", images, {"b": 1.0}, complete=False)
    claim = items_of("claim", make_study([one, two]))
    assert "one: " in claim["9"]["answer"]
    assert claim["9"]["answer"].endswith("two: not recorded")
    assert claim["23"]["answer"] == "medembed 0.1.0"  # said once
    assert claim["37"]["answer"].startswith("one/a: ")


def test_an_evaluation_answers_what_is_asked_of_external_data(tmp_path):
    info = {"kind": "evaluation", "command": "medembed evaluate M C m.csv --out e"}
    run = make_run(
        tmp_path / "e", make_images(n_patients=120), {"a": 1.0}, info=info, complete=False
    )
    difference = {"difference": -0.3, "low": -0.4, "high": -0.2}
    own = {"internal": {"value": 0.9}, "external": {"value": 0.6}, "difference": difference}
    scores = {"drop": {"scores": {"auroc": own}}, "drift": {"sentence": "Drift: some."}}
    scores["recalibrated"] = {"n_patients": 20}
    study = make_study([run], {"e": scores})
    claim, tripod = items_of("claim", study), items_of("tripod-ai", study)
    assert "AUROC 0.900 → 0.600 elsewhere" in claim["33"]["answer"]
    assert claim["33"]["status"] == "answered"
    assert claim["32"]["answer"] == "no run here trained a model"
    assert tripod["12g"]["answer"] == "medembed evaluate M C m.csv --out e"
    assert tripod["16"]["answer"] == "Drift: some."
    assert tripod["24"]["answer"] == "calibrated anew on 20 patients"
    noted = make_study([run], {"e": scores | {"drop": {"note": "Of its own test.", "scores": {}}}})
    assert items_of("claim", noted)["33"]["status"] == "partly"
    assert tripod["4"]["answer"] == "evaluation of an existing model on other images"


def test_an_unknown_checklist_is_refused(study):
    with pytest.raises(RunError, match=r"'stard' is unknown. Choose one of: tripod-ai, claim"):
        fill_checklist("stard", study)


def test_foreign_text_is_text_in_markdown(tmp_path):
    hostile = "=1|2\n# <script>[x](y)‮"
    info = {"command": hostile, "versions": {hostile: hostile}, "data": {"licence": hostile}}
    info["encoder"] = {"source": hostile, "preprocessing": {"size": [1], "fit": hostile}}
    run = make_run(tmp_path / "run", make_images(), {"a": 1.0}, info=info, complete=False)
    for name in CHECKLISTS:
        filled = fill_checklist(name, make_study([run]))
        text = render_checklist(filled)
        assert "<script>" not in text
        assert "‮" not in text
        assert "\n# <" not in text
        rows = [line for line in text.splitlines() if re.match(r"\| \d", line)]
        assert len(rows) == len(filled["items"])
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {5}


def test_the_command_writes_them_beside_the_page_and_removes_those_of_before(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "plot_all", lambda *_: [])
    monkeypatch.setattr(page, "compare_aligned", lambda *of, **_: compare_aligned(*of, **FAST))
    make_run(tmp_path / "run", make_images(), {"a": 1.0, "b": 2.0})
    words = ["report", str(tmp_path / "run"), "-o", str(tmp_path / "out"), "--json"]
    both = ["--checklist", "claim", "--checklist", "tripod-ai"]
    ran = CliRunner().invoke(main, [*words, *both])
    assert ran.exit_code == 0, ran.output
    document = json.loads(ran.stdout)
    assert [own["name"] for own in document["checklist"]] == ["claim", "tripod-ai"]
    for own in document["checklist"]:
        text = Path(own["path"]).read_text()
        assert str(tmp_path) not in text
        assert all(f"| {item['item']} | " in text for item in own["items"])
    text = (tmp_path / "out" / "index.html").read_text()
    assert "--checklist claim --checklist tripod-ai" in text
    again = CliRunner().invoke(main, [*words, "--checklist", "claim"])
    assert again.exit_code == 0, again.output
    left = sorted(path.name for path in (tmp_path / "out").glob("*.md"))
    assert left == ["checklist-claim.md"]
    assert CliRunner().invoke(main, [*words, "--checklist", "x"]).exit_code == 2
