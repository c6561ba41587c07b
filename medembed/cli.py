"""The `medembed` command: its parts, put together.

Heavy libraries are imported inside the commands, so that `medembed --help` starts at once.
"""

import click

from medembed import __version__
from medembed.commands.autoencoding import autoencoder_command
from medembed.commands.caches import cache
from medembed.commands.comparing import compare_command, report_command
from medembed.commands.demonstrating import demo_command
from medembed.commands.encoding import doctor_command, extract_command
from medembed.commands.evaluating import evaluate_command
from medembed.commands.finetuning import finetune_command
from medembed.commands.manifests import manifest
from medembed.commands.planning import plan_command
from medembed.commands.predicting import predict_command
from medembed.commands.training import sweep_command
from medembed.console import Commands

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
