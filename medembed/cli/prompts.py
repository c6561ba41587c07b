"""`medembed prompts`."""

from pathlib import Path

import click

from medembed.cli.commands import Command
from medembed.cli.console import print_json, say, suggest
from medembed.cli.options import PATH, json_option, output_option
from medembed.cli.progress import showing_progress

__all__ = ["prompts_command"]


@click.command(
    "prompts",
    cls=Command,
    starting="Loading the text tower",
    examples=[
        "medembed prompts prompts.toml --encoder google/medsiglip-448 -o prompts.safetensors",
        "medembed prompts prompts.toml --encoder google/medsiglip-448 --manifest mura.csv "
        "-o prompts.safetensors",
    ],
)
@click.argument("path", metavar="PROMPTS.toml", type=PATH)
@click.option(
    "--encoder",
    "reference",
    required=True,
    help="Hub id such as google/medsiglip-448[@revision], or a checkpoint directory.",
)
@click.option(
    "--manifest", type=PATH, help="Manifest whose regions are put in the place of {region}."
)
@output_option("The file to write (.safetensors).")
@json_option
def prompts_command(
    path: Path, reference: str, manifest: Path | None, out: Path, as_json: bool
) -> None:
    """Embed the sentences of PROMPTS.toml, for `medembed sweep --prompts`.

    The file has two lists, `normal` and `abnormal`, or several tables with both; a sweep chooses
    among tables on training patients. The encoder is the checkpoint that the cache was made with,
    and has a text tower: MedSigLIP, SigLIP or CLIP, but not MedGemma. The cache needs the pooling
    `pooler`.
    """
    from medembed.extraction.prompts import embed_prompts

    with showing_progress("Fetching", "bytes") as fetching:
        prompts = embed_prompts(path, reference, out, manifest=manifest, progress=fetching)
    entries = prompts.document.prompts
    if as_json:
        classes = {
            label: sum(entry.label == label for entry in entries)
            for label in ("normal", "abnormal")
        }
        listed = [entry.model_dump() for entry in entries]
        print_json({"path": str(out), "classes": classes, "prompts": listed})
        return
    for entry in entries:
        say(f"{entry.set}: {entry.label}: {entry.text}")
    say(f"Prompts: {out}")
    suggest("sweep", "CACHE", "MANIFEST", "--prompts", out, "-o", "runs/words")
