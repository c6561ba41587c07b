"""`medembed cache`: look at one, prove it whole, make it compact."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medembed.cli.console import Commands, print_json, printable, say
from medembed.cli.options import PATH, json_option, split_names
from medembed.cli.progress import showing_progress

if TYPE_CHECKING:
    from medembed.cache.verification import Problem

__all__ = ["cache", "compact_command", "export_command", "info_command", "verify_command"]


@click.group(cls=Commands)
def cache() -> None:
    """Look at a cache, prove that it is whole, merge its small shards."""


@cache.command("info")
@click.argument("cache_path", metavar="CACHE", type=PATH)
@click.option("--manifest", "manifest_path", type=PATH, help="Also say how much of it is there.")
@click.option("--failures", "with_failures", is_flag=True, help="Also list what failed, and why.")
@json_option
def info_command(
    cache_path: Path, manifest_path: Path | None, with_failures: bool, as_json: bool
) -> None:
    """Show the cache's card: spec, rows, size, failures, and how much of a manifest it holds."""
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
    for line in _lines(card):
        click.echo(printable(line))
    for failure in failed:
        name = failure["image"] or failure["sha256"]
        click.echo(printable(f"failed ({failure['stage']}): {name}: {failure['reason']}"))


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
@click.option("--repair", is_flag=True, help="Move bad shards into CACHE/set-aside/.")
@json_option
def verify_command(cache_path: Path, repair: bool, as_json: bool) -> None:
    """Compare every shard with its name and its spec; exit 1 if any is damaged.

    With --repair bad shards are set aside, never deleted: the next `medembed extract` embeds just
    their rows again. The exit status is 1 then too, for rows are missing.
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
        return "Every row can be read; `medembed cache compact` keeps one of each."
    if repair:
        return "Bad shards were set aside: `medembed extract` embeds just their rows again."
    return "--repair sets bad shards aside; `medembed extract` then embeds just their rows again."


@cache.command("compact")
@click.argument("cache_path", metavar="CACHE", type=PATH)
@json_option
def compact_command(cache_path: Path, as_json: bool) -> None:
    """Merge small shards into full ones, and keep one of each row that stands twice.

    Others may read and extract meanwhile. A shard goes only when what replaces it is on disk and
    proved; killed at any moment, it loses nothing, and the next one goes on.
    """
    from medembed.cache.compaction import compact
    from medembed.cache.store import open_cache

    opened = open_cache(cache_path)
    with showing_progress("Merging", "shards") as progress:
        done = compact(opened.path, opened.spec, progress)
    if as_json:
        print_json({**opened.card(), "compacted": asdict(done)})
    click.echo(
        f"{cache_path}: {done.shards_before} shards before, {done.shards_after} now; "
        f"{done.repeats} repeated rows left out",
        err=as_json,
    )


@cache.command("export")
@click.argument("cache_path", metavar="CACHE", type=PATH)
@click.argument("manifest_path", metavar="MANIFEST", type=PATH)
@click.option("-o", "--out", "out_path", type=PATH, required=True, help="FILE.parquet or FILE.npz")
@click.option(
    "--pool",
    "poolings",
    callback=split_names,
    metavar="NAMES",
    help="Poolings, such as mean,max; by default all of the cache.",
)
@json_option
def export_command(
    cache_path: Path,
    manifest_path: Path,
    out_path: Path,
    poolings: tuple[str, ...] | None,
    as_json: bool,
) -> None:
    """Write MANIFEST's rows and their embeddings as one Parquet or .npz file.

    Row by row in the manifest's order, without the images that are known to have failed.
    """
    from medembed.cache.export import SUFFIXES, export
    from medembed.cache.store import open_cache
    from medembed.dataset.manifest import read_manifest

    if out_path.suffix not in SUFFIXES:
        raise click.BadParameter(f"{out_path} ends in neither of {', '.join(SUFFIXES)}")
    opened, rows = open_cache(cache_path), read_manifest(manifest_path)
    with showing_progress("Exporting", "rows") as progress:
        written = export(
            opened, rows, out_path, poolings=poolings, name=str(manifest_path), progress=progress
        )
    if as_json:
        print_json({**asdict(written), "file": str(written.file)})
    left_out = f"; {written.failed} failed images left out" if written.failed else ""
    say(f"{out_path}: {written.rows} rows, {written.bytes / 1e6:,.1f} MB{left_out}")
