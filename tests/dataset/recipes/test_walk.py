"""What of an image root cannot be seen is said, and what has several names counts once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from made_dicom import DEEP, dataset, write
from made_recipes import FOLDERS, HEAD, LABELS, STUDIES, TABLE, folder_tree, image, write_mura

from medembed.core.errors import RecipeError
from medembed.dataset.recipes.build import BuildReport, build_manifest, load_recipe
from medembed.dataset.recipes.image_index import ImageIndex, plain_path

DICOM = HEAD + 'layout = "dicom"\nlabel_level = "study"\n[split]\nfraction = 0.4\n'
LAYOUTS = ("table", "folders", "mura", "dicom")


def lay_out(layout: str, folder: Path) -> tuple[str, Path]:
    """Write a small data set, with a folder `sub` of which one image is the whole content."""
    root = folder / "root"
    if layout == "table":
        for i, name in enumerate(["one/a.png", "two/b.png", "deep/c.png"]):
            image(root / name, i)
        (root / "labels.csv").write_text(LABELS)
        return TABLE, root / "two"
    if layout == "folders":
        return FOLDERS, folder_tree(root) / "test/wrist"
    if layout == "mura":
        root.mkdir()
        write_mura(root, STUDIES)
        return "mura", root / "valid/XR_WRIST/patient11185"
    for i in range(3):
        made = dataset(DEEP + i, BitsStored=13, PatientID=f"p{i}", StudyInstanceUID=f"1.2.{i}")
        (root / f"p{i}").mkdir(parents=True)
        (root / f"p{i}/IM").write_bytes(write(made))
    return DICOM, root / "p2"


def build(folder: Path, recipe: str, **options: Any) -> BuildReport:
    path = folder / "recipe.toml"
    path.write_text(recipe)
    loaded = load_recipe("mura" if recipe == "mura" else path)
    return build_manifest(loaded, folder / "root", **options)


BUILD_EACH = """
import json, sys
from click.testing import CliRunner
from medembed.cli import main
for folder, recipe in json.loads(sys.argv[1]):
    options = ["--image-root", f"{folder}/root", "-o", f"{folder}/m.csv", "--json"]
    done = CliRunner().invoke(main, ["manifest", "build", recipe, *options])
    print(json.dumps([done.exit_code, json.loads(done.stdout)["warnings"], done.stderr]))
