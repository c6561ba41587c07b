"""Datasets of the Hugging Face hub as image roots: which files one commit has, and their bytes.

`hf://datasets/OWNER/NAME[@REVISION][/SUBSET]` names Parquet files, tar files or image files; SUBSET
is a folder, a file, or a configuration of the dataset's card. Nothing is written to a disk: files
are read in ranges by `core.hub_http`, which checks each answer and goes on where a connection broke
(`HfFileSystem` of huggingface_hub 2.4 takes any answer for the range that it asked for).
Nor is code of a dataset run: the card is parsed as YAML, and scripts are not looked at.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from pathlib import PurePosixPath
from typing import Any, Literal
from urllib.parse import quote, unquote

from medembed.core.errors import ArgumentError, ImageError, PathNotFoundError, StorageError
from medembed.core.hub_http import (
    DATASET,
    RemoteFile,
    ask_hub,
    copy_range,
    explain_changed,
    hub_address,
)
from medembed.core.system import require_libraries
from medembed.core.text import mask_controls, one_line
from medembed.images.parquet_stream import read_columns
from medembed.images.stream_files import IMAGE_SUFFIXES, StreamFile

__all__ = [
    "BLOCK",
    "METADATA_FILES",
    "DatasetFiles",
    "HubRoot",
    "list_data_files",
    "parse_hub_root",
    "pin_commit",
]

SCHEME = "hf://"
BLOCK = 8 * 2**20
"""Bytes of a file asked for at once."""
METADATA_FILES = ("metadata.csv", "metadata.jsonl")
"""Files that describe the images beside them."""
MAX_CARD_BYTES = 4 * 2**20
CARD = "README.md"
Layout = Literal["parquet", "tar", "images"]
_OWN_REFERENCE = re.compile(r"refs/(?:convert|pr)/[\w.-]+", re.ASCII)
_ROOT = re.compile(
    r"hf://datasets/([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@(refs/(?:convert|pr)/[\w.-]+|[\w.%-]+))?(?:/(.*))?",
    re.ASCII | re.DOTALL,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubRoot:
    """A dataset of the Hugging Face hub that serves as an image root.

    Parameters
    ----------
    dataset : str
        OWNER/NAME.
    revision : str
        A branch, a tag or a commit; "" for the default branch.
    subset : str
        A folder, file or configuration; "" for all data files.
    """

    dataset: str
    revision: str = ""
    subset: str = ""

    def __str__(self) -> str:
        is_plain = _OWN_REFERENCE.fullmatch(self.revision)
        name = self.revision if is_plain else quote(self.revision, safe="")
        revision = f"@{name}" if name else ""
        subset = f"/{self.subset}" if self.subset else ""
        return f"{SCHEME}datasets/{self.dataset}{revision}{subset}"

    def __fspath__(self) -> str:
        return str(self)

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return _COMMIT.fullmatch(self.revision) is not None


def parse_hub_root(text: str) -> HubRoot | None:
    """Read `hf://datasets/OWNER/NAME[@REVISION][/SUBSET]`; None for anything but `hf://`.

    Raises
    ------
    ArgumentError
        It names no dataset, or a subset that leads out of it.

    Examples
    --------
    >>> parse_hub_root("hf://datasets/owner/films@v1/hands")
    HubRoot(dataset='owner/films', revision='v1', subset='hands')
    """
    if not text.startswith(SCHEME):
        return None
    found = _ROOT.fullmatch(text)
    parts = [part for part in (found[3] or "").split("/") if part] if found else []
    if not found or any(part in (".", "..") or not _is_plain(part) for part in parts):
        # The text is not shown: what a user typed in a wrong place may be a token.
        raise ArgumentError(
            "an address that begins hf:// is hf://datasets/OWNER/NAME, with @REVISION or /FOLDER "
            "after it if need be, and holds no credentials: these are found in HF_TOKEN."
        )
    return HubRoot(found[1], unquote(found[2] or ""), "/".join(parts))


def _is_plain(name: str) -> bool:
    return name.isprintable() and "\\" not in name


@dataclass(frozen=True)
class DatasetFiles:
    """The files of a stream, such as the data files of a dataset at one commit.

    Attributes
    ----------
    layout : {"parquet", "tar", "images"}
        What they are.
    files : tuple of StreamFile
        Sorted by name, a path in the repository.
    metadata : tuple of StreamFile
        Tables beside images: `METADATA_FILES`.
    class_names : dict of str to tuple of str
        The names of a column's classes, by number, as the card says; empty if that is not clear.
    problem : str
        Why the card could not be read; "" if it could.
    """

    layout: Layout
    files: tuple[StreamFile, ...]
    metadata: tuple[StreamFile, ...]
    class_names: dict[str, tuple[str, ...]]
    problem: str = ""


@dataclass(frozen=True)
class _Card:
    """What a dataset's card says of its files."""

    patterns: dict[str, list[tuple[str, str]]]  # of each configuration: (split, glob)
    default: str
    classes: dict[str, dict[str, tuple[str, ...]]]  # of a configuration's columns; () is unclear
    problem: str = ""


