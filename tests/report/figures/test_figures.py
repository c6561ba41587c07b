"""The figures: drawn numbers, equal bytes, text that fits, and none where there is nothing."""

import copy
import csv
import dataclasses
import io
import itertools
import json
import os
import re
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from made_runs import make_images, make_run
from matplotlib.text import Text
from sklearn import metrics

from medembed.core.text import to_figure
from medembed.report import figures
from medembed.report.figures import plotting
from medembed.report.figures.captions import elide, measure, thin, wrap
from medembed.report.figures.roc_pr import (
    precision_recall_band,
    precision_recall_curve,
    roc_band,
    roc_curve,
)
from medembed.report.figures.trends import Slots
from medembed.results.alignment import align_runs
from medembed.results.comparison import compare_runs

FAST = {"n_resamples": 60}
NAMES = [
    *("roc", "precision_recall", "cost", "regions", "views", "confusion", "decision_curve"),
    *("calibration", "deferral", "depths", "efficiency", "flow"),
]
LONG = "a-run-of-the-year-with-every-option-that-there-is/and-its-logistic-head"
HOSTILE = ["<script>x</script>", "$\\frac{$ & \"'>", "手_\x07" + "e\u0301\u0323" * 9, "W" * 90]


def score(value, width=0.03):
    return {"value": value, "low": value - width, "high": value + width}


def make_series(heads, by, places, **more):
    """Return `depths` or `efficiency` by hand: scores that rise with the place."""
    return [
        {
            "head": head,
            "points": [
                {"run": f"run-{k}", by: x, **{name: own[k] for name, own in more.items()}}
                | {"auroc": score(0.7 + 0.02 * k + 0.005 * i)}
                | {"macro_f1": score(0.6 + 0.03 * k + 0.005 * i)}
                for k, x in enumerate(places)
            ],
        }
        for i, head in enumerate(heads)
    ]


def make_deferral(i):
    """Return a head's `deferral` by hand: promising less defers less, and at last more."""
    alphas = [step / 40 for step in range(1, 17)]
    deferred = [abs(0.6 - 3 * alpha) + 0.02 * i for alpha in alphas]
    errors = [None, *(0.05 + alpha / 2 for alpha in alphas[1:])]
    curve = {"alpha": alphas, "coverage": [1 - alpha for alpha in alphas], "error": errors}
    curve |= dict.fromkeys(("coverage_normal", "coverage_abnormal"), curve["coverage"])
    curve |= {"deferred": deferred, "empty": [0.0] * 16}
    levels = [
        {"nominal": nominal, "alpha": round(1 - nominal, 6)}
        | dict.fromkeys(("coverage", "coverage_normal", "coverage_abnormal"), score(nominal))
        | {"deferred": score(0.02 * i + 3 * nominal - 2.4), "error": score(0.55 - nominal / 2)}
        | {"empty": score(0.0)}
        for nominal in (0.8, 0.9, 0.95)
    ]
    return {"levels": levels, "curve": curve}


def enrich(result):
    """Give a comparison what a run made by hand has not: times, sets, depths, shares."""
    result = copy.deepcopy(result)
    heads = [row["head"] for row in result["rows"] if not row["baseline"]]
    for i, row in enumerate(result["rows"]):
        row["seconds"] = None if row["baseline"] else 0.7 * 4.0**i
        row["deferral"] = None if row["baseline"] else make_deferral(i)
    shares, patients = (0.01, 0.1, 0.25, 0.5, 0.9, 1.0), (12, 117, 292, 584, 1051, 1168)
    result["depths"] = make_series(heads, "depth", (0, 1, 2, 4))
    result["efficiency"] = make_series(heads, "train_fraction", shares, n_train_patients=patients)
    return result


