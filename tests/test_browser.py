"""The page in a real browser: it loads alone, sorts, filters, fits, and everybody can read it."""

import datetime
import io
import os
import shutil
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from made_runs import fit_sets, give_model, make_images, make_run
from PIL import Image

from medembed.report.gallery import Thumbnail
from medembed.report.page import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
SCHEMES = ("light", "dark")
HOSTILE = "<img src=x onerror=alert(1)>"
HEADS = {"mlp": 0.9, "logistic": 1.5, "attention-with-quite-a-long-name": 1.2, "lightgbm": 1.3}
#: A directory given here keeps the screenshots, to be looked at.
KEPT = os.environ.get("MEDEMBED_SCREENSHOTS")


def thumbnails(wanted):
    """Grey ramps in place of radiographs; every seventh image is not at hand."""
    found = {}
    for k, sha256 in enumerate(wanted):
        if k % 7 != 6:
            ramp = np.tile(np.linspace(0, 255, 160, dtype=np.uint8), (200, 1))
            output = io.BytesIO()
            Image.fromarray(ramp).save(output, "JPEG")
            found[sha256] = Thumbnail(output.getvalue(), 160, 200)
    return found


@pytest.fixture(scope="module")
def page_path(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    images = make_images(n_patients=150, regions=("elbow", "hand", HOSTILE))
    data = {"images": 300, "studies": 150, "patients": 150, "abnormal": 140, "unlabelled": 0}
    data |= {"left_out": 1, "left_out_test": 1, "synthetic": True, "label_level": "study"}
    left_out = [{"sha256": "cd" * 32, "split": "test", "stage": "decode", "reason": HOSTILE}]
    info = {"data": data, "left_out": left_out, "encoder": {"source": "demo"}}
    run = make_run(runs / "sweep", images, HEADS, info=info)
    for head in list(HEADS)[1:]:
        give_model(run, head, conformal=fit_sets(run, head).as_dict())
    make_run(runs / "again", images, {"mlp": 1.0}, seed=2, info=info)
    out = tmp_path_factory.mktemp("report")
    paths = [runs / "sweep", runs / "again"]
    date = datetime.date(2026, 1, 2)
    write_report(paths, out, n_resamples=100, date=date, find_thumbnails=thumbnails)
    return out / "index.html"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser, page_path):
    """Return a function that opens the page, and refuses errors, dialogs and requests."""
    contexts, troubles = [], []

    def opened(size="desktop", scheme="light", **options):
        width, height = SIZES[size]
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, **options
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: troubles.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (troubles.append("dialog"), dialog.dismiss()))
        page.on("request", lambda request: note(request.url))
        page.goto(page_path.as_uri())
        return page

    def note(url):
        if not url.startswith("data:") and url != page_path.as_uri():
            troubles.append(f"request: {url}")

    yield opened
    for context in contexts:
        context.close()
    assert not troubles


def names(page):
    return page.locator("#heads tbody tr:not([hidden]) th").all_inner_texts()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", SIZES)
def test_the_page_fits_and_everybody_can_read_it(open_page, size, scheme, tmp_path):
    page = open_page(size, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
    if size == "desktop":  # a phone scrolls wide tables sideways
        cut = "[...document.querySelectorAll('.scroll')].filter(s => s.scrollWidth > s.clientWidth)"
        assert page.evaluate(f"{cut}.map(s => s.textContent.slice(0, 60))") == []
    for image in page.locator("img").all():
        image.scroll_into_view_if_needed()
        assert image.evaluate("i => i.complete && i.naturalWidth > 0")
    page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run()")
    assert [(v["id"], [n["html"][:120] for n in v["nodes"]]) for v in found["violations"]] == []
    picture = Path(KEPT or tmp_path) / f"{size}-{scheme}.png"
    page.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 50_000


def test_a_click_sorts_and_another_turns_the_order_round(open_page):
    page = open_page()
    best_first = names(page)
    heading = page.locator("#heads thead th", has_text="Brier")
    column = heading.evaluate("th => th.cellIndex")
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    cells = page.locator(f"#heads tbody tr td:nth-child({column + 1})").all_inner_texts()
    assert [float(cell) for cell in cells] == sorted(map(float, cells), reverse=True)
    assert "Sorted by Brier, highest first." in page.locator("#heads-said").inner_text()
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    page.locator("#heads thead th", has_text="AUROC").get_by_role("button").click()
    assert heading.get_attribute("aria-sort") is None
    assert names(page) == best_first
    page.locator("#heads thead th", has_text="Head").get_by_role("button").click()
    assert names(page) == sorted(best_first, key=str.lower)


def test_typing_filters_the_heads(open_page):
    page = open_page()
    everything = names(page)
    page.get_by_label("Show heads named").fill("MLP")
    assert names(page) == [name for name in everything if "mlp" in name]
    assert "2 of 7 heads shown." in page.locator("#heads-said").inner_text()
    page.get_by_label("Show heads named").fill("again mlp")
    assert names(page) == ["again/mlp"]
    page.get_by_label("Show heads named").fill("")
    assert names(page) == everything


def test_keys_alone_sort_and_filter(open_page):
    page = open_page()
    page.get_by_label("Show heads named").focus()
    page.keyboard.type("prior")
    assert len(names(page)) == 2  # the runs share their priors
    page.locator("#heads thead th button").nth(1).focus()
    page.keyboard.press("Enter")
    assert page.locator("#heads thead th").nth(1).get_attribute("aria-sort") == "descending"


def test_without_scripts_the_page_is_whole(open_page):
    page = open_page(java_script_enabled=False)
    assert page.locator("#heads tbody tr").count() == 7
    assert page.locator("#heads-tools").is_hidden()
    assert page.locator("#heads thead button").count() == 0


def test_a_hostile_name_is_only_text(open_page):
    page = open_page()
    assert page.get_by_text(HOSTILE).count() >= 3
    assert page.locator("img[src=x]").count() == 0


def test_a_foreign_script_does_not_run(browser, page_path, tmp_path):
    """The content security policy alone stops it, should escaping ever fail."""
    foreign = "<script>document.title = 'owned'</script></main>"
    (tmp_path / "index.html").write_text(page_path.read_text().replace("</main>", foreign))
    page = browser.new_page()
    page.goto((tmp_path / "index.html").as_uri())
    assert page.title() != "owned"
    page.close()


def test_print_hides_what_paper_cannot_do(open_page, tmp_path):
    page = open_page()
    page.emulate_media(media="print")
    assert page.locator("nav").is_hidden()
    assert page.locator("#heads-tools").is_hidden()
    path = Path(KEPT or tmp_path) / "print.pdf"
    page.pdf(path=path, format="A4")
    assert path.read_bytes().startswith(b"%PDF")