"""


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, ...]]:
    """Build each layout with a closed folder and a closed file; permissions do not bind root."""
    made, named, every = [], [], []
    for layout in LAYOUTS:
        home = tmp_path_factory.mktemp(layout)
        recipe, folder = lay_out(layout, home)
        (home / "recipe.toml").write_text(recipe)
        made.append((str(home), recipe if recipe == "mura" else str(home / "recipe.toml")))
        files = (path for path in sorted((home / "root").glob("*/**/*")) if path.is_file())
        file = next(path for path in files if not path.is_relative_to(folder))
        named.append([str(path.relative_to(home / "root")) for path in (folder, file)])
        every += [folder, file]
    command = [sys.executable, "-c", BUILD_EACH, json.dumps(made)]
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root may read everything, and there is no setpriv to give that up")
        rights = "-dac_override,-dac_read_search"
        command = ["setpriv", "--bounding-set", rights, "--inh-caps", rights, *command]
    modes = [path.stat().st_mode for path in every]
    for path in every:
        path.chmod(0)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        for path, mode in zip(every, modes, strict=True):
            path.chmod(mode)
    assert done.returncode == 0, done.stderr
    results = map(json.loads, done.stdout.splitlines())
    return {x: (*y, *z) for x, y, z in zip(LAYOUTS, named, results, strict=True)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_cannot_be_read_is_named_in_every_layout(
    closed: dict[str, tuple[Any, ...]], layout: str
) -> None:
    folder, file, code, warnings, said = closed[layout]
    assert code == 0
    for expected in (
        f"1 place below the image root is unreadable, and may hold more: {folder} "
        "(Permission denied)",
        f"1 file cannot be read and was left out: {file} (Permission denied)",
    ):
        assert expected in warnings
        assert f"Warning: {expected}\n" in said


def test_a_file_that_cannot_be_read_is_left_out_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = lay_out("folders", tmp_path)
    (gone,) = (path for path in folder.rglob("*") if path.is_file())
    whole, listed = gone.read_bytes(), ImageIndex.__init__

    def list_and_remove(self: ImageIndex, *arguments: Any, **options: Any) -> None:
        listed(self, *arguments, **options)
        gone.unlink()  # between the walk and the hash

    monkeypatch.setattr(ImageIndex, "__init__", list_and_remove)
    with pytest.raises(RecipeError, match="1 file cannot be read and was left out"):
        build(tmp_path, recipe, strict=True)
    gone.write_bytes(whole)
    report = build(tmp_path, recipe)
    name = gone.relative_to(tmp_path / "root").as_posix()
    assert report.excluded == [(name, "cannot be read: No such file or directory")]
    assert report.warnings[0].startswith("1 file cannot be read and was left out: ")
    assert len(report.manifest.rows) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_link_out_of_the_root_is_named_and_not_followed(tmp_path: Path, layout: str) -> None:
    recipe, folder = lay_out(layout, tmp_path)
    whole = len(build(tmp_path, recipe).manifest.rows)
    shutil.move(folder, tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    report = build(tmp_path, recipe)
    assert len(report.manifest.rows) == whole - 1
    name = folder.relative_to(tmp_path / "root")
    said = f"1 link out of the image root is not followed.*: {name}"
    assert any(warning.endswith(f": {name}") for warning in report.warnings)
    with pytest.raises(RecipeError, match=said):
        build(tmp_path, recipe, strict=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_behind_a_link_within_the_root_is_entered(tmp_path: Path, layout: str) -> None:
    recipe, folder = lay_out(layout, tmp_path)
    whole = build(tmp_path, recipe).manifest.rows[["image", "sha256"]]
    store = tmp_path / "root/.store"
    shutil.move(folder, store)
    folder.symlink_to(store)  # absolute
    (tmp_path / "root/.again").symlink_to(".store")
    (store / "back").symlink_to("..")  # a circle
    (store / "here").symlink_to(".")
    report = build(tmp_path, recipe)
    assert report.manifest.rows[["image", "sha256"]].equals(whole)
    assert not [warning for warning in report.warnings if "link" in warning or "not in" in warning]


@pytest.mark.parametrize("layout", ["table", "dicom"])
def test_a_second_name_of_a_folder_gives_no_image_twice(tmp_path: Path, layout: str) -> None:
    recipe, folder = lay_out(layout, tmp_path)
    whole = build(tmp_path, recipe).manifest.rows
    for name in ("alpha", "omega"):
        (tmp_path / "root" / name).symlink_to(folder.name)
    rows = build(tmp_path, recipe).manifest.rows
    assert rows[["image", "sha256"]].equals(whole[["image", "sha256"]])


def test_folders_that_link_to_each_other_are_entered_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path.resolve()
    for i, name in enumerate(("a", "b", ".c")):
        image(root / name / f"{i}.png", i)
    for name in ("a", "b", ".c"):
        for other in ("a", "b", ".c"):
            (root / name / f"to{other}").symlink_to(f"../{other}")
    entered: list[str] = []
    scan = os.scandir

    def count(path: str) -> Any:
        entered.append(path)
        assert len(entered) < 100, "it goes round in circles"
        return scan(path)

    monkeypatch.setattr("os.scandir", count)
    index = ImageIndex(root)
    assert index.paths == {"a/0.png", "b/1.png", "a/to.c/2.png"}
    assert index.unseen == []
    assert len(entered) == 1 + 2 + 3  # the root, its folders, and each behind a link


def test_of_two_names_a_pattern_takes_the_one_that_fits(tmp_path: Path) -> None:
    root = folder_tree(tmp_path / "root")
    store = root / "all"
    shutil.move(root / "test/wrist", store)
    (root / "test/wrist").symlink_to("../all")
    report = build(tmp_path, FOLDERS)
    assert report.manifest.rows["image"][0] == "test/wrist/p2/s1_bad/1.png"
    assert not [warning for warning in report.warnings if "not in the pattern" in warning]


def test_names_of_one_file_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    root = folder_tree(tmp_path / "root")
    (root / "train/knee").symlink_to("../test/wrist")
    said = r"train/knee/p2/s1_bad/1.png is the file test/wrist/.*, but for its region, study, split"
    with pytest.raises(RecipeError, match=said):
        build(tmp_path, FOLDERS)


def test_links_to_nowhere_and_what_is_no_file_are_named(tmp_path: Path) -> None:
    recipe, _ = lay_out("table", tmp_path)
    (tmp_path / "root/unmounted").symlink_to(tmp_path / "not there")
    (tmp_path / "root/circle").symlink_to("circle")
    os.mkfifo(tmp_path / "root/pipe.png")
    os.mkfifo(tmp_path / "root/pipe.txt")
    warnings = build(tmp_path, recipe).warnings
    assert "1 link to nowhere is passed by: unmounted" in warnings
    (said,) = (warning for warning in warnings if "unreadable" in warning)
    assert said.startswith("2 places below the image root are unreadable")
    assert "circle (Too many levels of symbolic links)" in said
    assert "pipe.png (neither a file nor a folder)" in said


def test_a_link_to_a_file_counts_as_the_file(tmp_path: Path) -> None:
    recipe, folder = lay_out("table", tmp_path)
    (tmp_path / "root/latest.png").symlink_to("two/b.png")
    (folder / "b.png").rename(folder / ".b")
    (folder / "b.png").symlink_to(".b")  # as git-annex does
    index = ImageIndex((tmp_path / "root").resolve())
    assert index.paths == {"deep/c.png", "latest.png", "one/a.png"}
    assert index.others == {"two/b.png": "latest.png"}
    assert index.find("b") == index.find("two/b.png") == index.find(".//latest.png")
    rows = build(tmp_path, recipe).manifest.rows
    assert rows["image"].tolist() == ["deep/c.png", "latest.png", "one/a.png"]


def test_folders_to_search_that_are_not_there_are_named(tmp_path: Path) -> None:
    recipe, _ = lay_out("table", tmp_path)
    (tmp_path / "root/deep").rename(tmp_path / "root/.deep")
    (tmp_path / "root/deep").symlink_to(".deep")
    below = 'below = ["one", "./two/", "deep", "images_part9"]\n[region]'
    report = build(tmp_path, recipe.replace("[region]", below))
    assert len(report.manifest.rows) == 3
    said = "1 folder of `below` in [table] is not below the image root: images_part9"
    assert report.warnings[0] == said
    assert build(tmp_path, recipe, structure_only=True).warnings[0] != said


def test_a_file_that_the_walk_passes_by_is_found_by_its_path(tmp_path: Path) -> None:
    root = tmp_path.resolve()
    image(root / ".hidden/a.png", 1)
    image(root / "seen/b.png", 2)
    (root / "scan").write_bytes(b"any")
    index = ImageIndex(root)
    assert index.paths == {"seen/b.png"}
    assert index.find(".hidden/a.png") == [".hidden/a.png"]
    assert index.find("scan") == ["scan"]
    assert index.find(str(root / "seen/b.png")) == ["seen/b.png"]
    assert index.find("seen/../seen/b.png") == ["seen/b.png"]
    for value in ("", ".", "seen", "a.png", "../x", "/etc/hostname", "\0", "x" * 5000):
        assert index.find(value) == []


def test_a_root_that_cannot_be_listed_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=r"cannot be read: Not a directory"):
        ImageIndex(tmp_path / "file")


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("a\\b\\c.png", "a/b/c.png"),
        ("./a//b/./c.png", "a/b/c.png"),
        (" a / c.png\u00a0", "a/c.png"),
        ("e\u0301.png\u200b", "\u00e9.png"),
        ("\\\\server\\c.png", "/server/c.png"),
        ("../c.png", "../c.png"),
        ("", ""),
    ],
)
def test_paths_are_compared_in_one_spelling(text: str, plain: str) -> None:
    assert plain_path(text) == plain
    assert plain_path(plain) == plain
