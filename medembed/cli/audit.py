"""`medembed audit`: look for what is wrong with labels, or with what a model reads.

Each command is in its own module, imported when it is called.
"""

import click

from medembed.cli.commands import Sections

__all__ = ["audit_command"]

_SECTIONS = {
    "Commands": {
        "labels": ("medembed.cli.audit_labels", "List studies whose label a run contradicts."),
        "shortcuts": ("medembed.cli.audit_shortcuts", "Ask what else the embedding tells."),
    },
}


@click.group(
    "audit",
    cls=Sections,
    sections=_SECTIONS,
    examples=[
        "medembed audit labels runs/sweep --manifest mura.csv -o review",
        "medembed audit shortcuts cache mura.csv --columns region,cast",
    ],
)
def audit_command() -> None:
    """Audit the labels of a data set, and what a model may read in place of the disease."""
