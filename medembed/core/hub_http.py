"""Validate a hub's HTTP answers, fetch ranges of files, and raise errors with the way out.

huggingface_hub appends an ETag and a commit to its cache's path unchecked, and sleeps for as long
as a server demands. Every answer is therefore checked before huggingface_hub acts on it. If a
connection breaks, a range is requested again from where it stopped.

Addresses, headers, session, errors and locks are huggingface_hub's. Its `http_get` does not fetch
the ranges, because it takes any answer for the bytes it asked for: a whole file from a server
that ignores `Range`, another part, compressed bytes, or bytes of a file that changed meanwhile
(release 2.4). Nor can its retries be bounded in time, or ended by another connection's failure.
"""

import errno
import math
import re
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from medembed.core.errors import EncoderError, MedembedError, StorageError
from medembed.core.text import mask_controls, without_credentials

__all__ = [
    "DATASET",
    "LONGEST_PAUSE",
    "MODEL",
    "RemoteFile",
    "RepoKind",
    "ask_hub",
    "copy_range",
    "explain",
    "explain_changed",
    "explain_missing",
    "explain_no_space",
    "explain_unreached",
    "guard_answers",
    "hub_address",
    "is_no_space",
    "open_file",
    "plain_tag",
    "read_range",
    "seconds_to_wait",
]

LONGEST_PAUSE = 60
"""Longest pause, in seconds, that a server can demand."""


@dataclass(frozen=True)
class RepoKind:
    """A kind of repository, and what is said when one cannot be read.

    Attributes
    ----------
    name : {"model", "dataset"}
        What huggingface_hub calls it.
    error : type of MedembedError
        The class of its errors.
    instead : str
        What to do without the hub.
    again : str
        What to do after a connection broke.
    """

    name: str
    error: type[MedembedError]
    instead: str
    again: str


MODEL = RepoKind(
    "model",
    EncoderError,
    "give a checkpoint directory",
    "The part received is kept: run again to resume.",
)
DATASET = RepoKind(
    "dataset",
    StorageError,
    "download its images or tar files and name the directory",
    "Run the same command again; rows that were embedded stay.",
)

Answer = TypeVar("Answer")
_TAG = re.compile(r'(?:W/)?"?([0-9A-Za-z][0-9A-Za-z._-]{0,127})"?')
_COMMIT = re.compile(r"[0-9a-f]{40}")
_XET_HASH = re.compile(r"[0-9a-fA-F]{64}")
_ASKED_COMMIT = re.compile(r"/resolve/([0-9a-f]{40})/")
_SECONDS = re.compile(r"[0-9]{1,18}")
_RESET = re.compile(r"\bt\s*=\s*([0-9]+)")
_LONGEST_SHOWN = 60
_installing = threading.Lock()


def guard_answers() -> None:
    """Check every answer that huggingface_hub receives in this process before it acts on it.

    The check is an event hook of its HTTP client, installed once and on every client created
    later. A client factory set by the caller stays in use.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    with _installing:
        make = getattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)
        if not isinstance(make, _Guarded):
            set_client_factory(_Guarded(make))


@dataclass(frozen=True)
class _Guarded:
    """A client factory whose clients pass each answer to `_check_answer` first."""

    make: Callable[[], Any]

    def __call__(self) -> Any:
        client = self.make()
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "response": [_check_answer, *hooks.get("response", ())]}
        return client


def plain_tag(header: str, kind: RepoKind = MODEL) -> str:
    """Return an ETag without quotes, if it has up to 128 letters, digits and . _ - characters.

    Raises
    ------
    EncoderError
        The ETag is anything else, such as a path.
    """
    found = _TAG.fullmatch(header)
    if found is None:
        raise _refuse("ETag", header, "a plain word", kind)
    return found[1]


def seconds_to_wait(header: str) -> float | None:
    """Return the seconds of a Retry-After header, RFC 9110 section 10.2.3: a number or a date.

    Returns
    -------
    float or None
        From 0 to `LONGEST_PAUSE`; None if the header is invalid.
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


def _shown(text: str) -> str:
    """Return a server's text shortened and without control characters, for a message."""
    text = mask_controls(text)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def _check_answer(response: Any) -> None:
    """Refuse invalid names, and limit pauses; raises the error of the repository's kind."""
    headers, request = response.headers, response.request
    kind = DATASET if "/datasets/" in request.url.path else MODEL
    commit = headers.get("X-Repo-Commit")
    if commit is not None:
        _check_commit(commit, request.url.path, kind)
    if request.method == "HEAD":  # only these tags name blobs; a storage's own tags on GET do not
        for name in ("X-Linked-Etag", "ETag"):
            if name in headers:
                plain_tag(headers[name], kind)
    xet = headers.get("X-Xet-Hash")
    if xet is not None and not _XET_HASH.fullmatch(xet):
        raise _refuse("X-Xet-Hash", xet, "64 hex digits", kind)
    _bound_waits(headers)


