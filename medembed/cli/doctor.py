"""`medembed doctor`: check whether an extraction will run before starting one."""

from pathlib import Path

import click

from medembed.cli.commands import Command
from medembed.cli.console import print_json, suggest
from medembed.cli.options import LOCATION, PATH, json_option, pool_option
from medembed.core.locations import Location

__all__ = ["doctor_command"]


@click.command(
    "doctor",
    cls=Command,
    starting="Looking at this machine",
    examples=[
        "medembed doctor --encoder google/medgemma-4b-pt --manifest mura.csv --cache cache",
    ],
)
@click.option(
    "--encoder", "reference", help="Also check this encoder: access, memory, bytes to download."
)
@click.option(
    "--manifest",
    "manifest_path",
    type=PATH,
    help="Manifest whose images are counted to estimate disk space.",
)
@click.option("--cache", "cache_path", type=LOCATION, help="Where the cache will be written.")
@pool_option
@json_option
def doctor_command(
    reference: str | None,
    manifest_path: Path | None,
    cache_path: Location | None,
    poolings: tuple[str, ...],
    as_json: bool,
) -> None:
    """Check device, memory, disk, token and access; exit with 1 if one is not good enough."""
    from medembed import doctor

    checks = doctor.examine(reference, manifest=manifest_path, cache=cache_path, poolings=poolings)
    if as_json:
        print_json({"checks": [check.as_dict() for check in checks]})
    else:
        for line in doctor.lines(checks):
            click.echo(line)
    n_bad = sum(not check.ok for check in checks)
    if n_bad:
        raise click.ClickException(f"{n_bad} of {len(checks)} checks failed; see above.")
    if not as_json:
        suggest(
            *("extract", manifest_path or "MANIFEST", "--image-root", "DIR"),
            *("--encoder", reference or "google/medgemma-4b-pt", "--cache", cache_path or "cache"),
        )
