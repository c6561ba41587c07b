"""`medembed report`."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from medembed.cli.commands import Command
from medembed.cli.compare import read_given
from medembed.cli.console import print_json, say, suggest
from medembed.cli.options import (
    LOCATION,
    PATH,
    json_option,
    level_option,
    margin_option,
    operating_point_option,
    output_option,
    prevalence_option,
    seed_option,
    split_names,
)
from medembed.cli.progress import showing_progress
from medembed.core.locations import BucketPath, Location

__all__ = ["hush_matplotlib", "is_public", "report_command", "write_command"]

_FORMATS = ("png", "pdf")
"""`figures.OPTIONAL_FORMATS`, whose module imports matplotlib."""
_SILENT = {"as_json"}
"""Parameters that change only what is printed, not what is written."""
_NO_HOME = (
    "mkdir -p failed for path",
    "%s is not a writable directory",
    "Matplotlib created a temporary cache directory",
)
"""matplotlib's warnings that its font cache is elsewhere, which does not matter here."""


def hush_matplotlib() -> None:
    """Suppress matplotlib's warnings about a home directory that is not writable."""
    import logging

    logging.getLogger("matplotlib").addFilter(
        lambda record: not str(record.msg).startswith(_NO_HOME)
    )


def _check_formats(context: click.Context, option: click.Parameter, value: str | None) -> Any:
    for name in split_names(context, option, value) or ():
        if name not in _FORMATS:
            raise click.BadParameter(f"{name!r} is not one of: {', '.join(_FORMATS)}.")
    return value


