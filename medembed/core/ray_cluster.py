"""Connect to Ray, which is an extra: `pip install 'medembed[ray]'`."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from medembed.core.errors import MedembedError
from medembed.core.system import missing_library

__all__ = ["connected_to_ray"]


@contextmanager
def connected_to_ray(option: str, on_status: Callable[[str], None] | None = None) -> Iterator[Any]:
    """Yield the module `ray`, connected.

    Uses the Ray that this process is connected to, else the cluster at `RAY_ADDRESS`, else starts
    one on this machine and ends it afterwards.

    Parameters
    ----------
    option : str
        The option that requires Ray, such as "--engine ray", for the message if it is missing.
    on_status : callable, optional
        Called with "Ray" before connecting, which takes seconds.

    Raises
    ------
    MissingLibraryError
        Ray is not installed.
    MedembedError
        Ray cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise missing_library(option, "Ray", "ray", "leave it out") from error
    if ray.is_initialized():
        yield ray
        return
    if on_status:
        on_status("Ray")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        address = os.environ.get("RAY_ADDRESS")
        where = f"at RAY_ADDRESS={address}" if address else "on this machine"
        raise MedembedError(f"cannot connect to Ray {where}: {error}") from error
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's own handler ends the process at once
        yield ray
    finally:
        ray.shutdown()
