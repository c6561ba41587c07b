"""`medembed audit labels`."""

from pathlib import Path

import click

from medembed.cli.commands import Command
from medembed.cli.options import PATH, json_option, output_option

__all__ = ["labels_command"]


@click.command("labels", cls=Command, starting="Reading the run")
@click.argument("run_path", metavar="RUN", type=PATH)
@click.option("--manifest", "manifest_path", type=PATH, required=True, help="The run's manifest.")
@output_option("The directory to write.", "output")
@json_option
def labels_command(run_path: Path, manifest_path: Path, output: Path, as_json: bool) -> None:
    """List studies whose label the out-of-fold scores of RUN contradict."""