@click.command(
    "report",
    cls=Command,
    starting="Reading the runs",
    examples=[
        "medembed report runs/sweep -o report",
        "medembed report runs/sweep -o report --manifest mura.csv --image-root MURA-v1.1",
        "medembed report runs/sweep -o report --cache cache --explanations heat",
        "medembed report runs/sweep -o paper --figures png,pdf",
        "medembed report runs/wrist -o report",
    ],
)
@click.argument("runs", metavar="RUN…", type=PATH, nargs=-1, required=True)
@output_option("Directory of the page.", "output")
@level_option
@click.option(
    "--manifest",
    "manifest_path",
    type=PATH,
    help="The runs' manifest; adds scores by its columns and, with --image-root, films.",
)
@click.option(
    "--image-root",
    type=LOCATION,
    help="Directory or bucket that the manifest's paths are relative to.",
)
@click.option(
    "--cache",
    "cache_path",
    type=LOCATION,
    help="The runs' cache; adds to each case the nearest films of training.",
)
@click.option(
    "--explanations",
    type=PATH,
    metavar="DIR",
    help="What `predict --explain DIR` wrote; adds heat maps to the cases.",
)
@click.option(
    "--covariates",
    callback=split_names,
    metavar="A,B",
    help="Columns of the manifest to show with each case; they may identify a patient.",
)
@margin_option
@click.option("--names", is_flag=True, help="Show the films' paths, which may identify a patient.")
@click.option(
    "--checklist",
    "checklists",
    type=click.Choice(["tripod-ai", "claim"]),
    multiple=True,
    help="Reporting checklist to fill in beside the page; repeatable.",
)
@click.option(
    "--figures",
    "formats",
    callback=_check_formats,
    metavar="png,pdf",
    help="Also write each figure as PNG, PDF or both; SVG and CSV are always written.",
)
@operating_point_option("Operating point to show:")
@prevalence_option
@seed_option
@json_option
def report_command(
    runs: tuple[Path, ...],
    output: Path,
    level: str,
    manifest_path: Path | None,
    image_root: Location | None,
    cache_path: Location | None,
    explanations: Path | None,
    covariates: Sequence[str] | None,
    margin: float | None,
    names: bool,
    checklists: tuple[str, ...],
    formats: str | None,
    operating_points: tuple[Any, ...],
    prevalence: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Write a self-contained page that compares runs, with figures and their data."""
    if image_root is not None and manifest_path is None:
        raise click.UsageError("--image-root requires --manifest, whose paths are relative to it.")
    if names and image_root is None:
        raise click.UsageError("--names requires --manifest and --image-root.")
    if covariates and manifest_path is None:
        raise click.UsageError("--covariates requires --manifest, whose columns they are.")
    hush_matplotlib()
    from medembed.report.cases import CaseSources
    from medembed.report.page import write_report
    from medembed.results.comparison import ComparisonOptions
    from medembed.results.targets import holds_targets

    manifest, find_thumbnails = read_given(manifest_path), None
    if image_root is not None:
        find_thumbnails = _film_finder(manifest, image_root, names, output)
    if any(map(holds_targets, runs)):
        if len(runs) > 1 or margin is not None or checklists:
            raise click.UsageError(
                "A directory of targets stands alone, without --margin and --checklist; name a "
                f"target's run, such as {runs[0]}/NAME, for these."
            )
        asked = ComparisonOptions(
            level=level, seed=seed, operating_points=operating_points, prevalence=prevalence
        )
        sources = CaseSources(
            cache=cache_path, explanations=explanations, covariates=covariates or (), names=names
        )
        _report_targets(
            runs[0], output, asked, manifest, find_thumbnails, formats or (), sources, as_json
        )
        return
    with (
        showing_progress("Drawing", "figures") as progress,
        showing_progress("Reading", "films") as films_progress,
    ):
        written = write_report(
            list(runs),
            output,
            level=level,
            seed=seed,
            find_thumbnails=find_thumbnails,
            manifest=manifest,
            margin=margin,
            command=write_command(click.get_current_context()),
            checklists=checklists,
            operating_points=operating_points,
            prevalence=prevalence,
            progress=progress,
            figures=formats or (),
            cases=CaseSources(
                cache=cache_path,
                explanations=explanations,
                covariates=covariates or (),
                names=names,
                progress=films_progress,
            ),
        )
    say(f"Page: {written['page']}")
    if not formats:
        say("Its figures are SVG and CSV; --figures png,pdf adds these formats.")
    for filled in written.get("checklist", []):
        counts = ", ".join(f"{n} {status}" for status, n in filled["counts"].items())
        say(f"Checklist: {filled['path']} ({counts})")
    if as_json:
        print_json(written)
    else:
        suggest("predict", runs[0], "IMAGE")


def _report_targets(
    path: Path,
    output: Path,
    asked: Any,
    manifest: Any,
    find_thumbnails: Any,
    formats: str | tuple[()],
    sources: Any,
    as_json: bool,
) -> None:
    """Write a page for each target of a sweep, and the overview that links them."""
    from medembed.report.page import PageExtras, read_formats
    from medembed.report.target_pages import write_target_report
    from medembed.results.targets import open_targets

    command = write_command(click.get_current_context())
    with showing_progress("Drawing", "figures") as progress:
        extras = PageExtras(
            manifest,
            find_thumbnails,
            command,
            progress=progress,
            formats=read_formats(formats),
            cases=sources,
        )
        written = write_target_report(open_targets(path), output, asked, extras)
    say(f"Page: {written['page']}")
    if as_json:
        print_json(written)
    else:
        suggest("predict", path / next(iter(written["targets"])), "IMAGE")


def _film_finder(manifest: Any, image_root: Location, names: bool, output: Path) -> Any:
    """Return what finds films; those that lie beside the page are not decoded again."""
    from medembed.dataset.manifest import existing_images
    from medembed.report.cases import FOLDER
    from medembed.report.gallery import FILM_SIDE, make_thumbnails

    root = existing_images(image_root)
    return lambda wanted: make_thumbnails(
        manifest, root, wanted, with_names=names, side=FILM_SIDE, made=output / FOLDER
    )


def write_command(context: click.Context) -> str:
    """Return the command line of a context, with every option that has a value.

    Relative paths are kept. A path that reveals its place on the machine (absolute, from home, or
    upwards) is cut to its last part, as a bucket's URL is, and several arguments to ends long
    enough to tell them apart. The command then works from the directory that holds these files.
    """
    words, given = context.command_path.split()[1:], context.params
    arguments, options = [], []
    for parameter in context.command.params:
        value = given.get(parameter.name or "")
        if parameter.name in _SILENT or value is None or value is False or value == ():
            continue
        if isinstance(parameter, click.Argument):
            several = value if isinstance(value, tuple) else (value,)
            arguments += _name_all(several)
        else:
            options += list(_option(parameter, value))
    return shlex.join(["medembed", *words, *arguments, *options])


def is_public(path: Path) -> bool:
    """Return whether a path reveals nothing of the machine: relative, not from home or upwards."""
    return not (path.is_absolute() or ".." in path.parts or str(path).startswith(("~", ".")))


def _option(parameter: click.Parameter, value: Any) -> Iterator[str]:
    name = parameter.opts[0]
    for own in value if isinstance(value, tuple) else (value,):
        yield name
        if own is not True:
            yield _name_all([own])[0]


def _name_all(values: Sequence[Any]) -> list[str]:
    """Return values as words; paths are kept if all are public, else cut to their ends."""
    values = [value.name if isinstance(value, BucketPath) else value for value in values]
    paths = [value for value in values if isinstance(value, Path)]
    if len(paths) < len(values) or all(map(is_public, paths)):
        words = [str(value) for value in values]
    else:
        words = _shortest_ends([path.expanduser().resolve() for path in paths])
    return [f"./{word}" if word.startswith("-") and paths else word for word in words]


def _shortest_ends(paths: Sequence[Path]) -> list[str]:
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names
