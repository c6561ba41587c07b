"""Write the reference pages of the command line, one for each command, from click's own objects.

Sphinx calls this before it reads any page, so that a page cannot say what the help does not.
"""

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path

import click

from medembed.cli import SECTIONS, main
from medembed.cli.commands import Command, fold

__all__ = ["render_pages", "write_pages"]

WIDTH = 88
"""Columns of a block of code."""

COMMON = {
    "--json": "Print one JSON document on stdout.",
    "-q, --quiet": "Print results and errors only.",
    "-v, --verbose": "Show where an error was raised.",
    "-h, --help": "Show the help and exit.",
}
"""Options of every command, which the index alone lists."""


def write_pages(directory: Path) -> None:
    """Write all pages into `directory`; pages of commands that are gone are removed."""
    pages = render_pages()
    directory.mkdir(exist_ok=True)
    for path in directory.glob("*.md"):
        if path.name not in pages:
            path.unlink()
    for name, text in pages.items():
        path = directory / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:  # Sphinx reads it again
            path.write_text(text, encoding="utf-8")


def render_pages() -> dict[str, str]:
    """Return the text of every page, by the name of its file."""
    root = click.Context(main, info_name="medembed", **main.context_settings)
    pages = {"index.md": _render_index(SECTIONS)}
    for name in main.list_commands(root):
        command = main.get_command(root, name)
        assert command is not None
        pages[f"{name}.md"] = "\n".join(_render(command, root, name, level=1))
    return pages


def _render_index(sections: Mapping[str, Mapping[str, tuple[str, str]]]) -> str:
    lines = ["# Commands", ""]
    lines += ["Each page is the `--help` of a command. These options belong to all of them:", ""]
    for name, words in COMMON.items():
        lines += [f"`{name}`", f": {words}", ""]
    for heading, entries in sections.items():
        lines += [f"## {heading}", ""]
        for name, (_, words) in entries.items():
            lines += [f"[medembed {name}]({name}.md)", f": {words}", ""]
    names = [name for entries in sections.values() for name in entries]
    return "\n".join([*lines, ":::{toctree}", ":hidden:", "", *names, ":::", ""])


def _render(command: click.Command, parent: click.Context, name: str, level: int) -> Iterator[str]:
    context = click.Context(command, info_name=name, parent=parent)
    path = context.command_path
    yield from (f"{'#' * level} {path}", "")
    yield from (inspect.cleandoc(command.help or ""), "")
    if isinstance(command, click.Group):
        for sub in command.list_commands(context):
            found = command.get_command(context, sub)
            assert found is not None
            yield from _render(found, context, sub, level + 1)
        return
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    yield from ("```text", *fold(usage, WIDTH), "```", "")
    if isinstance(command, Command):
        yield from _render_options(command, context, level + 1)
        yield from (f"{'#' * (level + 1)} Examples", "", "```sh")
        for example in command.examples:
            yield from fold(example, WIDTH)
        yield from ("```", "")


def _render_options(command: Command, context: click.Context, level: int) -> Iterator[str]:
    yield from (f":::{{program}} {context.command_path}", ":::", "")
    for heading, records in command.grouped_options(context).items():
        own = [record for record in records if record[0] not in COMMON]
        if own:
            yield from (f"{'#' * level} {heading}", "")
        for name, words in own:
            yield from (f":::{{option}} {name}", words.replace("*", r"\*"), ":::", "")
