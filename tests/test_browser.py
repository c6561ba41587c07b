"""The page in a real browser: it loads alone, answers, fits, and everybody can read it."""

import datetime
import os
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
from made_pages import give_map, make_answers, make_heat, thumbnails
from made_runs import REGIONS, fit_sets, give_model, make_images, make_run

from medembed.report import cases
from medembed.report.cases import CaseSources
from medembed.report.page import write_report
from medembed.results.alignment import align_runs

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

SIZES = {"desktop": (1440, 900), "tablet": (1024, 768), "phone": (390, 844)}
SCHEMES = ("light", "dark")
HOSTILE = "<img src=x onerror=alert(1)>"
TURNED = "wrist\u202eabc"
HEADS = {"mlp": 0.9, "logistic": 1.5, "attention-with-quite-a-long-name": 1.2, "lightgbm": 1.3}
#: A directory given here keeps the screenshots, to be looked at.
KEPT = os.environ.get("MEDEMBED_SCREENSHOTS")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two runs, and what a page of them is written with."""
    runs = tmp_path_factory.mktemp("runs")
    images = make_images(n_patients=150, regions=("elbow", TURNED, HOSTILE))
    data = {"images": 300, "studies": 150, "patients": 150, "abnormal": 140, "unlabelled": 0}
    data |= {"left_out": 1, "left_out_test": 1, "synthetic": True, "label_level": "study"}
    left_out = [{"sha256": "cd" * 32, "split": "test", "stage": "decode", "reason": HOSTILE}]
    info = {"data": data, "left_out": left_out, "encoder": {"source": "demo"}}
    run = make_run(runs / "sweep", images, HEADS, info=info)
    for head in list(HEADS)[1:]:
        give_model(run, head, conformal=fit_sets(run, head).as_dict())
    other = make_run(runs / "again", images, {"mlp": 1.0}, seed=2, info=info)
    give_map(run, images)
    for sha256 in images["sha256"]:
        make_heat(runs / "heat", sha256)
    return [run, other], CaseSources(explanations=runs / "heat", answers=make_answers(images))


@pytest.fixture(scope="module")
def page_path(made, tmp_path_factory):
    runs, sources = made
    out = tmp_path_factory.mktemp("report")
    date = datetime.date(2026, 1, 2)
    write_report(runs, out, n_resamples=100, date=date, find_thumbnails=thumbnails, cases=sources)
    return out / "index.html"


@pytest.fixture(scope="module")
def best(made):
    """Labels and probabilities of the best head, and its Youden threshold."""
    test_set = align_runs(made[0])
    head = next(c for c in test_set.contenders if (c.run, c.head) == ("sweep", "mlp"))
    return test_set.y == 1, head.probability, head.threshold


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

    def opened(size="desktop", scheme="light", path=None, **options):
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
        page.goto((path or page_path).as_uri())
        return page

    def note(url):
        own = ("/index.html", "/cases.js", ".jpg")
        if not url.startswith("data:") and not (url.startswith("file:") and url.endswith(own)):
            troubles.append(f"request: {url}")

    yield opened
    for context in contexts:
        context.close()
    assert not troubles


def names(page):
    return page.locator("#heads tbody tr:not([hidden]) th").all_inner_texts()


def check_with_axe(page):
    page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run()")
    assert [(v["id"], [n["html"][:120] for n in v["nodes"]]) for v in found["violations"]] == []


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", SIZES)
def test_the_page_fits_and_everybody_can_read_it(open_page, size, scheme, tmp_path):
    page = open_page(size, scheme)
    if size == "desktop":  # a phone scrolls wide tables sideways
        cut = "[...document.querySelectorAll('.scroll')].filter(s => s.scrollWidth > s.clientWidth)"
        assert page.evaluate(f"{cut}.map(s => s.textContent.slice(0, 60))") == []
    for details in page.locator("details").all():
        details.evaluate("d => { d.open = true }")
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
    page.evaluate(
        "Promise.all([...document.querySelectorAll('main figure img')].map(i => i.decode()))"
    )
    check_with_axe(page)
    picture = Path(KEPT or tmp_path) / f"{size}-{scheme}.png"
    page.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 50_000
    page.locator(".cases").focus()
    page.keyboard.press("Enter")
    assert page.locator("dialog").evaluate("d => d.scrollWidth <= d.clientWidth")
    check_with_axe(page)
    page.screenshot(path=Path(KEPT or tmp_path) / f"viewer-{size}-{scheme}.png")


def test_forced_colours_keep_lines_and_controls(open_page, tmp_path):
    page = open_page(forced_colors="active")
    colours = page.evaluate(
        "[...document.querySelectorAll('[data-plot=roc] .line')]"
        ".map(line => getComputedStyle(line).stroke)"
    )
    assert len(set(colours)) == len(colours) == 4
    assert page.locator("#slider").is_visible()
    page.screenshot(path=Path(KEPT or tmp_path) / "forced.png", full_page=True)


def wait_for_count(page, n):
    """Wait until the page says that it shows n cases."""
    says = "n => document.querySelector('#cases-app .said').textContent.startsWith(`${n} of`)"
    page.wait_for_function(says, arg=int(n), timeout=5000)


def results(page):
    """The numbers that follow the threshold, by name."""
    shown = page.locator(".results > div").all()
    return {own.locator("dt").inner_text(): own.locator("b").inner_text() for own in shown}


def test_the_threshold_moves_every_number(open_page, best):
    page = open_page()
    abnormal, probability, youden = best

    def check(cut):
        called = probability >= cut
        sensitivity, specificity = called[abnormal].mean(), 1 - called[~abnormal].mean()
        found = results(page)
        assert found["Sensitivity"] == f"{sensitivity:.3f}"
        assert found["Specificity"] == f"{specificity:.3f}"
        counts = [(called & ~abnormal).sum(), (~called & abnormal).sum(), (called & abnormal).sum()]
        cells = page.locator(".matrix td.cell b").all_inner_texts()
        assert [int(cell) for cell in cells[1:]] == counts
        return sensitivity, specificity

    check(youden)
    assert page.locator("#option").input_value() == "--operating-point youden"
    page.locator("#typed").fill("0.7")
    page.locator("#typed").press("Enter")
    assert page.locator("#option").input_value() == "--operating-point threshold=0.7"
    sensitivity, specificity = check(0.7)
    page.locator("#prevalence").fill("5")
    called = 0.05 * sensitivity
    assert results(page)["PPV"] == f"{called / (called + 0.95 * (1 - specificity)):.3f}"
    page.locator("#slider").focus()
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    steps = page.evaluate("JSON.parse(document.getElementById('page-data').textContent).thresholds")
    check(steps[steps.index(0.7) - 3])
    page.get_by_role("button", name="sensitivity=0.95").click()
    assert page.locator("#option").input_value() == "--operating-point sensitivity=0.95"
    assert "[" in page.locator(".results").inner_text()  # named points have intervals
    page.get_by_role("button", name="Copy").click()
    page.get_by_text("Copied.").wait_for(timeout=5000)


def test_a_curve_answers_the_pointer_and_the_keys(open_page):
    page = open_page()
    chart = page.locator("[data-plot=roc] .chart")
    chart.scroll_into_view_if_needed()
    dot = page.locator("[data-plot=roc] .mark").first.bounding_box()
    readout = page.locator("[data-plot=roc] .readout")
    page.mouse.move(dot["x"] + dot["width"] / 2, dot["y"] + dot["height"] / 2)
    assert "sensitivity" in readout.inner_text()
    before = results(page)
    chart.focus()
    for key in ["PageUp"] * 3 + ["ArrowRight", "Enter"]:
        page.keyboard.press(key)
    said = readout.inner_text()
    assert results(page) != before
    assert f"sensitivity {results(page)['Sensitivity']}" in said
    assert f"specificity {results(page)['Specificity']}" in said
    page.locator("[data-plot=decision_curve] .chart").focus()
    page.keyboard.press("ArrowRight")
    assert "net benefit" in page.locator("[data-plot=decision_curve] .readout").inner_text()


def test_heads_are_switched_on_and_off_and_chosen(open_page):
    page = open_page()
    lines = page.locator("[data-plot=roc] path.line")
    assert lines.count() == 4
    page.locator("#show-2").uncheck()
    page.locator("#show-3").focus()
    page.keyboard.press("Space")
    assert lines.count() == 2
    page.locator("#head").select_option(index=4)
    assert lines.count() == 3
    assert page.locator("#head option").nth(4).inner_text() in page.locator(".matrix").inner_text()


def test_cases_are_filtered_sorted_and_searched(open_page, best):
    page = open_page()
    abnormal, probability, youden = best
    called = probability >= youden
    said = page.locator("#mistakes ~ #cases-app .said").first
    assert f"{len(abnormal)} of {len(abnormal)} studies." in said.inner_text()
    assert "false" in page.locator(".case").first.inner_text()  # mistakes come first
    for name, wanted in (
        ("fp", called & ~abnormal),
        ("fn", ~called & abnormal),
        ("mistakes", called != abnormal),
    ):
        page.locator("#case-kind").select_option(name)
        wait_for_count(page, wanted.sum())
    page.locator("#case-kind").select_option("all")
    page.locator("#case-sort").select_option("high")
    page.locator(".case", has_text=f"{probability.max():.2f}").first.wait_for(timeout=5000)
    page.locator("#case-region").select_option(label="wrist�abc")
    wait_for_count(page, 25)
    cards = page.locator(".case").all_inner_texts()
    assert cards
    assert all("wrist�abc" in card for card in cards)
    code = cards[-1].split()[-1]
    page.locator("#case-search").fill(code)
    wait_for_count(page, 1)
    page.locator("#case-search").fill("nothing of that name")
    page.get_by_text("No studies are left").wait_for(timeout=5000)


def test_cases_are_filtered_by_further_targets_which_colour_the_map(open_page, made):
    page = open_page()
    units = align_runs(made[0]).units
    first = units["images"].str.split(" ").str[0]
    metal, cast = (own.reindex(first).fillna(2).to_numpy(int) for own in made[1].answers.values())
    page.get_by_label("Target metal").select_option("positive")
    wait_for_count(page, (metal == 1).sum())
    page.get_by_label("Target cast").select_option("negative")
    wait_for_count(page, ((metal == 1) & (cast == 0)).sum())
    page.get_by_label("Target cast").select_option("unknown")
    wait_for_count(page, ((metal == 1) & (cast == 2)).sum())
    page.locator(".case").first.click()
    facts = page.locator(".facts-of-case dl > div").all_inner_texts()
    assert [fact.split("\n") for fact in facts if "Target" in fact] == [
        ["Target metal", "positive"],
        ["Target cast", "unknown"],
    ]
    page.keyboard.press("Escape")
    page.locator("#map-colour").select_option(label="target metal")
    n = {code: int((made[1].answers["metal"] == code).sum()) for code in (0, 1)}
    legend = page.locator(".map-legend").inner_text()
    assert f"negative {n[0]}" in legend
    assert f"positive {n[1]}" in legend


def test_many_targets_are_folded_up(open_page, made, tmp_path, monkeypatch):
    monkeypatch.setattr("medembed.report.page.plot_all", lambda *_: [])
    metal = made[1].answers["metal"]
    sources = CaseSources(answers={f"finding_{k}": metal for k in range(6)})
    write_report(made[0], tmp_path, n_resamples=20, cases=sources)
    page = open_page(path=tmp_path / "index.html")
    assert page.get_by_label("Target finding_4").is_hidden()
    page.get_by_text("Further targets").click()
    page.get_by_label("Target finding_4").select_option("negative")
    wait_for_count(page, 50)
    page.get_by_text("Further targets: finding_4 negative").click()
    assert page.get_by_label("Target finding_4").is_hidden()


OF_THE_LABEL = r"""() => {
  const said = [...document.querySelectorAll("body *:not(script, style)")].flatMap((e) => [
    e.getAttribute("aria-label") ?? "", e.getAttribute("alt") ?? "",
    ...[...e.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data),
  ]);
  return said.filter((text) => /\b(ab)?normal\b/i.test(text));
}"""
"""Texts of a page, shown or not, that speak of the label's classes."""


