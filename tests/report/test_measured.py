"""The first screen says what was measured: question, data, regions, rows and encoder."""

import re

import pytest
from made_runs import REGIONS, make_images, make_run

from medembed.report.measured import MAX_REGIONS, describe_measured, list_measured
from medembed.report.page import write_report
from medembed.results.alignment import align_runs
from medembed.results.comparison import compare_aligned

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HEADS = {"mlp": 0.9}


def make_build(**more):
    counts = {"found": 9, "not_listed": 0, "excluded": [], "images": 9}
    return {"counts": counts, "recipe": {"name": None, "sha256": None}} | more


def list_of(path, *, regions=REGIONS, kind="sweep", target=None, **info):
    """List what a run with these entries measured."""
    images = make_images(n_patients=60, regions=regions)
    asked = {"manifest": "12" * 32} | ({} if target is None else {"target": target})
    data = {"synthetic": False} | info.pop("data", {})
    run = make_run(path, images, HEADS, info={"kind": kind, "data": data, **info}, asked=asked)
    return list_measured([run], align_runs([run]).units["region"])


def test_a_recipe_names_the_data_and_a_revision_the_encoder(tmp_path):
    encoder = {"source": "google/medsiglip-448", "revision": COMMIT, "fingerprint": "ef" * 32}
    data = {"build": make_build(recipe={"name": "mura", "sha256": None})}
    assert list_of(tmp_path / "run", data=data, encoder=encoder) == {
        "Data set": "mura",
        "Body regions": "elbow, hand and wrist",
        "Encoder": "google/medsiglip-448, revision 0123456789ab",
    }


def test_a_stream_names_its_commit_and_a_local_encoder_its_fingerprint(tmp_path):
    stream = {"kind": "hub", "dataset": "owner/films", "revision": "main", "commit": COMMIT}
    found = list_of(
        tmp_path / "run",
        regions=("wrist",),
        data={"build": make_build(stream=stream)},
        encoder={"source": "tower", "revision": None, "fingerprint": "ef" * 32},
    )
    assert found == {
        "Data set": "owner/films, revision 0123456789ab",
        "Body region": "wrist",
        "Encoder": f"tower, fingerprint {'ef' * 8}",
    }


def test_what_is_not_recorded_is_not_named(tmp_path):
    for name, is_synthetic in (("not named", False), ("synthetic images", True)):
        found = list_of(tmp_path / name, data={"synthetic": is_synthetic})
        assert found["Data set"] == f"{name}, manifest {'12' * 8}"
        assert "Encoder" not in found


def test_an_adapted_encoder_is_not_passed_off_as_its_base(tmp_path):
    encoder = {"source": "google/medsiglip-448", "revision": "main"}
    found = list_of(tmp_path / "run", kind="finetune", encoder=encoder)
    assert found["Encoder"] == "google/medsiglip-448, revision main, fine-tuned"


def test_many_regions_and_encoders_are_counted(tmp_path):
    regions = tuple(f"region-{k}" for k in range(MAX_REGIONS + 1))
    images = make_images(n_patients=90, regions=regions)
    runs = [
        make_run(tmp_path / f"run-{k}", images, HEADS, info={"encoder": {"source": f"tower-{k}"}})
        for k in range(4)
    ]
    test_set = align_runs(runs)
    found = list_measured(runs, test_set.units["region"])
    assert found["Body regions"] == "9 body regions"
    assert found["Encoder"] == "4 encoders, see What was run"
    assert list_measured(runs[:2], test_set.units["region"])["Encoder"] == "tower-0; tower-1"


@pytest.mark.parametrize("target", [None, "metal"])
@pytest.mark.parametrize("level", ["study", "image"])
def test_the_sentence_counts_images_studies_and_patients_of_test(tmp_path, level, target):
    images = make_images(n_patients=60)
    run = make_run(tmp_path / "run", images, HEADS, asked={"target": target} if target else None)
    test_set = align_runs([run], level)
    result = compare_aligned([run], test_set, n_resamples=20)
    test = images[images["split"] == "test"]
    n_patients = test["patient"].nunique()
    rows = f"{len(test)} images in {test['study'].nunique()} test studies"
    rows = rows if level == "study" else f"{len(test)} test images"
    told = "abnormal from normal" if target is None else "metal from no metal"
    assert describe_measured(result, test_set) == (
        f"How well heads tell {told}, measured on {rows} of {n_patients} patients held out of "
        "training."
    )


def test_the_first_screen_has_all_of_it_and_no_hash_of_a_patient(tmp_path):
    images = make_images(n_patients=60)
    data = {"build": make_build(recipe={"name": "<b>mura", "sha256": None}), "synthetic": True}
    info = {"data": data, "encoder": {"source": "tower", "revision": COMMIT}}
    run = make_run(tmp_path / "run", images, HEADS, info=info)
    write_report(run, tmp_path / "page", n_resamples=20)
    first = (tmp_path / "page" / "index.html").read_text().partition("<header>")[2]
    first = re.sub(r"\s+", " ", first.partition("</header>")[0])
    for words in (
        "Synthetic images.",
        "Small sample.",
        "images in 30 test studies of 30 patients held out of training",
        "<dt>Data set</dt><dd>&lt;b&gt;mura, synthetic</dd>",
        "<dt>Body regions</dt><dd>elbow, hand and wrist</dd>",
        "<dt>Encoder</dt><dd>tower, revision 0123456789ab</dd>",
        "95 % interval",
    ):
        assert words in first
    assert not any(name in first for name in images["sha256"].str[:12])
