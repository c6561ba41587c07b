"""The `medembed` command: its parts, put together.

Heavy libraries are imported inside the commands, so that `medembed --help` starts at once.
"""

import click

from medembed import __version__
from medembed.cli.autoencoder import autoencoder_command
from medembed.cli.cache import cache
from medembed.cli.compare import compare_command, report_command
from medembed.cli.console import Commands
from medembed.cli.demo import demo_command
from medembed.cli.evaluate import evaluate_command
from medembed.cli.extract import doctor_command, extract_command
from medembed.cli.finetune import finetune_command
from medembed.cli.manifest import manifest
from medembed.cli.plan import plan_command
from medembed.cli.predict import predict_command
from medembed.cli.sweep import sweep_command

__all__ = ["main"]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="medembed")
def main() -> None:
    """Embed radiographs once; train and compare light classifiers on them in seconds.

    Research software, not a medical device.
    """


for _command in (
    *(manifest, doctor_command, extract_command, cache),
    *(autoencoder_command, sweep_command, finetune_command),
    *(compare_command, report_command, plan_command, predict_command, evaluate_command),
    demo_command,
):
    main.add_command(_command)