def test_a_targets_page_answers_in_the_targets_words(open_page, tmp_path):
    images = make_images(n_patients=60)
    run = make_run(tmp_path / "run", images, {"mlp": 0.9, "knn": 1.5}, asked={"target": "metal"})
    give_model(run, "mlp", conformal=fit_sets(run, "mlp").as_dict())
    give_map(run, images)
    write_report(run, tmp_path / "out", n_resamples=20)
    page = open_page(path=tmp_path / "out" / "index.html")

    def told():
        assert page.evaluate(OF_THE_LABEL) == []
        return page.locator("body").inner_text()

    for words in ("called no metal", "at 50 % metal", "Dashed: no metal. Solid: metal.",
                  "Calibrated probability of metal", "Share metal"):  # fmt: skip
        assert words.replace("50", page.locator("#prevalence").input_value()) in told()
    for name in ("roc", "calibration", "distribution"):
        page.locator(f"[data-plot={name}] .chart").focus()
        for key in ("Home", "ArrowRight", "End"):
            page.keyboard.press(key)
            told()
    page.locator("#map-colour").select_option("prediction")
    assert "called metal" in page.locator(".map-legend").inner_text()
    page.locator("#map-colour").select_option("label")
    assert "no metal" in page.locator(".map-legend").inner_text()
    for way in ("fp", "fn", "tp", "tn"):
        page.locator("#case-kind").select_option(way)
        told()
    page.locator("#case-kind").select_option("all")
    page.locator(".cases").focus()
    page.keyboard.press("Enter")
    facts = page.locator(".facts-of-case").inner_text().lower()
    assert "target metal" in facts
    assert "no metal" in facts
    told()


