"""`medembed manifest`: propose a recipe, build a manifest, check it."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medembed.cli.choices import CHOICES, choice_options, is_interactive, read_choices, settle
from medembed.cli.commands import Commands
from medembed.cli.console import is_step, print_json, say, suggest
from medembed.cli.options import (
    IMAGES,
    LOCATION,
    PATH,
    conclude,
    json_option,
    output_option,
    seed_option,
)
from medembed.cli.progress import showing_progress
from medembed.core.locations import Location
from medembed.core.text import counted

if TYPE_CHECKING:
    from medembed.cache.near_duplicates import NearDuplicates
    from medembed.cache.store import Cache
    from medembed.dataset.recipes.build import BuildReport
    from medembed.dataset.recipes.proposals import Proposal
    from medembed.images.streams import StreamRoot

__all__ = [
    "build_command",
    "check_command",
    "init_command",
    "manifest_command",
    "recipes_command",
    "relabel_command",
    "texts_command",
]

_CHOICES = {
    "Without a recipe": (
        *("from-folders", "from-table", "image", "label", "normal", "abnormal", "empty"),
        *("patient", "study", "region", "split", "covariate", "encoding", "delimiter", "sheet"),
        *("pattern", "test-fraction", "seed"),
    )
}
_NOT_OF_STREAMS = ("pattern", "encoding", "delimiter", "sheet")
REBUILD = "Correct the recipe or the tables and build the manifest again."
LOOK = (
    "Look at each pair: put the patients of a copied image in one split, or give them one name if "
    "they are one person, or leave the image out with [exclude] in the recipe; then build again."
)


@click.group(
    "manifest",
    cls=Commands,
    examples=[
        "medembed manifest init films -o films.toml",
        "medembed manifest build films.toml --image-root films -o films.csv",
        "medembed manifest check films.csv --image-root films",
    ],
)
def manifest_command() -> None:
    """Propose, build, check and relabel manifests: one row per image."""


@manifest_command.command(
    "build",
    starting="Listing the images",
    short_help="Turn a folder or table of images into a manifest.",
    examples=[
        "medembed manifest build mura --image-root MURA-v1.1 -o mura.csv",
        "medembed manifest build --from-folders films --abnormal broken -o films.csv",
        "medembed manifest build --from-table labels.xlsx --label finding -o films.csv",
        "medembed manifest build --from-stream hf://datasets/OWNER/NAME --patient patient_id "
        "-o films.csv",
    ],
    sections=_CHOICES,
)
@click.argument("recipe", metavar="[RECIPE]", required=False)
@click.option("--from-folders", type=PATH, metavar="DIR", help="Use a folder per class, no recipe.")
@click.option("--from-table", type=PATH, metavar="FILE", help="Use a table of images, no recipe.")
@click.option(
    "--from-stream",
    type=IMAGES,
    metavar="URL",
    help="Use tar files with a .json beside each image, tar://DIR, or a dataset of the hub, "
    "hf://datasets/OWNER/NAME, no recipe.",
)
@click.option(
    "--image-root",
    type=PATH,
    help="Directory that the manifest's paths are relative to.  [default without a recipe: DIR, or "
    "the folder of FILE]",
)
@output_option("MANIFEST.csv or .parquet.", "output")
@click.option("--strict", is_flag=True, help="Warnings are errors.")
@click.option("--structure-only", is_flag=True, help="Read only tables, hash no images.")
@click.option(
    "--key-file",
    type=PATH,
    help="Key for hashing patients and studies of layout dicom; created if missing.",
)
@choice_options
@json_option
@click.pass_context
def build_command(
    context: click.Context,
    /,
    recipe: str | None,
    from_folders: Path | None,
    from_table: Path | None,
    from_stream: "StreamRoot | Path | None",
    image_root: Path | None,
    output: Path,
    strict: bool,
    structure_only: bool,
    key_file: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Turn the images of a dataset into a manifest, with a RECIPE or without.

    RECIPE is a file such as data_manifests/mura.toml, or the name of a recipe that comes with
    medembed (see `medembed manifest recipes`). Without a recipe, --from-folders takes a folder per
    class, --from-table a CSV, Excel or Parquet table, and --from-stream tar files or a dataset of
    the Hugging Face hub (Parquet, tar or image files), read from front to back; `medembed manifest
    init` proposes a recipe for you to correct. MANIFEST.build.json beside the manifest
    (mura.build.json for mura.csv) counts what was found and left out, names the dataset's commit,
    and runs copy it. A build from folders or a table writes the recipe that it used to
    MANIFEST.recipe.toml, from which the manifest can be built again.
    """
    from medembed.dataset import build_file
    from medembed.dataset.recipes import build

    if from_stream is not None:
        others = (recipe, from_folders, from_table, image_root, key_file)
        if any(other is not None for other in others) or structure_only:
            raise click.UsageError(
                "--from-stream cannot be combined with RECIPE, --from-folders, --from-table, "
                "--image-root, --key-file or --structure-only."
            )
        _build_from_stream(context, from_stream, output, strict, as_json, given)
        return
    _refuse_mixture(context, recipe, from_folders, from_table, image_root)
    build_file.check_destinations(output)
    options: dict[str, Any] = {"strict": strict, "structure_only": structure_only}
    text = ""
    if recipe is not None and image_root is not None:
        loaded, root = build.load_recipe(recipe), image_root
        with showing_progress("Hashing", "images") as progress:
            report = build.build_manifest(
                loaded, root, **options, key_file=key_file, progress=progress
            )
    else:
        from medembed.dataset.recipes.proposals import build_proposal

        proposal = _propose_without_recipe(from_folders, from_table, image_root, given)
        loaded, text = proposal.recipe, proposal.text
        root = image_root or _root_of(from_folders or from_table or Path())
        with showing_progress("Hashing", "images") as progress:
            report = build_proposal(proposal, **options, key_file=key_file, progress=progress)
    build_file.write_build(report, loaded, output, text)
    document = report.as_dict()
    _conclude_build(report, output)
    if text:
        document["recipe"] = str(build_file.recipe_path(output))
        say(f"{document['recipe']}: the recipe of this build, for you to repeat or correct")
    if as_json:
        print_json(document)
    elif not structure_only:
        suggest("extract", str(output), "--image-root", str(root), "--encoder",
                  "google/medgemma-4b-pt", "--cache", "cache")  # fmt: skip
        if not is_step():
            say("      (--encoder demo tries this without a download)")


