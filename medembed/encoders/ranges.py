"""Ranges of a repository's file, over connections that may break."""

import re
import threading
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from medembed.core.errors import EncoderError
from medembed.core.text import mask_controls
from medembed.encoders.hub_answers import (
    LONGEST_PAUSE,
    guard_answers,
    plain_tag,
    seconds_to_wait,
    shown,
)
from medembed.encoders.hub_errors import explain, explain_changed

__all__ = ["RemoteFile", "copy_range", "open_file", "read_range"]

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
_PASSING = (408, 429, 500, 502, 503, 504)
# Seconds before each new try since bytes last came; with stalls of HF_HUB_DOWNLOAD_TIMEOUT (10 s
# unless set) it gives up on a dead line after about a minute.
_PAUSES = (0.25, 0.5, 1.0, 2.0, 4.0)
# Fewer bytes than this per connection are no progress.
_SOME_BYTES = 1 << 16


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit, as it was when first asked for.

    Attributes
    ----------
    repo, commit, name : str
        Where it is.
    size : int
        In bytes.
    etag : str
        The hub's own tag of the content, without quotes.
    """

    repo: str
    commit: str
    name: str
    size: int
    etag: str


class _Broken(Exception):  # noqa: N818 - no error yet: the try may be repeated
    """A connection that ended early, with the seconds to wait that the server asked for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        self.reason = reason
        self.wait = wait
        super().__init__(reason)


def open_file(repo: str, commit: str, name: str, count: int) -> tuple[RemoteFile, bytes]:
    """Fetch the first `count` bytes of a file, and with them its size and ETag.

    Raises
    ------
    EncoderError
        No such file, no access, no connection, or a server that does not give ranges.
    """
    found: list[RemoteFile] = []
    asked = RemoteFile(repo, commit, name, -1, "")
    data = _collect(asked, 0, count, found.append)
    return found[-1], data


def read_range(file: RemoteFile, start: int, stop: int) -> bytes:
    """Fetch bytes `start` to `stop` (not included) into memory; raises as `copy_range` does."""
    return _collect(file, start, stop, None)


def copy_range(
    file: RemoteFile,
    start: int,
    stop: int,
    sink: Callable[[int, bytes], None],
    *,
    halted: threading.Event | None = None,
    note: Callable[[RemoteFile], None] | None = None,
) -> None:
    """Fetch bytes `start` to `stop` (not included); go on where a connection broke.

    Parameters
    ----------
    sink : callable(position, bytes)
        Takes each piece as it comes; what it raises is raised here.
    halted : threading.Event, optional
        Ends the copying early, and its pauses, once set.
    note : callable(RemoteFile), optional
        Takes the size and ETag of each answer, before they are compared with those of `file`.

    Raises
    ------
    EncoderError
        Another content than `file` names, a refusal, or a connection that stays broken.
    """
    halted = halted or threading.Event()
    position, failures = start, 0
    while position < stop and not halted.is_set():
        before = position
        try:
            with closing(_stream(file, position, stop, note)) as chunks:
                for chunk in chunks:
                    sink(position, chunk)
                    position += len(chunk)
                    if halted.is_set():
                        return
        except _Broken as broken:
            failures = 0 if position - before >= _SOME_BYTES else failures + 1
            if failures > len(_PAUSES):
                raise _explain_broken(file, broken) from broken
            pause = max(_PAUSES[max(failures - 1, 0)], broken.wait)
            halted.wait(min(pause, LONGEST_PAUSE))


def _collect(
    file: RemoteFile, start: int, stop: int, note: Callable[[RemoteFile], None] | None
) -> bytes:
    data = bytearray()
    copy_range(file, start, stop, lambda _, chunk: data.extend(chunk), note=note)
    return bytes(data)


