"""What several commands share: options, the width of tables, and the end of checks."""

import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from medembed.cli.console import print_json, say
from medembed.core.poolings import DEFAULT_POOLINGS, POOLINGS
from medembed.core.text import without_credentials

__all__ = [
    "IMAGES",
    "LOCATION",
    "MANY",
    "MAX_BATCH",
    "MAX_SEED",
    "PATH",
    "STREAMS",
    "Finite",
    "check_point",
    "conclude",
    "device_option",
    "encoder_option",
    "fit_option",
    "image_root_option",
    "json_option",
    "level_option",
    "limit_options",
    "margin_option",
    "operating_point_option",
    "output_option",
    "pool_option",
    "precision_option",
    "prevalence_option",
    "refuse_stream",
    "seed_option",
    "split_names",
    "stream_root_option",
    "table_columns",
]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
STREAMS = ("tar://", "hf://")
"""How addresses of streams begin."""


class _LocalPath(click.Path):
    """A path of this machine; a bucket's URL is refused rather than taken for a strange path."""

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:
        if _URL.match(os.fspath(value)):
            what = "this option" if isinstance(param, click.Option) else "this argument"
            refuse_stream(os.fspath(value), param, ctx)
            shown = without_credentials(os.fspath(value))
            self.fail(
                f"{shown} is not on this machine, and {what} takes a local path. Copy "
                "it here first, a cache with `medembed cache pull URL DIR`.",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


def refuse_stream(
    text: str, param: click.Parameter | None = None, ctx: click.Context | None = None
) -> None:
    """Refuse the address of a stream with the commands that read one; ignore any other text."""
    if not text.startswith(STREAMS):
        return
    from medembed.core.errors import ArgumentError
    from medembed.images.streams import parse_stream_root

    try:
        root = parse_stream_root(text)
    except ArgumentError as error:
        raise click.BadParameter(str(error), ctx, param) from error
    raise click.BadParameter(
        f"{root} is read from front to back, as `manifest build --from-stream` and `extract "
        "--image-root` do; this option needs files that can be opened by name. Extract from it and "
        "name the --cache, or save its images as files and name the directory.",
        ctx,
        param,
    )


class _LocationType(click.Path):
    """A local path, or a bucket's prefix such as s3://bucket/mura; or, if asked for, a stream."""

    takes_streams = False

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:
        text = os.fspath(value)
        if not _URL.match(text):
            return super().convert(value, param, ctx)
        from medembed.cli.progress import announce_download
        from medembed.core.errors import ArgumentError
        from medembed.core.locations import parse_location
        from medembed.core.object_store import set_announcer
        from medembed.images.streams import parse_stream_root

        set_announcer(announce_download)
        if not self.takes_streams:
            refuse_stream(text, param, ctx)
        try:
            stream = parse_stream_root(text) if self.takes_streams else None
            return stream or parse_location(text)
        except ArgumentError as error:
            self.fail(str(error), param, ctx)


PATH = _LocalPath(path_type=Path)
LOCATION = _LocationType(path_type=Path)
IMAGES = _LocationType(path_type=Path)
IMAGES.takes_streams = True
Command = TypeVar("Command", bound=Callable[..., Any])
MAX_SEED = 2**63 - 1
"""The largest whole number that every file and library here holds."""


class Finite(click.FloatRange):
    """A number within a range, and finite."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the number; refuse infinities, and NaN, which no range refuses."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


image_root_option = click.option(
    "--image-root",
    type=LOCATION,
    required=True,
    help="Directory or bucket that the manifest's paths are relative to.",
)
stream_root_option = click.option(
    "--image-root",
    type=IMAGES,
    required=True,
    help="Directory or bucket that the manifest's paths are relative to; or tar://DIR, or "
    "hf://datasets/OWNER/NAME[@REVISION][/SUBSET].",
)
encoder_option = click.option(
    "--encoder",
    "reference",
    required=True,
    help="Hub id such as google/medgemma-4b-pt[@revision], a checkpoint directory, or demo.",
)
device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "mps"]),
    default="auto",
    show_default=True,
    help="Where the encoder runs.",
)
precision_option = click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    show_default=True,
    help="Precision of the encoder; auto is bf16 on a GPU that supports it, else fp32.",
)
fit_option = click.option(
    "--fit",
    type=click.Choice(["stretch", "pad"]),
    default="stretch",
    show_default=True,
    help="How to make an image square.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document on stdout."
)
margin_option = click.option(
    "--margin",
    type=Finite(0, 0.5, min_open=True, max_open=True),
    help="Acceptable loss of AUROC; tests whether heads are non-inferior to the best.",
)
level_option = click.option(
    "--level",
    type=click.Choice(["study", "image"]),
    default="study",
    show_default=True,
    help="Unit that is scored.",
)
pool_option = click.option(
    "--pool",
    "poolings",
    callback=lambda *given: split_names(*given),
    default=",".join(DEFAULT_POOLINGS),
    show_default=True,
    help=f"Poolings to store: {', '.join(entry.label for entry in POOLINGS.values())}; after "
    f"block K {', '.join(f'{n}@K' for n, entry in POOLINGS.items() if entry.is_per_block)}.",
)
MAX_BATCH = 65_536
"""The most images in one batch: more than any device can hold."""
MANY = 1_000_000
"""The most epochs, configurations or folds: more would never end."""


def output_option(words: str, name: str = "out") -> Callable[[Command], Command]:
    """Return a decorator that adds -o, --output (or --out), as the parameter `name`."""
    return click.option(
        "-o", "--output", "--out", name, type=PATH, required=True, metavar="PATH", help=words
    )


def limit_options(command: Command) -> Command:
    """Add --max-bytes and --max-seconds, the limits above which an image counts as failed."""
    for option in (
        click.option(
            "--max-seconds",
            type=Finite(0, 1_000_000, min_open=True),
            default=120.0,
            show_default=True,
            help="CPU seconds of decoding above which an image counts as failed.",
        ),
        click.option(
            "--max-bytes",
            type=click.IntRange(min=1, max=2**63 - 1),
            default=2**30,
            show_default=True,
            help="File size above which an image counts as failed.",
        ),
    ):
        command = option(command)
    return command


def operating_point_option(words: str) -> Callable[[Command], Command]:
    """Return a decorator that adds a repeatable --operating-point; `words` begin its help."""
    return click.option(
        "--operating-point",
        "operating_points",
        metavar="POINT",
        multiple=True,
        callback=_read_points,
        help=f"{words} sensitivity=0.95, specificity=0.9, youden or threshold=0.3; repeatable.",
    )


def check_point(context: click.Context, option: click.Parameter, text: str | None) -> str | None:
    """Return the text of an operating point; anything else is a usage error."""
    _read_points(context, option, () if text is None else (text,))
    return text


def _read_points(context: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> Any:
    if not texts:
        return ()
    from medembed.core.errors import TrainingDataError
    from medembed.evaluation.thresholds import parse_rules

    try:
        return parse_rules(texts)
    except TrainingDataError as error:
        raise click.BadParameter(f"{error}.", context, option) from None


prevalence_option = click.option(
    "--prevalence",
    type=Finite(0, 1, min_open=True, max_open=True),
    metavar="P",
    help="Also report PPV and NPV at this prevalence.",
)
seed_option = click.option(
    "--seed",
    type=click.IntRange(min=0, max=MAX_SEED),
    default=0,
    show_default=True,
    help="Random seed.",
)


def split_names(context: click.Context, option: click.Parameter, value: str | None) -> Any:
    """Split `a,b` into ("a", "b"); an empty name is a usage error."""
    if value is None:
        return None
    names = tuple(name.strip() for name in value.split(","))
    if not all(names):
        raise click.BadParameter(f"{value!r} has an empty name", context, option)
    return names


def table_columns(piped: int) -> int:
    """Return the columns of the terminal, or `piped` for a file or another program."""
    import shutil  # here, so that --help need not wait

    return shutil.get_terminal_size().columns if sys.stdout.isatty() else piped


def conclude(problems: list[str], checked: Path, remedy: str, as_json: bool, **more: Any) -> None:
    """Print the problems that a check found; exit with 1 if any. `more` goes into the document."""
    if as_json:
        print_json({"problems": problems, **more})
    for problem in problems:
        say(problem)
    if problems:
        raise click.ClickException(f"{checked}: {len(problems)} problem(s), listed above. {remedy}")
    say(f"{checked}: no problems")
