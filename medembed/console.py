"""What commands show: progress on stderr, one JSON document on stdout, errors in one line."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import click

from medembed.errors import MedembedError

__all__ = [
    "INTERRUPTED",
    "TERMINATED",
    "Commands",
    "Progress",
    "Terminated",
    "print_json",
    "say",
    "showing_progress",
    "terminate_cleanly",
]

# What a shell reports of a process that a signal ended: 128 + the signal's number.
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
LINE_EVERY_SECONDS = 10.0  # between plain progress lines where stderr is no terminal


class Terminated(KeyboardInterrupt):
    """SIGTERM came, as schedulers send it before they kill; handled like Ctrl-C."""


def terminate_cleanly() -> None:
    """Let SIGTERM end the command as Ctrl-C does: what is done is committed first."""
    signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, frame: FrameType | None) -> None:
    # Launchers repeat the signal; a commit that is under way is not to be interrupted by that.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


class Commands(click.Group):
    """A click group that turns errors raised on purpose into `Error: …` and exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; convert `MedembedError`, a full disk and the like in one place."""
        try:
            return super().invoke(ctx)
        except MedembedError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt as error:
            terminated = isinstance(error, Terminated)
            done = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
            say(
                f"{'Terminated' if terminated else 'Interrupted'}.{done} Nothing is half-written; "
                "the same command goes on from what is done."
            )
            raise SystemExit(TERMINATED if terminated else INTERRUPTED) from None
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


class Progress(Protocol):
    """What is handed to long work."""

    def __call__(self, done: int, total: int) -> None:
        """Say how much is done."""
        ...

    def tell(self, label: str) -> None:
        """Say what is being done now, in a word or two."""
        ...


@contextmanager
def showing_progress(label: str, unit: str) -> Iterator[Progress]:
    """Show how far long work is: a bar on a terminal, a plain line now and then elsewhere.

    Nothing is shown before the first call.

    Parameters
    ----------
    label : str
        What is being done, such as "Embedding".
    unit : str
        What is counted, in the plural, such as "images". Of "bytes" megabytes are shown.

    Yields
    ------
    progress : Progress
        To be called as `progress(done, total)`.
    """
    if not sys.stderr.isatty():
        yield _PlainLines(label, unit)
        return
    bar = _Bar(label, unit)
    try:
        yield bar
    finally:
        bar.stop()


class _Pace:
    """The rate since the work that is shown began."""

    def __init__(self, label: str, unit: str) -> None:
        self.label, self._unit = label, unit
        self._scale, self.shown_unit = (1e6, "MB") if unit == "bytes" else (1.0, unit)
        self._start = time.monotonic()

    def begin(self, label: str) -> None:
        self.label, self._start = label, time.monotonic()

    def measure(self, done: int) -> float:
        """Return what was done per second."""
        return done / max(time.monotonic() - self._start, 1e-9)

    def shown(self, count: float) -> str:
        return f"{count / self._scale:,.{0 if self._scale == 1 else 1}f}"

    def shown_rate(self, rate: float) -> str:
        return f"{rate / self._scale:,.1f}/s"


class _Bar(_Pace):
    def __init__(self, label: str, unit: str) -> None:
        super().__init__(label, unit)
        self._bar: Any = None
        self._task: Any = None

    def __call__(self, done: int, total: int) -> None:
        self._show()
        text = f"{self.shown(done)}/{self.shown(total)} {self.shown_unit}"
        rate = self.shown_rate(self.measure(done))
        self._bar.update(self._task, completed=done, total=total, text=f"{text}, {rate}")

    def tell(self, label: str) -> None:
        self.begin(label)
        self._show()
        self._bar.update(self._task, description=label)

    def stop(self) -> None:
        if self._bar:
            self._bar.stop()

    def _show(self) -> None:
        if self._bar:
            return
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(compact=True),
        )
        self._bar = RichProgress(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task(self.label, total=None, text="")
        self._bar.start()


class _PlainLines(_Pace):
    def __init__(self, label: str, unit: str) -> None:
        super().__init__(label, unit)
        self._last, self._said = time.monotonic(), -1

    def __call__(self, done: int, total: int) -> None:
        rate, now = self.measure(done), time.monotonic()
        early = done < total and now - self._last < LINE_EVERY_SECONDS
        if done == self._said or early:
            return
        self._last, self._said = now, done
        left = f", {(total - done) / rate:,.0f} s left" if rate > 0 else ""
        say(
            f"{self.label}: {self.shown(done)}/{self.shown(total)} {self.shown_unit}, "
            f"{self.shown_rate(rate)}{left}"
        )

    def tell(self, label: str) -> None:
        self.begin(label)
