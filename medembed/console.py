"""What commands show: progress on stderr, one JSON document on stdout, errors in one line."""

import json
import os
import signal
import sys
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import click

from medembed.errors import MedembedError

__all__ = [
    "INTERRUPTED",
    "TERMINATED",
    "Commands",
    "Leaderboard",
    "Lines",
    "Progress",
    "Terminated",
    "print_json",
    "say",
    "showing_leaderboard",
    "showing_progress",
    "terminate_cleanly",
]

# What a shell reports of a process that a signal ended: 128 + the signal's number.
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
LINE_EVERY_SECONDS = 10.0  # between plain progress lines where stderr is no terminal
DRAWN_PER_SECOND = 4  # at most, on a terminal
COMPUTING_SHARE = 0.05  # of the time, at most, goes into a leaderboard that training waits for

Lines = Callable[[], Sequence[Mapping[str, Any]]]
"""Computes a leaderboard: per head `head`, `tried`, `total`, `best`, `pooling`, `params`."""


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
        """Say how much is done; what the first call says was done before, and has no rate."""
        ...

    def tell(self, label: str) -> None:
        """Say what is being done now, in a word or two."""
        ...


class Leaderboard(Progress, Protocol):
    """What is handed to a sweep."""

    def board(self, lines: Lines) -> None:
        """Say how the heads stand; `lines` is called when they are drawn, in any thread or never.

        What it returns is best first; `best`, `pooling` and `params` are None before there is one.
        """
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
    if not _draws():
        yield _PlainLines(label, unit)
        return
    bar = _Bar(label, unit)
    try:
        yield bar
    finally:
        bar.stop()


@contextmanager
def showing_leaderboard(label: str, unit: str, metric: str) -> Iterator[Leaderboard]:
    """Show how far a sweep is as `showing_progress` does, and its leaderboard so far.

    On a terminal that is a table above the bar, gone at the end; elsewhere a plain line ends with
    the best head. However often it is told, it takes at most `COMPUTING_SHARE` of the time.

    Parameters
    ----------
    label, unit : str
        As for `showing_progress`.
    metric : str
        Name of the score that `best` is.

    Yields
    ------
    progress : Leaderboard
        To be called as `progress(done, total)` and `progress.board(lines)`.
    """
    if not _draws():
        yield _PlainBoard(label, unit)
        return
    board = _Board(label, unit, metric)
    try:
        yield board
    finally:
        board.stop()


def _draws() -> bool:
    """Return whether stderr is a terminal that can move its cursor."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


@dataclass(frozen=True)
class _Measured:
    done: int
    total: int
    at: float
    rate: float | None  # per second; unknown before anything was done


class _Pace:
    """How far work is, and its rate since the first call.

    What was done by then was done before: by a process that this one goes on for, or in the time
    that the work took to begin.
    """

    def __init__(self, label: str, unit: str) -> None:
        self.label = label
        self._scale, self._unit = (1e6, "MB") if unit == "bytes" else (1.0, unit)
        self._first: _Measured | None = None
        self._latest: _Measured | None = None

    def begin(self, label: str) -> None:
        self.label, self._first, self._latest = label, None, None

    def measure(self, done: int, total: int) -> None:
        now, first = time.monotonic(), self._first
        rate = None
        if first is not None and done > first.done and now > first.at:
            rate = (done - first.done) / (now - first.at)
        self._latest = _Measured(done, total, now, rate)
        self._first = first or self._latest

    def count(self) -> str:
        """Return such as "3/8 fits"; nothing before anything was measured."""
        measured = self._latest
        if measured is None:
            return ""
        return f"{self._shown(measured.done)}/{self._shown(measured.total)} {self._unit}"

    def rate(self) -> str:
        """Return such as "1.5/s", or nothing while that is unknown."""
        if self._latest is None or self._latest.rate is None:
            return ""
        return f"{self._latest.rate / self._scale:,.1f}/s"

    def seconds_left(self) -> float | None:
        """Return the time left by the last call's rate; None if that is unknown or was wrong."""
        measured = self._latest
        if measured is None or measured.rate is None:
            return None
        waited = time.monotonic() - measured.at
        left = (measured.total - measured.done) / measured.rate - waited
        return left if left > 0 else None

    def _shown(self, count: float) -> str:
        return f"{count / self._scale:,.{0 if self._scale == 1 else 1}f}"


