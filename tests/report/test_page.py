"""The page: whole, self-contained, harmless, and the same every time."""

import base64
import datetime
import hashlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from made_runs import make_images, make_run

from medembed.core.errors import RunError
from medembed.report import page
from medembed.report.figures import plot_all, plot_roc
from medembed.report.page import write_report
from medembed.results.provenance import public_name

DATE = datetime.date(2026, 1, 2)
FAST = {"n_resamples": 100, "date": DATE}
DATA = [{"type": "application/json", "id": f"{name}-data"} for name in ("page", "film")]
"""The scripts besides the one that runs: data, which a browser does not run."""
VOID = {"meta", "img", "source", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collect what the tests ask about, and refuse tags that do not nest."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.ids, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def run_path(tmp_path_factory):
    images = make_images(n_patients=120)
    data = {"images": 240, "studies": 120, "patients": 120, "abnormal": 110, "unlabelled": 0}
    data |= {"left_out": 1, "left_out_test": 1, "synthetic": True, "label_level": "study"}
    left_out = [{"sha256": "cd" * 32, "split": "test", "stage": "decode", "reason": "truncated"}]
    info = {"data": data, "left_out": left_out, "encoder": {"source": "demo"}}
    path = tmp_path_factory.mktemp("runs") / "sweep"
    make_run(path, images, {"mlp": 0.9, "logistic": 1.5}, info=info)
    return path


@pytest.fixture(scope="module")
def written(run_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    result = write_report([run_path], out, **FAST)
    return out, result, (out / "index.html").read_text()


def test_the_page_and_its_figures_are_written(written):
    out, result, _ = written
    assert result["page"] == str(out / "index.html")
    names = sorted(path.name for path in (out / "figures").iterdir())
    plots = ("calibration", "confusion", "cost", "decision_curve", "flow", "precision_recall")
    plots += ("regions", "roc", "views")
    suffixes = ("csv", "svg")
    assert names == [f"{plot}.{suffix}" for plot in plots for suffix in suffixes]
    assert sorted(result["figures"]) == [str(out / "figures" / name) for name in names]
    assert not list(out.rglob("*.partial"))


def test_the_page_nests_has_landmarks_and_labels_its_tables(written):
    page = Page(written[2])
    assert page.all("html")[0]["lang"] == "en"
    for landmark in ("header", "main", "footer", "nav"):
        assert len(page.all(landmark)) == 1
    assert len(page.all("h1")) == 1
    assert len(page.ids) == len(set(page.ids))
    assert len(page.all("caption")) == len(page.all("table")) >= 8
    assert {attributes.get("scope") for attributes in page.all("th")} == {"col", "row", "rowgroup"}
    assert not re.search(r"<th[^>]*></th>", written[2])
    assert all(len(attributes["alt"]) > 40 for attributes in page.all("img"))
    targets = [attributes["href"].removeprefix("#") for attributes in page.all("a")]
    assert set(targets) <= set(page.ids)


def test_nothing_is_fetched_and_one_known_script_runs(written):
    page = Page(written[2])
    assert page.all("script") == [*DATA, {}]
    assert not page.all("link")
    script = written[2].partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in written[2]
    for _, attributes in page.tags:
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/svg+xml;base64,"))
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\((?!#)|@import", written[2].partition("</style>")[0])
    assert "default-src 'none'" in written[2]


def test_the_page_says_what_was_run_what_was_lost_and_that_it_is_synthetic(written):
    text = " ".join(" ".join(Page(written[2]).text).split())
    for words in (
        "Synthetic images.",
        "not a medical device",
        "mlp has the highest AUROC",
        "medembed sweep cache manifest.csv --out run",
        "1 image could not be embedded",
        "truncated",
        "cdcdcdcdcdcdcdcd",
        "60 studies",
        "2026-01-02",
    ):
        assert words in text, words


def test_the_same_run_gives_the_same_bytes_but_for_the_date(
    run_path, written, tmp_path, monkeypatch
):
    def digests(directory):
        files = [path for path in directory.rglob("*") if path.is_file()]
        return {
            str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        }

    drawn = []
    monkeypatch.setattr(page, "plot_all", lambda *of: drawn.extend(plot_all(*of)) or drawn)
    write_report([run_path], tmp_path, **FAST)
    assert digests(tmp_path) == digests(written[0])
    monkeypatch.setattr(page, "plot_all", lambda *_: drawn)  # which are not told of any date
    write_report([run_path], tmp_path, **FAST | {"date": datetime.date(2027, 3, 4)})
    later = (tmp_path / "index.html").read_text()
    assert later != written[2]
    assert later.replace("2027-03-04", "2026-01-02") == written[2]


def test_no_path_of_the_machine_is_in_the_page_or_its_figures(run_path, written):
    for path in written[0].rglob("*"):
        if path.is_file():
            assert str(run_path.parent).encode() not in path.read_bytes()
            assert b"/root" not in path.read_bytes()


def test_hostile_names_are_only_text(tmp_path):
    attack = "<script>alert(1)</script>"
    names = {"elbow": attack, "hand": "$\\frac{$ & \"'>", "wrist": "手_\x07"}
    images = make_images(n_patients=90)
    images["region"] = images["region"].map(names)
    left_out = [{"sha256": attack, "split": attack, "stage": attack, "reason": attack}]
    info = {"left_out": left_out, "encoder": {"source": attack}, "command": attack}
    info["data"] = {"left_out": 1, "licence": attack}
    make_run(tmp_path / "_<b>run", images, {"mlp": 1.0, "logistic": 2.0}, info=info)
    make_run(tmp_path / "other", images, {"mlp": 1.0})
    write_report([tmp_path / "_<b>run", tmp_path / "other"], tmp_path / "out", **FAST)
    text = (tmp_path / "out" / "index.html").read_text()
    page = Page(text)
    assert page.all("script") == [*DATA, {}]
    assert not page.all("b")
    assert attack in "".join(page.text)
    for attributes in page.all("img"):
        svg = base64.b64decode(attributes["src"].partition(",")[2]).decode()
        assert not re.search(r"<script|<b>|onload", svg)


def test_one_class_in_test_still_gives_a_page(tmp_path):
    images = make_images(n_patients=60)
    images.loc[images["split"] == "test", "label"] = 0
    make_run(tmp_path / "run", images, {"mlp": 1.0})
    result = write_report([tmp_path / "run"], tmp_path / "out", **FAST)
    text = (tmp_path / "out" / "index.html").read_text()
    assert "not estimable" in text
    assert not [path for path in result["figures"] if "roc" in path]


def test_a_page_in_the_place_of_another_keeps_none_of_its_figures(tmp_path):
    images = make_images(n_patients=60)
    make_run(tmp_path / "both", images, {"mlp": 1.0})
    images.loc[images["split"] == "test", "label"] = 0
    make_run(tmp_path / "one", images, {"mlp": 1.0})
    out = tmp_path / "out"
    drawn = write_report([tmp_path / "both"], out, **FAST, figures=["png"])["figures"]
    assert str(out / "figures" / "roc.png") in drawn
    (out / "figures" / "mine.png").write_text("not ours")
    again = write_report([tmp_path / "one"], out, **FAST)["figures"]
    there = sorted(str(path) for path in (out / "figures").iterdir())
    assert there == sorted([*again, str(out / "figures" / "mine.png")])


def test_figures_are_written_in_the_formats_that_are_asked_for(run_path, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "plot_all", lambda *of: [plot_roc(*of[:2])])
    suffixes = {(): ".svg and .csv", ("pdf",): ".svg, .csv and .pdf"}
    for formats in (("pdf",), ()):  # the second page keeps nothing of the first
        out = tmp_path / "out"
        write_report([run_path], out, **FAST, figures=",".join(formats) or ())
        there = {path.name for path in (out / "figures").iterdir()}
        assert there == {f"roc.{name}" for name in ("svg", "csv", *formats)}
        assert f"Also as figures/roc{suffixes[formats]}." in (out / "index.html").read_text()
    with pytest.raises(RunError, match=r"not written as 'gif'. Choose from png, pdf; SVG and CSV"):
        write_report([run_path], tmp_path / "other", figures=["gif"])
    assert not (tmp_path / "other").exists()


def test_many_heads_and_runs_still_give_figures(tmp_path):
    images = make_images(n_patients=60)
    heads = {f"head-{i}": 0.5 + i / 4 for i in range(8)}
    make_run(tmp_path / "a", images, heads)
    write_report([tmp_path / "a"], tmp_path / "out", **FAST)
    assert "The best 6 of 8 heads." in (tmp_path / "out" / "index.html").read_text()


def test_a_file_in_the_way_is_refused(run_path, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(RunError, match="is a file"):
        write_report([run_path], tmp_path / "out")


def test_drawing_leaves_the_users_settings_alone(run_path, written, tmp_path):
    import matplotlib

    with matplotlib.rc_context({"font.size": 3, "text.usetex": False}):
        write_report([run_path], tmp_path / "out", **FAST)
        assert matplotlib.rcParams["font.size"] == 3
    for name in ("roc.svg", "views.svg"):
        usual = (written[0] / "figures" / name).read_bytes()
        assert (tmp_path / "out" / "figures" / name).read_bytes() == usual


def test_only_the_last_part_of_an_absolute_path_is_public():
    assert public_name("/home/somebody/models/medgemma") == "medgemma"
    assert public_name("~/models/medgemma") == "medgemma"
    assert public_name("../models/medgemma") == "medgemma"
    assert public_name("google/medgemma-4b-pt") == "google/medgemma-4b-pt"


def test_a_home_that_cannot_be_written_says_nothing():
    nowhere = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")
    kept = {name: value for name, value in os.environ.items() if name != "MPLCONFIGDIR"}
    environment = kept | dict.fromkeys(nowhere, "/dev/null/x")
    ask = "import matplotlib; matplotlib.get_cachedir()"
    hush = "from medembed.cli.report import hush_matplotlib; hush_matplotlib(); "
    said = [
        subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, check=True
        ).stderr
        for code in (ask, hush + ask)
    ]
    assert b"temporary cache directory" in said[0]
    assert said[1] == b""
