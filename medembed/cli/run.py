"""`medembed run`: from a folder, table, recipe or manifest to a page, using other commands."""

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from medembed.cli.choices import CHOICES, choice_options
from medembed.cli.commands import Command
from medembed.cli.console import STEP, print_json, say, suggest
from medembed.cli.options import (
    PATH,
    device_option,
    encoder_option,
    json_option,
    output_option,
    refuse_stream,
)
from medembed.core.files import json_bytes, read_plain, write_atomically

__all__ = ["run_command"]

_KNOWN = [*(name.replace("_", "-") for name in CHOICES if name != "covariates"), "covariate"]
_OF_A_MANIFEST = {"image", "sha256", "patient", "study", "label", "split"}
_PARQUET = (".parquet", ".pq")


@click.command(
    "run",
    cls=Command,
    starting="Looking at the files",
    examples=[
        "medembed run films --encoder google/medgemma-4b-pt -o films-run",
        "medembed run films.csv --label fracture --patient person --encoder demo -o trial",
        "medembed run mura --image-root MURA-v1.1 --encoder google/medgemma-4b-pt -o mura",
    ],
    sections={"What is known already": _KNOWN},
)
@click.argument("source", metavar="FOLDER|TABLE|RECIPE|MANIFEST")
@encoder_option
@output_option("Directory to write everything to.", "output")
@click.option(
    "--image-root",
    type=PATH,
    help="Directory with the images.  [default: FOLDER, or that of TABLE]",
)
@click.option("--key-file", type=PATH, help="Key for the hashes of DICOM patients and studies.")
@device_option
@click.option("--jobs", type=click.IntRange(min=1), help="Processes of the sweep.")
@choice_options
@json_option
@click.pass_context
def run_command(
    context: click.Context,
    /,
    source: str,
    reference: str,
    output: Path,
    image_root: Path | None,
    key_file: Path | None,
    device: str,
    jobs: int | None,
    seed: int,
    as_json: bool,
    **given: Any,
) -> None:
    """Go from images to a page in one command.

    Each step is printed as the command it stands for: propose a recipe, build the manifest, check
    the machine, embed, train, report. Everything is written to the output directory, and running
    the command again continues from there. To correct a proposed recipe, edit recipe.toml in that
    directory and run the command again.
    """
    refuse_stream(source)
    _refuse_unknown(source)
    root = image_root or _folder_of(source)
    if root is None:
        raise click.UsageError("Missing option '--image-root': a recipe or manifest needs it.")
    choices = [*_words_of(context, given), *(("--seed", str(seed)) if seed else ())]
    output.mkdir(parents=True, exist_ok=True)
    context.meta[f"medembed.{STEP}"] = True
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        paths = _make(context, source, output, root, key_file, choices)
        manifest, cache, run = (str(paths[name]) for name in ("manifest", "cache", "run"))
        images = ("--image-root", str(root))
        encoder = ("--encoder", reference)
        _step(context, "doctor", *encoder, "--manifest", manifest, "--cache", cache)
        where = () if device == "auto" else ("--device", device)
        _step(context, "extract", manifest, *images, *encoder, "--cache", cache, *where)
        speed = () if jobs is None else ("--jobs", str(jobs))
        seeded = ("--seed", str(seed)) if seed else ()
        _step(context, "sweep", cache, manifest, "-o", run, *speed, *seeded)
        page = ("-o", str(paths["report"]), "--manifest", manifest)
        _step(context, "report", run, *page, *images)
    del context.meta[f"medembed.{STEP}"]
    if as_json:
        print_json({name: str(path) for name, path in paths.items()})
    else:
        suggest("predict", paths["run"], "IMAGE", *encoder)


