"""The `medembed` command: the list of commands, and the module of each.

A command's module is imported when the command is called, and heavy libraries when it runs, so that
`medembed --help` starts quickly however many commands there are.
"""

import click

from medembed import __version__
from medembed.cli.commands import Sections

__all__ = ["main"]

SECTIONS = {
    "Start": {
        "run": ("run", "Go from images to a page in one command."),
        "demo": ("demo", "Run the whole path on synthetic radiographs drawn on the spot."),
    },
    "Prepare": {
        "manifest": ("manifest", "Propose, build, check and relabel manifests."),
        "doctor": ("doctor", "Check device, memory, disk, token and access beforehand."),
        "plan": ("plan", "Compute how many test patients a study needs."),
        "worklist": ("worklist", "Choose which unlabelled studies to label next."),
    },
    "Embed": {
        "encoders": ("encoders", "List the encoders that are tested, with their poolings."),
        "extract": ("extract", "Run a frozen encoder over a manifest's images, once."),
        "prompts": ("prompts", "Embed sentences with an encoder's text tower."),
        "autoencoder": ("autoencoder", "Train an autoencoder as a baseline encoder."),
    },
    "Train": {
        "sweep": ("sweep", "Train and tune classifiers on cached embeddings."),
        "ensemble": ("ensemble", "Combine the classifiers of several sweeps into one."),
        "finetune": ("finetune", "Unfreeze an encoder's last blocks, at several depths."),
    },
    "Look": {
        "compare": ("compare", "Compare runs: scores, intervals and paired tests."),
        "report": ("report", "Write a page with figures and their data."),
        "map": ("map", "Lay out a run's images in two dimensions."),
        "similar": ("similar", "Find the films that most resemble a film."),
        "audit": ("audit", "Look for wrong labels and for shortcuts."),
    },
    "Use": {
        "predict": ("predict", "Apply a trained model to images."),
        "evaluate": ("evaluate", "Validate a model on images of another institution."),
    },
    "Maintain": {
        "cache": ("cache", "Inspect, verify, compact and export a cache."),
        "completion": ("completion", "Print the completion script of a shell."),
    },
}


@click.group(
    cls=Sections,
    sections={
        heading: {name: (f"medembed.cli.{file}", words) for name, (file, words) in entries.items()}
        for heading, entries in SECTIONS.items()
    },
    context_settings={
        "help_option_names": ["-h", "--help"],
        "auto_envvar_prefix": "MEDEMBED",
    },
    examples=[
        "medembed demo",
        "medembed run films --encoder google/medgemma-4b-pt -o films-run",
        "medembed extract --help",
    ],
    epilog="Options can be set by environment variables too: MEDEMBED_SWEEP_JOBS=4 is --jobs 4 of "
    "sweep. Research software, not a medical device.",
)
@click.version_option(__version__, "-V", "--version", prog_name="medembed")
def main() -> None:
    """Embed radiographs once; train and compare light classifiers on them in seconds."""
