"""What commands show: words on stderr, one JSON document on stdout, errors in one line."""

import errno
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

import click

from medembed.core.errors import MedembedError
from medembed.core.text import printable

__all__ = [
    "STATUSES",
    "Commands",
    "Terminated",
    "exit_status",
    "ignore_endings",
    "print_json",
    "printable",
    "say",
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


class Commands(click.Group):
    """A click group that turns errors raised on purpose into `Error: …` and exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; convert `MedembedError`, a full disk and the like in one place."""
        try:
            return super().invoke(ctx)
        except MedembedError as error:
            raise click.ClickException(printable(str(error))) from error
        except KeyboardInterrupt as error:
            raise _end(error) from None
        except BrokenPipeError:
            raise
        except OSError as error:
            ending = error.__context__
            if isinstance(ending, KeyboardInterrupt):  # the terminal is gone, and with it its lines
                raise _end(ending) from None
            raise click.ClickException(printable(_describe(error))) from error


def _end(error: KeyboardInterrupt) -> SystemExit:
    """Say what a command that a signal has ended leaves behind; return how it exits."""
    status = exit_status(error)
    word = ENDINGS[signal.Signals(status - 128)]
    done = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
    with suppress(OSError):  # after SIGHUP there may be no terminal
        say(f"{word}.{done} Nothing is half-written; the same command goes on from what is done.")
    return SystemExit(status)


def _describe(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    remedy = "Check that the path is right, writable and not full."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "Free some space there, or write to another disk, and run the command again."
    return f"{where}{error.strerror or error}. {remedy}"


def say(text: str = "") -> None:
    """Print a line for people, on stderr."""
    click.echo(printable(text), err=True)


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
