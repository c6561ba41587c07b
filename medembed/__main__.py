"""`python -m medembed` is the `medembed` command."""

from medembed.cli import main

main()
