"""`medembed manifest`: build and check."""

from pathlib import Path
from typing import Any

import click

from medembed.commands.options import PATH, conclude, image_root_option, json_option
from medembed.console import Commands, print_json, say
from medembed.progress import showing_progress

__all__ = ["build_command", "check_command", "manifest"]


@click.group(cls=Commands)
def manifest() -> None:
    """Build and check manifests: one row per image."""


@manifest.command("build")
@click.argument("recipe", metavar="RECIPE")
@image_root_option
@click.option("-o", "--output", type=PATH, required=True, help="MANIFEST.csv or .parquet.")
@click.option("--strict", is_flag=True, help="Counts that differ from the recipe are an error.")
@click.option("--structure-only", is_flag=True, help="Tables alone; no image is read or hashed.")
@json_option
def build_command(
    recipe: str, image_root: Path, output: Path, strict: bool, structure_only: bool, as_json: bool
) -> None:
    """Turn the images of a dataset into a manifest, as RECIPE says.

    RECIPE is a file such as data_manifests/mura.toml, or the bare name of a recipe that medembed
    brings (mura, fracatlas, grazpedwri).
    """
    from medembed.dataset import manifest as manifests
    from medembed.dataset import recipes

    manifests.check_destination(output)
    with showing_progress("Hashing", "images") as progress:
        report = recipes.build_manifest(
            recipes.load_recipe(recipe),
            image_root,
            strict=strict,
            structure_only=structure_only,
            progress=progress,
        )
    manifests.write_manifest(report.manifest, output)
    document = report.as_dict()
    for warning in report.warnings:
        say(f"Warning: {warning}")
    say(f"{output}: {_counted(document)}")
    if as_json:
        print_json(document)


def _counted(document: dict[str, Any]) -> str:
    keys = ("images", "studies", "patients", "abnormal")
    return ", ".join(f"{document[key]:,} {key}" for key in keys)


@manifest.command("check")
@click.argument("manifest_path", metavar="MANIFEST", type=PATH)
@click.option("--image-root", type=PATH, help="Also compare every file's bytes with its row.")
@json_option
def check_command(manifest_path: Path, image_root: Path | None, as_json: bool) -> None:
    """List everything wrong with MANIFEST; exit 1 if anything is."""
    from medembed.dataset import manifest as manifests

    with showing_progress("Checking", "images") as progress:
        problems = manifests.check_manifest(manifest_path, image_root, progress=progress)
    conclude(problems, manifest_path, "Mend the recipe or the tables and build it again.", as_json)
