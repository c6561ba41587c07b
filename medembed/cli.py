"""The `medembed` command: parse, one library call, print.

Heavy libraries are imported inside the commands, so that `medembed --help` starts at once.
"""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from medembed.console import Commands, print_json, say, showing_progress

__all__ = ["main"]

PATH = click.Path(path_type=Path)
PIPED_COLUMNS = 120  # of a table that goes to a file or another program

image_root_option = click.option(
    "--image-root", type=PATH, required=True, help="Directory that the manifest's paths start from."
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document on stdout."
)
seed_option = click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of everything random.",
)


def _names(context: click.Context, option: click.Parameter, value: str | None) -> Any:
    """Split `a,b` into ("a", "b"); an empty name is wrong usage."""
    if value is None:
        return None
    names = tuple(name.strip() for name in value.split(","))
    if not all(names):
        raise click.BadParameter(f"{value!r} has an empty name", context, option)
    return names


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="medembed")
def main() -> None:
    """Embed radiographs once; train and compare light classifiers on them in seconds.

    Research software, not a medical device.
    """


@main.group()
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
    _conclude(problems, manifest_path, "Mend the recipe or the tables and build it again.", as_json)


def _conclude(problems: list[str], checked: Path, remedy: str, as_json: bool) -> None:
    """Print what a check found; exit 1 if it found anything."""
    if as_json:
        print_json({"problems": problems})
    for problem in problems:
        say(problem)
    if problems:
        raise click.ClickException(f"{checked}: {len(problems)} problem(s), listed above. {remedy}")
    say(f"{checked}: no problems")


