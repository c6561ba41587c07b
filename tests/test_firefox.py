"""The page in Firefox: what it does in Chromium (`test_browser`), it does there."""

import base64
import os
from pathlib import Path

import pytest
from made_pages import give_map, make_answers, make_heat, thumbnails
from made_runs import fit_sets, give_model, make_images, make_run
from marionette import FIREFOX, Firefox

from medembed.report.cases import CaseSources
from medembed.report.page import write_report
from medembed.results.alignment import align_runs

pytestmark = pytest.mark.skipif(FIREFOX is None, reason="no Firefox is installed")

SIZES = {"desktop": (1440, 900), "phone": (390, 844)}
KEPT = os.environ.get("MEDEMBED_SCREENSHOTS")
SAYS = "return document.querySelector('#cases-app .said').textContent.startsWith(arguments[0])"
CHOOSE = """const [id, value] = arguments;
const own = document.getElementById(id);
own.value = value;
own.dispatchEvent(new Event("change", { bubbles: true }));"""
PLACE = """const own = document.querySelector(arguments[0]);
own.scrollIntoView({ block: "center" });
const { left, top, width, height } = own.getBoundingClientRect();
return [left, top, width, height];"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page of one run with everything, and the best head's calls of its test studies."""
    home = tmp_path_factory.mktemp("runs")
    images = make_images(n_patients=150)
    run = make_run(home / "sweep", images, {"mlp": 0.9, "logistic": 1.5})
    give_model(run, "mlp", conformal=fit_sets(run, "mlp").as_dict())
    give_map(run, images)
    for sha256 in images["sha256"]:
        make_heat(home / "heat", sha256)
    answers = {"metal": make_answers(images)["metal"]}
    sources = CaseSources(explanations=home / "heat", answers=answers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medembed.report.page.plot_all", lambda *_: [])
        write_report(run, home / "page", n_resamples=20, find_thumbnails=thumbnails, cases=sources)
    test_set = align_runs([run])
    head = next(c for c in test_set.contenders if c.head == "mlp")
    return home / "page" / "index.html", test_set, head, answers


@pytest.fixture(scope="module")
def firefox(tmp_path_factory):
    opened = Firefox(tmp_path_factory.mktemp("firefox"))
    yield opened
    opened.close()


@pytest.mark.parametrize("size", SIZES)
def test_the_page_answers_in_firefox(firefox, made, size):
    path, test_set, head, answers = made
    width, height = SIZES[size]
    firefox.open(path, width, height)
    run, wait_for, keys = firefox.run, firefox.wait_for, firefox.keys
    assert run("return innerWidth") == width
    assert run("return document.documentElement.scrollWidth") <= width

    n, abnormal = len(test_set.y), test_set.y == 1
    called = head.probability >= head.threshold

    def show(control, value, count):
        run(CHOOSE, control, value)
        wait_for(SAYS, f"{int(count)} of {n} ")

    # filters, order and search
    show("case-kind", "fp", (called & ~abnormal).sum())
    show("case-kind", "mistakes", (called != abnormal).sum())
    show("case-kind", "all", n)
    first = test_set.units["images"].str.split(" ").str[0]
    metal = answers["metal"].reindex(first).to_numpy(int) == 1
    show("case-target-0", "1", metal.sum())
    show("case-target-0", "", n)
    run(CHOOSE, "case-sort", "high")
    highest = f"{head.probability.max():.2f}"
    wait_for("return document.querySelector('.case').textContent.includes(arguments[0])", highest)
    run("document.getElementById('case-search').focus()")
    keys(*"hand")
    wait_for(SAYS, f"{(test_set.units['region'] == 'hand').sum()} of {n} ")
    run("document.getElementById('case-search').value = ''")
    keys("a", "Backspace")
    run(CHOOSE, "case-sort", "mistakes")
    wait_for(SAYS, f"{n} of {n} ")

    # keys walk through cases; a film is drawn, enlarged and under its heat map
    run("document.querySelector('.cases').focus()")
    wait_for("return !!document.querySelector(\".case .film[height='142']\")")
    keys("ArrowRight", "Home", "Enter")
    title = "return document.getElementById('viewer-title').textContent"
    assert f"case 1 of {n}" in run(title)
    keys("ArrowRight")
    assert f"case 2 of {n}" in run(title)
    wait_for("return !!document.querySelector(\"dialog .film[height='200']\")")
    run("document.getElementById('heat').click()")
    covers = """const [heat, film] = [".heat", ".film"]
      .map((own) => document.querySelector(`dialog .stack ${own}`).getBoundingClientRect());
    return Math.abs(heat.left - film.left) < 1 && Math.abs(heat.height - film.height) < 1;"""
    wait_for(covers)
    run("document.getElementById('width').value = 50")
    run("document.getElementById('width').dispatchEvent(new Event('input'))")
    assert run("return document.querySelector('#window feFuncR').getAttribute('slope')") == "2"
    assert run("const d = document.querySelector('dialog'); return d.scrollWidth <= d.clientWidth")
    if KEPT:
        picture = base64.b64decode(firefox.screenshot())
        (Path(KEPT) / f"firefox-viewer-{size}.png").write_bytes(picture)
    keys("Escape")
    assert run("return document.activeElement.className") == "cases"

    # the threshold
    said = "return document.querySelector('.results b').textContent"
    before = run(said)
    run("document.getElementById('slider').focus()")
    keys(*["PageUp"] * 2, *["ArrowRight"] * 40)
    cut = float(run("return document.getElementById('typed').value"))
    assert cut > head.threshold
    assert run(said) != before
    assert float(run(said)) == pytest.approx((head.probability[abnormal] >= cut).mean(), abs=0.02)

    # a curve by keys; tabs
    readout = "return document.querySelector('.plot .readout').value"
    rest = run(readout)
    run("document.querySelector('.plot .chart').focus()")
    keys("ArrowRight")
    assert run(readout) != rest
    run("document.querySelector('[role=tab]').focus()")
    keys("ArrowRight")
    assert run("return document.getElementById('t-views').checkVisibility()")
    assert not run("return document.getElementById('t-regions').checkVisibility()")

    # the map: a film below the pointer, a lasso around the right half
    left, top, across, down = run(PLACE, ".stage")
    middle, right, bottom = left + across / 2, left + across - 3, top + down - 3
    firefox.pointer(*((middle + (right - middle) * k / 12, top + down / 2) for k in range(13)))
    firefox.pointer(
        (middle, top + 3), (right, top + 3), (right, bottom), (middle, bottom), drag=True
    )
    wait_for(SAYS, f"{abnormal.sum()} of {n} ")
    run("document.querySelector('.stage canvas + canvas').focus()")
    keys("Escape")
    wait_for(SAYS, f"{n} of {n} ")
    keys(*["ArrowUp"] * 20)
    keys(*["ArrowRight"] * 45, *["ArrowDown"] * 36, held="Shift")
    wait_for(SAYS, f"{abnormal.sum()} of {n} ")
    keys("Escape")
    run(CHOOSE, "map-colour", "target-metal")
    n_metal = int((answers["metal"] == 1).sum())
    assert f"positive {n_metal}" in run("return document.querySelector('.map-legend').textContent")
    assert run("return document.documentElement.scrollWidth") <= width
    assert firefox.troubles() == []
