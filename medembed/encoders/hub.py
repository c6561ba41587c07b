"""Find a checkpoint: packaged, in a directory, or on the hub, downloading only the needed parts."""

import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from medembed.core.errors import EncoderError, MedembedError
from medembed.core.hub_http import explain, explain_missing, explain_unreached, guard_answers
from medembed.core.system import require_libraries
from medembed.encoders.checkpoint_files import (
    ADAPTER_FILE,
    CLIP_TYPES,
    CONFIG_FILE,
    FETCHED_FILES,
    INDEX_FILE,
    OPEN_CLIP_CONFIG,
    PART_NAMES,
    PART_WORDS,
    PICKLED_FILES,
    SIGLIP_TYPES,
    WEIGHTS_FILE,
    Part,
    check_config,
    explain_adapter,
    find_config,
    holds_file,
    is_open_clip_config,
    is_timm_config,
    names_model,
    part_shards,
    pickled_file,
    read_json,
    refuse_adapter,
    single_file,
    weight_files,
    weight_map_of,
    whole_files,
)
from medembed.encoders.partial_download import fetch_part, remote_tensors
from medembed.encoders.preprocessing import PROCESSOR_FILES
from medembed.encoders.stored_tensors import read_header

__all__ = [
    "DEMO",
    "TOKENIZER_FILES",
    "Checkpoint",
    "RemoteCheckpoint",
    "describe_remote",
    "has_token",
    "resolve_checkpoint",
]

DEMO = "demo"
WEIGHT_SUFFIXES = (".pth", ".pt")
"""Of a file of torchvision's weights."""
_DEMO_PATH = Path(__file__).parent / "assets" / "demo"
TOKENIZER_FILES = (
    *("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json"),
    *("spiece.model", "vocab.json", "merges.txt"),
)
_HUB_ID = re.compile(r"^(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?$", re.ASCII)
_COMMIT = re.compile(r"^[0-9a-f]{40}$")
# Timeout of the first request, which shows whether the hub is reachable; HF_HUB_ETAG_TIMEOUT
# overrides it. The hub client's own 10 s, six times, is too long for an interactive user.
_FIRST_ANSWER_SECONDS = 3.0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's files in one directory of this machine.

    Attributes
    ----------
    path : Path
        The directory, or a file of torchvision's weights.
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
    """The properties of a checkpoint whose weights may not have been downloaded.

    Attributes
    ----------
    source : str
        See `Checkpoint`.
    revision : str or None
        The hub's commit.
    fetched : bool
        Whether the weights are on this machine.
    tower_bytes : int or None
        Size of the vision tower's tensors (of all tensors, unless the model is SigLIP's); None if
        neither the files nor the hub can be reached.
    config : dict
        The content of `config.json`.
    """

    source: str
    revision: str | None
    fetched: bool
    tower_bytes: int | None
    config: Mapping[str, object]


@dataclass(frozen=True)
class _Snapshot:
    """A repository at one commit: its local small files, and whether the hub is reachable."""

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
    words: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Checkpoint:
    """Return the checkpoint that `ref` names, downloading the needed parts from the hub.

    `demo` is the packaged encoder (a directory of that name is `./demo`); a directory, or a file of
    torchvision's weights (`.pth`), is used as it is; `owner/name[@revision]` is downloaded through
    huggingface_hub, which respects HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE as usual. All
    files belong to the commit of the first answer. From a model of SigLIP or CLIP, and one of
    open_clip in safetensors, only the image tower's tensors are downloaded, unless complete files
    are already present. An interrupted download is resumed.

    Parameters
    ----------
    projector : bool
        Also download Gemma's projector.
    words : bool
        Also download the text tower and the tokenizer's files.
    progress : callable(bytes done, bytes in all), optional
        Called at intervals while weights are downloaded; the projector is counted separately.

    Raises
    ------
    EncoderError
        The checkpoint does not exist, access is denied, there is no connection or no room, weights
        are damaged, an adapter is not merged, or the hub's answers contain invalid names.
    MissingLibraryError
        It is on the hub, and a library of the extra `encoders` is not installed.
    """
    found = _find_local(ref)
    if isinstance(found, Checkpoint):
        return found
    snapshot, config = _open(*found)
    part = _part_of(config)
    if part != "image" and not is_timm_config(config):
        _fetch_processor(snapshot)
    if words and part == "tower":
        for name in TOKENIZER_FILES:
            _download(snapshot, name)
    if part == "image":
        if not words:  # of open_clip's, none are read
            _fetch_image_tower(snapshot, progress)
    elif part == "tower":
        wanted: dict[Part, bool] = {"tower": True, "projector": projector, "text": words}
        for each in (each for each, is_wanted in wanted.items() if is_wanted):
            _fetch_part(snapshot, each, progress)
    else:
        _fetch_whole(snapshot)
    return Checkpoint(snapshot.path, snapshot.repo, snapshot.commit)


