"""Find a checkpoint: packaged, in a directory, or on the hub, of which only the tower's files."""

import errno
import re
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path

from medembed.encoders.preprocessing import PROCESSOR_FILES
from medembed.encoders.weights import (
    INDEX_FILE,
    WEIGHTS_FILE,
    read_json,
    tower_shards,
    weight_map_of,
)
from medembed.errors import EncoderError

__all__ = ["DEMO", "Checkpoint", "resolve_checkpoint"]

DEMO = "demo"
_DEMO_PATH = Path(__file__).parent / "assets" / "demo"
_HUB_ID = re.compile(r"^(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?$", re.ASCII)
_COMMIT = re.compile(r"^[0-9a-f]{40}$")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's files in one directory of this machine.

    Attributes
    ----------
    path : Path
        The directory.
    source : str
        The hub id, the directory's own name, or `demo`.
    revision : str or None
        The hub's commit.
    """

    path: Path
    source: str
    revision: str | None = None


def resolve_checkpoint(ref: str | PathLike[str]) -> Checkpoint:
    """Find the checkpoint that `ref` names; fetch it where it is on the hub.

    `demo` is the packaged encoder (a directory of that name is `./demo`); a directory is taken
    as it is; `owner/name[@revision]` is fetched through huggingface_hub, so HF_TOKEN, HF_HOME,
    HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean everywhere. All files are of the commit
    that answered first.

    Raises
    ------
    EncoderError
        Nothing of that name, no access, or no connection.
    """
    name = fspath(ref)
    if name == DEMO:
        if not _DEMO_PATH.is_dir():
            raise EncoderError("the demo encoder is not part of this installation; reinstall it.")
        return Checkpoint(_DEMO_PATH, DEMO)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return Checkpoint(path, path.resolve().name)
    hub_id = _HUB_ID.match(name)
    if hub_id is None or path.exists():
        found = "a file" if name and path.exists() else "no directory"
        raise EncoderError(
            f"encoder {name!r} is {found} and not a hub id. Give a checkpoint directory, a hub id "
            "such as google/medgemma-4b-pt, or demo."
        )
    return _fetch(hub_id[1], hub_id[2])


def _fetch(repo: str, revision: str | None) -> Checkpoint:
    unreached = _find_unreached(repo, revision)
    config = _download(repo, revision, unreached, "config.json")
    commit = config.parent.name
    if not _COMMIT.match(commit):
        raise EncoderError(f"{repo}: the hub's cache gave {commit!r} where a commit belongs.")
    _download(repo, commit, unreached, *PROCESSOR_FILES)
    weights = _download(repo, commit, unreached, INDEX_FILE, WEIGHTS_FILE)
    if weights.name == INDEX_FILE:
        for shard in tower_shards(weight_map_of(read_json(weights), repo)):
            _download(repo, commit, unreached, shard)
    return Checkpoint(config.parent, repo, commit)


def _find_unreached(repo: str, revision: str | None) -> Exception | None:
    """Ask the hub once; give the error if it is out of reach.

    `hf_hub_download` would ask six times with growing pauses, 23 s per file, where one question
    tells that only what was fetched before can serve.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(repo, "config.json", revision=revision))
    except HfHubHTTPError as error:  # an answer: a refusal is met again, and explained, below
        return error if error.response.status_code >= 500 else None
    except Exception as error:  # its client's errors are neither the hub's nor OSErrors
        return error
    return None


def _download(repo: str, revision: str | None, unreached: Exception | None, *names: str) -> Path:
    """Fetch the first of `names` that the repository has; from the cache if out of reach."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    missing: Exception | None = None
    for name in names:
        try:
            local = unreached is not None
            return Path(hf_hub_download(repo, name, revision=revision, local_files_only=local))
        except EntryNotFoundError as error:  # not there; or out of reach and not fetched before
            missing = missing or error
        except Exception as error:  # as above
            raise _explain(error, repo, revision, name) from error
    assert missing is not None
    what = " or ".join(names)
    if isinstance(missing, LocalEntryNotFoundError):
        raise _explain_unreached(unreached or missing.__cause__, repo, what) from missing
    raise _explain(missing, repo, revision, what) from missing


def _explain(error: Exception, repo: str, revision: str | None, name: str) -> EncoderError:
    """Say in one line what went wrong and what to do."""
    from huggingface_hub import constants, errors

    address = f"{constants.ENDPOINT}/{repo}"
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
        return EncoderError(f"{repo} holds no {name}: it is not a checkpoint that can be read.")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EncoderError(
            f"no space is left for {name} of {repo} in {constants.HF_HUB_CACHE}. Free some, or set "
            "HF_HOME to another disk."
        )
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return EncoderError(f"{name} of {repo} could not be fetched: {reason} Try again.")


def _explain_unreached(error: BaseException | None, repo: str, name: str) -> EncoderError:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return EncoderError(
            f"{name} of {repo} was not fetched before, and HF_HUB_OFFLINE is set. Unset it once "
            "while there is a connection, or give a checkpoint directory."
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return EncoderError(
            f"{constants.ENDPOINT} refused {name} of {repo} (HTTP {status}): the token in HF_TOKEN "
            "is wrong or lacks access. Make a token with read access to it."
        )
    answer = f"answered HTTP {status}" if status else "cannot be reached"
    return EncoderError(
        f"{constants.ENDPOINT} {answer} and {name} of {repo} was not fetched before. Check the "
        "connection, or give a checkpoint directory."
    )
