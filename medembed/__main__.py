"""The `medembed` command as a process of its own; also `python -m medembed`."""

import gc
import io
import os
import signal
import sys
import threading
from contextlib import suppress

from medembed.cli import main
from medembed.cli.console import STATUSES, ignore_endings, terminate_cleanly

__all__ = ["run"]


def run() -> None:
    """Run the command; after Ctrl-C, SIGTERM or SIGHUP do not wait for what still computes."""
    _open_standard_streams()
    terminate_cleanly()
    try:
        main()
    except SystemExit as end:
        if end.code not in STATUSES:
            raise
        ignore_endings()  # the interpreter, as it ends, would let one more kill it
        if end.code != 128 + signal.SIGHUP and not _computes_still():
            raise
        # All that was to be kept is on disk. A batch in a lane would take up to minutes to end.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # after SIGHUP there may be no terminal
                stream.flush()
        os._exit(int(end.code or 0))
    finally:
        gc.freeze()  # the interpreter, as it ends, would search all objects for cycles


def _open_standard_streams() -> None:
    """Keep descriptors 0 to 2 from files of ours, and output from ending the command half-way.

    Where the caller has closed one, the next file opened would get its number, and what a library
    prints would go into that file. A character that the locale lacks is written as an escape.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _computes_still() -> bool:
    """Whether threads are left that the interpreter would wait for."""
    main_thread = threading.main_thread()
    return any(t is not main_thread and not t.daemon for t in threading.enumerate())


if __name__ == "__main__":
    run()
