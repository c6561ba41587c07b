"""The most confident mistakes, and the thumbnails that go with them."""

import hashlib
import io
import re

import numpy as np
import pytest
from made_runs import make_images, make_run, manifest_of
from PIL import Image

from medembed.cli import main
from medembed.core.errors import PathNotFoundError
from medembed.report.gallery import SIDE, Thumbnail, find_mistakes, make_thumbnails, show_mistakes
from medembed.report.page import write_report
from medembed.results.alignment import align_runs
from medembed.results.comparison import compare_aligned


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "sweep"
    run = make_run(path, make_images(n_patients=150), {"mlp": 1.5, "logistic": 3.0})
    return run, align_runs([run])


@pytest.fixture(scope="module")
def result(aligned):
    return compare_aligned([aligned[0]], aligned[1], n_resamples=50)


def png(shape=(400, 300), seed=0):
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    output = io.BytesIO()
    Image.fromarray(values).save(output, "PNG")
    return output.getvalue()


def test_mistakes_are_wrong_and_ordered_by_their_distance_from_the_threshold(aligned, result):
    contender = next(c for c in aligned[1].contenders if c.head == "mlp")
    assert result["rows"][0]["head"] == "mlp"
    mistakes = find_mistakes(result, aligned[1])
    called = contender.probability >= contender.threshold
    y = aligned[1].y.astype(bool)
    for kind, wrong, best in (("abnormal", called & ~y, max), ("normal", ~called & y, min)):
        own = [mistake.probability for mistake in mistakes if mistake.called == kind]
        assert len(own) == min(6, wrong.sum()) > 2
        assert own == sorted(own, reverse=kind == "abnormal")
        assert own[0] == best(contender.probability[wrong])


def test_a_mistake_names_the_images_of_its_study(aligned, result):
    predictions = aligned[0].predictions().query("head == 'mlp' and split == 'test'")
    studies = predictions.groupby("study")["sha256"].agg(lambda own: sorted(own)).tolist()
    for mistake in find_mistakes(result, aligned[1]):
        assert mistake.images in studies


def test_a_head_without_mistakes_has_none_and_priors_are_not_looked_at(tmp_path):
    run = make_run(tmp_path / "run", make_images(n_patients=90), {"mlp": 0.01})
    test_set = align_runs([run])
    found = compare_aligned([run], test_set, n_resamples=20)
    assert find_mistakes(found, test_set) == []
    priors_only = {"rows": [row for row in found["rows"] if row["baseline"]]}
    assert find_mistakes(priors_only, test_set) == []


def test_cards_show_what_is_at_hand_and_count_the_rest(aligned, result):
    mistakes = find_mistakes(result, aligned[1])
    asked = []

    def thumbnails(wanted):
        asked.extend(wanted)
        return {
            wanted[0]: Thumbnail(b"jpeg", 3, 4),
            wanted[1]: Thumbnail(b"two", 5, 6, "a/<b>.png"),
        }

    shown = show_mistakes(mistakes, thumbnails)
    assert asked == [image for mistake in mistakes for image in mistake.images]
    assert (shown["n"], shown["n_images"], shown["n_shown"]) == (len(mistakes), len(asked), 2)
    views = [v for kind in shown["kinds"] for card in kind["cards"] for v in card["views"]]
    assert [view["name"] for view in views[:3]] == [asked[0][:12], "a/<b>.png", asked[2][:12]]
    assert views[0]["data"] == "data:image/jpeg;base64,anBlZw=="
    assert views[2]["data"] is None
    without = show_mistakes(mistakes, None)
    assert without["n_shown"] == 0
    assert not without["asked_for_images"]


def test_thumbnails_are_small_grey_and_named_only_when_asked(tmp_path):
    files = {"wide.png": png((200, 900)), "small.png": png((30, 20), seed=1)}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    manifest = manifest_of(files)
    wanted = {hashlib.sha256(data).hexdigest(): name for name, data in files.items()}
    found = make_thumbnails(manifest, tmp_path, list(wanted))
    assert set(found) == set(wanted)
    for sha256, thumbnail in found.items():
        picture = Image.open(io.BytesIO(thumbnail.jpeg))
        assert picture.mode == "L"
        assert picture.size == (thumbnail.width, thumbnail.height)
        assert thumbnail.name is None
        assert picture.size == ((SIDE, 71) if wanted[sha256] == "wide.png" else (20, 30))
    named = make_thumbnails(manifest, tmp_path, list(wanted), with_names=True)
    assert {sha256: thumbnail.name for sha256, thumbnail in named.items()} == wanted
    assert make_thumbnails(manifest, tmp_path, list(wanted)) == found


def test_what_is_missing_changed_or_broken_is_left_out(tmp_path):
    files = {"gone.png": png(), "changed.png": png(seed=1), "broken.png": png(seed=2)[:500]}
    manifest = manifest_of(files | {"good.png": png(seed=3)})
    (tmp_path / "changed.png").write_bytes(png(seed=9))
    (tmp_path / "broken.png").write_bytes(files["broken.png"])
    (tmp_path / "good.png").write_bytes(png(seed=3))
    wanted = [*manifest.rows["sha256"], "ab" * 32]
    found = make_thumbnails(manifest, tmp_path, wanted)
    assert list(found) == [hashlib.sha256(png(seed=3)).hexdigest()]
    with pytest.raises(PathNotFoundError):
        make_thumbnails(manifest, tmp_path / "nowhere", wanted)


def test_the_page_has_no_name_of_an_image_unless_asked(tmp_path, monkeypatch):
    images = make_images(n_patients=90)
    files = {f"Jane Doe {k}.png": png((40, 30), seed=k) for k in range(len(images))}
    hashes = {hashlib.sha256(data).hexdigest(): name for name, data in files.items()}
    images["sha256"] = sorted(hashes)
    run = make_run(tmp_path / "run", images, {"mlp": 2.0})
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    manifest = manifest_of(files)

    def page(**options):
        write_report(
            [run.path],
            tmp_path / "out",
            n_resamples=20,
            find_thumbnails=lambda wanted: make_thumbnails(manifest, tmp_path, wanted, **options),
        )
        return (tmp_path / "out" / "index.html").read_text()

    assert "Jane Doe" not in page()
    monkeypatch.setattr("medembed.report.page.plot_all", lambda *_: [])  # they take most of it
    assert page().count("data:image/jpeg;base64,") >= 6
    assert "Jane Doe" in page(with_names=True)


def test_the_options_of_thumbnails_go_together(tmp_path, capsys):
    make_run(tmp_path / "run", make_images(), {"mlp": 2.0})
    for options in (["--image-root", "x"], ["--names"], ["--names", "--manifest", "x"]):
        with pytest.raises(SystemExit) as ended:
            main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "out"), *options])
        assert ended.value.code == 2
        assert re.search(r"(requires|and) --(manifest|image-root)", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_an_image_that_lies_outside_the_root_is_left_out(tmp_path):
    files = {"a.png": png(seed=1), "b.png": png(seed=2)}
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.png").write_bytes(files["a.png"])
    (tmp_path / "b.png").write_bytes(files["b.png"])
    (tmp_path / "root" / "b.png").symlink_to(tmp_path / "b.png")
    manifest = manifest_of(files)
    inside, outside = manifest.rows["sha256"]
    assert set(make_thumbnails(manifest, tmp_path / "root", [inside, outside])) == {inside}
