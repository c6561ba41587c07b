"""What commands print with `--json`, held to `docs/schemas` wherever a test runs one."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner, Result
from jsonschema import Draft202012Validator

from medembed.cli import main

SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"


@contextmanager
def holding_documents() -> Iterator[None]:
    """Check every document that a `CliRunner` sees, until the end of the block."""
    run = CliRunner.invoke

    @wraps(run)
    def invoke(self: CliRunner, command: Any, args: Any = None, *more: Any, **known: Any) -> Result:
        result = run(self, command, args, *more, **known)
        if command is main and not isinstance(args, str) and "--json" in (args or ()):
            check_document(name_command(args), result.stdout)
        return result

    CliRunner.invoke = invoke  # type: ignore[method-assign]
    try:
        yield
    finally:
        CliRunner.invoke = run  # type: ignore[method-assign]


def check_document(name: str, text: str) -> None:
    """Hold what a command has printed to its schema; nothing where it was refused before."""
    if text:
        read_validator(name).validate(json.loads(text))


@cache
def read_validator(name: str) -> Draft202012Validator:
    """Return what checks the documents of a command."""
    schema = json.loads((SCHEMAS / f"{name}.output.json").read_text(encoding="utf-8"))
    return Draft202012Validator(schema)


def name_command(args: Any) -> str:
    """Return the name of a command's schema: `cache-info`."""
    command: click.Command = main
    context = click.Context(main)
    names = []
    for arg in args:
        found = command.get_command(context, arg) if isinstance(command, click.Group) else None
        if found is None:
            break
        names.append(arg)
        command = found
    return "-".join(names)
