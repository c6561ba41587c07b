"""`medembed cache`: look at one and prove it whole."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from medembed.commands.options import PATH, conclude, json_option
from medembed.console import Commands, print_json, showing_progress

__all__ = ["cache", "info_command", "verify_command"]


@click.group(cls=Commands)
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
    conclude(problems, cache_path, remedy, as_json)
