"""`medembed run`: from images to a page, by the commands that it prints."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from medembed.cli import main
from medembed.encoders.hub import resolve_checkpoint

FAST = {
    "MEDEMBED_SWEEP_HEADS": "logistic",
    "MEDEMBED_SWEEP_CONFIGS": "1",
    "MEDEMBED_SWEEP_FOLDS": "2",
}


def run(*arguments: object, **environment: str) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], env={**FAST, **environment})


def steps(result: Result) -> list[list[str]]:
    return [shlex.split(line)[2:] for line in result.stderr.splitlines() if line.startswith("$ ")]


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of synthetic squares, the abnormal ones brighter."""
    root = tmp_path_factory.mktemp("run") / "films"
    generator = np.random.default_rng(0)
    for label, name in enumerate(("normal", "abnormal")):
        (root / name).mkdir(parents=True)
        for number in range(30):
            pixels = generator.integers(60 * label, 120 + 60 * label, (32, 32), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def first(films: Path) -> Result:
    return run("run", films, "--encoder", "demo", "-o", films.parent / "out", "--jobs", 1)


def test_a_folder_per_class_becomes_a_page(films: Path, first: Result) -> None:
    assert first.exit_code == 0, first.output
    names = [words[0] for words in steps(first)]
    assert names == ["manifest", "manifest", "doctor", "extract", "sweep", "report"]
    out = films.parent / "out"
    assert (out / "report" / "index.html").is_file()
    assert {path.name for path in out.iterdir()} >= {"recipe.toml", "manifest.csv", "cache", "runs"}
    last = first.stderr.splitlines()[-1]
    assert last == f"Next: medembed predict {out / 'runs' / 'sweep'} IMAGE --encoder demo"
    assert first.stderr.count("Next:") == 1


def test_every_step_is_a_command_that_can_be_given_by_itself(films: Path, first: Result) -> None:
    for words in steps(first)[3:]:
        again = run(*words)
        assert again.exit_code == 0, again.output


def test_a_second_run_goes_on_from_what_is_there(films: Path, first: Result) -> None:
    out = films.parent / "out"
    before = {p: p.read_bytes() for p in out.rglob("*") if p.suffix in (".toml", ".h5", ".parquet")}
    again = run("run", films, "--encoder", "demo", "-o", out, "--jobs", 1, "--json")
    assert again.exit_code == 0, again.output
    document = json.loads(again.stdout)
    assert document == {
        "recipe": str(out / "recipe.toml"),
        "manifest": str(out / "manifest.csv"),
        "cache": str(out / "cache"),
        "run": str(out / "runs" / "sweep"),
        "report": str(out / "report"),
    }
    assert steps(again)[0][:2] == ["manifest", "build"]
    assert re.search(r"\b0 embedded, 60 already there", again.stderr)
    assert {path: path.read_bytes() for path in before} == before


def test_a_manifest_needs_no_recipe(films: Path, first: Result, tmp_path: Path) -> None:
    manifest = films.parent / "out" / "manifest.csv"
    result = run("run", manifest, "--image-root", films, "--encoder", "demo", "-o", tmp_path, "-q")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert not (tmp_path / "manifest.csv").exists()
    assert (tmp_path / "report" / "index.html").is_file()


def test_the_same_command_with_its_options_goes_on(films: Path, tmp_path: Path) -> None:
    command = ["run", films, "--encoder", "demo", "-o", tmp_path / "out", "-q"]
    options = ["--abnormal", "abnormal", "--test-fraction", "0.3"]
    assert run(*command, *options).exit_code == 0
    again = run(*command, *options)
    assert again.exit_code == 0, again.output
    other = run(*command, *options[:2])
    assert other.exit_code == 2
    assert "recipe.toml already exists" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{out}/manifest.csv", "-o", "{new}"], "--image-root"),
        (["mura", "-o", "{new}"], "--image-root"),
        (["{films}", "-o", "{out}", "--abnormal", "normal"], "recipe.toml already exists"),
        (["{out}/manifest.csv", "--image-root", "{films}", "-o", "{new}", "--label", "x"],
         "is a manifest"),
        (["{out}/recipe.toml", "--image-root", "{films}", "-o", "{new}", "--label", "x"],
         "is a recipe"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_wrong_usage(
    films: Path, first: Result, tmp_path: Path, arguments: list[str], words: str
) -> None:
    names: dict[str, Any] = {"films": films, "out": films.parent / "out", "new": tmp_path}
    result = run("run", *(a.format(**names) for a in arguments), "--encoder", "demo")
    assert result.exit_code == 2, result.output
    assert words in result.stderr


def test_a_step_that_fails_ends_the_run_with_its_error(films: Path, tmp_path: Path) -> None:
    result = run("run", films, "--encoder", tmp_path / "none", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert [words[0] for words in steps(result)][-1] == "doctor"
    assert not (tmp_path / "out" / "cache").exists()
    missing = run("run", tmp_path / "nothing.csv", "--image-root", films, "--encoder", "demo",
                  "-o", tmp_path / "out2")  # fmt: skip
    assert missing.exit_code == 1
    assert "nothing.csv" in missing.stderr
    bare = run("run", tmp_path / "nothing", "--encoder", "demo", "-o", tmp_path / "out3")
    assert bare.exit_code == 1
    assert "nothing does not exist. Give a folder of images" in bare.stderr
    assert not (tmp_path / "out3").exists()


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_nothing_to_embed_is_told_without_loading_torch(
    films: Path, first: Result, more: list[str]
) -> None:
    code = (
        "import sys\nfrom medembed.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as end: assert end.code == 0\n"
        "print('torch' in sys.modules)"
    )
    words = next(words for words in steps(first) if words[0] == "extract")
    command = [sys.executable, "-c", code, *words, *more]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "0 embedded, 60 already there" in done.stderr.replace("would be ", "")
    assert "images/s" not in done.stderr


def test_a_dry_run_without_a_cache_answers_without_loading_torch(
    films: Path, first: Result, tmp_path: Path
) -> None:
    words = next(words for words in steps(first) if words[0] == "extract")
    place = words.index("--cache") + 1
    words = [*words[:place], str(tmp_path / "new"), *words[place + 1 :], "--dry-run"]
    end, said = end_of(words)
    assert end == "0 False", said
    assert "60 would be embedded, 0 already there" in said
    assert "medembed doctor --encoder demo" in said
    assert not (tmp_path / "new").exists()
    hub = ["google/medgemma-4b-pt" if word == "demo" else word for word in words]
    assert end_of(hub)[0] == "0 False"  # the hub is not asked
    empty = tmp_path / "no-checkpoint"
    empty.mkdir()
    wrong = (("--encoder", "no-such-directory"), ("--encoder", str(empty)), ("--pool", "median"))
    for name, value in wrong:  # the last of equal options counts
        end, said = end_of([*words, name, value])
        assert end == "1 False"
        assert Path(value).name in said


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hidden_size", 64, "rows of {} columns, and {} has 64"),
        ("image_size", 64, "images of 128 x 128 pixels, and {1} has 64 x 64"),
    ],
)
def test_an_encoder_of_another_size_is_refused_before_torch(
    first: Result, tmp_path: Path, key: str, value: int, words: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(resolve_checkpoint("demo").path, other)
    config = json.loads((other / "config.json").read_text())
    width = config["vision_config"]["hidden_size"]
    config["vision_config"][key] = value
    (other / "config.json").write_text(json.dumps(config))
    if key == "image_size":
        processor = other / "preprocessor_config.json"
        size = {"size": {"height": value, "width": value}}
        processor.write_text(json.dumps(json.loads(processor.read_text()) | size))
    command = [
        str(other) if word == "demo" else word
        for word in next(words for words in steps(first) if words[0] == "extract")
    ]
    end, said = end_of(command)
    assert end == "1 False"
    assert words.format(width, other) in " ".join(said.split())
    shutil.rmtree(other)
    shutil.copytree(resolve_checkpoint("demo").path, other)
    assert end_of(command)[0] == "0 True"  # the same tower under another name: it has to be loaded


def end_of(words: list[str]) -> tuple[str, str]:
    """Run a command in a process; return its exit code with whether torch loaded, and stderr."""
    code = (
        "import sys\nfrom medembed.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1], done.stderr


def test_an_encoder_that_did_not_make_the_cache_is_refused_by_name(
    films: Path, first: Result
) -> None:
    words = next(words for words in steps(first) if words[0] == "extract")
    other = ["google/medgemma-4b-pt" if word == "demo" else word for word in words]
    result = run(*other)
    assert result.exit_code == 1
    assert "was made by demo, and you asked for google/medgemma-4b-pt" in result.stderr


def test_a_request_that_the_record_does_not_settle_asks_the_encoder(
    films: Path, first: Result
) -> None:
    words = next(words for words in steps(first) if words[0] == "extract")
    for more in (["--pool", "mean"], ["--dtype", "float32"], ["--fit", "pad"]):
        result = run(*words, *more)
        assert result.exit_code == 1, more
        assert "was made by demo with" in result.stderr
