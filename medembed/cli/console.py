"""The output of commands: text on stderr, one JSON document on stdout, errors in one line."""

import json
import os
import shlex
import signal
import sys
import threading
import time
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
"""The signals that end a command, and the word that the command then prints."""
STATUSES = tuple(128 + number for number in ENDINGS)
"""Added to a signal's number in the exit status of a process that the signal ended."""
PATIENCE_SECONDS = 10.0
AGAIN_SECONDS = 0.05
"""By then a finalizer or callback that a signal interrupted has ended."""
QUIET, VERBOSE = "quiet", "verbose"
"""The options that every command takes."""
STEP = "step"
"""Marks a command that another command runs as a step."""


class Terminated(KeyboardInterrupt):
    """The signal `number`, one of `ENDINGS`, was received.

    Schedulers send SIGTERM before they kill a process, and closing a terminal sends SIGHUP.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def terminate_cleanly() -> None:
    """Make Ctrl-C, SIGTERM and SIGHUP end the command alike: what is done is committed first.

    Only the first signal counts: launchers and people repeat them, and a repeated signal must
    interrupt neither a commit in progress nor the end of other processes. Only after
    `PATIENCE_SECONDS` does a further signal end this process at once; its child processes notice
    and end too. One that arrives within a finalizer or a callback of a C library, where Python
    drops exceptions, counts shortly after.
    """
    began: list[float] = []

    def begin_again(number: int) -> None:
        began.clear()
        os.kill(os.getpid(), number)

    def tell_again(unraisable: "sys.UnraisableHookArgs") -> None:
        """Send a signal once more whose exception Python has dropped."""
        if isinstance(unraisable.exc_value, Terminated):
            again = threading.Timer(AGAIN_SECONDS, begin_again, [unraisable.exc_value.number])
            again.daemon = True
            again.start()
        else:
            sys.__unraisablehook__(unraisable)

    def end(number: int, frame: FrameType | None) -> None:
        began.append(time.monotonic())
        if len(began) == 1:
            # Library threads raise errors about ending workers, which help nobody.
            threading.excepthook = lambda _: None
            raise Terminated(number)
        if began[-1] - began[0] > PATIENCE_SECONDS:
            os._exit(128 + number)

    sys.unraisablehook = tell_again
    for number in ENDINGS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # under `nohup` or a shell's `&`
            signal.signal(number, end)


def ignore_endings() -> None:
    """Ignore the signals that end a command, now that the command is ending."""
    for number in ENDINGS:
        signal.signal(number, signal.SIG_IGN)


def exit_status(error: KeyboardInterrupt) -> int:
    """Return the exit status of a command that a signal ended."""
    return 128 + int(getattr(error, "number", signal.SIGINT))


def is_quiet() -> bool:
    """Return whether the current command was given -q."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(f"medembed.{QUIET}"))


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a standard stream is a terminal; a stream that the caller closed is None."""
    return stream is not None and stream.isatty()


def is_step() -> bool:
    """Return whether the current command is a step of another command."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(f"medembed.{STEP}"))


def say(text: str = "") -> None:
    """Print a line for people on stderr, unless the current command was given -q."""
    if not is_quiet():
        click.echo(printable(text), err=True)


def suggest(*words: str | os.PathLike[str]) -> None:
    """Print the command that usually follows, on stderr: `Next: medembed …`.

    A step of another command prints nothing.
    """
    if not is_step():
        say(f"Next: {shlex.join(['medembed', *map(str, words)])}")


def print_json(document: Any) -> None:
    """Print the one JSON document of a command on stdout; NaN is refused.

    Non-ASCII characters are escaped if stdout cannot encode one of them, as in a locale other than
    UTF-8 or with a file name that is not UTF-8.
    """
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(document, indent=2, allow_nan=False)
    click.echo(text)
