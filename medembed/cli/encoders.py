"""`medembed encoders`."""

import click

from medembed.cli.commands import Command
from medembed.cli.console import print_json, suggest
from medembed.cli.options import json_option

__all__ = ["encoders_command"]


@click.command(
    "encoders",
    cls=Command,
    starting="Reading the list",
    examples=["medembed encoders", "medembed encoders --json"],
)
@json_option
def encoders_command(as_json: bool) -> None:
    """List the encoders that are tested: sizes, poolings, licence, and whether they are gated.

    Nothing is asked of the hub: licences are those of the cards when the list was written.
    """
    from medembed.encoders.catalogue import describe_families

    families = list(describe_families())
    if as_json:
        print_json(families)
        return
    for family in families:
        gated = ", gated" if family["gated"] else ""
        extra = f"; needs medembed[{family['extra']}]" if family["extra"] else ""
        side = f"{family['pixels']} px" if family["pixels"][0].isdigit() else family["pixels"]
        click.echo(click.style(family["name"], bold=True))
        for example in family["examples"]:
            click.echo(f"  {example}")
        click.echo(f"  {side}; {', '.join(family['poolings'])}")
        click.echo(f"  licence: {family['licence']}{gated}{extra}")
    suggest("doctor", "--encoder", "google/medgemma-4b-pt")
