"""Help, examples, suggestions, and the options that every command has."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from cli_commands import COMMANDS
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from medembed.cli import SECTIONS, main
from medembed.cli.commands import Command, Sections, fold
from medembed.cli.sweep import METRICS
from medembed.evaluation.scores import SCORES
from medembed.heads.registry import HEADS


def run(*arguments: object, **settings: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], **settings)


def test_the_help_lists_every_command_whole() -> None:
    shown = run("--help", terminal_width=80).output.splitlines()
    listed = {line.split()[0]: line for line in shown if line.startswith("  ") and line.split()}
    for entries in SECTIONS.values():
        for name, (_, words) in entries.items():
            assert listed[name].endswith(words), f"the line of {name} is cut or folded"


def test_the_help_imports_no_command() -> None:
    code = (
        "import sys, medembed.cli as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in sys.modules if m.startswith('medembed.cli.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['medembed.cli.console', 'medembed.cli.commands']"


def test_every_command_lies_in_its_own_file() -> None:
    for entries in SECTIONS.values():
        assert all(file == name for name, (file, _) in entries.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_examples_that_it_takes(name: str) -> None:
    command = COMMANDS[name]
    assert isinstance(command, Command)
    assert command.examples
    own = [
        shlex.split(line.split(" > ")[0])[len(name.split()) :]
        for line in command.examples
        if line.startswith(f"{name} ") or line == name
    ]
    assert own or name == "medembed completion"
    for arguments in own:
        command.make_context(name, arguments)  # raises what the command line would


@pytest.mark.parametrize("group", ["", "audit", "cache", "manifest"])
def test_groups_show_examples_of_their_commands(group: str) -> None:
    shown = run(*group.split(), "--help").output.partition("Examples:\n")[2]
    examples = re.findall(r"^  (medembed .*)$", shown, re.M)
    assert examples
    for example in examples:
        words = shlex.split(example)[1:]
        assert words[: len(group.split())] == group.split()
        _, command, rest = main.resolve_command(main.make_context("medembed", ["-"]), words)
        if group:
            assert isinstance(command, click.Group)
            _, command, rest = command.resolve_command(click.Context(command), rest)
        assert command is not None
        if rest != ["--help"]:
            command.make_context(example, rest)  # raises what the command line would


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("width", [60, 80])
def test_no_line_of_the_help_ends_within_a_word(name: str, width: int) -> None:
    shown = run(*name.split()[1:], "--help", terminal_width=width).output
    assert not [line for line in shown.splitlines() if re.search(r"\w-$", line)]
    assert "\u2011" not in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_headings_of_options_name_options_and_leave_none_out(name: str) -> None:
    command = COMMANDS[name]
    assert isinstance(command, Command)
    options = [p for p in command.params if isinstance(p, click.Option)]
    long = {max(option.opts, key=len).removeprefix("--") for option in options}
    named = [option for names in command.sections.values() for option in names]
    assert len(named) == len(set(named))
    assert set(named) <= long
    shown = run(*name.split()[1:], "--help").output
    assert all(f"--{option}" in shown for option in long)


def test_an_option_without_help_is_noticed() -> None:
    bare = [
        f"{name} {parameter.opts[0]}"
        for name, command in COMMANDS.items()
        for parameter in command.params
        if isinstance(parameter, click.Option) and not parameter.help
    ]
    assert bare == []


def test_a_misspelt_command_is_answered_with_the_nearest() -> None:
    result = run("sweeep", "cache")
    assert result.exit_code == 2
    assert "Did you mean sweep?" in result.output
    assert "Did you mean verify?" in run("cache", "verfy").output
    assert "Did you mean" not in run("zzz").output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_that_completes(shell: str) -> None:
    script = run("completion", shell).output
    assert "_MEDEMBED_COMPLETE" in script
    assert json.loads(run("completion", shell, "--json").output)["script"].strip() == script.strip()
    asked = {"_MEDEMBED_COMPLETE": "bash_complete", "COMP_WORDS": "medembed sw", "COMP_CWORD": "1"}
    found = CliRunner().invoke(main, env=asked, prog_name="medembed")
    assert found.output.split() == ["plain,sweep"]


def test_environment_variables_set_options(tmp_path: Path) -> None:
    result = run("plan", "--auroc", "0.9", "--width", "0.05", env={"MEDEMBED_PLAN_PREVALENCE": "2"})
    assert result.exit_code != 0
    assert "2" in result.output
    given = run("plan", "--auroc", "0.9", "--width", "0.05", env={"MEDEMBED_PLAN_PREVALENCE": ".4"})
    assert given.exit_code == 0, given.output


@pytest.mark.parametrize("name", COMMANDS)
def test_a_variable_is_named_as_its_option_is_written(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--patients` of `demo` is MEDEMBED_DEMO_PATIENTS, whatever the code calls it."""
    command, prefix = COMMANDS[name], re.sub(r"\W", "_", name.upper())
    context = command.make_context(
        name.split()[-1], [], resilient_parsing=True, auto_envvar_prefix=prefix
    )
    for option in command.params:
        if isinstance(option, click.Option):
            long = max(option.opts, key=len).removeprefix("--")
            monkeypatch.setenv(re.sub(r"\W", "_", f"{prefix}_{long}".upper()), "planted")
            assert option.resolve_envvar_value(context) == "planted", long


