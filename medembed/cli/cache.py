"""`medembed cache`: inspect, verify, compact, move and export a cache."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medembed.cli.commands import Commands
from medembed.cli.console import print_json, printable, say, suggest
from medembed.cli.options import LOCATION, PATH, Finite, json_option, output_option, split_names
from medembed.cli.progress import showing_progress
from medembed.core.locations import Location
from medembed.core.text import counted

if TYPE_CHECKING:
    from medembed.cache.verification import Problem

__all__ = [
    "cache_command",
    "compact_command",
    "export_command",
    "info_command",
    "pull_command",
    "push_command",
    "verify_command",
]


_MISSING = ("--image-root", "DIR", "--encoder", "REF")


@click.group(
    "cache",
    cls=Commands,
    examples=[
        "medembed cache info cache --manifest mura.csv",
        "medembed cache verify cache",
    ],
)
def cache_command() -> None:
    """Inspect, verify, compact, move and export a cache of embeddings."""


@cache_command.command(
    "info",
    starting="Opening the cache",
    short_help="Show what a cache holds, and what failed.",
    examples=[
        "medembed cache info cache --manifest mura.csv",
    ],
)
@click.argument("cache_path", metavar="CACHE", type=LOCATION)
@click.option(
    "--manifest",
    "manifest_path",
    type=PATH,
    help="Also show how much of this manifest is embedded.",
)
@click.option(
    "--failures", "with_failures", is_flag=True, help="Also list the images that failed, and why."
)
@json_option
def info_command(
    cache_path: Location, manifest_path: Path | None, with_failures: bool, as_json: bool
) -> None:
    """Show what CACHE holds: its spec, rows and size, and how much of a manifest is embedded."""
    from medembed.cache.pending import make_plan
    from medembed.cache.store import open_cache
    from medembed.dataset.manifest import read_contents

    opened = open_cache(cache_path)
    card = opened.card()
    failures = opened.failures() if with_failures else {}
    names: dict[Any, list[str | None]] = {}
    if manifest_path:
        rows = read_contents(manifest_path)
        plan = make_plan(rows, opened)
        failed_rows = rows[rows["sha256"].isin(list(failures))]
        names = failed_rows.groupby("sha256")["image"].agg(list).to_dict()
        card["coverage"] = {
            "rows": plan.n_rows,
            "contents": plan.n_contents,
            "embedded": plan.n_already,
            "failed": len(plan.known),
            "missing": len(plan.pending),
        }
    if with_failures:
        card["failed"] = [
            {"image": image, **asdict(failure)}
            for sha256, failure in failures.items()
            for image in names.get(sha256, [None])
        ]
    if as_json:
        print_json(card)
        return
    failed = card.pop("failed", [])
    click.echo(_summary(card))
    for line in _lines(card):
        click.echo(printable(line))
    if card.get("coverage", {}).get("missing") == 0:
        suggest("sweep", cache_path, manifest_path or "MANIFEST", "-o", "runs/sweep")
    elif manifest_path:
        suggest("extract", manifest_path, *_MISSING, "--cache", cache_path)
    for failure in failed:
        name = failure["image"] or failure["sha256"]
        click.echo(printable(f"failed ({failure['stage']}): {name}: {failure['reason']}"))


def _summary(card: dict[str, Any]) -> str:
    """Return the line that most people look for."""
    covered, size = card.get("coverage"), f"{card['bytes'] / 1e6:,.1f} MB"
    n_failed = sum(card["failures"].values())
    if covered is None:
        return f"{card['rows']:,} images embedded, {n_failed:,} failed, {size}"
    missing = f", {covered['missing']:,} missing" if covered["missing"] else ""
    return (
        f"{covered['embedded']:,} of {covered['contents']:,} images embedded, "
        f"{covered['failed']:,} failed{missing}, {size}"
    )


def _lines(card: dict[str, Any], indent: str = "") -> Iterator[str]:
    """Yield a nested document as `key: value` lines."""
    for key, value in card.items():
        if isinstance(value, dict):
            yield f"{indent}{key}:"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{key}: {'none' if value is None else value}"


@cache_command.command(
    "verify",
    starting="Opening the cache",
    short_help="Check that every shard is intact; set damaged ones aside.",
    examples=[
        "medembed cache verify cache",
    ],
)
@click.argument("cache_path", metavar="CACHE", type=LOCATION)
@click.option("--repair", is_flag=True, help="Move damaged shards to CACHE/set-aside/.")
@json_option
def verify_command(cache_path: Location, repair: bool, as_json: bool) -> None:
    """Check every shard of CACHE against its hash and the spec; exit with 1 if any is damaged.

    With --repair, damaged shards are set aside, never deleted, and the next `medembed extract`
    embeds only their rows again. The exit status is 1 all the same, because rows are missing.
    """
    from medembed.cache import verification
    from medembed.cache.store import open_cache

    opened = open_cache(cache_path)
    with showing_progress("Verifying", "bytes") as progress:
        problems = verification.verify(opened.path, opened.spec, progress)
    moved = verification.repair(opened.path, problems) if repair else []
    for problem in problems:
        say(problem.what)
    for path in moved:
        say(f"Set aside: {path}")
    if as_json:
        document = {"problems": [problem.what for problem in problems]}
        print_json({**document, "set_aside": [str(path) for path in moved]} if repair else document)
    if problems:
        count = f"{cache_path}: {len(problems)} problem(s), listed above"
        raise click.ClickException(f"{count}. {_remedy(problems, repair)}")
    say(f"{cache_path}: no problems")


def _remedy(problems: "list[Problem]", repair: bool) -> str:
    if not any(problem.is_bad for problem in problems):
        return "Every row can be read; `medembed cache compact` keeps one copy of each."
    if repair:
        return "Damaged shards were set aside; `medembed extract` embeds only their rows again."
    return "--repair sets damaged shards aside; `medembed extract` then embeds only their rows."


@cache_command.command(
    "compact",
    starting="Opening the cache",
    short_help="Merge small shards into full ones.",
    examples=[
        "medembed cache compact cache",
    ],
)
@click.argument("cache_path", metavar="CACHE", type=LOCATION)
@click.option(
    "--grace",
    type=Finite(0, 86_400),
    default=60.0,
    show_default=True,
    help="Seconds that merged shards stay in a bucket, for those who are reading them.",
)
@json_option
def compact_command(cache_path: Location, grace: float, as_json: bool) -> None:
    """Merge small shards of CACHE into full ones, and keep one copy of repeated rows.

    Other processes may read and extract meanwhile. A shard is removed only after its replacement
    is on disk and verified; if the command is killed, nothing is lost and the next call continues.
    """
    from medembed.cache.compaction import compact
    from medembed.cache.store import open_cache

    opened = open_cache(cache_path)
    with showing_progress("Merging", "shards") as progress:
        done = compact(opened.path, opened.spec, progress, grace_seconds=grace)
    if as_json:
        print_json({**opened.card(), "compacted": asdict(done)})
    click.echo(
        f"{cache_path}: {done.shards_before} shards before, {done.shards_after} now; "
        f"{done.repeats} repeated rows left out",
        err=as_json,
    )


@cache_command.command(
    "pull",
    starting="Opening the cache",
    short_help="Copy a cache from a bucket to this machine.",
    examples=[
        "medembed cache pull s3://bucket/mura cache",
        "medembed cache pull s3://bucket/mura",
    ],
)
@click.argument("source", metavar="URL", type=LOCATION)
@click.argument("target", metavar="[DIR]", type=PATH, required=False)
@json_option
def pull_command(source: Location, target: Path | None, as_json: bool) -> None:
    """Copy what DIR lacks of the cache at URL; DIR is then a cache that needs no network.

    Shards of DIR from before a compaction of URL are removed once those with their rows are there;
    rows that only DIR holds stay.

    Without DIR, fill this machine's copies of shards, which every command that reads URL uses.
    """
    from medembed.cache.transfer import keep_copies
    from medembed.core.locations import BucketPath

    if not isinstance(source, BucketPath):
        raise click.UsageError(f"{source} is no bucket. Write: cache pull s3://BUCKET/PREFIX DIR")
    if target is not None:
        _copy_cache(source, target, as_json)
        return
    done = keep_copies(source)
    if as_json:
        print_json(asdict(done))
    say(f"{source}: {counted(done.shards, 'shard')} fetched, {done.already} already there")


@cache_command.command(
    "push",
    starting="Opening the cache",
    short_help="Copy a cache from this machine to a bucket.",
    examples=[
        "medembed cache push cache s3://bucket/mura",
    ],
)
@click.argument("source", metavar="DIR", type=LOCATION)
@click.argument("target", metavar="URL", type=LOCATION)
@json_option
def push_command(source: Location, target: Location, as_json: bool) -> None:
    """Copy what the bucket at URL lacks of the cache in DIR, which stays as it is.

    The two may be named in either order.
    """
    from medembed.core.locations import BucketPath

    if isinstance(source, BucketPath):
        source, target = target, source
    if not isinstance(target, BucketPath):
        raise click.UsageError(f"{target} is no bucket. Write: cache push DIR s3://BUCKET/PREFIX")
    _copy_cache(source, target, as_json)


def _copy_cache(source: Location, target: Location, as_json: bool) -> None:
    from medembed.cache.transfer import copy_cache

    def announce(n_shards: int, n_bytes: int) -> None:
        size = f"{counted(n_shards, 'shard')}, {n_bytes / 1e6:,.1f} MB"
        say(f"Copying {size}, from {source} to {target} …")

    with showing_progress("Copying", "bytes") as progress:
        done = copy_cache(source, target, progress, announce)
    if as_json:
        print_json(asdict(done))
    removed = f", {done.superseded} older ones with their rows removed" if done.superseded else ""
    say(f"{target}: {counted(done.shards, 'shard')} copied, {done.already} already there{removed}")
    suggest("cache", "info", target)


@cache_command.command(
    "export",
    starting="Reading cache and manifest",
    short_help="Write embeddings as a Parquet, CSV or .npz file, or for a viewer.",
    examples=[
        "medembed cache export cache mura.csv -o embeddings.parquet",
        "medembed cache export cache mura.csv -o projector --format tensorboard",
    ],
)
@click.argument("cache_path", metavar="CACHE", type=LOCATION)
@click.argument("manifest_path", metavar="MANIFEST", type=PATH)
@output_option("FILE.parquet, FILE.csv or FILE.npz; with --format a new directory.", "out_path")
@click.option(
    "--pool",
    "poolings",
    callback=split_names,
    metavar="NAMES",
    help="Poolings to export, such as mean,max; all by default.",
)
@click.option(
    "--format",
    "viewer",
    type=click.Choice(["tensorboard", "fiftyone"]),
    help="Write a directory for TensorBoard's projector or FiftyOne instead of a file.",
)
@click.option(
    "--names",
    "with_names",
    is_flag=True,
    help="With --format, also write names of images and studies, which may identify patients.",
)
@click.option(
    "--image-root",
    type=PATH,
    help="Directory of the images, for FiftyOne to show them; requires --names.",
)
@click.option("--wide", is_flag=True, help="Parquet with one column per number, mean_0 and so on.")
@json_option
def export_command(
    cache_path: Location,
    manifest_path: Path,
    out_path: Path,
    poolings: tuple[str, ...] | None,
    viewer: str | None,
    with_names: bool,
    image_root: Path | None,
    wide: bool,
    as_json: bool,
) -> None:
    """Write MANIFEST's rows and their embeddings to one file, or for a viewer.

    Rows keep the manifest's order; images that are known to have failed are left out. A CSV file
    has one column per number, like Parquet with --wide. Files hold all of the manifest's columns;
    what --format writes goes by hash, region, label and split.
    """
    _check_export(out_path, viewer, with_names, image_root, wide)
    from medembed.cache.export import export
    from medembed.cache.store import open_cache
    from medembed.cache.viewers import export_for_viewer
    from medembed.dataset.manifest import read_manifest

    opened, rows = open_cache(cache_path), read_manifest(manifest_path)
    with showing_progress("Exporting", "rows") as progress:
        about: dict[str, Any] = {"poolings": poolings, "name": str(manifest_path)}
        if viewer is None:
            written = export(opened, rows, out_path, wide=wide, progress=progress, **about)
        else:
            written = export_for_viewer(
                opened,
                rows,
                out_path,
                viewer,
                with_names=with_names,
                image_root=image_root,
                progress=progress,
                **about,
            )
    if as_json:
        print_json({**asdict(written), "file": str(written.file)})
    left_out = f"; {written.failed} failed images left out" if written.failed else ""
    say(f"{out_path}: {written.rows} rows, {written.bytes / 1e6:,.1f} MB{left_out}")


def _check_export(
    out_path: Path, viewer: str | None, with_names: bool, image_root: Path | None, wide: bool
) -> None:
    suffixes = (".csv", ".npz", ".parquet")
    if viewer is None:
        if out_path.suffix not in suffixes:
            raise click.BadParameter(f"{out_path} ends in none of {', '.join(suffixes)}")
        if wide and out_path.suffix == ".npz":
            raise click.UsageError(
                "--wide is for Parquet; an .npz file holds one array per pooling."
            )
        if with_names or image_root is not None:
            raise click.UsageError(
                "--names and --image-root are for --format; files have all names."
            )
        return
    if wide:
        raise click.UsageError("--wide is for Parquet; leave it out with --format.")
    if image_root is not None and (viewer != "fiftyone" or not with_names):
        raise click.UsageError("--image-root is for --format fiftyone --names.")
