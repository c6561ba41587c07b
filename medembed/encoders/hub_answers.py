"""What a hub's answers may say: names that become file names, and how long to wait.

huggingface_hub joins an ETag and a commit to its cache's path as they come, and sleeps for as long
as it is told. Every answer is therefore looked at before huggingface_hub acts on it.
"""

import math
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from medembed.core.errors import EncoderError
from medembed.core.text import mask_controls

__all__ = ["LONGEST_PAUSE", "guard_answers", "plain_tag", "seconds_to_wait", "shown"]

LONGEST_PAUSE = 60
"""Seconds that a server is waited for at its own wish, at the most."""

_TAG = re.compile(r'(?:W/)?"?([0-9A-Za-z][0-9A-Za-z._-]{0,127})"?')
_COMMIT = re.compile(r"[0-9a-f]{40}")
_XET_HASH = re.compile(r"[0-9a-fA-F]{64}")
_ASKED_COMMIT = re.compile(r"/resolve/([0-9a-f]{40})/")
_SECONDS = re.compile(r"[0-9]{1,18}")
_RESET = re.compile(r"\bt\s*=\s*([0-9]+)")
_LONGEST_SHOWN = 60
_installing = threading.Lock()


def guard_answers() -> None:
    """Have each answer that huggingface_hub gets in this process checked before it acts on it.

    The check is an event hook of its HTTP client, put on once and on every client that is made
    later. A client factory that the caller has set goes on making the clients.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    with _installing:
        make = getattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)
        if not isinstance(make, _Guarded):
            set_client_factory(_Guarded(make))


@dataclass(frozen=True)
class _Guarded:
    """A client factory whose clients show each answer to `_check_answer` first."""

    make: Callable[[], Any]

    def __call__(self) -> Any:
        client = self.make()
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "response": [_check_answer, *hooks.get("response", ())]}
        return client


def plain_tag(header: str) -> str:
    """Give an ETag without its quotes; the first 128 letters, digits and . _ - are a name.

    Raises
    ------
    EncoderError
        It is something else, such as a path.
    """
    found = _TAG.fullmatch(header)
    if found is None:
        raise _refuse("ETag", header, "a plain word")
    return found[1]


def seconds_to_wait(header: str) -> float | None:
    """Read a Retry-After header, RFC 9110 section 10.2.3: seconds, or a date.

    Returns
    -------
    float or None
        From 0 to `LONGEST_PAUSE`; None for what is neither.
    """
    text = header.strip()
    if _SECONDS.fullmatch(text):
        return float(min(int(text), LONGEST_PAUSE))
    try:
        moment = parsedate_to_datetime(text)
        left = (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    return min(max(left, 0.0), float(LONGEST_PAUSE))


def shown(text: str) -> str:
    """Give a server's text as a message may show it: short, and nothing that a terminal obeys."""
    text = mask_controls(text)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def _check_answer(response: Any) -> None:
    """Refuse names that are none, and bound the waits; raises EncoderError."""
    headers, request = response.headers, response.request
    commit = headers.get("X-Repo-Commit")
    if commit is not None:
        _check_commit(commit, request.url.path)
    if request.method == "HEAD":  # whose tags name the blobs; a storage's own on GET name nothing
        for name in ("X-Linked-Etag", "ETag"):
            if name in headers:
                plain_tag(headers[name])
    xet = headers.get("X-Xet-Hash")
    if xet is not None and not _XET_HASH.fullmatch(xet):
        raise _refuse("X-Xet-Hash", xet, "64 hex digits")
    _bound_waits(headers)


def _check_commit(commit: str, path: str) -> None:
    if not _COMMIT.fullmatch(commit):
        raise _refuse("X-Repo-Commit", commit, "40 hex digits")
    asked = _ASKED_COMMIT.search(path)
    if asked and asked[1] != commit:
        raise _refuse("X-Repo-Commit", commit, f"the commit {asked[1]} that was asked for")


def _bound_waits(headers: Any) -> None:
    if "Retry-After" in headers:
        seconds = seconds_to_wait(headers["Retry-After"])
        del headers["Retry-After"]
        if seconds is not None:
            headers["Retry-After"] = str(math.ceil(seconds))
    reset = _RESET.search(headers.get("RateLimit", ""))
    if reset and (not _SECONDS.fullmatch(reset[1]) or int(reset[1]) > LONGEST_PAUSE):
        del headers["RateLimit"]


def _refuse(header: str, value: str, expected: str) -> EncoderError:
    from huggingface_hub import constants

    return EncoderError(
        f"{constants.ENDPOINT} gives {shown(value)!r} as {header}, which is not {expected}. "
        "Nothing of it was written. Set HF_ENDPOINT to a hub that is to be trusted, or give a "
        "checkpoint directory."
    )
