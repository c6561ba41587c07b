"""What commands show: words on stderr, one JSON document on stdout, errors in one line."""

import json
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import click

from medembed.core.text import printable

__all__ = [
    "ENDINGS",
    "QUIET",
    "STATUSES",
    "STEP",
    "VERBOSE",
    "Terminated",
    "exit_status",
    "ignore_endings",
    "is_quiet",
    "is_step",
    "is_terminal",
    "print_json",
    "printable",
    "say",
    "suggest",
    "terminate_cleanly",
]

ENDINGS = {
    signal.SIGINT: "Interrupted",
    signal.SIGTERM: "Terminated",
    signal.SIGHUP: "Hung up",
}
"""The signals that end a command, and what it says then."""
STATUSES = tuple(128 + number for number in ENDINGS)
"""What a shell reports of a process that a signal ended."""
PATIENCE_SECONDS = 10.0
QUIET, VERBOSE = "quiet", "verbose"
"""The options that every command takes."""
STEP = "step"
"""Marks a command that another one runs as one of its steps."""


class Terminated(KeyboardInterrupt):
    """One of `ENDINGS` came; `number` says which.

    Schedulers send SIGTERM before they kill, and a terminal that is closed SIGHUP.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def terminate_cleanly() -> None:
    """Let Ctrl-C, SIGTERM and SIGHUP end the command alike: what is done is committed first.

    The first one alone: launchers and people repeat them, and neither a commit that is under way
    nor the end of other processes is to be interrupted by that. Only after `PATIENCE_SECONDS` does
    one more end this process at once; its own processes see that, and end too.
    """
    began: list[float] = []

    def end(number: int, frame: FrameType | None) -> None:
        began.append(time.monotonic())
        if len(began) == 1:
            # What threads of libraries raise, of workers that end under them, helps nobody.
            threading.excepthook = lambda _: None
            raise Terminated(number)
        if began[-1] - began[0] > PATIENCE_SECONDS:
            os._exit(128 + number)

    for number in ENDINGS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` has it, and a shell's `&`
            signal.signal(number, end)


def ignore_endings() -> None:
    """Pass over the signals that end a command, now that it ends."""
    for number in ENDINGS:
        signal.signal(number, signal.SIG_IGN)


def exit_status(error: KeyboardInterrupt) -> int:
    """Return the exit status of a command that a signal has ended."""
    return 128 + int(getattr(error, "number", signal.SIGINT))


def is_quiet() -> bool:
    """Return whether the command that runs was given -q."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(f"medembed.{QUIET}"))


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a standard stream is a terminal; one that the caller has closed is None."""
    return stream is not None and stream.isatty()


def is_step() -> bool:
    """Return whether the command that runs is a step of another one."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(f"medembed.{STEP}"))


def say(text: str = "") -> None:
    """Print a line for people on stderr, unless the command was given -q."""
    if not is_quiet():
        click.echo(printable(text), err=True)


def suggest(*words: str | Path) -> None:
    """Print the command that usually follows, on stderr: `Next: medembed …`.

    Nothing is printed by a step of another command.
    """
    if not is_step():
        say(f"Next: {shlex.join(['medembed', *map(str, words)])}")


def print_json(document: Any) -> None:
    """Print the one JSON document of a command on stdout; NaN is refused.

    Characters are escaped where stdout has no way to write one of them, as in another locale than
    UTF-8, and where a file's name is no UTF-8.
    """
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(document, indent=2, allow_nan=False)
    click.echo(text)