def _build_from_stream(
    context: click.Context,
    asked: "StreamRoot | Path",
    output: Path,
    strict: bool,
    as_json: bool,
    given: Any,
) -> None:
    from medembed.core.errors import RecipeError
    from medembed.dataset import build_file
    from medembed.dataset.recipes.stream import build_from_stream
    from medembed.images.streams import is_stream, settle_stream

    if not is_stream(asked):
        raise click.UsageError(
            f"--from-stream takes tar://DIR or hf://datasets/OWNER/NAME, and {asked} is neither."
        )
    named = _named_choices(context)
    if extra := [name for name in named if name in _NOT_OF_STREAMS]:
        raise click.UsageError(f"--{extra[0].replace('_', '-')} is not for --from-stream.")
    build_file.check_destinations(output)
    root = settle_stream(asked)
    choices = read_choices(given) if named else None
    with showing_progress("Hashing", "images") as progress:
        report = build_from_stream(root, choices=choices, progress=progress)
    if strict and report.warnings:
        listed = "".join(f"\n  - {warning}" for warning in report.warnings)
        raise RecipeError(f"{root} causes warnings, which --strict refuses:{listed}")
    build_file.write_stream_build(report, asked, root, output)
    _conclude_build(report, output)
    if as_json:
        print_json(report.as_dict())
    else:
        suggest("extract", str(output), "--image-root", root, "--encoder",
                  "google/medgemma-4b-pt", "--cache", "cache")  # fmt: skip


def _named_choices(context: click.Context) -> list[str]:
    """Return the choices that were given as options."""
    source = click.core.ParameterSource.COMMANDLINE
    return [name for name in (*CHOICES, "seed") if context.get_parameter_source(name) is source]