def describe_remote(ref: str | PathLike[str]) -> RemoteCheckpoint:
    """Return a checkpoint's description and check access, without downloading weights.

    For a repository, the config, the index and the headers of its files are requested: well under a
    second and half a MB for MedGemma. A directory and `demo` are described in the same form.

    Raises
    ------
    EncoderError, MissingLibraryError
        The checkpoint is not available; see `resolve_checkpoint`.
    """
    found = _find_local(ref)
    if isinstance(found, Checkpoint) and found.path.is_file():
        return RemoteCheckpoint(found.source, None, True, found.path.stat().st_size, {})
    if isinstance(found, Checkpoint):
        config = _read_config(found.path, found.source)
        part = _part_of(config)
        pickled = pickled_file(found.path, part)
        held = [pickled] if pickled else weight_files(found.path, part)
        return RemoteCheckpoint(found.source, None, True, _held_bytes(held, part), config)
    snapshot, config = _open(*found)
    part = _part_of(config)
    held = _held_files(snapshot.path, part)
    remote_size: int | None = None
    if not held and snapshot.unreached is None:
        remote_size = _remote_bytes(snapshot, part)
    size = _held_bytes(held, part) if held else remote_size
    return RemoteCheckpoint(snapshot.repo, snapshot.commit, bool(held), size, config)


def has_token() -> bool:
    """Return whether a token is set, in HF_TOKEN or by login, without checking its validity."""
    if find_spec("huggingface_hub") is None:
        return "HF_TOKEN" in os.environ
    from huggingface_hub import get_token

    return get_token() is not None


def _find_local(ref: str | PathLike[str]) -> Checkpoint | tuple[str, str | None]:
    """Return the checkpoint if it is on this machine, else its repository and revision."""
    name = fspath(ref)
    if name == DEMO:
        if not _DEMO_PATH.is_dir():
            raise EncoderError("the demo encoder is not part of this installation; reinstall it.")
        return Checkpoint(_DEMO_PATH, DEMO)
    path = Path(name).expanduser()
    if name and path.is_dir():
        refuse_adapter(path)
        return Checkpoint(path, path.resolve().name)
    if name and path.is_file() and path.suffix in WEIGHT_SUFFIXES:
        return Checkpoint(path, path.name)
    hub_id = _HUB_ID.match(name)
    if hub_id is None or path.exists():
        found = "a file" if name and path.exists() else "no directory"
        raise EncoderError(
            f"encoder {name!r} is {found} and not a hub id. Give a checkpoint directory, a hub id "
            "such as google/medgemma-4b-pt, or demo."
        )
    if hub_id[2] and not all(part.strip(".") for part in hub_id[2].split("/")):
        raise EncoderError(
            f"encoder {name!r}: {hub_id[2]!r} is not a revision. Give a branch, a tag or a commit."
        )
    return hub_id[1], hub_id[2]


def _open(repo: str, revision: str | None) -> tuple[_Snapshot, dict[str, Any]]:
    """Return the snapshot and the config, whose commit determines that of all other files."""
    require_libraries(f"encoder {repo}", ("huggingface_hub", "transformers"), "encoders")
    unreached = _find_unreached(repo, revision)
    path = _download_file(repo, revision, unreached, CONFIG_FILE)
    if path is None or not names_model(read_json(path)):
        other = _download_file(repo, revision, unreached, OPEN_CLIP_CONFIG)
        path = other or path
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
    path = find_config(directory)
    config = read_json(path)
    if not isinstance(config, dict):
        raise EncoderError(f"{path.name} of {source} is no JSON object.")
    check_config(config, source)
    return config


def _part_of(config: dict[str, Any]) -> Part:
    if is_open_clip_config(config):
        return "image"
    is_tower = config.get("model_type") in (*SIGLIP_TYPES, *CLIP_TYPES)
    return "tower" if is_tower else "whole"


def _held_files(snapshot: Path, part: Part) -> list[Path]:
    """Return the files of a snapshot that hold a part, or none if it must be downloaded."""
    fetched = snapshot / FETCHED_FILES.get(part, "-")
    pickled = pickled_file(snapshot, part) if part == "image" else None  # else never fetched
    others = [fetched] if holds_file(fetched) else [pickled] if pickled else []
    return whole_files(snapshot, part) or others


def _held_bytes(paths: list[Path], part: Part) -> int:
    if any(path.name in PICKLED_FILES.get(part, ()) for path in paths):
        return sum(path.stat().st_size for path in paths)
    held = (tensor for path in paths for tensor in read_header(path))
    return sum(tensor.stop - tensor.start for tensor in held if PART_NAMES[part](tensor.name))


def _fetch_part(
    snapshot: _Snapshot, part: Part, progress: Callable[[int, int], None] | None
) -> None:
    if _held_files(snapshot.path, part):
        return
    if snapshot.unreached is not None:
        raise explain_unreached(snapshot.unreached, snapshot.repo, PART_WORDS[part])
    fetch_part(snapshot.path, snapshot.repo, _weight_map(snapshot, part), part, progress)


