"""The `medembed` command as a process of its own; also `python -m medembed`."""

import os
import sys
import threading

from medembed.cli import main
from medembed.console import INTERRUPTED, TERMINATED, terminate_cleanly

__all__ = ["run"]


def run() -> None:
    """Run the command; after Ctrl-C or SIGTERM end without waiting for what still computes."""
    terminate_cleanly()
    try:
        main()
    except SystemExit as end:
        if end.code not in (INTERRUPTED, TERMINATED) or not _computes_still():
            raise
        # All that was to be kept is on disk. A batch in a lane would take up to minutes to end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(end.code))


def _computes_still() -> bool:
    """Whether threads are left that the interpreter would wait for."""
    main_thread = threading.main_thread()
    return any(t is not main_thread and not t.daemon for t in threading.enumerate())


if __name__ == "__main__":
    run()