def _check_commit(commit: str, path: str, kind: RepoKind) -> None:
    if not _COMMIT.fullmatch(commit):
        raise _refuse("X-Repo-Commit", commit, "40 hex digits", kind)
    asked = _ASKED_COMMIT.search(path)
    if asked and asked[1] != commit:
        raise _refuse("X-Repo-Commit", commit, f"the commit {asked[1]} that was asked for", kind)


def _bound_waits(headers: Any) -> None:
    if "Retry-After" in headers:
        seconds = seconds_to_wait(headers["Retry-After"])
        del headers["Retry-After"]
        if seconds is not None:
            headers["Retry-After"] = str(math.ceil(seconds))
    reset = _RESET.search(headers.get("RateLimit", ""))
    if reset and (not _SECONDS.fullmatch(reset[1]) or int(reset[1]) > LONGEST_PAUSE):
        del headers["RateLimit"]


def _refuse(header: str, value: str, expected: str, kind: RepoKind) -> MedembedError:
    return kind.error(
        f"{hub_address()} gives {_shown(value)!r} as {header}, which is not {expected}. "
        f"Nothing was saved. Set HF_ENDPOINT to a trusted hub, or {kind.instead}."
    )


_SECRETS = re.compile(r"\?\S*|(?<=://)[^/\s]*@")  # a storage's signature, a mirror's password
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def hub_address() -> str:
    """Return HF_ENDPOINT for a message, without the password that it may hold."""
    from huggingface_hub import constants

    return without_credentials(constants.ENDPOINT)


def _reason(text: str) -> str:
    """Return the first line of what a library says, without what is secret in addresses."""
    from huggingface_hub import constants

    text = mask_controls(text.splitlines()[0]).replace(constants.ENDPOINT, hub_address())
    return _SECRETS.sub("…", text)


