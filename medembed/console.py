"""What commands show: progress on stderr, one JSON document on stdout, errors in one line."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from medembed.errors import MedembedError

__all__ = ["Commands", "print_json", "say", "showing_progress"]

INTERRUPTED = 130  # what a shell reports of a process that Ctrl-C ended: 128 + SIGINT
LINE_EVERY_SECONDS = 10.0  # between plain progress lines where stderr is no terminal


class Commands(click.Group):
    """A click group that turns errors raised on purpose into `Error: …` and exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; convert `MedembedError`, a full disk and the like in one place."""
        try:
            return super().invoke(ctx)
        except MedembedError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            say("Interrupted. Nothing is half-written; the same command goes on from what is done.")
            raise SystemExit(INTERRUPTED) from None
        except BrokenPipeError:
            raise
        except OSError as error:
            raise click.ClickException(_describe(error)) from error


def _describe(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}. Check that the path is right, writable and not full."


def say(text: str = "") -> None:
    """Print a line for people, on stderr."""
    click.echo(text, err=True)


def print_json(document: Any) -> None:
    """Print the one JSON document of a command on stdout; NaN is refused."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


@contextmanager
def showing_progress(label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Show how far long work is: a bar on a terminal, a plain line now and then elsewhere.

    Parameters
    ----------
    label : str
        What is being done, such as "Embedding".
    unit : str
        What is counted, in the plural, such as "images".

    Yields
    ------
    progress : callable
        To be called as `progress(done, total)`.
    """
    if sys.stderr.isatty():
        with _bar(label, unit) as progress:
            yield progress
    else:
        yield _plain_lines(label, unit)


@contextmanager
def _bar(label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[rate]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=0, rate=unit)
        start = time.monotonic()

        def progress(done: int, total: int) -> None:
            rate = done / max(time.monotonic() - start, 1e-9)
            bar.update(task, completed=done, total=total, rate=f"{unit}, {rate:,.1f}/s")

        yield progress


def _plain_lines(label: str, unit: str) -> Callable[[int, int], None]:
    start = time.monotonic()
    last, said = start, -1

    def progress(done: int, total: int) -> None:
        nonlocal last, said
        now = time.monotonic()
        if done == said or (done < total and now - last < LINE_EVERY_SECONDS):
            return
        last, said = now, done
        rate = done / max(now - start, 1e-9)
        left = (total - done) / rate if rate else 0.0
        say(f"{label}: {done}/{total} {unit}, {rate:,.1f}/s, {left:,.0f} s left")

    return progress
