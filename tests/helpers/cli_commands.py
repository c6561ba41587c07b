"""All commands of the program by their whole names, such as "medembed cache info"."""

import click

from medembed.cli import main

__all__ = ["COMMANDS"]

_CONTEXT = click.Context(main)


def _find(group: click.Group, prefix: str) -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name in group.list_commands(_CONTEXT):
        command = group.get_command(_CONTEXT, name)
        assert command is not None
        if isinstance(command, click.Group):
            found |= _find(command, f"{prefix} {name}")
        else:
            found[f"{prefix} {name}"] = command
    return found


COMMANDS = _find(main, "medembed")
