"""Find a checkpoint: packaged, in a directory, or on the hub, of which only what is needed."""

import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from medembed.core.errors import EncoderError
from medembed.core.system import require_libraries
from medembed.encoders.checkpoint_files import (
    ADAPTER_FILE,
    CONFIG_FILE,
    FETCHED_FILES,
    INDEX_FILE,
    PART_NAMES,
    PART_WORDS,
    SIGLIP_TYPES,
    WEIGHTS_FILE,
    Part,
    check_config,
    explain_adapter,
    holds_file,
    part_shards,
    read_json,
    refuse_adapter,
    weight_files,
    weight_map_of,
    whole_files,
)
from medembed.encoders.hub_http import explain, explain_missing, explain_unreached, guard_answers
from medembed.encoders.partial_download import fetch_part, remote_tensors
from medembed.encoders.preprocessing import PROCESSOR_FILES
from medembed.encoders.stored_tensors import read_header

__all__ = [
    "DEMO",
    "Checkpoint",
    "RemoteCheckpoint",
    "describe_remote",
    "has_token",
    "resolve_checkpoint",
]

DEMO = "demo"
_DEMO_PATH = Path(__file__).parent / "assets" / "demo"
_HUB_ID = re.compile(r"^(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?$", re.ASCII)
_COMMIT = re.compile(r"^[0-9a-f]{40}$")
# The first question tells in time whether there is a way to the hub; HF_HUB_ETAG_TIMEOUT has the
# last word. The hub's own 10 s, six times, is too long for someone who waits.
_FIRST_ANSWER_SECONDS = 3.0


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


@dataclass(frozen=True)
class RemoteCheckpoint:
    """What is known of a checkpoint before its weights are fetched.

    Attributes
    ----------
    source : str
        As in `Checkpoint`.
    revision : str or None
        The hub's commit.
    fetched : bool
        Whether the weights are on this machine.
    tower_bytes : int or None
        Size of the vision tower's tensors (of all tensors, for a model that is no SigLIP); None
        if neither the files nor the hub are in reach.
    config : dict
        Its `config.json`.
    """

    source: str
    revision: str | None
    fetched: bool
    tower_bytes: int | None
    config: dict[str, Any]


@dataclass(frozen=True)
class _Snapshot:
    """A repository at one commit: the small files that are here, and whether the hub is too."""

    path: Path
    repo: str
    unreached: Exception | None

    @property
    def commit(self) -> str:
        return self.path.name


