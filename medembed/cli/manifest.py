"""`medembed manifest`: build and check."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medembed.cli.commands import Commands
from medembed.cli.console import print_json, say
from medembed.cli.options import (
    PATH,
    conclude,
    image_root_option,
    json_option,
    output_option,
    seed_option,
)
from medembed.cli.progress import showing_progress

if TYPE_CHECKING:
    from medembed.cache.near_duplicates import NearDuplicates
    from medembed.cache.store import Cache

__all__ = ["build_command", "check_command", "manifest_command"]

REBUILD = "Mend the recipe or the tables and build it again."
LOOK = (
    "Look at each pair: give the patients of a copied image one split, or one name where they are "
    "one, or leave the image out with [exclude] in the recipe, and build it again."
)


@click.group("manifest", cls=Commands)
def manifest_command() -> None:
    """Build and check manifests: one row per image."""


@manifest_command.command(
    "build",
    starting="Listing the images",
    short_help="Turn a folder or table of images into a manifest.",
    examples=[
        "medembed manifest build mura --image-root MURA-v1.1 -o mura.csv",
    ],
)
@click.argument("recipe", metavar="RECIPE")
@image_root_option
@output_option("MANIFEST.csv or .parquet.", "output")
@click.option("--strict", is_flag=True, help="Warnings are errors.")
@click.option("--structure-only", is_flag=True, help="Tables alone; no image is read or hashed.")
@click.option(
    "--key-file",
    type=PATH,
    help="Key for the hashes of patients and studies of layout dicom; made if it is not there.",
)
@json_option
def build_command(
    recipe: str,
    image_root: Path,
    output: Path,
    strict: bool,
    structure_only: bool,
    key_file: Path | None,
    as_json: bool,
) -> None:
    """Turn the images of a dataset into a manifest, as RECIPE says.

    RECIPE is a file such as data_manifests/mura.toml, or the bare name of a recipe that medembed
    brings (mura, fracatlas, grazpedwri). What was found and left out is counted in
    MANIFEST.build.json beside the manifest (mura.build.json of mura.csv); runs copy it.
    """
    from medembed.dataset import build_file
    from medembed.dataset.recipes import build
    from medembed.dataset.split_counts import describe_splits

    build_file.check_destinations(output)
    with showing_progress("Hashing", "images") as progress:
        report = build.build_manifest(
            loaded := build.load_recipe(recipe),
            image_root,
            strict=strict,
            structure_only=structure_only,
            key_file=key_file,
            progress=progress,
        )
    build_file.write_build(report, loaded, output)
    document = report.as_dict()
    for warning in report.warnings:
        say(f"Warning: {warning}")
    for reason, n in Counter(reason for _, reason in report.excluded).most_common():
        say(f"Left out: {n:,} files: {reason}")
    for notice in report.notices:
        say(f"Note: {notice}")
    for line in describe_splits(report.manifest.rows):
        say(line)
    say(f"{output}: {_counted(document)}")
    if as_json:
        print_json(document)


def _counted(document: dict[str, Any]) -> str:
    keys = ("images", "studies", "patients", "abnormal")
    return ", ".join(f"{document[key]:,} {key}" for key in keys)


@manifest_command.command(
    "check",
    starting="Reading the manifest",
    short_help="List everything that is wrong with a manifest.",
    examples=[
        "medembed manifest check mura.csv --image-root MURA-v1.1",
    ],
)
@click.argument("manifest_path", metavar="MANIFEST", type=PATH)
@click.option("--image-root", type=PATH, help="Also compare every file's bytes with its row.")
@click.option(
    "--cache",
    "cache_path",
    type=PATH,
    help="Also find test images that look like a train image, and look-alikes within a split.",
)
@click.option("--strict", is_flag=True, help="Warnings are errors.")
@seed_option
@json_option
def check_command(
    manifest_path: Path,
    image_root: Path | None,
    cache_path: Path | None,
    strict: bool,
    seed: int,
    as_json: bool,
) -> None:
    """List everything wrong with MANIFEST; exit 1 if anything is.

    Warnings are what only looks wrong: words that usually mean missing, spellings of one patient,
    region or category, one patient for an improbable share of the studies.

    With --cache also near-duplicates across splits: images of test that are one of train saved
    anew, resized or brightened a little, found by their embeddings. Of test images without such a
    twin up to 1 in 1,000 is listed too, or more where train has few patients; how many that makes
    is said. Images that look alike under two patients of one split are listed as well: one image
    that stands twice, or films that show nothing.
    """
    from medembed.cache.store import open_cache
    from medembed.dataset.review import review_manifest

    cache = open_cache(cache_path) if cache_path else None
    with showing_progress("Checking", "images") as progress:
        review = review_manifest(manifest_path, image_root, progress=progress)
    problems = review.problems
    remedy = REBUILD if problems else LOOK
    more: dict[str, Any] = {"warnings": review.warnings}
    for warning in review.warnings:
        say(f"Warning: {warning}")
    if cache is not None:
        found = _compare(cache, manifest_path, seed)
        more["near_duplicates"] = found.as_dict() if found else None
        problems += found.problems() if found else []
    conclude(problems, manifest_path, remedy, as_json, **more)
    if strict and review.warnings:
        raise click.ClickException(
            f"{manifest_path}: {len(review.warnings)} warning(s), listed above, which --strict "
            f"refuses. {REBUILD}"
        )


def _compare(cache: "Cache", manifest_path: Path, seed: int) -> "NearDuplicates | None":
    """Look for near-duplicates and say what was compared; None where the rows are not sound."""
    from medembed.cache.near_duplicates import find_near_duplicates
    from medembed.core.errors import ManifestError

    try:
        with showing_progress("Comparing", "images") as progress:
            found = find_near_duplicates(cache, manifest_path, seed=seed, progress=progress)
    except ManifestError as error:
        if not error.problems:
            raise
        say("Near-duplicates were not looked for: the rows themselves have problems.")
        return None
    say(found.describe())
    return found