@main.command("extract")
@click.argument("manifest_path", metavar="MANIFEST", type=PATH)
@image_root_option
@click.option(
    "--encoder",
    "reference",
    required=True,
    help="Hub id such as google/medgemma-4b-pt[@revision], a checkpoint directory, or demo.",
)
@click.option("--cache", "cache_path", type=PATH, required=True, help="The cache directory.")
@click.option("--pool", "poolings", callback=_names, default="mean,max", show_default=True)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "mps"]),
    default="auto",
    show_default=True,
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    show_default=True,
    help="What the encoder computes in; auto is bf16 on a GPU that has it, else fp32.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "float32"]),
    default="float16",
    show_default=True,
    help="What is stored.",
)
@click.option(
    "--fit",
    type=click.Choice(["stretch", "pad"]),
    default="stretch",
    show_default=True,
    help="How an image that is not square becomes square.",
)
@click.option("--batch-size", type=click.IntRange(min=1), help="Images in one encoder pass.")
@click.option("--decoders", type=click.IntRange(min=1), help="Threads that read and decode.")
@click.option("--retry-failed", is_flag=True, help="Try images again that failed before.")
@click.option("--strict", is_flag=True, help="Exit 1 at the end if any image failed.")
@click.option("--dry-run", is_flag=True, help="Say what would be done; embed nothing.")
@json_option
def extract_command(
    manifest_path: Path,
    image_root: Path,
    reference: str,
    cache_path: Path,
    poolings: tuple[str, ...],
    device: str,
    precision: str,
    dtype: str,
    fit: str,
    batch_size: int | None,
    decoders: int | None,
    retry_failed: bool,
    strict: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Embed MANIFEST's images into a cache; what is there already is not done again."""
    from medembed import extraction
    from medembed.dataset.manifest import read_manifest
    from medembed.encoders.loading import load_encoder

    rows = read_manifest(manifest_path)
    encoder = load_encoder(reference, device=device, precision=precision, fit=fit)
    with showing_progress("Embedding", "images") as progress:
        report = extraction.extract(
            rows,
            image_root,
            encoder,
            cache_path,
            poolings=poolings,
            dtype=dtype,
            batch_size=batch_size,
            decoders=decoders,
            retry_failed=retry_failed,
            dry_run=dry_run,
            progress=progress,
        )
    _say_extraction(report.as_dict(), cache_path, dry_run)
    if as_json:
        print_json(report.as_dict())
    if strict and report.failed:
        raise click.ClickException(
            f"{report.failed} images failed and --strict was given. They are listed above; mend "
            "them and run the same command with --retry-failed, or drop --strict."
        )


def _say_extraction(report: dict[str, Any], cache_path: Path, dry_run: bool) -> None:
    for failure in report["failures"]:
        say(f"Failed ({failure['stage']}): {failure['image']}: {failure['reason']}")
    verb = "would be embedded" if dry_run else "embedded"
    say(
        f"{cache_path}: {report['embedded']} {verb}, {report['already']} already there, "
        f"{report['failed']} failed, {report['duplicates']} the same bytes under another name, "
        f"of {report['requested']} images; {report['seconds']:.1f} s, "
        f"{report['images_per_second']:.1f} images/s"
    )


@main.group()
def cache() -> None:
    """Look at a cache and prove that it is whole."""


@cache.command("info")
@click.argument("cache_path", metavar="CACHE", type=PATH)
@json_option
def info_command(cache_path: Path, as_json: bool) -> None:
    """Show the cache's card: spec, rows, size, failures."""
    from medembed.cache.store import open_cache

    card = open_cache(cache_path).card()
    if as_json:
        print_json(card)
    else:
        for line in _lines(card):
            click.echo(line)


def _lines(card: dict[str, Any], indent: str = "") -> Iterator[str]:
    """Yield a nested document as `key: value` lines."""
    for key, value in card.items():
        if isinstance(value, dict):
            yield f"{indent}{key}:"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{key}: {'none' if value is None else value}"


@cache.command("verify")
@click.argument("cache_path", metavar="CACHE", type=PATH)
@json_option
def verify_command(cache_path: Path, as_json: bool) -> None:
    """Compare every shard with its name and its spec; exit 1 if any is damaged."""
    from medembed.cache.store import open_cache

    with showing_progress("Verifying", "shards") as progress:
        problems = open_cache(cache_path).verify(progress=progress)
    remedy = "Mend each as its line says; the next extract embeds the rows that are then missing."
    _conclude(problems, cache_path, remedy, as_json)


@main.command("sweep")
@click.argument("cache_path", metavar="CACHE", type=PATH)
@click.argument("manifest_path", metavar="MANIFEST", type=PATH)
@click.option("--out", "out", type=PATH, required=True, help="The run directory to write.")
@click.option(
    "--heads",
    callback=_names,
    default="logistic,mlp,lightgbm",
    show_default=True,
    help="Kinds of classifiers; logistic is always among them.",
)
@click.option("--pool", help="mean, max or mean+max; without it all poolings side by side.")
@click.option(
    "--configs", "n_configs", type=click.IntRange(min=1), default=8, show_default=True,
    help="Configurations tried per head.",
)  # fmt: skip
@click.option("--folds", "n_folds", type=click.IntRange(min=2), default=5, show_default=True)
@click.option("--metric", default="auroc", show_default=True, help="What chooses the winners.")
@click.option("--jobs", type=click.IntRange(min=1), help="Processes; without it one per core.")
@seed_option
@json_option
def sweep_command(
    cache_path: Path,
    manifest_path: Path,
    out: Path,
    heads: tuple[str, ...],
    pool: str | None,
    n_configs: int,
    n_folds: int,
    metric: str,
    jobs: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Cross-validate heads on CACHE, refit the winners and score them once on test."""
    from medembed import sweeps

    with showing_progress("Training", "fits") as progress:
        result = sweeps.sweep(
            cache_path,
            manifest_path,
            out,
            heads=heads,
            pool=pool,
            n_configs=n_configs,
            n_folds=n_folds,
            metric=metric,
            seed=seed,
            jobs=jobs,
            progress=progress,
        )
    if as_json:
        print_json(result)
    else:
        _show_comparison([out], "study", None, "table")


@main.command("compare")
@click.argument("runs", metavar="RUN…", type=PATH, nargs=-1, required=True)
@click.option("--level", type=click.Choice(["study", "image"]), default="study", show_default=True)
@click.option("--by", type=click.Choice(["region", "views"]), help="A block of rows for each.")
@click.option(
    "--format",
    "table_format",
    type=click.Choice(["table", "markdown", "csv", "latex"]),
    default="table",
    show_default=True,
)
@seed_option
@json_option
def compare_command(
    runs: tuple[Path, ...], level: str, by: str | None, table_format: str, seed: int, as_json: bool
) -> None:
    """Compare the heads of one or more runs, with intervals and paired tests."""
    if as_json:
        from medembed.results.comparison import compare

        print_json(compare(list(runs), level=level, seed=seed))
    else:
        _show_comparison(list(runs), level, by, table_format, seed)


def _show_comparison(
    runs: list[Path], level: str, by: str | None, table_format: str, seed: int = 0
) -> None:
    from medembed.results.comparison import compare
    from medembed.results.tables import render

    result = compare(runs, level=level, seed=seed)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPED_COLUMNS
    click.echo(render(result, table_format=table_format, by=by, width=width))


@main.command("report")
@click.argument("runs", metavar="RUN…", type=PATH, nargs=-1, required=True)
@click.option("-o", "--output", type=PATH, required=True, help="Directory of the page.")
@json_option
def report_command(runs: tuple[Path, ...], output: Path, as_json: bool) -> None:
    """Write a page with the leaderboard, ROC curves and scores per region."""
    from medembed.results.page import write_report

    written = write_report(list(runs), output)
    say(f"Page: {written['page']}")
    if as_json:
        print_json(written)


@main.command("demo")
@click.argument("directory", metavar="[DIR]", type=PATH, default=Path("medembed-demo"))
@click.option("--patients", "n_patients", type=click.IntRange(min=40), default=400,
              show_default=True, help="Synthetic patients.")  # fmt: skip
@seed_option
@json_option
def demo_command(directory: Path, n_patients: int, seed: int, as_json: bool) -> None:
    """Run the whole path on synthetic radiographs that medembed draws itself."""
    from medembed.demo.pipeline import run_demo

    say("The demo's images are synthetic; its scores say nothing about medicine.")
    result = run_demo(directory, n_patients=n_patients, seed=seed, show_progress=showing_progress)
    if as_json:
        print_json(result)
        return
    _show_comparison([directory / "runs" / "sweep"], "study", None, "table")
    click.echo(f"Page: {result['page']}")