def pin_commit(root: HubRoot) -> HubRoot:
    """Return the root at the commit that its revision is now.

    Raises
    ------
    ArgumentError
        It is not a valid dataset name.
    StorageError
        The dataset or the revision does not exist, is gated or private, or the hub cannot be
        reached.
    MissingLibraryError
        huggingface_hub is not installed.
    """
    require_libraries(str(root), ("huggingface_hub",), "encoders")
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(root.dataset)
    except HFValidationError as error:
        raise ArgumentError(
            f"{root.dataset!r} is not a valid dataset name. Correct {root}."
        ) from error
    seconds = constants.HF_HUB_ETAG_TIMEOUT
    given = {"revision": root.revision or None, "expand": ["sha"], "timeout": seconds}
    info = ask_hub(
        lambda: HfApi().dataset_info(root.dataset, **given),  # type: ignore[arg-type]
        root.dataset,
        root.revision or "main",
        "the list of files",
        DATASET,
    )
    commit = str(info.sha)
    if not _COMMIT.fullmatch(commit) or (root.is_pinned and commit != root.revision):
        asked = f"the commit {root.revision}" if root.is_pinned else "40 hex digits"
        raise StorageError(
            f"{hub_address()} gives {mask_controls(commit[:60])!r} as a commit of "
            f"{root.dataset}, which is not {asked}. Set HF_ENDPOINT to a trusted hub."
        )
    return replace(root, revision=commit)


@lru_cache(maxsize=4)
def list_data_files(root: HubRoot) -> DatasetFiles:
    """Return the data files of a pinned root; the list is asked for once in a process.

    Raises
    ------
    PathNotFoundError
        It holds no Parquet, tar or image files, or nothing of that name.
    ImageError
        It cannot be told which names of classes are those of a column's numbers.
    StorageError
        As for `pin_commit`.
    """
    sizes = _list_tree(root)
    card = _read_card(root, sizes)
    chosen = _choose(root, sizes, card)
    layout, suffixes = _find_layout(root, chosen)
    paths = sorted(path for path in chosen if _suffix(path) in suffixes)
    files = tuple(_stream_file(root, path, sizes[path], chosen[path]) for path in paths)
    beside = sorted(path for path in chosen if PurePosixPath(path).name in METADATA_FILES)
    tables = tuple(_stream_file(root, path, sizes[path]) for path in beside)
    names = _class_names(card, root.subset)
    if layout == "parquet":
        _refuse_unclear(root, files[0], names)
    return DatasetFiles(layout, files, tables, names, card.problem)


