"""What went wrong between this machine and the hub, each in one line with the way out."""

import errno

from medembed.core.errors import EncoderError
from medembed.core.text import mask_controls

__all__ = [
    "explain",
    "explain_changed",
    "explain_missing",
    "explain_no_space",
    "explain_unreached",
    "is_no_space",
]

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def explain(error: Exception, repo: str, revision: str | None, name: str) -> EncoderError:
    """Say why `name` of a repository cannot be had.

    Parameters
    ----------
    error : Exception
        What huggingface_hub, its HTTP client or the file system raised.
    revision : str or None
        As the user gave it.
    """
    from huggingface_hub import constants, errors

    address = f"{constants.ENDPOINT}/{repo}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):  # a RepositoryNotFoundError too, so first
        return EncoderError(
            f"{repo} is gated: accept its terms at {address} and set HF_TOKEN to a token of the "
            "account that did."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return EncoderError(f"{repo} has no revision {revision}; see {address}/commits/main.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return EncoderError(
            f"encoder {repo} is neither a directory here nor a repository at {address} that you "
            "may read. Check the name; if it is private, set HF_TOKEN."
        )
    if isinstance(error, errors.EntryNotFoundError):
        return explain_missing(repo, name)
    if status in (401, 403):
        return _refused(status, repo, name)
    if is_no_space(error):
        return explain_no_space(name, repo)
    reason = mask_controls((str(error).strip() or type(error).__name__).splitlines()[0])
    return EncoderError(f"{name} of {repo} could not be fetched: {reason} Try again.")


def explain_missing(repo: str, name: str) -> EncoderError:
    """Say that a repository has no file `name`."""
    return EncoderError(f"{repo} holds no {name}: it is not a checkpoint that can be read.")


def explain_unreached(error: BaseException | None, repo: str, name: str) -> EncoderError:
    """Say that `name` was not fetched before, and why it cannot be fetched now."""
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        return EncoderError(
            f"{name} of {repo} was not fetched before, and HF_HUB_OFFLINE is set. Unset it once "
            "while there is a connection, or give a checkpoint directory."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return explain(error, repo, None, name)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return _refused(status, repo, name)
    answer = f"answered HTTP {status}" if status else "cannot be reached"
    slow = f" ({error}: HF_HUB_ETAG_TIMEOUT allows more)" if isinstance(error, TimeoutError) else ""
    return EncoderError(
        f"{constants.ENDPOINT} {answer} and {name} of {repo} was not fetched before{slow}. Check "
        "the connection, or give a checkpoint directory."
    )


def explain_no_space(
    name: str, repo: str, *, needed: int | None = None, free: int | None = None
) -> EncoderError:
    """Say that the hub's cache has no room for `name`; `needed` and `free` in bytes."""
    from huggingface_hub import constants

    sizes = f" ({needed:,} bytes are needed, {free:,} are free)" if needed is not None else ""
    return EncoderError(
        f"no space is left for {name} of {repo} in {constants.HF_HUB_CACHE}{sizes}. Free some, or "
        "set HF_HOME to another disk."
    )


def explain_changed(repo: str, commit: str, name: str) -> EncoderError:
    """Say that a file is no longer what it was under the same commit."""
    return EncoderError(
        f"{name} of {repo} changed at the hub under commit {commit[:12]} while it was fetched: "
        "nothing of it is kept. Run again; if this repeats, the repository or the mirror in "
        "HF_ENDPOINT is not to be trusted."
    )


def is_no_space(error: BaseException) -> bool:
    """Whether the disk, the quota or the largest allowed file is full."""
    return isinstance(error, OSError) and error.errno in _NO_SPACE


def _refused(status: int, repo: str, name: str) -> EncoderError:
    from huggingface_hub import constants

    return EncoderError(
        f"{constants.ENDPOINT} refused {name} of {repo} (HTTP {status}): the token in HF_TOKEN "
        "is wrong or lacks access. Make a token with read access to it."
    )
