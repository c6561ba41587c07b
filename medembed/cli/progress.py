"""The progress of long work: a bar or a live table on a terminal, else plain lines, on stderr."""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, Self

from medembed.cli.console import is_quiet, is_terminal, say
from medembed.core.text import mask_controls

__all__ = [
    "Leaderboard",
    "Lines",
    "Progress",
    "announce_download",
    "showing_leaderboard",
    "showing_progress",
]

LINE_EVERY_SECONDS = 10.0  # between plain progress lines if stderr is not a terminal
FEWEST_TIMED = 2  # items before the time left is shown: the first includes start-up
SLOW = 0.1  # per second; lower rates are shown per minute
DRAWN_PER_SECOND = 4  # at most, on a terminal
COMPUTING_SHARE = 0.05  # most of the time spent on a leaderboard, for which training waits


Lines = Callable[[], Sequence[Mapping[str, Any]]]
"""Computes a leaderboard: per head `head`, `tried`, `total`, `best`, `pooling`, `params`."""


class Progress(Protocol):
    """The callback that long work gets."""

    def __call__(self, done: int, total: int) -> None:
        """Report how much is done; the amount of the first call does not count for the rate."""
        ...

    def show_status(self, label: str) -> None:
        """Report what is being done now, in a word or two."""
        ...


class Leaderboard(Progress, Protocol):
    """The callback that a sweep gets."""

    def board(self, lines: Lines) -> None:
        """Report the leaderboard; `lines` is called when it is drawn, in any thread or never.

        `lines` returns the best head first; `best`, `pooling` and `params` are None at the start.
        """
        ...


def showing_progress(label: str, unit: str) -> AbstractContextManager[Progress]:
    """Show the progress of long work: a bar on a terminal, else a plain line now and then.

    Nothing is shown before the first call.

    Parameters
    ----------
    label : str
        What is being done, such as "Embedding".
    unit : str
        What is counted, in the plural, such as "images". "bytes" are shown as megabytes.

    Returns
    -------
    context manager
        Its value is `progress`, to be called as `progress(done, total)`.
    """
    if is_quiet():
        return _Silent(label, unit)
    return _Bar(label, unit) if _draws() else _PlainLines(label, unit)


def announce_download(words: str, unit: str) -> AbstractContextManager[Progress]:
    """Print `words`, which say what is downloaded and its size; show its progress in lines.

    Lines, also on a terminal: a command's own bar may be drawn at the time.
    """
    say(f"{words} …")
    return _Silent("", unit) if is_quiet() else _PlainLines("Fetching", unit)


def showing_leaderboard(label: str, unit: str, metric: str) -> AbstractContextManager[Leaderboard]:
    """Show a sweep's progress, like `showing_progress`, and its leaderboard by `metric` so far.

    On a terminal the leaderboard is a table above the bar, removed at the end; elsewhere plain
    lines end with the best head. `progress.board(lines)` may be called after every fit: drawing
    takes at most `COMPUTING_SHARE` of the time.
    """
    if is_quiet():
        return _Silent(label, unit)
    return _Board(label, unit, metric) if _draws() else _PlainBoard(label, unit)


def _draws() -> bool:
    """Return whether stderr is a terminal that can move its cursor."""
    return is_terminal(sys.stderr) and os.environ.get("TERM", "") not in ("dumb", "unknown")


@dataclass(frozen=True)
class _Measured:
    done: int
    total: int
    at: float
    rate: float | None  # per second; unknown before anything was done
    n_timed: int  # items that the rate is based on


class _Pace:
    """The progress of work, and its rate since the first call.

    Anything done by the first call does not count for the rate: an earlier process did it, or it
    was done while the work started.
    """

    def __init__(self, label: str, unit: str) -> None:
        self.label = label
        self._scale, self._unit = (1e6, "MB") if unit == "bytes" else (1.0, unit)
        self._first: _Measured | None = None
        self._latest: _Measured | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        """End the drawing, if there is one."""

    def show_status(self, label: str) -> None:
        self.label, self._first, self._latest = label, None, None

    def measure(self, done: int, total: int) -> None:
        now, first = time.monotonic(), self._first
        rate, n_timed = None, 0 if first is None else done - first.done
        if first is not None and done > first.done and now > first.at:
            rate = (done - first.done) / (now - first.at)
        self._latest = _Measured(done, total, now, rate, n_timed)
        self._first = first or self._latest

    def describe(self, shown_time: Callable[[float], str]) -> list[str]:
        """Return texts such as "3/8 fits", "1.5/s" and "2 s left", as far as these are known.

        Between calls the time left counts down; once it reaches zero it is left out.
        """
        measured = self._latest
        if measured is None:
            return []
        parts = [f"{self._shown(measured.done)}/{self._shown(measured.total)} {self._unit}"]
        if measured.rate is not None:
            rate = measured.rate / self._scale
            parts.append(f"{rate:,.1f}/s" if rate >= SLOW else f"{60 * rate:.1f}/min")
            if measured.n_timed < FEWEST_TIMED:
                return parts
            waited = time.monotonic() - measured.at
            left = (measured.total - measured.done) / measured.rate - waited
            parts += [f"{shown_time(left)} left"] if left > 0 else []
        return parts

    def _shown(self, count: float) -> str:
        return f"{count / self._scale:,.{0 if self._scale == 1 else 1}f}"


