"""The command that a page prints: complete, without the machine's paths, and it makes that page."""

import re
import shlex
from html import unescape
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from made_runs import make_images, make_run
from PIL import Image

from medembed.cli import main
from medembed.cli.report import is_public, write_command
from medembed.dataset.manifest import make_manifest, write_manifest
from medembed.report import page
from medembed.report.figures import plot_roc
from medembed.results.comparison import compare_aligned


def printed_command(text):
    found = re.search(r"<p>This page, .*?</p>\s*<pre tabindex=\"0\"><code>(.*?)</code>", text, re.S)
    return unescape(found[1])


def compare_fast(runs, test_set, *, n_resamples, **given):
    return compare_aligned(runs, test_set, n_resamples=40, **given)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Two runs, their manifest and images, in a directory that is not the current one."""
    images = make_images(n_patients=30)
    home = tmp_path / "of somebody" / "work"
    (home / "films").mkdir(parents=True)
    make_run(home / "runs" / "sweep one", images, {"mlp": 1.0, "logistic": 1.5})
    make_run(home / "runs" / "depths", images, {"mlp": 1.2}, seed=2)
    Image.new("L", (8, 8), 9).save(home / "films" / "a.png")
    table = images.assign(image=[f"{k}.png" for k in range(len(images))]).drop(columns="fold")
    write_manifest(make_manifest(table.astype(str), "study"), home / "m.csv")
    # one figure drawn twice shows what ten do, and few resamples what many do
    monkeypatch.setattr(page, "compare_aligned", compare_fast)
    monkeypatch.setattr(page, "plot_all", lambda result, test_set, *_: [plot_roc(result, test_set)])
    return home


def report(*words):
    ran = CliRunner().invoke(main, ["report", *words])
    assert ran.exit_code == 0, ran.output
    out = Path(words[words.index("-o") + 1])
    return (out / "index.html").read_text()


@pytest.mark.parametrize(
    "given",
    [
        ["runs/sweep one", "-o", "report"],
        ["runs/sweep one", "runs/depths", "-o", "out/page", "--level", "image", "--seed", "3",
         "--manifest", "m.csv", "--image-root", "films", "--names", "--margin", "0.02",
         "--checklist", "claim"],
        ["./runs/depths", "-o", "report"],
    ],
    ids=["plain", "everything", "dotted"],
)  # fmt: skip
def test_the_printed_command_makes_the_same_page(place, monkeypatch, given):
    monkeypatch.chdir(place)
    first = report(*given)
    command = shlex.split(printed_command(first))
    assert command[:2] == ["medembed", "report"]
    for option in given:
        if option.startswith("--"):
            assert option in command
    files = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    second = report(*command[2:])
    assert second == first
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == files


def test_paths_of_the_machine_stay_out_and_the_command_runs_beside_the_runs(place, monkeypatch):
    monkeypatch.chdir(place.parent)
    given = [str(place / "runs" / "sweep one"), "work/runs/depths", "-o", str(place / "out")]
    first = report(*given)
    assert "of somebody" not in first
    command = shlex.split(printed_command(first))
    assert command[2:4] == ["sweep one", "depths"]
    monkeypatch.chdir(place / "runs")
    assert report(*command[2:]) == first


def test_runs_of_one_name_are_told_apart_by_their_directories(place, monkeypatch):
    images = make_images(n_patients=30)
    for site in ("a", "b"):
        make_run(place / site / "sweep", images, {"mlp": 1.0})
    monkeypatch.chdir(place / "runs")
    text = report("../a/sweep", str(place / "b" / "sweep"), "-o", "../page")
    command = shlex.split(printed_command(text))
    assert command[2:] == ["a/sweep", "b/sweep", "-o", "page", "--level", "study", "--seed", "0"]
    monkeypatch.chdir(place)
    assert report(*command[2:]) == text


@pytest.mark.parametrize(
    ("path", "expected"),
    [("a", True), ("a/b c", True), ("/a", False), ("~/a", False), ("../a", False), (".", False)],
)
def test_only_relative_paths_below_are_public(path, expected):
    assert is_public(Path(path)) is expected


def test_options_of_every_kind_are_written_again():
    path = click.Path(path_type=Path)

    @click.command("do")
    @click.argument("runs", type=path, nargs=-1)
    @click.option("-k", "--keep", is_flag=True)
    @click.option("--drop", is_flag=True)
    @click.option("--by", multiple=True)
    @click.option("--margin", type=float)
    @click.option("--file", type=path)
    @click.option("--json", "as_json", is_flag=True)
    @click.pass_context
    def command(context, **_):
        click.echo(write_command(context))

    group = click.Group("medembed", commands=[command])
    words = ["do", "a", "--", "-x"]
    options = ["-k", "--by", "age:0-5", "--by", "sex", "--margin", "0.02", "--file", "/q/f g.csv"]
    ran = CliRunner().invoke(group, [*words[:1], *options, "--json", *words[1:]])
    assert ran.output == (
        "medembed do a ./-x -k --by age:0-5 --by sex --margin 0.02 --file 'f g.csv'\n"
    )
