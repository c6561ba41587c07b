"""What long work shows: a live table and a bar on a terminal, plain lines elsewhere."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medembed.cli import progress
from medembed.cli.progress import showing_leaderboard, showing_progress

HEIGHT = 24
ERASED, SHOWN, HIDDEN, ESCAPE = "\x1b[2K", "\x1b[?25h", "\x1b[?25l", "\x1b"


def line(head: str, best: float | None = None, **others: Any) -> dict[str, Any]:
    rest = {"pooling": "mean+max", "params": {"lr": 0.00123456, "hidden": [256, 128]}}
    known = rest if best is not None else {"pooling": None, "params": None}
    return {"head": head, "tried": 3, "total": 200, "best": best, **known, **others}


LINES = [
    line("mlp", 0.81249, params={"lr": 0.00123456, "hidden": [256, 128], "dropout": 0.25} | {
        f"parameter_{i}": i for i in range(9)
    }),
    line("lightgbm", 0.7, pooling="mean+max+pooler+projector"),
    line("logistic"),
]  # fmt: skip

SWEEP = """
import json, sys, time
from medembed.cli.progress import showing_leaderboard
lines, metric = json.loads(sys.argv[1])
with showing_leaderboard("Training", "fits", metric) as progress:
    progress(200, 1200)
    progress.board(lambda: lines)
    time.sleep(0.3)
    progress(240, 1200)
"""


class Screen:
    """A terminal that understands what rich writes to draw again and again, and nothing else."""

    def __init__(self, width: int) -> None:
        self.width, self.row, self.column = width, 0, 0
        self.rows: list[list[str]] = [[]]
        self.frames: list[list[str]] = []
        self.wrapped = False

    def write(self, text: str) -> None:
        for token in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|[\s\S]", text):
            if token == "\r":
                self.column = 0
            elif token == "\n":
                self.row += 1
                self.rows += [[] for _ in range(self.row + 1 - len(self.rows))]
            elif token == ERASED:
                self.frames.append(self.text())
                self.rows[self.row] = []
            elif re.fullmatch(r"\x1b\[\d+A", token):
                self.row -= int(token[2:-1])
            elif token not in (SHOWN, HIDDEN) and not re.fullmatch(r"\x1b\[[0-9;]*m", token):
                self._put(token)

    def _put(self, character: str) -> None:
        assert character.isprintable(), f"{character!r} reached the terminal"
        self.wrapped |= self.column >= self.width
        row = self.rows[self.row]
        row += " " * (self.column + 1 - len(row))
        row[self.column] = character
        self.column += 1

    def text(self) -> list[str]:
        return [found for row in self.rows if (found := "".join(row).rstrip())]

    def fullest(self) -> list[str]:
        """Return the last of the frames that had most lines."""
        return max(reversed(self.frames), key=len)


@cache  # the start of a process is most of what these tests cost
def run_on_terminal(
    program: str, *arguments: str, width: int = 80, **environment: str
) -> tuple[str, str]:
    """Return what a program writes to a terminal on stderr, and what to a pipe on stdout."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, width, 0, 0))
    plain = {"NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"}
    inherited = {name: value for name, value in os.environ.items() if name not in plain}
    child = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        env=inherited | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"} | environment,
    )
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 65536):
            written += part
    except OSError:  # Linux's end of a terminal that nobody has open any more
        pass
    os.close(ours)
    stdout = child.communicate()[0]
    assert child.returncode == 0, written.decode()
    return written.decode(), stdout


def watch_sweep(
    lines: list[dict[str, Any]] = LINES, metric: str = "auroc", width: int = 80, **environment: str
) -> Screen:
    screen = Screen(width)
    screen.write(run_on_terminal(SWEEP, json.dumps([lines, metric]), width=width, **environment)[0])
    return screen


def test_a_terminal_shows_a_line_per_head_above_the_bar() -> None:
    title, headings, mlp, lightgbm, logistic, bar = watch_sweep().fullest()
    assert title == "Best auroc so far, mean over folds"
    assert headings.split() == ["head", "tried", "inner", "pooling", "parameters"]
    assert re.match(r"mlp +3/200  0\.812  mean\+max .* lr=0\.00123 hidden=\[256,128\] .*…$", mlp)
    assert re.match(r"lightgbm +3/200  0\.700  mean\+max\+pooler.*  lr=0\.00123", lightgbm)
    assert re.fullmatch(r"logistic +3/200 +–", logistic)
    assert re.match(r"Training [━╸]+ +240/1,200 fits, \d+\.\d/s, \d\d:\d\d left$", bar)


