"""The `medembed` command as a process of its own; also `python -m medembed`."""

import os
import sys

from medembed.cli import main
from medembed.console import INTERRUPTED, TERMINATED, terminate_cleanly

__all__ = ["run"]


def run() -> None:
    """Run the command; after Ctrl-C or SIGTERM end without waiting for what still computes."""
    terminate_cleanly()
    try:
        main()
    except SystemExit as end:
        if end.code not in (INTERRUPTED, TERMINATED):
            raise
        # All that was to be kept is on disk. A batch in a lane would take up to minutes to end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(end.code))


if __name__ == "__main__":
    run()