def explain(
    error: Exception, repo: str, revision: str | None, name: str, kind: RepoKind = MODEL
) -> MedembedError:
    """Return the error that explains why `name` of a repository cannot be downloaded.

    Parameters
    ----------
    error : Exception
        The exception of huggingface_hub, its HTTP client or the file system.
    revision : str or None
        The revision given by the user.
    """
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return explain_unreached(error, repo, name, kind)
    address = f"{hub_address()}/{'' if kind is MODEL else 'datasets/'}{repo}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):  # a RepositoryNotFoundError too, so first
        return kind.error(
            f"{repo} is gated: accept its terms at {address} and set HF_TOKEN to a token of the "
            "account that did."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return kind.error(f"{repo} has no revision {revision}; see {address}/commits/main.")
    if isinstance(error, errors.RepositoryNotFoundError):
        absent = "neither a directory here nor a repository" if kind is MODEL else "no repository"
        noun = "encoder" if kind is MODEL else kind.name
        return kind.error(
            f"{noun} {repo} is {absent} at {address} that you may read. Check the name; if it is "
            "private, set HF_TOKEN."
        )
    if isinstance(error, errors.EntryNotFoundError):
        return explain_missing(repo, name, kind)
    if status in (401, 403):
        return _refused(status, repo, name, kind)
    if is_no_space(error):
        return explain_no_space(name, repo)
    reason = _reason(str(error).strip() or type(error).__name__)
    return kind.error(f"{name} of {repo} could not be fetched: {reason} Try again.")


def explain_missing(repo: str, name: str, kind: RepoKind = MODEL) -> MedembedError:
    """Return the error for a repository without a file `name`."""
    what = "is not a checkpoint that can be read" if kind is MODEL else "does not match the listing"
    return kind.error(f"{repo} holds no {name}: it {what}.")


def explain_unreached(
    error: BaseException | None, repo: str, name: str, kind: RepoKind = MODEL
) -> MedembedError:
    """Return the error for `name` that was not downloaded before and cannot be now."""
    from huggingface_hub import constants, errors

    kept = " and {} was not fetched before" if kind is MODEL else ": {} cannot be read"
    without = kept.format(f"{name} of {repo}")
    if constants.HF_HUB_OFFLINE and kind is MODEL:
        return kind.error(
            f"{name} of {repo} was not fetched before, and HF_HUB_OFFLINE is set. Unset it once "
            f"while there is a connection, or {kind.instead}."
        )
    if constants.HF_HUB_OFFLINE:
        return kind.error(
            f"HF_HUB_OFFLINE is set, and {name} of {repo} is read from the hub. Unset it, or "
            f"{kind.instead}."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return explain(error, repo, None, name, kind)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return _refused(status, repo, name, kind)
    answer = f"answered HTTP {status}" if status else "cannot be reached"
    # (the client of huggingface_hub 1.5, httpx, has an error of its own)
    is_late = {kind.__name__ for kind in type(error).__mro__} & {"TimeoutError", "TimeoutException"}
    slow = f" ({error}: HF_HUB_ETAG_TIMEOUT allows more)" if is_late else ""
    return kind.error(
        f"{hub_address()} {answer}{without}{slow}. Check the connection, or {kind.instead}."
    )


def explain_no_space(
    name: str, repo: str, *, needed: int | None = None, free: int | None = None
) -> EncoderError:
    """Return the error for a hub cache without room for `name`; `needed`, `free` in bytes."""
    from huggingface_hub import constants

    sizes = f" ({needed:,} bytes are needed, {free:,} are free)" if needed is not None else ""
    return EncoderError(
        f"no space is left for {name} of {repo} in {constants.HF_HUB_CACHE}{sizes}. Free some, or "
        "set HF_HOME to another disk."
    )


def explain_changed(repo: str, commit: str, name: str, kind: RepoKind = MODEL) -> MedembedError:
    """Return the error for a file that changed under its commit."""
    return kind.error(
        f"{name} of {repo} changed at the hub under commit {commit[:12]} while it was fetched. "
        "Nothing was saved. Run again; if this repeats, the repository or the mirror in "
        "HF_ENDPOINT cannot be trusted."
    )


def is_no_space(error: BaseException) -> bool:
    """Return whether an error means a full disk, an exhausted quota or a file size limit."""
    return isinstance(error, OSError) and error.errno in _NO_SPACE


def _refused(status: int, repo: str, name: str, kind: RepoKind) -> MedembedError:
    return kind.error(
        f"{hub_address()} refused {name} of {repo} (HTTP {status}): the token in HF_TOKEN "
        "is wrong or lacks access. Make a token with read access to it."
    )


_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
_PASSING = (408, 429, 500, 502, 503, 504)
# Seconds before each retry since bytes last arrived; with stalls of HF_HUB_DOWNLOAD_TIMEOUT (10 s
# unless set) it gives up on a dead connection after about a minute.
_PAUSES = (0.25, 0.5, 1.0, 2.0, 4.0)
# Fewer bytes than this per connection do not count as progress.
_SOME_BYTES = 1 << 16


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit, as first answered.

    Attributes
    ----------
    repo, commit, name : str
        The file's location.
    size : int
        Size in bytes.
    etag : str
        The hub's own tag of the content, without quotes.
    kind : RepoKind
        What the repository is.
    """

    repo: str
    commit: str
    name: str
    size: int
    etag: str
    kind: RepoKind = MODEL


class _Broken(Exception):  # noqa: N818 - no error yet: the try may be repeated
    """A connection that ended early, with the pause in seconds that the server demanded."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        self.reason = reason
        self.wait = wait
        super().__init__(reason)


def open_file(repo: str, commit: str, name: str, count: int) -> tuple[RemoteFile, bytes]:
    """Return the size and ETag of a file, and its first `count` bytes.

    Raises
    ------
    MedembedError
        The file does not exist, access is denied, there is no connection, or the server does not
        support ranges.
    """
    found: list[RemoteFile] = []
    asked = RemoteFile(repo, commit, name, -1, "")

    def note(answered: RemoteFile) -> None:
        found.append(answered)
        _check_same(found[0], answered)  # what a broken connection goes on with may be another's

    data = _collect(asked, 0, count, note)
    return found[0], data


def read_range(file: RemoteFile, start: int, stop: int) -> bytes:
    """Return bytes `start` to `stop` (not included); raises like `copy_range`."""
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
    """Fetch bytes `start` to `stop` (not included), resuming where a connection broke.

    Parameters
    ----------
    sink : callable(position, bytes)
        Receives each piece as it arrives; its exceptions propagate.
    halted : threading.Event, optional
        Ends the copy and its pauses early, once set.
    note : callable(RemoteFile), optional
        Receives the size and ETag of each answer, before they are compared with those of `file`.

    Raises
    ------
    MedembedError
        The content differs from `file`, the server refuses, or the connection stays broken.
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
    """Yield one connection's bytes of a range, checked to belong to the expected file."""
    from huggingface_hub import constants, get_session, hf_hub_url, hf_raise_for_status
    from huggingface_hub.errors import HfHubHTTPError

    # Public by its documentation, but exported in a way that type checkers do not see.
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    guard_answers()
    url = hf_hub_url(file.repo, file.name, repo_type=file.kind.name, revision=file.commit)
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
                    raise _range_error(file, f"sent more than the {stop - start} bytes asked for")
                left -= len(chunk)
                yield chunk
    except MedembedError:
        raise
    except HfHubHTTPError as error:
        if error.response.status_code not in _PASSING:
            raise explain(error, file.repo, file.commit, file.name, file.kind) from error
        wait = seconds_to_wait(error.response.headers.get("Retry-After", ""))
        raise _Broken(f"HTTP {error.response.status_code}", wait or 0.0) from error
    except Exception as error:  # its client's errors are neither the hub's nor OSErrors
        raise _Broken(str(error).strip() or type(error).__name__) from error
    if left:
        raise _Broken(f"{left} bytes were missing")


def _read_answer(response: Any, file: RemoteFile, start: int, stop: int) -> RemoteFile:
    """Return the file described by an answer, if it has the requested range."""
    status = response.status_code
    if status != 206:
        raise _range_error(file, f"answered HTTP {status} instead of the part asked for (HTTP 206)")
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise _range_error(
            file, f"sent bytes encoded as {_shown(encoding)}, which was not asked for"
        )
    span = response.headers.get("Content-Range", "")
    found = _CONTENT_RANGE.fullmatch(span)
    size = int(found[3]) if found else 0
    if found and (int(found[1]), size) == (start, int(found[2]) + 1) and size < stop:
        what = "not a whole safetensors file" if file.kind is MODEL else "shorter than listed"
        raise file.kind.error(f"{file.name} of {file.repo} is {what}: it ends at byte {size}.")
    if not found or (int(found[1]), int(found[2]) + 1) != (start, stop):
        raise _range_error(
            file, f"sent {_shown(span) or 'no Content-Range'} for bytes {start}-{stop - 1}"
        )
    answered = replace(file, size=size, etag=_etag_of(response, file.kind))
    if not answered.etag:
        raise _range_error(file, "names no ETag, so parts cannot be known to be of one file")
    return answered


def _check_same(file: RemoteFile, answered: RemoteFile) -> None:
    if file.etag and answered != file:
        raise explain_changed(file.repo, file.commit, file.name, file.kind)


def _etag_of(response: Any, kind: RepoKind) -> str:
    """Return the hub's tag of the content.

    A file in large storage is redirected to another host, whose own tag is useless; the hub sends
    the content's tag in the redirect.
    """
    linked = [hop.headers.get("X-Linked-Etag") for hop in (*response.history, response)]
    named = [tag for tag in linked if tag]
    etag = named[-1] if named else response.headers.get("ETag", "")
    return plain_tag(etag, kind) if etag else ""


def _range_error(file: RemoteFile, what: str) -> MedembedError:
    return file.kind.error(
        f"{hub_address()} {what}: {file.name} of {file.repo} cannot be fetched in part from "
        f"it. Check HF_ENDPOINT and proxies, or {file.kind.instead}."
    )


def _explain_broken(file: RemoteFile, broken: _Broken) -> MedembedError:
    return file.kind.error(
        f"the connection to {hub_address()} broke while {file.name} of {file.repo} was fetched: "
        f"{_reason(broken.reason).rstrip('.')}. {file.kind.again}"
    )


def ask_hub(
    call: Callable[[], Answer], repo: str, revision: str, what: str, kind: RepoKind
) -> Answer:
    """Return what a call of huggingface_hub's API answers, tried again while it fails in passing.

    Raises
    ------
    MedembedError
        The hub refuses, its answer is not usable, or it cannot be reached.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    guard_answers()
    for pause in (*_PAUSES[:3], None):
        try:
            return call()
        except MedembedError:  # of what it answered
            raise
        except OfflineModeIsEnabled as error:
            raise explain_unreached(error, repo, what, kind) from error
        except HfHubHTTPError as error:
            if error.response.status_code not in _PASSING:
                raise explain(error, repo, revision, what, kind) from error
            if pause is None:
                raise explain_unreached(error, repo, what, kind) from error
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise kind.error(
                f"{what} of {repo}: the hub's answer cannot be read ({type(error).__name__}). "
                f"Check HF_ENDPOINT and proxies, or {kind.instead}."
            ) from error
        except Exception as error:  # its client's errors are neither the hub's nor OSErrors
            if pause is None:
                raise explain_unreached(error, repo, what, kind) from error
        time.sleep(pause)
    raise AssertionError("unreachable")