def make_case(directory, heads, *, names=("run",), regions=None, info=None):
    """Return a comparison and its test set, of a run per name with the same heads."""
    images = make_images(n_patients=150, **({"regions": regions} if regions else {}))
    runs = [
        make_run(directory / name, images, heads, seed=seed, complete=False, info=info)
        for seed, name in enumerate(names, 1)
    ]
    return enrich(compare_runs(runs, **FAST)), align_runs(runs)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("runs"), {"mlp": 0.9, "logistic": 1.5, "lgb": 2.0})


@pytest.fixture(scope="module")
def plots(case):
    return {plot.name: plot for plot in figures.plot_all(*case)}


def read(plot):
    return list(csv.DictReader(io.StringIO(plot.csv)))


# the curves


def made_scores(n=150, seed=0):
    """Return labels, probabilities with ties, and patients of one to three rows."""
    generator = np.random.default_rng(seed)
    y = generator.integers(0, 2, n)
    p = np.round(np.clip(0.3 * y + generator.normal(0.4, 0.2, n), 0, 1), 2)
    return y, p, np.sort(generator.integers(0, n // 2, n))


@pytest.mark.parametrize("seed", range(5))
def test_the_precision_recall_curve_is_scikit_learns(seed):
    y, p, _ = made_scores(seed=seed)
    curve = precision_recall_curve(y, p)
    precision, recall, thresholds = metrics.precision_recall_curve(y, p)
    assert np.allclose(curve["precision"], precision[::-1])
    assert np.allclose(curve["recall"], recall[::-1])
    assert np.array_equal(curve["threshold"][1:], thresholds[::-1])


@pytest.mark.parametrize("seed", range(5))
def test_the_area_below_the_steps_is_average_precision(seed):
    y, p, _ = made_scores(seed=seed)
    curve = precision_recall_curve(y, p)
    area = (curve["recall"].diff()[1:] * curve["precision"][1:]).sum()
    assert area == pytest.approx(metrics.average_precision_score(y, p))


def test_one_class_has_no_curve():
    for curve in (roc_curve, precision_recall_curve):
        assert curve(np.ones(3), np.arange(3) / 3).empty
        assert curve(np.zeros(3), np.arange(3) / 3).empty


def read_precision(y, p, grid):
    precision, recall, _ = metrics.precision_recall_curve(y, p)
    reached = recall[:-1] >= np.maximum(grid - 1e-9, 1e-9)[:, None]
    highest = len(recall) - 2 - reached[:, ::-1].argmax(axis=1)
    return precision[highest]


def read_sensitivity(y, p, grid):
    fpr, tpr, _ = metrics.roc_curve(y, p, drop_intermediate=False)
    return np.interp(grid, fpr, tpr)


@pytest.mark.parametrize(
    ("band", "read_curve", "x", "y_name"),
    [
        (precision_recall_band, read_precision, "recall", "precision"),
        (roc_band, read_sensitivity, "fpr", "tpr"),
    ],
)
def test_a_band_is_that_of_a_plain_loop_over_resampled_patients(band, read_curve, x, y_name):
    y, p, patients = made_scores()
    found = band(y, p, patients, n_resamples=80, seed=3)
    grid = found[x].to_numpy()
    codes = np.unique(patients, return_inverse=True)[1]
    n_patients = codes.max() + 1
    drawn = np.random.default_rng(3).integers(0, n_patients, size=(80, n_patients))
    curves = []
    for own in drawn:
        rows = np.concatenate([np.flatnonzero(codes == patient) for patient in own])
        curves.append(read_curve(y[rows], p[rows], grid))
    low, high = np.quantile(curves, [0.025, 0.975], axis=0)
    assert np.allclose(found[y_name], read_curve(y, p, grid))
    assert np.allclose(found["low"], low)
    assert np.allclose(found["high"], high)


@pytest.mark.parametrize("band", [precision_recall_band, roc_band])
def test_a_band_holds_its_curve_nearly_everywhere(band):
    found = band(*made_scores(400), n_resamples=200)
    value = found.iloc[:, 1]
    assert ((found["low"] <= value) & (value <= found["high"])).mean() > 0.95
    assert (found["low"] < found["high"]).mean() > 0.9


# the numbers behind them


def test_all_figures_are_there_in_the_order_of_the_page(case, plots):
    assert list(plots) == NAMES
    assert figures.plot_roc(*case) == plots["roc"]
    assert figures.plot_regions(case[0]) == plots["regions"]


def test_every_figure_says_n_its_intervals_and_what_it_shows(plots):
    assert "75 studies, 75 patients" not in plots["flow"].caption  # its boxes have what is n
    for plot in (plot for name, plot in plots.items() if name != "flow"):
        assert "n = 75 test studies" in plot.caption
        assert "95 %" in plot.caption
        assert "patients" in plot.caption
        assert len(plot.alt) > 80
        assert plot.title


def test_captions_claim_bars_and_bands_only_where_there_are_any(tmp_path):
    images = make_images(n_patients=8)
    run = make_run(tmp_path / "few", images, {"a": 0.5, "b": 9.0}, complete=False)
    result, test_set = compare_runs([run], **FAST), align_runs([run])
    rows = [row for row in result["rows"] if not row["baseline"]]
    assert all(score["low"] is None for row in rows for score in row["scores"].values())
    drawn = {plot.name: plot for plot in figures.plot_all(result, test_set)}
    assert {"roc", "precision_recall", "regions", "confusion", "calibration"} <= set(drawn)
    for plot in drawn.values():
        assert "95 %" not in plot.caption + plot.alt
        assert not re.search(r"\b(Bars?|Band|brackets: 95)\b", plot.caption)
        if plot.name != "flow":
            assert "No score here has an interval." in plot.caption


def test_the_csv_of_curves_holds_curves_and_band(case, plots):
    result, test_set = case
    best = result["rows"][0]
    contender = next(c for c in test_set.contenders if c.head == best["head"])
    for name, curve in (("roc", roc_curve), ("precision_recall", precision_recall_curve)):
        rows = read(plots[name])
        own = [row for row in rows if row["head"] == best["head"] and row["kind"] == "curve"]
        expected = curve(test_set.y, contender.probability)
        for column in expected.columns:
            assert np.allclose([float(row[column]) for row in own], expected[column])
        assert sum(row["kind"] == "band" for row in rows) == 101


def test_the_csv_of_groups_and_cost_holds_the_scores(case, plots):
    result, _ = case
    for name in ("regions", "views"):
        for row in read(plots[name]):
            group = row["region" if name == "regions" else "views"]
            own = next(r for r in result["rows"] if r["head"] == row["head"])
            block = own["mean_over_regions"] if group == "mean" else own[name][group]
            assert float(row["auroc_low"]) == block["auroc"]["low"]
    for row, own in zip(read(plots["cost"]), result["rows"], strict=False):
        assert float(row["seconds"]) == own["seconds"]
        assert float(row["auroc_high"]) == own["scores"]["auroc"]["high"]


def test_the_csv_of_matrices_adds_up_to_the_test_set(case, plots):
    result, test_set = case
    rows = read(plots["confusion"])
    assert list(dict.fromkeys(row["head"] for row in rows)) == ["mlp", "logistic", "lgb"]
    points = [own for row in result["rows"][:3] for own in row["operating_points"]]
    for row, own in zip(rows, points, strict=True):
        counts = {name: int(row[name]) for name in ("tn", "fp", "fn", "tp")}
        assert sum(counts.values()) == result["test"]["n"]
        assert counts["fn"] + counts["tp"] == test_set.y.sum()
        sensitivity = counts["tp"] / (counts["tp"] + counts["fn"])
        assert sensitivity == pytest.approx(float(row["sensitivity"]))
        assert (row["operating_point"], float(row["threshold"])) == (own["name"], own["threshold"])


def test_the_csv_of_decision_curves_holds_net_benefit(case, plots):
    rows = read(plots["decision_curve"])
    for own in case[0]["rows"][:3]:
        lines = [row for row in rows if row["head"] == own["head"]]
        curve = own["net_benefit"]
        assert [float(line["threshold"]) for line in lines] == curve["thresholds"]
        assert [float(line["net_benefit"]) for line in lines] == curve["value"]
        assert [line["net_benefit_low"] for line in lines] == [
            "" if low is None else str(low) for low in curve["low"]
        ]


def test_the_csv_of_reliability_holds_the_bins(case, plots):
    result, _ = case
    rows = read(plots["calibration"])
    panels = result["rows"][0]["calibrations"]
    assert list(dict.fromkeys(row["calibration"] for row in rows)) == list(panels)
    for method, panel in panels.items():
        own = [row for row in rows if row["calibration"] == method]
        curve = [row for row in own if row["kind"] == "curve"]
        own = [row for row in own if row["kind"] == "bin"]
        assert [float(row["share_abnormal_low"]) for row in curve] == panel["curve"]["low"]
        assert [int(row["n"]) for row in own] == [part["n"] for part in panel["bins"]]
        assert sum(int(row["n"]) for row in own) == result["test"]["n"]
        assert float(own[0]["brier"]) == panel["brier"]["value"]
        for row, part in zip(own, panel["bins"], strict=True):
            share = part["share_abnormal"]
            assert row["share_abnormal"] == ("" if share is None else str(share))


def test_the_csv_of_deferral_holds_levels_and_curves(case, plots):
    rows = read(plots["deferral"])
    for row in case[0]["rows"][:3]:
        own = [line for line in rows if line["head"] == row["head"]]
        levels = [line for line in own if line["kind"] == "level"]
        curve = [line for line in own if line["kind"] == "curve"]
        deferral = row["deferral"]
        assert [float(line["promised"]) for line in levels] == [0.8, 0.9, 0.95]
        for line, level in zip(levels, deferral["levels"], strict=True):
            assert float(line["error_high"]) == level["error"]["high"]
            assert float(line["deferred"]) == level["deferred"]["value"]
        assert [float(line["deferred"]) for line in curve] == deferral["curve"]["deferred"]
        assert curve[0]["error"] == ""  # nothing was decided


def test_the_csv_of_trends_holds_every_point(case, plots):
    for name, by in (("depths", "depth"), ("efficiency", "train_fraction")):
        rows = read(plots[name])
        points = [point for own in case[0][name] for point in own["points"]]
        assert [float(row[by]) for row in rows] == [point[by] for point in points]
        assert [float(row["auroc_low"]) for row in rows] == [p["auroc"]["low"] for p in points]
        assert [float(row["macro_f1"]) for row in rows] == [p["macro_f1"]["value"] for p in points]
    assert read(plots["efficiency"])[0]["n_train_patients"] == "12"


# nothing where nothing can be drawn


def test_one_class_in_test_draws_nothing_of_ranking(tmp_path):
    images = make_images(n_patients=60)
    images.loc[images["split"] == "test", "label"] = 0
    run = make_run(tmp_path / "run", images, {"mlp": 1.0, "logistic": 2.0}, complete=False)
    drawn = figures.plot_all(compare_runs([run], **FAST), align_runs([run]))
    assert [plot.name for plot in drawn] == ["flow"]


def test_no_trained_head_draws_nothing(case):
    result = copy.deepcopy(case[0]) | {"depths": [], "efficiency": []}
    result["rows"] = [row for row in result["rows"] if row["baseline"]]
    assert [plot.name for plot in figures.plot_all(result, case[1])] == ["flow"]


def test_results_of_before_still_give_the_figures_that_they_can(case, monkeypatch):
    watch(monkeypatch)
    result = copy.deepcopy(case[0])
    for name in ("depths", "efficiency", "flow"):
        del result[name]
    for row in result["rows"]:
        later = ("operating_points", "net_benefit")
        for name in ("calibrations", "confusion", "seconds", "depth", "deferral", *later):
            row.pop(name, None)
    names = [plot.name for plot in figures.plot_all(result, case[1])]
    assert names == ["roc", "precision_recall", "regions", "views"]


def test_cost_wants_two_times(case):
    result = copy.deepcopy(case[0])
    for row in result["rows"][1:]:
        row["seconds"] = None
    assert figures.plot_cost(result) is None


def test_series_that_are_not_estimable_are_not_drawn(case, monkeypatch):
    watch(monkeypatch)
    nothing = {"value": None, "low": None, "high": None}
    result = copy.deepcopy(case[0])
    for own in result["depths"] + result["efficiency"]:
        for point in own["points"]:
            point |= {"auroc": nothing, "macro_f1": nothing}
    assert figures.plot_depths(result) is None
    assert figures.plot_efficiency(result) is None
    result["depths"][0]["points"][0]["auroc"] = {"value": 0.8, "low": None, "high": None}
    assert figures.plot_depths(result) is not None


def test_every_figure_has_the_name_that_it_is_listed_by(case, monkeypatch):
    watch(monkeypatch)
    assert [plot.name for plot in figures.plot_all(*case[:2])] == list(figures.FIGURES)


def test_groups_of_one_class_are_said_to_be(case, monkeypatch):
    result = copy.deepcopy(case[0])
    for row in result["rows"]:
        row["regions"]["elbow"]["auroc"] = {"value": None, "low": None, "high": None}
    drawn = watch(monkeypatch)
    figures.plot_regions(result).save()
    assert "not estimable" in [text.get_text() for text in shown_texts(drawn[0])]


def test_lines_of_deferral_end_where_promising_less_defers_more(case, monkeypatch):
    drawn = watch(monkeypatch)
    result = copy.deepcopy(case[0])
    for row in result["rows"]:
        row["deferral"] = make_deferral(0) if row["head"] == "mlp" else None
    plot = figures.plot_deferral(result)
    plot.save()
    assert "best 6" not in plot.caption
    top, bottom = drawn[0].axes
    line = top.get_lines()[0]
    # the least share is deferred at alpha 0.2, which is the least promise told as well
    assert line.get_ydata()[-1] == pytest.approx(0.8)
    assert line.get_xdata()[-1] == pytest.approx(0.0)
    assert len(bottom.get_lines()[0].get_xdata()) == len(line.get_xdata()) - 1
    result["rows"][0]["deferral"] = None
    assert figures.plot_deferral(result) is None


# equal bytes


def test_the_same_input_gives_the_same_bytes_whatever_the_users_settings(case, plots):
    settings = {"font.size": 3, "font.weight": "bold", "axes.grid": False, "pdf.fonttype": 3}
    with matplotlib.rc_context(settings):
        before = dict(matplotlib.rcParams)
        again = figures.plot_all(*case)
        assert dict(matplotlib.rcParams) == before
    assert {plot.name: plot for plot in again} == plots
    assert [plot.save() for plot in again] == [plots[plot.name].save() for plot in again]


def test_the_same_input_gives_the_same_bytes_in_every_process(case, plots):
    result = case[0]
    light = {name: result[name] for name in ("level", "n_resamples", "test", "synthetic", "depths")}
    light["rows"] = []
    code = (
        "import json, sys\n"
        "from medembed.report.figures import plot_depths\n"
        "plot = plot_depths(json.load(sys.stdin))\n"
        "sys.stdout.buffer.write(b''.join(plot.save(('svg', 'png', 'pdf')).values()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(light).encode(),
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        check=True,
    )
    own = plots["depths"]
    assert done.stdout == b"".join(own.save(("svg", "png", "pdf")).values())


def test_formats_are_what_they_are_called_and_carry_no_date(plots):
    for plot in plots.values():
        png, pdf = plot.save(("png", "pdf")).values()
        assert png.startswith(b"\x89PNG")
        assert pdf.startswith(b"%PDF")
        assert b"CreationDate" not in pdf
        assert b"/Type3" not in pdf
        for svg in (plot.light_svg, plot.dark_svg):
            assert b"<svg" in svg
            assert b"<dc:date>" not in svg
            assert b"<image" not in svg
        assert plot.light_svg != plot.dark_svg


def without_ids(svg):
    """Return an SVG without the names that matplotlib makes of a marker's colour."""
    return re.sub(rb'(id="|#)[a-z][0-9a-f]{10}"', b"", svg)


def test_the_dark_figure_is_the_light_one_in_the_other_themes_colours(plots):
    for plot in plots.values():
        assert plotting._recolour(plot.light_svg) is not None, plot.name
        drawn = plotting._save(plot.draw, plotting.DARK, ("svg",))["svg"]
        assert without_ids(plot.dark_svg) == without_ids(drawn), plot.name


def test_a_figure_with_a_colour_of_its_own_is_drawn_again_for_dark_pages(plots):
    def draw(theme):
        figure = plots["roc"].draw(theme)
        figure.axes[0].plot([0, 1], [0, 1], color="#123456")
        return figure

    plot = dataclasses.replace(plots["roc"], draw=draw)
    assert b"#123456" in plot.dark_svg
    assert plotting.DARK.ink.encode() in plot.dark_svg
    assert plotting.LIGHT.ink.encode() not in plot.dark_svg


def test_a_figure_is_drawn_once_for_all_its_files(plots):
    drawn = []
    plot = plots["roc"]
    counted = dataclasses.replace(plot, draw=lambda theme: drawn.append(theme) or plot.draw(theme))
    counted.save(("svg", "png", "pdf"))
    assert counted.dark_svg != counted.light_svg
    assert len(drawn) == 1


# text that fits


def watch(monkeypatch):
    """Collect the figures that are saved; they are not rendered, which takes most of the time."""
    drawn = []

    def savefig(figure, *_):
        if not drawn or drawn[-1] is not figure:
            check_text(figure)
            drawn.append(figure)

    monkeypatch.setattr(plotting, "_print_svg", savefig)
    return drawn


def tick_texts(figure):
    """Return the labels of all ticks, and of those ticks that are in view."""
    every, in_view = set(), []
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                every |= {tick.label1, tick.label2}
                if low <= tick.get_loc() <= high:
                    in_view += [tick.label1, tick.label2]
    return every, in_view


def shown_texts(figure):
    every, in_view = tick_texts(figure)
    texts = [text for text in figure.findobj(Text) if text not in every] + in_view
    return [text for text in texts if text.get_visible() and text.get_text().strip()]


def check_text(figure):
    """Refuse text that leaves the figure or lies on other text, and lines that leave their axes."""
    renderer = figure.canvas.get_renderer()
    assert figure.get_figwidth() == 5.2
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in shown_texts(figure)]
    for text, box in boxes:
        assert box.x0 >= 0, f"{text!r} begins left of the figure"
        assert box.y0 >= 0, f"{text!r} begins below the figure"
        assert box.x1 <= figure.bbox.x1, f"{text!r} ends right of the figure"
        assert box.y1 <= figure.bbox.y1, f"{text!r} ends above the figure"
    for (text, box), (other, other_box) in itertools.combinations(boxes, 2):
        assert not box.padded(-0.5).overlaps(other_box.padded(-0.5)), f"{text!r} lies on {other!r}"
    plots = [axes.get_window_extent(renderer) for axes in figure.axes]
    for legend in figure.legends:
        assert not any(legend.get_window_extent(renderer).overlaps(box) for box in plots)
    for axes in figure.axes:
        check_axes(axes)
    for name in ("get_xlabel", "get_ylabel"):
        assert any(getattr(axes, name)() or not axes.axison for axes in figure.axes)


def check_axes(axes):
    for line in axes.get_lines():
        if line.get_transform() != axes.transData:
            continue  # a line across the axes
        x, y = line.get_xdata(), line.get_ydata()
        for values, ends in ((x, sorted(axes.get_xlim())), (y, sorted(axes.get_ylim()))):
            assert ends[0] <= min(values, default=ends[0])
            assert max(values, default=ends[1]) <= ends[1]
    assert axes.get_window_extent().width > 160


@pytest.mark.parametrize(
    ("heads", "names", "regions"),
    [
        (("mlp",), ("run",), None),
        (("mlp", "logistic", "lightgbm"), ("run",), None),
        (tuple(f"{LONG}-{i}" for i in range(3)), (f"first-{LONG}", f"then-{LONG}"), None),
        (tuple(HOSTILE), ("<b>run_$", "W" * 60), [*HOSTILE, "elbow"]),
        (tuple(f"head-{i}" for i in range(7)), ("run",), [f"region {i}" for i in range(9)]),
    ],
    ids=["one", "usual", "long", "hostile", "many"],
)
def test_no_text_leaves_the_figure_or_lies_on_another(tmp_path, monkeypatch, heads, names, regions):
    names = [name.replace("/", "-") for name in names]
    noises = {head: 0.8 + 0.2 * i for i, head in enumerate(heads)}
    info = {"data": {"synthetic": True}}
    result, test_set = make_case(tmp_path, noises, names=names, regions=regions, info=info)
    drawn = watch(monkeypatch)
    plots = figures.plot_all(result, test_set)
    expected = [name for name in NAMES if name != "cost" or len(heads) * len(names) > 1]
    assert [plot.name for plot in plots] == expected
    assert len(drawn) == len(plots)


def test_the_axes_of_trends_and_cost_hold_whatever_comes(case, monkeypatch):
    watch(monkeypatch)
    result = copy.deepcopy(case[0])
    places = ((0, 1, 2, 4, 27), (0, 27), (1, 2), tuple(range(28)))
    for depths in places:
        result["depths"] = make_series(["a", "b"], "depth", depths)
        assert figures.plot_depths(result).save()
    for shares in ((0.001, 0.9, 0.95, 1.0), (0.99, 1.0), tuple(i / 20 for i in range(1, 21))):
        counts = [round(100_000 * share) for share in shares]
        result["efficiency"] = make_series(
            [f"head-{i}" for i in range(8)], "train_fraction", shares, n_train_patients=counts
        )
        assert figures.plot_efficiency(result).save()
    for seconds in ((1.0, 1.0, 1.0), (0.002, 5.0, 1e6), (30.0, 31.0, 32.0), (0.01, 0.1, 12.0)):
        for row, own in zip(result["rows"], seconds, strict=False):
            row["seconds"] = own
        assert figures.plot_cost(result).save()


def test_runs_at_one_place_stand_side_by_side_and_a_line_joins_their_means(case, monkeypatch):
    drawn = watch(monkeypatch)
    result = copy.deepcopy(case[0])
    result["depths"] = make_series(["unfreeze"], "depth", (0, 0, 0, 2, 2, 2))
    plot = figures.plot_depths(result)
    plot.save()
    assert "Lines join the means of runs that stand at one place." in plot.caption
    line, *_, points = drawn[0].axes[0].get_lines()
    assert np.allclose(line.get_xdata(), [0, 2])
    assert np.allclose(line.get_ydata(), [0.72, 0.78])
    x = points.get_xdata()
    assert len(set(x)) == 6
    assert np.allclose([x[:3].mean(), x[3:].mean()], [0, 2])
    assert np.allclose(points.get_ydata(), 0.7 + 0.02 * np.arange(6))


def test_large_counts_fit(case, monkeypatch):
    watch(monkeypatch)
    result = copy.deepcopy(case[0])
    result["test"] = {"n": 1_234_567, "n_abnormal": 345_678, "n_patients": 1_000_000}
    result["n_resamples"] = 10_000
    for row in result["rows"]:
        for own in (row, *row["operating_points"]):
            own["confusion"] |= {"tn": 345_678, "fp": 500_000, "fn": 120_000, "tp": 987_654}
        for block in [*row["regions"].values(), *row["views"].values()]:
            block |= {"n": 1_234_567, "n_abnormal": 345_678}
        for panel in row["calibrations"].values():
            panel["bins"][0]["n"] = 987_654
    assert len(figures.plot_all(result, case[1])) == len(NAMES)


def test_the_boxes_of_a_flow_hold_whatever_comes(case, monkeypatch):
    watch(monkeypatch)
    result = copy.deepcopy(case[0])
    reasons = [HOSTILE[0], "W" * 300, "a sentence of many words " * 12, *map(str, range(20))]
    own = result["flow"][0]
    own |= {"found": 1_234_567, "not_listed": 987_654, "not_asked": 345_678, "not_given": 9}
    own["excluded"] = own["failures"] = [{"reason": text, "images": 123_456} for text in reasons]
    own["manifest"] = own["used"] = dict.fromkeys(("images", "studies", "patients"), 40_000_561)
    for part in own["splits"]:
        part["used"] = own["used"]
        part["classes"] = dict.fromkeys(("normal", "abnormal"), own["used"])
    others = [own | {"run": LONG}, own | {"run": "W" * 90, "found": None, "unlabelled": None}]
    result["flow"] += [*others, own | {"run": "d", "failed": None}, own | {"run": "e", "found": 7}]
    result["runs"] *= 5
    plot = figures.plot_flow(result)
    plot.save()
    assert "1 more flow is in the CSV alone." in plot.caption


# letters and slots


def test_names_are_cut_in_their_middle_to_the_width():
    assert elide("mlp", 100, 9) == "mlp"
    short = elide(LONG, 120, 9)
    assert measure(short, 9) <= 120
    assert short.startswith("a-run")
    assert short.endswith("head")
    assert short.count("…") == 1
    assert elide("W" * 10_000, 50, 9).count("W") < 10
    assert elide("ab", 0, 9)


def test_what_a_font_cannot_draw_is_replaced():
    assert to_figure("a\x1b\nb\u202e") == "a��b�"
    assert to_figure("e\u0301") == "é"
    assert to_figure("x" + "\u0335\u0489" * 40) == "x"


def test_sentences_are_wrapped_between_words():
    lines = wrap("n = 75 test studies (33 abnormal), 75 patients. " * 4, 200, 8)
    assert len(lines) > 2
    assert all(measure(line, 8) <= 200 for line in lines)
    assert wrap("", 200, 8) == [""]


def test_tick_labels_that_collide_are_blanked_but_not_the_ends():
    assert thin([0, 100, 200], ["0", "1", "2"], 9) == ["0", "1", "2"]
    assert thin([0, 3, 197, 200], ["0", "1", "98", "99"], 9) == ["0", "", "", "99"]
    assert thin([50], ["5"], 9) == ["5"]
    assert thin([], [], 9) == []


@pytest.mark.parametrize(
    ("values", "is_log"), [((0, 1, 2, 4, 27), False), ((0.001, 0.01, 0.9, 1), True), ((3,), False)]
)
def test_heads_stand_side_by_side_and_apart_from_the_next_place(values, is_log):
    slots = Slots(values, 6, is_log=is_log)
    places = [slots.place(x, i, k, 3) for x in values for i in range(6) for k in range(3)]
    assert places == sorted(places)
    assert len(set(places)) == len(places)
    low, high = slots.ends
    assert low < places[0]
    assert places[-1] < high
    assert slots.place(values[0], 0) < values[0] < slots.place(values[0], 5)
    assert slots.share(low) == pytest.approx(0)
    assert slots.share(high) == pytest.approx(1)