def _list_tree(root: HubRoot) -> dict[str, int]:
    """Return the size of every file in the repository, by its path."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    def ask() -> dict[str, int]:
        known = {"recursive": True, "revision": root.revision, "repo_type": "dataset"}
        tree = HfApi().list_repo_tree(root.dataset, **known)  # type: ignore[arg-type]
        return {str(own.path): int(own.size) for own in tree if isinstance(own, RepoFile)}

    return ask_hub(ask, root.dataset, root.revision, "the list of files", DATASET)


def _choose(root: HubRoot, sizes: dict[str, int], card: _Card) -> dict[str, str]:
    """Return the files of the subset, each with the split that the card says."""
    subset = root.subset
    inside = len(subset) + 1
    below = [p for p in sizes if p.startswith(f"{subset}/") and _matches(p[inside:], "**")]
    if subset and (below or subset in sizes):
        return dict.fromkeys(below or [subset], "")
    names = [*card.patterns]
    if subset and subset not in names:
        also = f", and no configuration but {', '.join(names)}" if names else ""
        raise PathNotFoundError(
            f"dataset {root.dataset} holds nothing at {subset!r}{also} (commit "
            f"{root.revision[:12]}). Correct what follows the name in {root}."
        )
    chosen = subset or card.default
    if not chosen and len(names) > 1:
        raise PathNotFoundError(
            f"dataset {root.dataset} has the configurations {', '.join(names[:20])}. Name one: "
            f"hf://datasets/{root.dataset}/{names[0]}."
        )
    chosen = chosen or next(iter(names), "")
    found: dict[str, str] = {}
    for split, pattern in card.patterns.get(chosen, [("", "**")]):
        matched = [path for path in sizes if _matches(path, pattern)]
        if not matched and names:
            raise PathNotFoundError(
                f"the card of {root.dataset} says that configuration {chosen!r} has files like "
                f"{pattern[:100]!r}, and none is at commit {root.revision[:12]}. Name a folder or "
                f"a file instead: hf://datasets/{root.dataset}/FOLDER."
            )
        for path in matched:
            found.setdefault(path, split)
    return found


def _matches(path: str, pattern: str) -> bool:
    """Tell whether a path is of a pattern, as `datasets` reads it.

    Only `**` stands for several folders, or none; hidden files and folders have to be named.
    """
    parts = path.split("/")
    places = {0}  # how many parts the pattern may have used so far
    for step in pattern.split("/"):
        spans = ((p, q) for p in places for q in range(p, len(parts) + 1))
        places = {q for p, q in spans if _fits(parts[p:q], step)}
    return len(parts) in places


def _fits(parts: list[str], step: str) -> bool:
    is_hidden = any(part.startswith(".") and part.strip(".") for part in parts)
    if is_hidden and not step.startswith("."):
        return False
    if step == "**":
        return True
    is_long_enough = len(parts) == 1 or (len(parts) > 1 and "**" in step)
    return is_long_enough and fnmatchcase("/".join(parts), step)


def _find_layout(root: HubRoot, paths: Sequence[str] | dict[str, str]) -> tuple[Layout, set[str]]:
    """Return what the files are: Parquet if there is any, else tar files, else images."""
    tables = [path for path in paths if PurePosixPath(path).name != "metadata.parquet"]
    suffixes = {_suffix(path) for path in tables}
    if ".parquet" in suffixes:
        return "parquet", {".parquet"}
    if ".tar" in suffixes:
        return "tar", {".tar"}
    if suffixes & IMAGE_SUFFIXES:
        return "images", IMAGE_SUFFIXES
    where = f"{root.dataset}/{root.subset}" if root.subset else root.dataset
    raise PathNotFoundError(
        f"dataset {where} holds no Parquet, tar or image files at commit {root.revision[:12]}. The "
        "hub may keep it as Parquet beside that: try "
        f"hf://datasets/{root.dataset}@refs/convert/parquet."
    )


def _suffix(path: str) -> str:
    return PurePosixPath(path).suffix.lower()


def _stream_file(root: HubRoot, path: str, size: int, split: str = "") -> StreamFile:
    if size < 0 or not _is_plain(path) or {"", ".", ".."} & {*path.split("/")}:
        raise StorageError(
            f"{root.dataset} lists a file {mask_controls(path[:100])!r} of {size} bytes, which is "
            "not a valid file name or size; nothing was read. Name the folders to read after "
            "the dataset's name, or correct HF_ENDPOINT."
        )
    place = f"{path} of {root.dataset} at {root.revision[:12]}"
    remote = RemoteFile(root.dataset, root.revision, path, size, "", DATASET)
    return StreamFile(path, place, partial(_open, remote), size, split)


def _open(remote: RemoteFile) -> io.BufferedIOBase:
    return io.BufferedReader(_HubFile(remote), BLOCK)


class _HubFile(io.RawIOBase):
    """A file of a repository, read in ranges of what its first answer described."""

    def __init__(self, remote: RemoteFile) -> None:
        self._remote, self._place = remote, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        starts = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._remote.size}
        self._place = max(starts[whence] + offset, 0)
        return self._place

    def readinto(self, buffer: "memoryview | bytearray") -> int:  # type: ignore[override]
        stop = min(self._place + len(buffer), self._remote.size)
        if self._place >= stop:
            return 0
        view, start = memoryview(buffer), self._place

        def take(position: int, chunk: bytes) -> None:
            view[position - start : position - start + len(chunk)] = chunk

        copy_range(self._remote, start, stop, take, note=self._note)
        self._place = stop
        return stop - start

    def readall(self) -> bytes:
        """Return the rest, asked for at once: the base class asks for some KB at a time."""
        rest = bytearray(max(self._remote.size - self._place, 0))
        return bytes(memoryview(rest)[: self.readinto(rest)])

    def _note(self, answered: RemoteFile) -> None:
        """Keep the tag of the first answer, with which all others have to agree."""
        if not self._remote.etag and answered.size == self._remote.size:
            self._remote = answered
        elif answered.size == self._remote.size and answered.etag != self._remote.etag:
            raise explain_changed(answered.repo, answered.commit, answered.name, DATASET)
        elif answered.size != self._remote.size:
            raise StorageError(
                f"{answered.name} of {answered.repo} has {answered.size:,} bytes and was listed "
                f"with {self._remote.size:,}. Run again; if this repeats, the hub or the mirror in "
                "HF_ENDPOINT cannot be trusted."
            )


def _read_card(root: HubRoot, sizes: dict[str, int]) -> _Card:
    """Return what the card's metadata say; a card that is absent or damaged says nothing."""
    nothing = _Card({}, "", {})
    size = sizes.get(CARD, 0)
    if not size:
        return nothing
    if size > MAX_CARD_BYTES:
        return replace(nothing, problem=f"{CARD} has {size:,} bytes")
    from huggingface_hub import DatasetCard

    with _stream_file(root, CARD, size).open() as file:
        text = file.read().decode(errors="replace")
    if not text.startswith("---"):  # no metadata, which the library warns of
        return nothing
    try:
        data = DatasetCard(text, ignore_metadata_errors=True).data
        return _understand(data.get("configs"), data.get("dataset_info"))
    except Exception as error:  # YAML of strangers: whatever its parser says
        return replace(nothing, problem=f"{CARD} cannot be read: {one_line(error, 100)}")