@pytest.mark.parametrize(
    ("width", "metric"), [(80, "auroc"), (40, "average_precision"), (20, "average_precision")]
)
def test_no_line_is_wider_than_the_terminal(width: int, metric: str) -> None:
    screen = watch_sweep(metric=metric, width=width)
    assert not screen.wrapped
    assert len(screen.fullest()) == 6


def test_40_columns_still_say_metric_score_pace_and_time_left() -> None:
    title, _, mlp, *_, bar = watch_sweep(metric="average_precision", width=40).fullest()
    assert title.startswith("Best average_precision")
    assert re.match(r"mlp +3/200  0\.812  mean", mlp)
    assert re.match(r"240/1,200 fits, \d+\.\d/s, \d\d:\d\d left$", bar)


def test_nothing_is_left_on_the_terminal_but_the_cursor() -> None:
    written, _ = run_on_terminal(SWEEP, json.dumps([LINES, "auroc"]))
    screen = Screen(80)
    screen.write(written)
    assert screen.text() == []
    assert written.rindex(SHOWN) > written.rindex(HIDDEN)


def test_no_color_writes_no_colour() -> None:
    document = json.dumps([LINES, "auroc"])
    coloured = re.compile(r"\x1b\[(?:\d+;)*(?:3\d|4\d|9\d)[;m]")
    assert coloured.search(run_on_terminal(SWEEP, document)[0])
    assert not coloured.search(run_on_terminal(SWEEP, document, NO_COLOR="1")[0])
    assert len(watch_sweep(NO_COLOR="1").fullest()) == 6


def test_markup_and_control_characters_are_shown_as_text() -> None:
    hostile = line(
        "m[b]lp", 0.5, pooling="[red]m\x1b[2J", params={"[/]": "a\nb\r\t\x07", "x": "[link=y]"}
    )
    screen = watch_sweep([hostile])
    shown = screen.fullest()
    assert len(shown) == 4
    assert re.match(r"m\[b\]lp +3/200  0\.500  \[red\]m�\[2J  \[/\]=a�b��� x=\[link=y\]$", shown[2])


def test_a_low_terminal_keeps_the_bar() -> None:
    screen = watch_sweep([line(f"head{i}", 0.5) for i in range(60)])
    assert len(screen.fullest()) < HEIGHT
    assert screen.fullest()[-1].startswith("Training")


def test_a_leaderboard_is_computed_4_times_a_second_at_most_and_the_newest_is_shown() -> None:
    program = """
import time
from medembed.cli.progress import showing_leaderboard
computed = []
def lines_at(number):
    def lines():
        computed.append(number)
        return [dict(head=f"head{number}", tried=1, total=2, best=None, pooling=None, params=None)]
    return lines
began = time.monotonic()
with showing_leaderboard("Training", "fits", "auroc") as progress:
    for number in range(3000):
        progress(number, 3000)
        progress.board(lines_at(number))
        if number == 1500:
            time.sleep(1)
    time.sleep(0.6)
print(len(computed), computed[-1], time.monotonic() - began)
"""
    written, stdout = run_on_terminal(program)
    n_computed, last, seconds = (float(text) for text in stdout.split())
    assert 2 <= n_computed <= 4 * seconds + 1
    assert last == 2999
    screen = Screen(80)
    screen.write(written)
    assert screen.fullest()[2].startswith("head2999")


def test_a_slow_leaderboard_takes_a_twentieth_of_the_time() -> None:
    program = """
import time
from medembed.cli.progress import showing_leaderboard
computed = []
def slow():
    computed.append(0)
    time.sleep(0.1)
    return []
began = time.monotonic()
with showing_leaderboard("Training", "fits", "auroc") as progress:
    while time.monotonic() < began + 1.2:
        progress(0, 3000)
        progress.board(slow)
        time.sleep(0.01)
print(len(computed), time.monotonic() - began)
"""
    n_computed, seconds = (float(text) for text in run_on_terminal(program)[1].split())
    assert 1 <= n_computed <= 1 + seconds / 2


def test_stdout_is_not_diverted_to_the_terminal() -> None:
    program = """
from medembed.cli.progress import showing_progress
with showing_progress("Training", "fits") as progress:
    progress(0, 2)
    print("a result")
    progress(2, 2)
"""
    written, stdout = run_on_terminal(program)
    assert stdout == "a result\n"
    assert "2/2 fits" in written
    assert "a result" not in written


