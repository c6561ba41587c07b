"""Processes that start at once: forks of one that has imported the libraries already."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from typing import Any

# Of all tests together: the process that forks starts once, whoever asks first.
LIBRARIES = (
    *("medembed.cli", "medembed.cli.sweep", "medembed.extraction.job", "medembed.sweeps"),
    *("medembed.heads.attention", "medembed.heads.linear", "medembed.heads.mlp"),
    *("medembed.heads.lightgbm", "medembed.finetuning", "medembed.encoders.siglip", "pytest"),
)


def fork(function: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """Start a process that calls a function of a module, and nothing of this one is in it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LIBRARIES))
    process = context.Process(target=function, args=arguments)
    process.start()
    return process