def _fetch_image_tower(snapshot: _Snapshot, progress: Callable[[int, int], None] | None) -> None:
    """Download open_clip's image tower from safetensors, or a state dict, which is read whole."""
    part: Part = "image"
    if snapshot.unreached is None and not _held_files(snapshot.path, part):
        name = single_file(part)
        if not _is_at_hub(snapshot.repo, snapshot.commit, name):
            (pickled,) = PICKLED_FILES[part]
            if not _download(snapshot, pickled):
                raise explain_missing(snapshot.repo, f"{name} or {pickled}")
            return
    _fetch_part(snapshot, part, progress)


def _remote_bytes(snapshot: _Snapshot, part: Part) -> int | None:
    """Return the size of what would be fetched."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    repo, commit = snapshot.repo, snapshot.commit
    if part == "image" and not _is_at_hub(repo, commit, single_file(part)):
        (pickled,) = PICKLED_FILES[part]
        if not _is_at_hub(repo, commit, pickled):
            raise explain_missing(repo, f"{single_file(part)} or {pickled}")
        return get_hf_file_metadata(hf_hub_url(repo, pickled, revision=commit)).size
    tensors = remote_tensors(repo, commit, _weight_map(snapshot, part), part)
    return sum(tensor.stop - tensor.start for _, tensor in tensors)


def _weight_map(snapshot: _Snapshot, part: Part) -> dict[str, str] | None:
    """Return the index, or None if a single file has all weights, which transformers prefers."""
    if part == "image" or _is_at_hub(snapshot.repo, snapshot.commit, WEIGHTS_FILE):
        return None
    index = _download(snapshot, INDEX_FILE)
    return None if index is None else weight_map_of(read_json(index), snapshot.repo)


def _fetch_processor(snapshot: _Snapshot) -> None:
    """Download each of the two files that may describe the processor, if it exists."""
    held = [_download(snapshot, name) for name in PROCESSOR_FILES]
    if not any(held):
        raise _explain_missing(snapshot.repo, snapshot.unreached, *PROCESSOR_FILES)


def _fetch_whole(snapshot: _Snapshot) -> None:
    if _download(snapshot, WEIGHTS_FILE):  # as in transformers: the index is used only without it
        return
    index = _download(snapshot, INDEX_FILE)
    if index is None:
        raise _explain_missing(snapshot.repo, snapshot.unreached, INDEX_FILE, WEIGHTS_FILE)
    for shard in part_shards(weight_map_of(read_json(index), snapshot.repo), "whole"):
        if not _download(snapshot, shard):
            raise _explain_missing(snapshot.repo, snapshot.unreached, shard)


def _find_unreached(repo: str, revision: str | None) -> Exception | None:
    """Query the hub once; return the error if it is unreachable or refuses.

    `hf_hub_download` would try six times with growing pauses, 23 s per file, although one query
    shows that only earlier downloads can be used. The query runs in another thread, because no
    connection timeout covers name resolution, nor a second address.
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
            caught.append(None)  # reachable: the download meets and explains these again
        except Exception as error:  # its client's errors are neither the hub's nor OSErrors
            caught.append(error)
        else:
            caught.append(None)

    guard_answers()
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds + 0.5)
    unreached = caught[0] if caught else TimeoutError(f"no answer in {seconds:g} s")
    if isinstance(unreached, EncoderError):  # reachable, but its answer was refused
        raise unreached
    return unreached


def _is_at_hub(repo: str, revision: str | None, name: str) -> bool:
    """Return whether a repository has a file, without downloading it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    guard_answers()
    try:
        get_hf_file_metadata(hf_hub_url(repo, name, revision=revision))
    except EncoderError:  # of what it answered
        raise
    except Exception as error:  # its client's errors are neither the hub's nor OSErrors
        if _means_absent(error):
            return False
        raise explain(error, repo, revision, name) from error
    return True


def _means_absent(error: BaseException | None) -> bool:
    """Return whether a hub has the repository but not the file; mirrors may send only a status."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
        return False
    return getattr(getattr(error, "response", None), "status_code", None) == 404


def _explain_missing(repo: str, unreached: Exception | None, *names: str) -> MedembedError:
    what = " or ".join(names)
    if unreached is None:
        return explain_missing(repo, what)
    return explain_unreached(unreached, repo, what)


def _download(snapshot: _Snapshot, name: str) -> Path | None:
    return _download_file(snapshot.repo, snapshot.commit, snapshot.unreached, name)


def _download_file(
    repo: str, revision: str | None, unreached: Exception | None, name: str
) -> Path | None:
    """Return a downloaded file of a repository, or None if the repository lacks it.

    If the hub is unreachable, an earlier download is returned, or None.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    guard_answers()
    if unreached is not None:
        # Not `local_files_only`: even then the hub client sends requests before it looks.
        held = try_to_load_from_cache(repo, name, revision=revision)
        return Path(held) if isinstance(held, str) else None
    try:
        return Path(hf_hub_download(repo, name, revision=revision))
    except LocalEntryNotFoundError as error:  # neither reached nor fetched before
        if _means_absent(error.__cause__):
            return None
        raise explain_unreached(error.__cause__, repo, name) from error
    except EntryNotFoundError:
        return None
    except EncoderError:  # of what it answered
        raise
    except Exception as error:  # its client's errors are neither the hub's nor OSErrors
        raise explain(error, repo, revision, name) from error