class _Bar(_Pace):
    """A line with a bar, redrawn by a thread of rich's."""

    transient = False

    def __init__(self, label: str, unit: str) -> None:
        super().__init__(label, unit)
        self._live: Any = None

    def __call__(self, done: int, total: int) -> None:
        self.measure(done, total)
        self._show()

    def tell(self, label: str) -> None:
        self.begin(label)
        self._show()

    def stop(self) -> None:
        if self._live:
            self._live.stop()

    def draw(self, console: Any) -> Any:
        """Return what is shown now; on a narrow terminal without bar, then without label."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        left = self.seconds_left()
        parts = (self.count(), self.rate(), "" if left is None else f"{_clock(left)} left")
        text = ", ".join(part for part in parts if part)
        cells: list[Any] = [Text(text, no_wrap=True, overflow="ellipsis")]
        room = console.width - len(text) - 1
        if room >= len(self.label):
            cells.insert(0, Text(self.label))
        if (room := room - len(self.label) - 1) >= 4:
            total, done = (self._latest.total, self._latest.done) if self._latest else (None, 0)
            cells.insert(1, ProgressBar(total, done, width=min(24, room)))
        line = Table.grid(padding=(0, 1))
        line.add_row(*cells)
        return line

    def _show(self) -> None:
        if self._live:
            return
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True)
        self._live = Live(
            get_renderable=lambda: self.draw(console),
            console=console,
            refresh_per_second=DRAWN_PER_SECOND,
            transient=self.transient,
            redirect_stdout=sys.stdout.isatty(),  # elsewhere it is not the drawing's to move
        )
        self._live.start()


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute:02}:{second:02}"


class _Board(_Bar):
    """A leaderboard above the bar."""

    transient = True

    def __init__(self, label: str, unit: str, metric: str) -> None:
        super().__init__(label, unit)
        self._metric, self._standings = metric, _Standings()

    def board(self, lines: Lines) -> None:
        self._standings.waiting.append(lines)

    def draw(self, console: Any) -> Any:
        from rich.console import Group
        from rich.text import Text

        bar = super().draw(console)
        lines = self._standings.latest()
        if not lines:
            return bar
        title = f"Best {self._metric} so far, mean over folds"
        room = max(1, console.height - 4)  # of a low terminal the bar is the last to go
        table = _lay_out([_HEADINGS, *(_cells(line) for line in lines[:room])], console.width)
        return Group(Text(title, no_wrap=True, overflow="ellipsis", style="bold"), *table, bar)


class _Standings:
    """The newest leaderboard, computed only when it is drawn and in its share of the time."""

    def __init__(self) -> None:
        self.waiting: deque[Lines] = deque(maxlen=1)
        self._lines: Sequence[Mapping[str, Any]] = ()
        self._not_before = 0.0

    def latest(self) -> Sequence[Mapping[str, Any]]:
        began = time.monotonic()
        if self.waiting and began >= self._not_before:
            self._lines = self.waiting.pop()()
            ended = time.monotonic()
            pause = max(1 / DRAWN_PER_SECOND, (ended - began) / COMPUTING_SHARE)
            self._not_before = ended + pause
        return self._lines


_HEADINGS = ("head", "tried", "best", "pooling", "parameters")
_ALIGNMENTS: tuple[Any, ...] = ("left", "right", "right", "left", "left")
_LONGEST_HEAD, _SHORTEST_PARAMETERS = 16, 12


def _cells(line: Mapping[str, Any]) -> tuple[str, ...]:
    """Write a line of the leaderboard, under `_HEADINGS`."""
    params = (line["params"] or {}).items()
    cells = (
        line["head"],
        f"{line['tried']}/{line['total']}",
        _score(line["best"]),
        line["pooling"] or "",
        " ".join(f"{name}={_short(value)}" for name, value in params),
    )
    return tuple(_printable(str(cell)) for cell in cells)


def _lay_out(rows: Sequence[tuple[str, ...]], width: int) -> list[Any]:
    """Return rows as lines of at most `width` columns; the parameters give way, then pooling."""
    from rich.cells import cell_len
    from rich.text import Text

    widths = [max(cell_len(row[k]) for row in rows) for k in range(len(_HEADINGS))]
    widths[0] = min(widths[0], _LONGEST_HEAD)
    room = width - sum(widths[:3]) - 2 * 3
    widths[3] = min(widths[3], room if room < 2 * _SHORTEST_PARAMETERS else room // 2)
    widths[4] = room - widths[3] - 2
    if widths[4] < _SHORTEST_PARAMETERS:
        widths[3:] = [room] if room > 0 else []
    lines = []
    for number, row in enumerate(rows):
        line = Text(no_wrap=True, overflow="ellipsis", style="" if number else "dim")
        for k, cell_width in enumerate(widths):
            cell = Text(row[k], overflow="ellipsis")
            cell.align(_ALIGNMENTS[k], cell_width)
            line.append("  " if k else "").append_text(cell)
        line.rstrip()
        lines.append(line)
    return lines


def _score(best: float | None) -> str:
    return "–" if best is None else f"{best:.3f}"  # noqa: RUF001 - a dash, as a table has it


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace(" ", "")


def _printable(text: str) -> str:
    """Replace what a terminal would obey instead of showing."""
    return "".join("�" if unicodedata.category(c)[0] == "C" else c for c in text)


class _PlainLines(_Pace):
    def __init__(self, label: str, unit: str) -> None:
        super().__init__(label, unit)
        self._last, self._said = time.monotonic(), -1

    def __call__(self, done: int, total: int) -> None:
        self.measure(done, total)
        now = time.monotonic()
        early = done < total and now - self._last < LINE_EVERY_SECONDS
        if done == self._said or early:
            return
        self._last, self._said = now, done
        left = self.seconds_left()
        parts = (self.count(), self.rate(), "" if left is None else f"{left:,.0f} s left")
        say(f"{self.label}: {', '.join(filter(None, (*parts, self.more())))}")

    def tell(self, label: str) -> None:
        self.begin(label)

    def more(self) -> str:
        """Return what else a line says."""
        return ""


class _PlainBoard(_PlainLines):
    def __init__(self, label: str, unit: str) -> None:
        super().__init__(label, unit)
        self._lines: Lines = tuple

    def board(self, lines: Lines) -> None:
        self._lines = lines

    def more(self) -> str:
        best = next((line for line in self._lines() if line["best"] is not None), None)
        return f"best {_printable(best['head'])} {_score(best['best'])}" if best else ""