def _understand(configs: Any, infos: Any) -> _Card:
    patterns: dict[str, list[tuple[str, str]]] = {}
    default = ""
    for config in configs or []:
        name = str(config["config_name"])
        files = config.get("data_files") or []
        patterns[name] = [*_patterns(files, str(config.get("data_dir") or ""))]
        if config.get("default") or name == "default":
            default = name
    listed = [infos] if isinstance(infos, dict) else infos or []
    classes = {str(own.get("config_name", "default")): _read_classes(own) for own in listed}
    return _Card(patterns, default, classes)


def _patterns(files: Any, folder: str) -> list[tuple[str, str]]:
    """Return (split, glob) of what a card says of a configuration's files."""
    folder = folder.removeprefix("./").strip("/")
    start = f"{folder}/" if folder else ""
    if not files:
        return [("", f"{start}**")]
    if isinstance(files, str):
        files = [files]
    if isinstance(files, dict):
        files = [{"split": split, "path": path} for split, path in files.items()]
    found: list[tuple[str, str]] = []
    for own in files:
        split, paths = (str(own["split"]), own["path"]) if isinstance(own, dict) else ("", own)
        several = [paths] if isinstance(paths, str) else paths
        found += [(split, start + str(path).removeprefix("./")) for path in several]
    return found


def _read_classes(info: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return the names of a configuration's classes; () if they are not for 0, 1, 2 and so on."""
    features = info.get("features")
    found: dict[str, tuple[str, ...]] = {}
    for feature in features if isinstance(features, list) else []:
        kind = feature.get("dtype") if isinstance(feature, dict) else None
        label = kind.get("class_label") if isinstance(kind, dict) else None
        names = label.get("names") if isinstance(label, dict) else None
        if isinstance(names, dict):
            by_number = {str(key): name for key, name in names.items()}
            numbers = [*map(str, range(len(names)))]
            names = [by_number[n] for n in numbers] if {*numbers} == {*by_number} else ()
        if isinstance(names, list | tuple):
            found[str(feature.get("name"))] = tuple(map(str, names))
    return found


def _class_names(card: _Card, subset: str) -> dict[str, tuple[str, ...]]:
    """Return the names of classes that the card gives columns; () where it cannot be told which."""
    asked = subset or card.default or next(iter(card.patterns), "default")
    if asked in card.classes:
        return card.classes[asked]
    known = {*card.classes, *card.patterns} if len(card.patterns) > 1 else {*card.classes}
    listed = [card.classes.get(name, {}) for name in known]
    columns = {column for own in listed for column in own}
    several = {column: {own.get(column, ()) for own in listed} for column in columns}
    return {name: own.pop() if len(own) == 1 else () for name, own in several.items()}


def _refuse_unclear(root: HubRoot, file: StreamFile, names: dict[str, tuple[str, ...]]) -> None:
    """Raise ImageError if neither the card nor a Parquet file says which class a number is."""
    unclear = [column for column, own in names.items() if not own]
    if not unclear:
        return
    columns = read_columns(file)
    lost = [name for name in unclear if name in columns.values and name not in columns.class_names]
    if lost:
        raise ImageError(
            f"the card of {root.dataset} names the classes of column {lost[0]!r}, and not clearly "
            f"which number each has in {file.name}: its configurations differ, or the numbers are "
            "not 0, 1, 2 and so on. Name a configuration after the dataset's name, or build the "
            "manifest with --from-table."
        )