def test_keys_walk_through_the_cases_and_the_film_is_adjusted(open_page):
    page = open_page()
    cases = page.locator(".cases")
    cases.focus()
    chosen = page.locator(".case[aria-selected=true]")
    for key, place in (("ArrowRight", 2), ("End", 75), ("Home", 1), ("ArrowDown", None)):
        page.keyboard.press(key)
        found = int(chosen.get_attribute("aria-posinset"))
        assert found == place or (place is None and found > 2)
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    viewer = page.locator("dialog.viewer")
    assert "case 1 of 75" in viewer.inner_text()
    page.keyboard.press("ArrowRight")
    assert "case 2 of 75" in viewer.inner_text()
    page.locator("#width").fill("50")
    slope = page.locator("#window feFuncR").get_attribute("slope")
    assert float(slope) == 2
    heat = viewer.locator("canvas.heat").first
    assert heat.is_hidden()
    page.locator("#heat").check()
    viewer.locator(".film[height='200']").first.wait_for()
    film = viewer.locator(".stack .film").first.bounding_box()
    assert heat.bounding_box() == pytest.approx(film, abs=1)  # over the film, of the same aspect
    assert viewer.locator(".original").first.is_visible()
    page.locator("#opacity").fill("20")
    assert float(heat.evaluate("c => getComputedStyle(c).opacity")) == pytest.approx(0.2)
    page.keyboard.press("Escape")
    assert viewer.is_hidden()
    assert cases.evaluate("c => c === document.activeElement")