def _make(
    context: click.Context,
    source: str,
    output: Path,
    root: Path,
    key_file: Path | None,
    choices: list[str],
) -> dict[str, Path]:
    """Propose a recipe and build a manifest, unless `source` is one already."""
    paths = {
        "manifest": output / "manifest.csv",
        "cache": output / "cache",
        "run": output / "runs" / "sweep",
        "report": output / "report",
    }
    images = ("--image-root", str(root))
    path = Path(source)
    if path.is_file() and _is_manifest(path):
        _refuse_choices(choices, f"{source} is a manifest")
        return {**paths, "manifest": path}
    recipe = source
    if path.is_dir() or (path.is_file() and path.suffix != ".toml"):
        recipe = str(output / "recipe.toml")
        asked = output / "recipe.options.json"
        if (output / "recipe.toml").exists():
            if choices != _read_options(asked):
                _refuse_choices(choices, f"{recipe} already exists; edit it, or delete it")
            say(f"{recipe}: used unchanged")
        else:
            write_atomically(asked, json_bytes(choices))  # so that the same command continues
            _step(context, "manifest", "init", source, *images, *choices, "--yes", "-o", recipe)
        paths = {"recipe": Path(recipe), **paths}
    else:
        _refuse_choices(choices, f"{source} is a recipe")
    key = () if key_file is None else ("--key-file", str(key_file))
    if key_file is None and _is_dicom(recipe):
        key = ("--key-file", str(output / "pseudonyms.key"))
    _step(context, "manifest", "build", recipe, *images, "-o", str(paths["manifest"]), *key)
    return paths


def _refuse_unknown(source: str) -> None:
    """Raise PathNotFoundError where `source` is neither on the disk nor a recipe's name."""
    if Path(source).exists():
        return
    from medembed.core.errors import PathNotFoundError
    from medembed.dataset.recipes.build import find_recipes

    names = sorted(find_recipes())
    if source not in names:
        raise PathNotFoundError(
            f"{source} does not exist. Give a folder of images, a table, a manifest, a recipe's "
            f"file, or one of the names {', '.join(names)}."
        )


def _read_options(path: Path) -> list[str]:
    """Return the options that a recipe was proposed with, or [] if these are unknown."""
    try:
        found = json.loads(read_plain(path))
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []


def _step(context: click.Context, *words: str) -> None:
    """Print a command and run it in this process."""
    say(f"\n$ {shlex.join(['medembed', *words])}")
    root = context.find_root()
    assert isinstance(root.command, click.Group)
    name, command, rest = root.command.resolve_command(root, list(words))
    assert command is not None
    with command.make_context(name, rest, parent=root) as own:
        command.invoke(own)


def _refuse_choices(choices: list[str], reason: str) -> None:
    if choices:
        raise click.UsageError(f"{choices[0]} is for proposing a recipe, but {reason}.")


def _words_of(context: click.Context, given: dict[str, Any]) -> Iterator[str]:
    """Yield the words of the given options that settle choices of a recipe."""
    options = {p.name: p.opts[0] for p in context.command.params if p.name in CHOICES}
    for name in CHOICES:
        value = given[name]
        for own in value if isinstance(value, tuple) else (value,):
            if own is not None:
                yield from (options[name], str(own))


def _folder_of(source: str) -> Path | None:
    path = Path(source)
    if path.is_dir():
        return path
    is_table = path.is_file() and path.suffix != ".toml" and not _is_manifest(path)
    return path.parent if is_table else None


def _is_manifest(path: Path) -> bool:
    """Return whether a file is a manifest, judging by the required columns."""
    from medembed.core.files import open_plain

    if path.suffix in _PARQUET:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with open_plain(path) as file:
                return set(pq.read_schema(file).names) >= _OF_A_MANIFEST
        except (pa.ArrowInvalid, OSError):
            return False
    try:
        with open_plain(path) as file:
            header = file.readline(100_000).decode("utf-8-sig", "replace")
    except OSError:
        return False
    return {name.strip().strip('"') for name in header.split(",")} >= _OF_A_MANIFEST


def _is_dicom(recipe: str) -> bool:
    from medembed.dataset.recipes.build import load_recipe

    return load_recipe(recipe).dicom is not None
