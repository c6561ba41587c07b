"""The command as a person meets it: help, exit status, one JSON document, one clear error."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli_commands import COMMANDS
from click.testing import CliRunner, Result
from doc_pages import PAGES, ROOT

from medembed.cli import main


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_json_and_a_place_in_the_docs(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    assert "--json" in [option for param in command.params for option in param.opts]
    assert any(name in page.read_text(encoding="utf-8") for page in PAGES)
    assert run(*name.split()[1:], "--help").exit_code == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_line_of_help_fits_a_terminal(name: str) -> None:
    help_text = run(*name.split()[1:], "--help").output
    assert max(len(line) for line in help_text.splitlines()) <= 80


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_page_names_a_command_that_is_not_there(page: Path) -> None:
    named = set(re.findall(r"`(medembed(?: [a-z]+)+)", page.read_text(encoding="utf-8")))
    known = {f"{name} " for name in COMMANDS}
    for words in (f"{name} " for name in named):  # a command with arguments, or a group
        assert any(words.startswith(k) or k.startswith(words) for k in known), words


def test_every_make_target_is_listed_with_its_help() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):(?!=)", makefile, re.MULTILINE))
    outside = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    listed = subprocess.run(
        ["make"], cwd=ROOT, env=outside, capture_output=True, text=True, check=True
    ).stdout
    assert targets == {line.split()[0] for line in listed.splitlines()}


def test_wrong_usage_exits_with_2() -> None:
    assert run("extract").exit_code == 2
    assert run("sweep", "cache", "m.csv", "--out", "r", "--heads", "mlp,,").exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("manifest", "build", "mura", "--image-root", "{absent}", "-o", "{out}"),
        ("manifest", "check", "{absent}"),
        ("extract", "{absent}", "--image-root", ".", "--encoder", "demo", "--cache", "{out}"),
        ("cache", "info", "{absent}"),
        ("cache", "verify", "{absent}"),
        ("sweep", "{absent}", "{absent}", "--out", "{out}"),
        ("compare", "{absent}"),
        ("report", "{absent}", "-o", "{out}"),
    ],
)
def test_a_path_that_is_not_there_is_one_clear_error(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    absent, out = tmp_path / "no such thing", tmp_path / "out.csv"
    result = run(*(argument.format(absent=absent, out=out) for argument in arguments))
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert "no such thing" in result.output
    assert not out.exists()


def test_an_error_leaves_no_traceback_in_a_real_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "medembed", "cache", "info", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr


def test_json_is_the_only_thing_on_stdout(shared_data: Path, tmp_path: Path) -> None:
    root, out = shared_data / "grazpedwri", tmp_path / "m.csv"
    arguments = ("--image-root", root, "-o", out, "--structure-only", "--json")
    result = run("manifest", "build", ROOT / "data_manifests" / "grazpedwri.toml", *arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["images"], document["patients"]) == (20_327, 6_091)
    assert document["abnormal"] == 13_550
    assert set(document) >= {"images", "studies", "patients", "abnormal", "excluded", "warnings"}


def test_ctrl_c_says_what_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("medembed.cache.store.open_cache", interrupt)
    result = run("cache", "info", tmp_path)
    assert result.exit_code == 130
    assert "same command" in result.output
    assert "Aborted" not in result.output


def test_a_bad_destination_is_refused_before_any_hashing(shared_data: Path, tmp_path: Path) -> None:
    for name in ("m.txt", "no/m.csv"):
        out = tmp_path / name
        result = run("manifest", "build", "fracatlas", "--image-root", shared_data, "-o", out)
        assert result.exit_code == 1
        assert "Hashing" not in result.output