def test_a_lasso_on_the_map_filters_the_cases(open_page, best):
    page = open_page()
    stage = page.locator(".stage")
    stage.evaluate("s => s.scrollIntoView({block: 'center'})")
    box = stage.bounding_box()
    middle = box["x"] + box["width"] / 2
    corners = [(middle, box["y"] + 3), (box["x"] + box["width"] - 20, box["y"] + 3)]
    corners += [(x, box["y"] + box["height"] - 3) for x, _ in reversed(corners)]
    page.mouse.move(*corners[0])
    page.mouse.down()
    for corner in corners[1:]:
        page.mouse.move(*corner, steps=4)
    page.mouse.up()
    wait_for_count(page, best[0].sum())  # abnormal ones lie on the right
    page.get_by_role("button", name="Show all again").click()
    wait_for_count(page, len(best[0]))
    page.locator("#map-colour").select_option("error")
    assert "wrong" in page.locator(".map-legend").inner_text()
    canvas = page.locator(".stage canvas").last
    canvas.focus()
    for _ in range(20):
        page.keyboard.press("ArrowUp")
    page.keyboard.down("Shift")
    for key in ["ArrowRight"] * 45 + ["ArrowDown"] * 36:
        page.keyboard.press(key)
    page.keyboard.up("Shift")
    wait_for_count(page, best[0].sum())
    page.keyboard.press("Escape")
    wait_for_count(page, len(best[0]))


def test_tabs_and_two_heads_answer_keys(open_page, made):
    page = open_page()
    page.get_by_role("tab", name="By region").focus()
    assert page.locator("#t-views").is_hidden()
    page.keyboard.press("ArrowRight")
    assert page.locator("#t-views").is_visible()
    assert page.locator("#t-regions").is_hidden()
    test_set = align_runs(made[0])
    names = [page.locator(f"#head-{key} option:checked").inner_text() for key in "ab"]
    heads = {f"{c.run}/{c.head}": c for c in test_set.contenders}
    right = [(heads[n].probability >= heads[n].threshold) == (test_set.y == 1) for n in names]
    differ = int((right[0] != right[1]).sum())
    assert f"The heads differ on {differ} of 75." in page.locator("#crossing-app").inner_text()
    page.get_by_role("button", name="Show these cases").press("Enter")
    wait_for_count(page, differ)