def _refuse_mixture(
    context: click.Context,
    recipe: str | None,
    from_folders: Path | None,
    from_table: Path | None,
    image_root: Path | None,
) -> None:
    """Refuse options that do not name the data set in exactly one of the three ways."""
    ways = [way for way in (recipe, from_folders, from_table) if way is not None]
    if len(ways) != 1:
        raise click.UsageError(
            "Name one of RECIPE, --from-folders, --from-table and --from-stream.", context
        )
    if recipe is None:
        return
    if image_root is None:
        raise click.UsageError("Missing option '--image-root'.", context)
    if extra := _named_choices(context):
        option = f"--{extra[0].removesuffix('s').replace('_', '-')}"
        raise click.UsageError(
            f"{option} is for builds without a recipe: a RECIPE settles this itself.", context
        )


def _propose_without_recipe(
    from_folders: Path | None, from_table: Path | None, image_root: Path | None, given: Any
) -> "Proposal":
    """Return a recipe proposed from what was named: only image and label are guessed."""
    from medembed.dataset.recipes.proposals import propose

    choices = read_choices(given)
    if from_folders is not None:
        return propose(from_folders, image_root, choices, kind="folders")
    assert from_table is not None
    if given["pattern"]:
        raise click.UsageError("--pattern is for --from-folders.")
    return propose(from_table, image_root, choices.without_guesses(), kind="table")


def _conclude_build(report: "BuildReport", output: Path) -> None:
    """Print what a manifest holds, and what looks odd."""
    from medembed.dataset.split_counts import describe_splits

    for line in describe_splits(report.manifest.rows):
        say(line)
    for warning in report.warnings:
        say(f"Warning: {warning}")
    for reason, n in Counter(reason for _, reason in report.excluded).most_common():
        say(f"Left out: {n:,} files: {reason}")
    for notice in report.notices:
        say(f"Note: {notice}")
    say(f"{output}: {_counted(report.as_dict())}")


def _counted(document: dict[str, Any]) -> str:
    keys = ("images", "studies", "patients", "abnormal")
    return ", ".join(f"{document[key]:,} {key}" for key in keys)