class _Silent(_Pace):
    """Shows nothing: the command was given -q."""

    def __call__(self, done: int, total: int) -> None:
        """Ignore the progress."""

    def board(self, lines: Lines) -> None:
        """Ignore the leaderboard."""


class _Bar(_Pace):
    """A line with a bar, redrawn by a thread of rich's."""

    transient = False

    def __init__(self, label: str, unit: str) -> None:
        super().__init__(label, unit)
        self._live: Any = None

    def __call__(self, done: int, total: int) -> None:
        self.measure(done, total)
        self._show()

    def show_status(self, label: str) -> None:
        super().show_status(label)
        self._show()

    def __exit__(self, *raised: object) -> None:
        if self._live:
            self._live.stop()

    def draw(self, console: Any) -> Any:
        """Return the current drawing; a narrow terminal drops the bar first, then the label."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        text = ", ".join(self.describe(_clock))
        cells: list[Any] = [Text(text, no_wrap=True, overflow="ellipsis")]
        room = console.width - len(text) - 1
        if room >= len(self.label):
            cells.insert(0, Text(self.label))
        if (room := room - len(self.label) - 1) >= 4:
            measured = self._latest
            total, done = (measured.total, measured.done) if measured else (None, 0)
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
            redirect_stdout=sys.stdout.isatty(),  # a redirected stdout must not be touched
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
        self._metric, self._not_before = metric, 0.0
        self._waiting: deque[Lines] = deque(maxlen=1)
        self._drawn: Sequence[Mapping[str, Any]] = ()

    def board(self, lines: Lines) -> None:
        self._waiting.append(lines)

    def draw(self, console: Any) -> Any:
        from rich.console import Group
        from rich.text import Text

        bar = super().draw(console)
        lines = self._latest_lines()
        if not lines:
            return bar
        title = f"Best {self._metric} so far, mean over folds"
        room = max(1, console.height - 4)  # a low terminal drops the bar last
        table = _lay_out([_HEADINGS, *(_cells(line) for line in lines[:room])], console.width)
        return Group(Text(title, no_wrap=True, overflow="ellipsis", style="bold"), *table, bar)

    def _latest_lines(self) -> Sequence[Mapping[str, Any]]:
        began = time.monotonic()
        if self._waiting and began >= self._not_before:
            self._drawn = self._waiting.pop()()
            ended = time.monotonic()
            pause = max(1 / DRAWN_PER_SECOND, (ended - began) / COMPUTING_SHARE)
            self._not_before = ended + pause
        return self._drawn


_HEADINGS = ("head", "tried", "inner", "pooling", "parameters")
# The inner score chooses among configurations; `cv`, which is reported, comes from other patients.
_ALIGNMENTS: tuple[Any, ...] = ("left", "right", "right", "left", "left")
_LONGEST_HEAD, _SHORTEST_PARAMETERS = 16, 12


def _cells(line: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the cells of a leaderboard's line, under `_HEADINGS`."""
    params = (line["params"] or {}).items()
    cells = (
        line["head"],
        f"{line['tried']}/{line['total']}",
        "–" if line["best"] is None else f"{line['best']:.3f}",
        line["pooling"] or "",
        " ".join(f"{name}={_short(value)}" for name, value in params),
    )
    return tuple(mask_controls(str(cell)) for cell in cells)


def _lay_out(rows: Sequence[tuple[str, ...]], width: int) -> list[Any]:
    """Return rows as lines of at most `width` columns; parameters are cut first, then pooling."""
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


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace(" ", "")


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
        parts = [*self.describe(lambda seconds: f"{seconds:,.0f} s"), *self.more()]
        say(f"{self.label}: {', '.join(parts)}")

    def more(self) -> list[str]:
        """Return further parts of a line."""
        return []


class _PlainBoard(_PlainLines):
    def __init__(self, label: str, unit: str) -> None:
        super().__init__(label, unit)
        self._lines: Lines = tuple

    def board(self, lines: Lines) -> None:
        self._lines = lines

    def more(self) -> list[str]:
        scored = (line for line in self._lines() if line["best"] is not None)
        return [
            f"best inner score: {mask_controls(line['head'])} {line['best']:.3f}" for line in scored
        ][:1]