def test_quiet_prints_results_and_errors_only(tmp_path: Path) -> None:
    command = ["manifest", "check", str(tmp_path / "none.csv")]
    assert "Error: " in run(*command, "-q").output
    assert run(*command, "-q").exit_code == run(*command).exit_code == 1
    loud = run("doctor")
    quiet = run("doctor", "--quiet")
    assert "Next: medembed extract" in loud.stderr
    assert quiet.stderr.replace("Error", "") == quiet.stderr or loud.exit_code
    assert "Next" not in quiet.stderr
    assert quiet.stdout == loud.stdout


def test_verbose_shows_where_an_error_was_raised(tmp_path: Path) -> None:
    command = ["cache", "info", str(tmp_path / "none")]
    assert "Traceback" not in run(*command).output
    shown = run(*command, "-v")
    assert "Traceback (most recent call last)" in shown.output
    assert shown.exit_code == 1


@pytest.mark.parametrize(
    ("command", "former", "name"),
    [
        (["sweep", "c", "m"], ["--out", "run"], "out"),
        (["evaluate", "model", "c", "m"], ["--out", "run"], "out"),
        (["report", "run"], ["--out", "page"], "output"),
        (["cache", "export", "c", "m"], ["--out", "rows.csv"], "out_path"),
    ],
)
def test_former_spellings_of_options_stay(command: list[str], former: list[str], name: str) -> None:
    whole = next(one for one in COMMANDS if " ".join(command).startswith(one[len("medembed ") :]))
    arguments = command[len(whole.split()) - 1 :]
    for spelling in (former[0], "-o", "--output"):
        context = COMMANDS[whole].make_context(whole, [*arguments, spelling, former[1]])
        assert context.params[name] == Path(former[1])


def test_former_names_of_backends_stay() -> None:
    sweep = COMMANDS["medembed sweep"].make_context(
        "sweep", ["c", "m", "-o", "r", "--backend", "loky"]
    )
    assert sweep.params["backend"] == "local"
    needed = ["m", "--image-root", "i", "--encoder", "demo", "--cache", "c"]
    extract = COMMANDS["medembed extract"].make_context("extract", [*needed, "--engine", "ray"])
    assert extract.params["engine"] == "ray"


WORDS = st.lists(st.from_regex(r"(--?)?[a-z./=,+]{1,30}", fullmatch=True), min_size=1, max_size=12)


@given(WORDS, st.integers(20, 100))
def test_a_folded_command_is_the_same_command(words: list[str], width: int) -> None:
    lines = fold(" ".join(words), width)
    joined = " ".join(line.removesuffix("\\").strip() for line in lines)
    assert joined.split() == words
    assert all(line.endswith(" \\") for line in lines[:-1])
    assert all(len(line) <= width or len(line.split()) <= 4 for line in lines)


def test_a_group_of_sections_is_a_group_of_click() -> None:
    assert isinstance(main, Sections)
    assert main.get_command(click.Context(main), "nothing") is None
    assert len(main.list_commands(click.Context(main))) == len(set(main.entries))


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "medembed completion"])
def test_every_command_says_at_once_what_it_begins_with(name: str) -> None:
    command = COMMANDS[name]
    assert isinstance(command, Command)
    assert command.starting


def test_the_help_names_every_metric_and_head() -> None:
    assert METRICS == SCORES
    shown = " ".join(run("sweep", "--help", terminal_width=80).output.split())
    assert all(name in shown for name in (*SCORES, *HEADS))