@manifest_command.command(
    "init",
    starting="Looking at the files",
    short_help="Propose a recipe for a folder or a table.",
    examples=[
        "medembed manifest init films -o films.toml",
        "medembed manifest init labels.csv --image-root films -o films.toml --yes",
    ],
    sections={"What is known already": _CHOICES["Without a recipe"][2:]},
)
@click.argument("path", metavar="PATH", type=PATH)
@output_option("RECIPE.toml to write.", "output")
@click.option(
    "--image-root",
    type=PATH,
    help="Directory with the images.  [default: PATH, or the folder of a table]",
)
@click.option("--name", default="", metavar="NAME", help="Name of the recipe.")
@click.option("-y", "--yes", is_flag=True, help="Accept the proposal without asking.")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@choice_options
@json_option
def init_command(
    path: Path,
    output: Path,
    image_root: Path | None,
    name: str,
    yes: bool,
    force: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Look at PATH and propose a recipe for it.

    PATH is a folder with images, a table (CSV, Excel, Parquet), or a tree of DICOM files. Columns,
    label values, patients, regions and the split are guessed from names and contents; on a terminal
    you are asked about anything undecided, and can change the rest. Options settle choices
    beforehand; COL '' means that there is no such column. The recipe is TOML with a comment on each
    guess: read it before you build the manifest.
    """
    from medembed.core.errors import PathNotFoundError, RecipeError
    from medembed.core.files import write_atomically
    from medembed.dataset.recipes.proposals import Choices, Proposal, propose

    if not output.parent.is_dir():
        raise PathNotFoundError(f"{output.parent} is not a directory. Create it, or name another.")
    if output.exists() and not force:
        raise RecipeError(f"{output} already exists. Name another file, or add --force.")

    def propose_with(choices: Choices) -> Proposal:
        return propose(path, image_root, choices, name=name)

    ask = is_interactive() and not yes and not as_json
    proposal = settle(propose_with, read_choices(given), ask=ask)
    write_atomically(output, proposal.text.encode())
    say(f"{output}: the recipe, with comments on what was guessed")
    if as_json:
        print_json({**proposal.as_dict(), "output": str(output)})
        return
    key = ("--key-file", str(output.with_suffix(".key"))) if proposal.recipe.dicom else ()
    suggest("manifest", "build", str(output), "--image-root", str(image_root or _root_of(path)),
              "-o", str(output.with_suffix(".csv")), *key)  # fmt: skip


def _root_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


@manifest_command.command(
    "recipes",
    starting="Reading the recipes",
    short_help="List the recipes of public data sets, or print one.",
    examples=["medembed manifest recipes", "medembed manifest recipes dicom > my.toml"],
)
@click.argument("name", metavar="[NAME]", required=False)
@json_option
def recipes_command(name: str | None, as_json: bool) -> None:
    """List the recipes that come with medembed, or print the one called NAME."""
    from medembed.dataset.recipes.build import find_recipes, load_recipe

    if name is not None:
        text = load_recipe(name).path.read_text(encoding="utf-8")
        if as_json:
            print_json({"name": name, "recipe": text})
        else:
            click.echo(text, nl=False)
        return
    recipes = [load_recipe(known) for known in sorted(find_recipes())]
    if as_json:
        fields = ("name", "about", "layout", "licence", "citation", "url", "patient_ids", "tried")
        print_json([{field: getattr(own, field) for field in fields} for own in recipes])
        return
    for own in recipes:
        click.echo(click.wrap_text(f"{own.name:<15}{own.about}", 80, "", " " * 15))
        for title, text in (
            ("licence", own.licence), ("patients", own.patient_ids), ("tried", own.tried)
        ):  # fmt: skip
            if text:
                click.echo(click.wrap_text(f"{title}: {text}", 80, " " * 15, " " * 17))
    say()
    suggest("manifest", "build", recipes[0].name, "--image-root", "DIR", "-o", "MANIFEST.csv")


@manifest_command.command(
    "check",
    starting="Reading the manifest",
    short_help="List everything that is wrong with a manifest.",
    examples=[
        "medembed manifest check mura.csv --image-root MURA-v1.1",
    ],
)
@click.argument("manifest_path", metavar="MANIFEST", type=PATH)
@click.option(
    "--image-root",
    type=LOCATION,
    help="Directory or bucket of the images: also compare every file's bytes with its row.",
)
@click.option(
    "--cache",
    "cache_path",
    type=LOCATION,
    help="Also find test images that look like a train image, and look-alikes within a split.",
)
@click.option("--strict", is_flag=True, help="Warnings are errors.")
@seed_option
@json_option
def check_command(
    manifest_path: Path,
    image_root: Location | None,
    cache_path: Location | None,
    strict: bool,
    seed: int,
    as_json: bool,
) -> None:
    """List everything that is wrong with MANIFEST; exit with 1 if anything is.

    Warnings are about what may be wrong: words that usually mean missing, several spellings of one
    patient, region or category, and a patient with an improbable share of the studies.

    With --cache, near-duplicates across splits are listed too: test images that are a train image
    saved again, resized or brightened a little, found by their embeddings. Up to 1 in 1,000 test
    images without such a twin are listed as well, or more if train has few patients; the expected
    number is printed. Images of two patients of one split that look alike are also listed: an image
    that occurs twice, or films that show nothing.
    """
    from medembed.cache.store import open_cache
    from medembed.dataset.manifest import review_manifest

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
    """Return near-duplicates and print what was compared; None if the rows have problems."""
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


@manifest_command.command(
    "relabel",
    starting="Reading the review",
    short_help="Apply a reviewer's labels to a manifest.",
    examples=["medembed manifest relabel mura.csv review.csv -o mura-2.csv"],
)
@click.argument("manifest_path", metavar="MANIFEST", type=PATH)
@click.argument("review_path", metavar="REVIEW", type=PATH)
@output_option("MANIFEST.csv or .parquet to write.", "output")
@json_option
def relabel_command(manifest_path: Path, review_path: Path, output: Path, as_json: bool) -> None:
    """Apply the labels of REVIEW to MANIFEST, and write another manifest.

    REVIEW is a table with the columns sha256 and new_label: 0 is normal, 1 abnormal, and empty not
    reviewed. `medembed audit labels` and `medembed worklist` write such a table for you to fill in.
    If labels are per study, a new label holds for all views. Nothing is embedded again. Every
    change since the build is kept beside the manifest, in MANIFEST.relabelling.json.
    """
    from medembed.dataset.relabelling import relabel, relabelling_path, write_relabelled

    relabelled = relabel(manifest_path, review_path)
    write_relabelled(relabelled, manifest_path, output)
    document = relabelled.as_dict()
    changed = counted(next(iter(document.values())), "label")
    _, abnormal, normal, new, confirmed = (f"{n:,}" for n in document.values())
    say(
        f"{output}: {changed} changed ({abnormal} to abnormal, {normal} to normal, {new} "
        f"new), {confirmed} confirmed; every change: {relabelling_path(output)}"
    )
    if as_json:
        print_json({**document, "output": str(output)})
    else:
        suggest("sweep", "CACHE", output, "-o", "runs/relabelled")


@manifest_command.command(
    "texts",
    starting="Loading the text tower",
    short_help="Turn a column of free text into covariates.",
    examples=[
        "medembed manifest texts films.csv --column indication --encoder google/medsiglip-448 "
        "-o films-2.csv",
        "medembed manifest texts elsewhere.csv --column indication --encoder google/medsiglip-448 "
        "--like films-2.csv -o elsewhere-2.csv",
    ],
)
@click.argument("manifest_path", metavar="MANIFEST", type=PATH)
@click.option("--column", required=True, help="The covariate that holds the texts.")
@click.option(
    "--encoder",
    "reference",
    required=True,
    help="Checkpoint with a text tower: hub id such as google/medsiglip-448, or a directory.",
)
@click.option(
    "--components",
    "n_components",
    type=click.IntRange(1, 1024),
    default=16,
    show_default=True,
    help="Columns to write at most.",
)
@click.option(
    "--like",
    type=PATH,
    help="A manifest of this command, or its .texts.safetensors: use its components, so that its "
    "models can read these columns.",
)
@output_option("MANIFEST.csv or .parquet to write; components go beside it.", "output")
@json_option
def texts_command(
    manifest_path: Path,
    column: str,
    reference: str,
    n_components: int,
    like: Path | None,
    output: Path,
    as_json: bool,
) -> None:
    """Embed a column of free text, such as the indication, as covariates of numbers.

    The text tower of MedSigLIP, SigLIP or CLIP embeds each text; the columns COLUMN_1, COLUMN_2, …
    are principal components of the texts of train. A report may hold the answer: a text that was
    written after the film was read says what was seen, and so does a classifier that reads it.
    """
    from medembed.extraction.free_text import (
        add_text_covariates,
        basis_path,
        may_hold_the_answer,
    )

    with showing_progress("Fetching", "bytes") as fetching:
        found = add_text_covariates(
            manifest_path,
            column,
            reference,
            output,
            n_components=n_components,
            like=like,
            progress=fetching,
        )
    names = [name for name in map(str, found.rows) if name.startswith(f"{column}_")]
    n_texts = int(found.rows[column].fillna("").str.strip().ne("").sum())
    if may_hold_the_answer(column):
        say(
            f"Warning: {column} may have been written after the film was read, and hold the answer."
        )
    else:
        say(f"If {column} was written after the film was read, it may hold the answer.")
    say(f"{output}: {counted(n_texts, 'text')} as {', '.join(names)}; {basis_path(output)}")
    if as_json:
        print_json({"output": str(output), "columns": names, "texts": n_texts})
    else:
        suggest("sweep", "CACHE", output, "--covariates", ",".join(names), "--heads",
                "logistic,metadata", "-o", "runs/texts")  # fmt: skip