def resolve_checkpoint(
    ref: str | PathLike[str],
    *,
    projector: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Checkpoint:
    """Find the checkpoint that `ref` names; fetch what is needed of it where it is on the hub.

    `demo` is the packaged encoder (a directory of that name is `./demo`); a directory is taken
    as it is; `owner/name[@revision]` is fetched through huggingface_hub, so HF_TOKEN, HF_HOME,
    HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean everywhere. All files are of the commit
    that answered first. Of a model that holds a SigLIP tower only the tower's tensors are
    fetched; whole files that are there already are used instead. A fetch that was cut off goes on
    where it was.

    Parameters
    ----------
    projector : bool
        Fetch Gemma's projector too.
    progress : callable(bytes done, bytes in all), optional
        Told now and then while weights are fetched; the projector counts anew.

    Raises
    ------
    EncoderError
        Nothing of that name, no access, no connection, no room, damaged weights, an adapter that
        is not merged, or a hub whose names are no names.
    MissingLibraryError
        It is on the hub, and a library of the extra `encoders` is not installed.
    """
    found = _find_local(ref)
    if isinstance(found, Checkpoint):
        return found
    snapshot, config = _open(*found)
    _fetch_processor(snapshot)
    if config.get("model_type") in SIGLIP_TYPES:
        parts: tuple[Part, ...] = ("tower", "projector") if projector else ("tower",)
        for part in parts:
            _fetch_part(snapshot, part, progress)
    else:
        _fetch_whole(snapshot)
    return Checkpoint(snapshot.path, snapshot.repo, snapshot.commit)


def describe_remote(ref: str | PathLike[str]) -> RemoteCheckpoint:
    """Ask what a checkpoint is, and whether it may be had, without fetching weights.

    Of a repository the config, the index and the heads of its files are asked for: well under a
    second and half a MB for MedGemma. A directory and `demo` are described alike.

    Raises
    ------
    EncoderError, MissingLibraryError
        As `resolve_checkpoint`.
    """
    found = _find_local(ref)
    if isinstance(found, Checkpoint):
        config = _read_config(found.path, found.source)
        part = _part_of(config)
        n_bytes = _held_bytes(weight_files(found.path, part), part)
        return RemoteCheckpoint(found.source, None, True, n_bytes, config)
    snapshot, config = _open(*found)
    part = _part_of(config)
    held = _held_files(snapshot.path, part)
    remote_size: int | None = None
    if not held and snapshot.unreached is None:
        tensors = remote_tensors(snapshot.repo, snapshot.commit, _weight_map(snapshot), part)
        remote_size = sum(tensor.stop - tensor.start for _, tensor in tensors)
    size = _held_bytes(held, part) if held else remote_size
    return RemoteCheckpoint(snapshot.repo, snapshot.commit, bool(held), size, config)


def has_token() -> bool:
    """Whether a token is set, in HF_TOKEN or by the hub's login; not whether it is accepted."""
    if find_spec("huggingface_hub") is None:
        return "HF_TOKEN" in os.environ
    from huggingface_hub import get_token

    return get_token() is not None


def _find_local(ref: str | PathLike[str]) -> Checkpoint | tuple[str, str | None]:
    """Give the checkpoint if it is on this machine, else the repository and revision it is."""
    name = fspath(ref)
    if name == DEMO:
        if not _DEMO_PATH.is_dir():
            raise EncoderError("the demo encoder is not part of this installation; reinstall it.")
        return Checkpoint(_DEMO_PATH, DEMO)
    path = Path(name).expanduser()
    if name and path.is_dir():
        refuse_adapter(path)
        return Checkpoint(path, path.resolve().name)
    hub_id = _HUB_ID.match(name)
    if hub_id is None or path.exists():
        found = "a file" if name and path.exists() else "no directory"
        raise EncoderError(
            f"encoder {name!r} is {found} and not a hub id. Give a checkpoint directory, a hub id "
            "such as google/medgemma-4b-pt, or demo."
        )
    if hub_id[2] and not all(part.strip(".") for part in hub_id[2].split("/")):
        raise EncoderError(
            f"encoder {name!r}: {hub_id[2]!r} is no revision. Give a branch, a tag or a commit."
        )
    return hub_id[1], hub_id[2]


def _open(repo: str, revision: str | None) -> tuple[_Snapshot, dict[str, Any]]:
    """Get the config, and by it the commit that all else will be of."""
    require_libraries(f"encoder {repo}", ("huggingface_hub", "transformers"), "encoders")
    unreached = _find_unreached(repo, revision)
    path = _download_file(repo, revision, unreached, CONFIG_FILE)
    if path is None:
        if unreached is None and _is_at_hub(repo, revision, ADAPTER_FILE):
            raise explain_adapter(repo, alone=True)
        raise _explain_missing(repo, unreached, CONFIG_FILE)
    if not _COMMIT.fullmatch(path.parent.name):
        raise EncoderError(f"{repo}: the hub's cache gave {path.parent.name!r}, no commit.")
    snapshot = _Snapshot(path.parent, repo, unreached)
    config = _read_config(path.parent, repo)
    refuse_adapter(snapshot.path)
    if unreached is None and _is_at_hub(repo, snapshot.commit, ADAPTER_FILE):
        raise explain_adapter(repo, alone=False)
    return snapshot, config


def _read_config(directory: Path, source: str) -> dict[str, Any]:
    config = read_json(directory / CONFIG_FILE)
    if not isinstance(config, dict):
        raise EncoderError(f"{CONFIG_FILE} of {source} is no JSON object.")
    check_config(config, source)
    return config


def _part_of(config: dict[str, Any]) -> Part:
    return "tower" if config.get("model_type") in SIGLIP_TYPES else "whole"


def _held_files(snapshot: Path, part: Part) -> list[Path]:
    """List the files of a snapshot that hold a part; none if it must be fetched."""
    fetched = snapshot / FETCHED_FILES.get(part, "-")
    return whole_files(snapshot, part) or ([fetched] if holds_file(fetched) else [])


def _held_bytes(paths: list[Path], part: Part) -> int:
    held = (tensor for path in paths for tensor in read_header(path))
    return sum(tensor.stop - tensor.start for tensor in held if PART_NAMES[part](tensor.name))


def _fetch_part(
    snapshot: _Snapshot, part: Part, progress: Callable[[int, int], None] | None
) -> None:
    if _held_files(snapshot.path, part):
        return
    if snapshot.unreached is not None:
        raise explain_unreached(snapshot.unreached, snapshot.repo, PART_WORDS[part])
    fetch_part(snapshot.path, snapshot.repo, _weight_map(snapshot), part, progress)


def _weight_map(snapshot: _Snapshot) -> dict[str, str] | None:
    """Get the index; None where a single file has all weights, which transformers takes first."""
    if _is_at_hub(snapshot.repo, snapshot.commit, WEIGHTS_FILE):
        return None
    index = _download(snapshot, INDEX_FILE)
    return None if index is None else weight_map_of(read_json(index), snapshot.repo)


def _fetch_processor(snapshot: _Snapshot) -> None:
    """Fetch both files that may describe the processor, where there are both."""
    held = [_download(snapshot, name) for name in PROCESSOR_FILES]
    if not any(held):
        raise _explain_missing(snapshot.repo, snapshot.unreached, *PROCESSOR_FILES)


def _fetch_whole(snapshot: _Snapshot) -> None:
    if _download(snapshot, WEIGHTS_FILE):  # as transformers: the index only without it
        return
    index = _download(snapshot, INDEX_FILE)
    if index is None:
        raise _explain_missing(snapshot.repo, snapshot.unreached, INDEX_FILE, WEIGHTS_FILE)
    for shard in part_shards(weight_map_of(read_json(index), snapshot.repo), "whole"):
        if not _download(snapshot, shard):
            raise _explain_missing(snapshot.repo, snapshot.unreached, shard)


def _find_unreached(repo: str, revision: str | None) -> Exception | None:
    """Ask the hub once; give the error if it is out of reach or refuses.

    `hf_hub_download` would ask six times with growing pauses, 23 s per file, where one question
    tells that only what was fetched before can serve. Asked beside the main thread, because no
    timeout of a connection covers the search for its address, nor a second address.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    set_by_user = "HF_HUB_ETAG_TIMEOUT" in os.environ
    seconds = float(constants.HF_HUB_ETAG_TIMEOUT) if set_by_user else _FIRST_ANSWER_SECONDS
    caught: list[Exception | None] = []

    def ask() -> None:
        try:
            url = hf_hub_url(repo, "config.json", revision=revision)
            get_hf_file_metadata(url, timeout=seconds)
        except (EntryNotFoundError, RevisionNotFoundError):
            caught.append(None)  # reached: these are met again, and explained, by the download
        except Exception as error:  # its client's errors are neither the hub's nor OSErrors
            caught.append(error)
        else:
            caught.append(None)

    guard_answers()
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds + 0.5)
    unreached = caught[0] if caught else TimeoutError(f"no answer in {seconds:g} s")
    if isinstance(unreached, EncoderError):  # reached, and what it answered was refused
        raise unreached
    return unreached


def _is_at_hub(repo: str, revision: str | None, name: str) -> bool:
    """Ask whether a repository has a file, without fetching it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    guard_answers()
    try:
        get_hf_file_metadata(hf_hub_url(repo, name, revision=revision))
    except EncoderError:  # of what it answered
        raise
    except Exception as error:  # its client's errors are neither the hub's nor OSErrors
        if _says_absent(error):
            return False
        raise explain(error, repo, revision, name) from error
    return True


def _says_absent(error: BaseException | None) -> bool:
    """Whether a hub has the repository and not the file; mirrors may say so by the status alone."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
        return False
    return getattr(getattr(error, "response", None), "status_code", None) == 404


def _explain_missing(repo: str, unreached: Exception | None, *names: str) -> EncoderError:
    what = " or ".join(names)
    if unreached is None:
        return explain_missing(repo, what)
    return explain_unreached(unreached, repo, what)


def _download(snapshot: _Snapshot, name: str) -> Path | None:
    return _download_file(snapshot.repo, snapshot.commit, snapshot.unreached, name)


def _download_file(
    repo: str, revision: str | None, unreached: Exception | None, name: str
) -> Path | None:
    """Fetch a file of a repository; None if it has none.

    If the hub is out of reach, what was fetched before serves, and None is what was not.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    guard_answers()
    if unreached is not None:
        # Not `local_files_only`: with that too, the hub asks for things before it looks.
        held = try_to_load_from_cache(repo, name, revision=revision)
        return Path(held) if isinstance(held, str) else None
    try:
        return Path(hf_hub_download(repo, name, revision=revision))
    except LocalEntryNotFoundError as error:  # neither reached nor fetched before
        if _says_absent(error.__cause__):
            return None
        raise explain_unreached(error.__cause__, repo, name) from error
    except EntryNotFoundError:
        return None
    except EncoderError:  # of what it answered
        raise
    except Exception as error:  # its client's errors are neither the hub's nor OSErrors
        raise explain(error, repo, revision, name) from error
