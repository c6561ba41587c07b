"""`medembed completion`."""

import click
from click.shell_completion import get_completion_class

from medembed.cli.commands import Command
from medembed.cli.console import print_json
from medembed.cli.options import json_option

__all__ = ["completion_command"]


@click.command(
    "completion",
    cls=Command,
    examples=[
        'eval "$(medembed completion bash)"',
        "medembed completion fish > ~/.config/fish/completions/medembed.fish",
    ],
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@json_option
@click.pass_context
def completion_command(context: click.Context, shell: str, as_json: bool) -> None:
    """Print the script that lets SHELL complete medembed's commands and options.

    Put the first example into ~/.bashrc, or the same line with zsh into ~/.zshrc.
    """
    found = get_completion_class(shell)
    assert found is not None
    root = context.find_root()
    script = found(root.command, {}, "medembed", "_MEDEMBED_COMPLETE").source()
    if as_json:
        print_json({"shell": shell, "script": script})
    else:
        click.echo(script)
