"""What commands show: words on stderr, one JSON document on stdout, errors in one line."""

import json
import signal
import sys
from types import FrameType
from typing import Any

import click

from medembed.errors import MedembedError
from medembed.text import printable

__all__ = [
    "INTERRUPTED",
    "TERMINATED",
    "Commands",
    "Terminated",
    "print_json",
    "printable",
    "say",
    "terminate_cleanly",
]

# What a shell reports of a process that a signal ended: 128 + the signal's number.
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


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
            raise click.ClickException(printable(str(error))) from error
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
            raise click.ClickException(printable(_describe(error))) from error


def _describe(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}. Check that the path is right, writable and not full."


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