def test_the_contents_stay_in_sight_and_mark_the_section(open_page):
    page = open_page()
    page.locator(".contents a", has_text="Details").click()
    page.wait_for_timeout(100)
    assert page.locator(".contents").bounding_box()["y"] == 0
    page.evaluate("document.getElementById('mistakes').scrollIntoView()")
    page.wait_for_timeout(100)
    assert page.locator(".contents [aria-current]").inner_text() == "Cases"


def test_cases_and_films_beside_the_page_are_loaded(open_page, made, tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "MAX_INLINED", 20)
    monkeypatch.setattr(cases, "INLINED_BYTES", 0)
    monkeypatch.setattr("medembed.report.page.plot_all", lambda *_: [])
    write_report(made[0], tmp_path, n_resamples=20, find_thumbnails=thumbnails)
    page = open_page(path=tmp_path / "index.html")
    said = page.locator("#cases-app .said").first
    assert "20 of the 20 that this page holds (75 in all) studies." in said.inner_text()
    page.locator(".cases").scroll_into_view_if_needed()
    page.locator(".case .film[height='142']").first.wait_for()  # as tall as it is shown
    page.get_by_role("button", name="Load all 75 studies").click()
    wait_for_count(page, 75)
    page.locator(".cases").focus()
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    assert "case 75 of 75" in page.locator("dialog").inner_text()


def test_a_click_sorts_and_another_turns_the_order_round(open_page):
    page = open_page()
    best_first = names(page)
    heading = page.locator("#heads thead th", has_text="Brier")
    column = heading.evaluate("th => th.cellIndex")
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"  # a low Brier score is a good one
    cells = page.locator(f"#heads tbody tr td:nth-child({column + 1})").all_inner_texts()
    assert [float(cell) for cell in cells] == sorted(map(float, cells))
    assert "Sorted by Brier, lowest first." in page.locator("#heads-said").inner_text()
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
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
    assert page.locator("figure img:visible").count() >= 8
    assert page.locator("noscript h4").first.is_visible()  # the most confident mistakes
    assert page.locator("#t-views").is_visible()


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


@pytest.mark.parametrize("kind", ["one head", "one region", "five patients", "twelve runs"])
def test_odd_runs_give_a_page_that_answers(open_page, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("medembed.report.page.plot_all", lambda *_: [])
    n_patients = 10 if kind == "five patients" else 60
    images = make_images(
        n_patients=n_patients, regions=("hand",) if kind == "one region" else REGIONS
    )
    heads = {"mlp": 1.0} if kind in ("one head", "twelve runs") else {"mlp": 1.0, "logistic": 1.2}
    n_runs = 12 if kind == "twelve runs" else 1
    runs = [make_run(tmp_path / f"run{k}", images, heads, seed=k) for k in range(n_runs)]
    write_report(runs, tmp_path / "out", n_resamples=20)
    page = open_page(path=tmp_path / "out" / "index.html")
    assert page.locator("#head option").count() == min(6, len(heads) * n_runs)
    assert page.locator("#crossing-app").count() == (0 if kind == "one head" else 1)
    assert page.locator("#case-region").count() == (0 if kind == "one region" else 1)
    page.locator("#slider").focus()
    page.keyboard.press("ArrowRight")
    page.locator(".cases").focus()
    page.keyboard.press("Enter")
    assert f"of {n_patients // 2}" in page.locator("dialog").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES["desktop"][0]


def test_print_hides_what_paper_cannot_do(open_page, tmp_path):
    page = open_page()
    page.emulate_media(media="print")
    assert page.locator("nav").is_hidden()
    assert page.locator("#heads-tools").is_hidden()
    assert page.locator("#t-views").is_visible()  # all tabs
    assert page.locator(".printed li").count() == 24
    path = Path(KEPT or tmp_path) / "print.pdf"
    page.pdf(path=path, format="A4")
    assert path.read_bytes().startswith(b"%PDF")