def test_a_dumb_terminal_gets_plain_lines() -> None:
    program = """
from medembed.cli.progress import showing_progress
with showing_progress("Training", "fits") as progress:
    progress(2, 2)
"""
    assert run_on_terminal(program, TERM="dumb")[0] == "Training: 2/2 fits\r\n"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_without_a_terminal_a_line_ends_with_the_best_so_far(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with showing_leaderboard("Training", "fits", "auroc") as progress:
        progress(0, 40)
        clock[0] += 10
        progress(10, 40)
        progress.board(lambda: LINES[2:])
        clock[0] += 10
        progress(20, 40)
        progress.board(lambda: [line("m\x1b[1Alp", 0.81249), *LINES[1:]])
        progress(21, 40)
        clock[0] += 20
        progress(40, 40)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "Training: 10/40 fits, 1.0/s, 30 s left",
        "Training: 20/40 fits, 1.0/s, 20 s left",
        "Training: 40/40 fits, 1.0/s, best inner score: m�[1Alp 0.812",
    ]


def test_without_a_terminal_a_leaderboard_is_computed_for_a_line_only(clock: list[float]) -> None:
    computed: list[int] = []

    def lines() -> list[dict[str, Any]]:
        computed.append(1)
        return LINES

    with showing_leaderboard("Training", "fits", "auroc") as progress:
        for done in range(1000):
            progress(done, 1000)
            progress.board(lines)
        assert not computed
        clock[0] += 10
        progress(1000, 1000)
    assert len(computed) == 1


Show = Callable[[str, str], Any]


@pytest.mark.parametrize("show", [showing_progress, lambda *of: showing_leaderboard(*of, "auroc")])
def test_what_was_done_before_has_no_rate_and_no_part_in_the_time_left(
    show: Show, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with show("Training", "fits") as progress:
        clock[0] += 60  # spent on reading the cache
        progress(900, 1000)
        clock[0] += 20
        progress(910, 1000)
    assert capsys.readouterr().err.splitlines() == [
        "Training: 900/1,000 fits",
        "Training: 910/1,000 fits, 0.5/s, 180 s left",
    ]


def test_work_that_was_all_done_before_claims_no_rate(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with showing_progress("Embedding", "images") as progress:
        clock[0] += 1
        progress(7, 7)
    assert capsys.readouterr().err == "Embedding: 7/7 images\n"


def test_telling_what_is_done_now_begins_a_new_pace(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with showing_progress("Fetching", "bytes") as progress:
        progress(0, 8_000_000)
        clock[0] += 1
        progress(8_000_000, 8_000_000)
        progress.show_status("Checking")
        clock[0] += 100
        progress(1_000_000, 8_000_000)
        clock[0] += 14
        progress(8_000_000 - 1, 8_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "Fetching: 8.0/8.0 MB, 8.0/s",
        "Checking: 1.0/8.0 MB",
        "Checking: 8.0/8.0 MB, 0.5/s, 0 s left",
    ]


def test_on_a_terminal_the_time_left_runs_down_between_calls_and_ends_when_it_was_wrong(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    bar = progress._Bar("Training", "fits")
    monkeypatch.setattr(bar, "_show", lambda: None)
    screen = Console(width=80, force_terminal=True, no_color=True)

    def shown() -> str:
        with screen.capture() as captured:
            screen.print(bar.draw(screen))
        return captured.get().rstrip().partition("fits")[2]

    bar(900, 1000)
    assert shown() == ""
    clock[0] += 60
    bar(901, 1000)
    assert shown() == ", 1.0/min"  # of one item no time left is claimed
    clock[0] += 60
    bar(902, 1000)
    assert shown() == ", 1.0/min, 1:38:00 left"
    clock[0] += 60
    assert shown() == ", 1.0/min, 1:37:00 left"
    bar(999, 1000)
    assert shown() == ", 0.6/s, 00:02 left"
    clock[0] += 60
    assert shown() == ", 0.6/s"


def test_a_terminal_sees_at_once_that_a_command_has_begun(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom medembed.cli import main\n"
        "try: main(['cache', 'info', *sys.argv[1:]])\nexcept SystemExit: pass"
    )
    assert run_on_terminal(program, str(tmp_path))[0].startswith("Opening the cache …\r\n")
    assert run_on_terminal(program, str(tmp_path), "-q")[0].startswith("Error: ")
