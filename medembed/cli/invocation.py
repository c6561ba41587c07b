"""The command that was given, as a page may print it: complete, and without a machine's paths."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

__all__ = ["is_public", "write_command"]

_SILENT = {"as_json"}
"""Parameters that change what is printed and not what is made."""


def write_command(context: click.Context) -> str:
    """Write the command of a context again, with every option that has a value.

    Relative paths stand as they were given. Of a path that says where on the machine it lies
    (absolute, from home, or upwards) the last part stands; of several arguments, as much of their
    ends as tells them apart. So the command works from the directory that holds what it names.
    """
    words, given = context.command_path.split()[1:], context.params
    arguments, options = [], []
    for parameter in context.command.params:
        value = given.get(parameter.name or "")
        if parameter.name in _SILENT or value is None or value is False or value == ():
            continue
        if isinstance(parameter, click.Argument):
            several = value if isinstance(value, tuple) else (value,)
            arguments += _name_all(several)
        else:
            options += list(_option(parameter, value))
    return shlex.join(["medembed", *words, *arguments, *options])


def is_public(path: Path) -> bool:
    """Tell whether a path says nothing of the machine: relative, and neither from home nor up."""
    return not (path.is_absolute() or ".." in path.parts or str(path).startswith(("~", ".")))


def _option(parameter: click.Parameter, value: Any) -> Iterator[str]:
    name = parameter.opts[0]
    for own in value if isinstance(value, tuple) else (value,):
        yield name
        if own is not True:
            yield _name_all([own])[0]


def _name_all(values: Sequence[Any]) -> list[str]:
    """Return values as words; paths as they are where all are public, else the ends of all."""
    paths = [value for value in values if isinstance(value, Path)]
    if len(paths) < len(values) or all(map(is_public, paths)):
        words = [str(value) for value in values]
    else:
        words = _shortest_ends([path.expanduser().resolve() for path in paths])
    return [f"./{word}" if word.startswith("-") and paths else word for word in words]


def _shortest_ends(paths: Sequence[Path]) -> list[str]:
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names