def _stream(
    file: RemoteFile, start: int, stop: int, note: Callable[[RemoteFile], None] | None
) -> Generator[bytes]:
    """Yield what one connection gives of a range, checked to be of the file that is meant."""
    from huggingface_hub import constants, get_session, hf_hub_url, hf_raise_for_status
    from huggingface_hub.errors import HfHubHTTPError

    # Public by its documentation, but exported in a way that type checkers do not see.
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    guard_answers()
    url = hf_hub_url(file.repo, file.name, revision=file.commit)
    # Compressed bytes would have other positions.
    asked = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    headers = {**build_hf_headers(), **asked}
    left = stop - start
    try:
        with get_session().stream(
            "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        ) as response:
            hf_raise_for_status(response)
            answered = _read_answer(response, file, start, stop)
            if note:
                note(answered)
            _check_same(file, answered)
            for chunk in response.iter_raw():
                if len(chunk) > left:
                    raise _refuse(file, f"sent more than the {stop - start} bytes asked for")
                left -= len(chunk)
                yield chunk
    except EncoderError:
        raise
    except HfHubHTTPError as error:
        if error.response.status_code not in _PASSING:
            raise explain(error, file.repo, file.commit, file.name) from error
        wait = seconds_to_wait(error.response.headers.get("Retry-After", ""))
        raise _Broken(f"HTTP {error.response.status_code}", wait or 0.0) from error
    except Exception as error:  # its client's errors are neither the hub's nor OSErrors
        raise _Broken(str(error).strip() or type(error).__name__) from error
    if left:
        raise _Broken(f"{left} bytes were missing")


def _read_answer(response: Any, file: RemoteFile, start: int, stop: int) -> RemoteFile:
    """Give the file that answered, if it answered with the range that was asked for."""
    status = response.status_code
    if status != 206:
        raise _refuse(file, f"answered HTTP {status} instead of the part asked for (HTTP 206)")
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise _refuse(file, f"sent bytes encoded as {shown(encoding)}, which was not asked for")
    span = response.headers.get("Content-Range", "")
    found = _CONTENT_RANGE.fullmatch(span)
    size = int(found[3]) if found else 0
    if found and (int(found[1]), size) == (start, int(found[2]) + 1) and size < stop:
        raise EncoderError(
            f"{file.name} of {file.repo} is not a whole safetensors file: it ends at byte {size}."
        )
    if not found or (int(found[1]), int(found[2]) + 1) != (start, stop):
        raise _refuse(
            file, f"sent {shown(span) or 'no Content-Range'} for bytes {start}-{stop - 1}"
        )
    answered = RemoteFile(file.repo, file.commit, file.name, size, _etag_of(response))
    if not answered.etag:
        raise _refuse(file, "names no ETag, so parts cannot be known to be of one file")
    return answered


def _check_same(file: RemoteFile, answered: RemoteFile) -> None:
    if file.etag and answered != file:
        raise explain_changed(file.repo, file.commit, file.name)


def _etag_of(response: Any) -> str:
    """Give the hub's tag of the content.

    A file in large storage is redirected to another host, whose own tag is of no use; the hub
    names the content's in the redirect.
    """
    linked = [hop.headers.get("X-Linked-Etag") for hop in (*response.history, response)]
    named = [tag for tag in linked if tag]
    etag = named[-1] if named else response.headers.get("ETag", "")
    return plain_tag(etag) if etag else ""


def _refuse(file: RemoteFile, what: str) -> EncoderError:
    from huggingface_hub import constants

    return EncoderError(
        f"{constants.ENDPOINT} {what}: {file.name} of {file.repo} cannot be fetched in part from "
        "it. Check HF_ENDPOINT and proxies, or give a checkpoint directory."
    )


def _explain_broken(file: RemoteFile, broken: _Broken) -> EncoderError:
    from huggingface_hub import constants

    reason = mask_controls(broken.reason.splitlines()[0]).rstrip(".")
    return EncoderError(
        f"the connection to {constants.ENDPOINT} broke while {file.name} of {file.repo} was "
        f"fetched: {reason}. What came is kept: run again to go on."
    )
