"""`medembed demo`."""

from pathlib import Path

import click

from medembed.cli.commands import Command
from medembed.cli.compare import show_comparison
from medembed.cli.console import print_json, say, suggest
from medembed.cli.options import MANY, PATH, json_option, seed_option
from medembed.cli.progress import showing_progress
from medembed.cli.report import hush_matplotlib

__all__ = ["demo_command"]


@click.command(
    "demo",
    cls=Command,
    starting="Drawing radiographs",
    examples=[
        "medembed demo",
        "medembed demo trial --patients 100",
    ],
)
@click.argument("directory", metavar="[DIR]", type=PATH, default=Path("medembed-demo"))
@click.option("--patients", "n_patients", type=click.IntRange(40, MANY), default=400,
              show_default=True, help="Number of synthetic patients.")  # fmt: skip
@seed_option
@json_option
def demo_command(directory: Path, n_patients: int, seed: int, as_json: bool) -> None:
    """Run the whole path on synthetic radiographs drawn on the spot, into DIR."""
    hush_matplotlib()
    from medembed.demo.pipeline import run_demo

    say("The demo's images are synthetic; its scores say nothing about medicine.")
    result = run_demo(directory, n_patients=n_patients, seed=seed, show_progress=showing_progress)
    if as_json:
        print_json(result)
        return
    show_comparison([directory / "runs" / "sweep"], "study", None, "table")
    click.echo(f"Page: {result['page']}")
    suggest("predict", directory / "runs" / "sweep", directory / "images")
