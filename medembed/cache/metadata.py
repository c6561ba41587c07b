"""`cache.json`: what a cache directory says of itself, and when two runs disagree about it."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from medembed.cache.spec import CacheSpec
from medembed.cache.storage import read_file, store_at
from medembed.core import object_store
from medembed.core.errors import CacheError, PathNotFoundError, SpecMismatchError, StorageError
from medembed.core.files import json_bytes, sync_directory
from medembed.core.locations import BucketPath, Location
from medembed.core.poolings import DEFAULT_POOLINGS

__all__ = [
    "FORMAT",
    "VERSION",
    "create_description",
    "damaged",
    "is_free",
    "mismatch",
    "options_of",
    "read_description",
    "source_of",
]

FORMAT = "medembed-cache"
VERSION = 1
# Spec entry -> command-line option and its default. Entries without one follow from the encoder.
OPTIONS = {
    "encoder": ("--encoder", None),
    "fit": ("--fit", "stretch"),
    "window": ("--window", "None"),
    "poolings": ("--pool", ",".join(DEFAULT_POOLINGS)),
    "dtype": ("--dtype", "float16"),
}


def create_description(
    path: Location,
    spec: CacheSpec,
    recorded: Mapping[str, Any],
    canary: Mapping[str, Any] | None = None,
) -> None:
    """Make the directory a cache, unless it is one or another process makes it one first.

    On return the cache and what is in it keep their names through a loss of power, also those
    that a killed run gave. `canary` is kept as it is given; see `extraction.canary`.

    Raises
    ------
    CacheError
        The directory holds something else, or cannot be written.
    StorageError
        The store of a bucket would let one process replace what another has written.
    """
    if isinstance(path, BucketPath):
        object_store.require_conditions(path)
        if not object_store.object_exists(path / "cache.json"):
            _create(path, spec, recorded, canary)
        return
    try:
        missing = [place for place in (path, *path.parents) if not place.exists()]
        if not (path / "cache.json").exists():
            _create(path, spec, recorded, canary)
        (path / "shards").mkdir(exist_ok=True)
        for directory in (path / "shards", path, *(place.parent for place in missing[1:])):
            sync_directory(directory)
        with suppress(PermissionError):  # a cache may lie in a directory that we cannot open
            sync_directory(path.parent)
    except OSError as error:
        raise CacheError(
            f"cannot make a cache at {path}: {error.strerror or error}. Choose another --cache."
        ) from error


def is_free(path: Location) -> bool:
    """Tell whether a cache can be made at `path`: nothing there, or what a crash left of that."""
    if isinstance(path, BucketPath):
        return _is_free_prefix(path)
    try:
        entries = list(path.iterdir())  # one question: another process may be making it
    except FileNotFoundError:
        return True
    except NotADirectoryError:  # a file; or below one, where nothing is
        return not path.exists()
    return all(entry.name == "shards" or entry.suffix == ".partial" for entry in entries)


def _is_free_prefix(path: BucketPath) -> bool:
    if object_store.object_exists(path / "cache.json"):
        return False
    shards, folders = f"{path / 'shards'}/", (path, path / "shards")

    def is_ours(found: BucketPath) -> bool:
        is_folder = found in folders and found.size == 0  # as consoles make it
        return is_folder or object_store.is_probe(found) or str(found).startswith(shards)

    return all(is_ours(found.path) for found in object_store.list_objects(path, limit=1000))


def read_description(path: Location) -> tuple[CacheSpec, dict[str, Any], dict[str, Any] | None]:
    """Read the spec, what was recorded beside it, and the canary, None in caches without one.

    Raises
    ------
    PathNotFoundError
        There is no directory at `path`.
    CacheError
        It is not a cache, damaged, or of an unknown version.
    """
    if isinstance(path, Path) and not path.is_dir():
        if path.exists():
            raise CacheError(f"{path} is a file, and a cache is a directory. Name another cache.")
        raise PathNotFoundError(f"no cache at {path}: make one with `medembed extract`")
    document = _read_document(path)
    if document.get("version") != VERSION:
        raise CacheError(
            f"cache at {path} has format version {document.get('version')!s:.40}; this "
            f"medembed reads version {VERSION}. Install the medembed that wrote it, or choose "
            "another --cache."
        )
    try:
        spec, recorded = CacheSpec.from_dict(document["spec"]), document["recorded"]
        if not isinstance(recorded, dict):
            raise TypeError("recorded is no table")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise damaged(path, "its spec cannot be read") from error
    canary = document.get("canary")
    if "canary" in document and not isinstance(canary, dict):
        raise damaged(path, "its canary cannot be read")
    return spec, recorded, canary


def damaged(path: Location, what: str) -> CacheError:
    """Return the error that says how a damaged `cache.json` is mended."""
    return CacheError(
        f"{path / 'cache.json'} is damaged: {what}. Restore that file from a copy; or move it "
        "away, extract one image into another cache with the same options, and copy its "
        "cache.json here: the shards hold all rows, and those of another spec are refused."
    )


def mismatch(
    path: Location,
    there: tuple[CacheSpec, Mapping[str, Any]],
    asked: tuple[CacheSpec, Mapping[str, Any]],
) -> SpecMismatchError | None:
    """Return the error that names the first difference of two specs, or None if they agree."""
    difference = there[0].first_difference(asked[0])
    if difference is None:
        return None
    name, old, new = difference
    source = source_of(there[1])
    wish = f"{name}={_shown(new)}" + (f" ({source_of(asked[1])})" if name == "encoder" else "")
    return SpecMismatchError(
        f"cache at {path} was made by {source} with {name}={_shown(old)}; this run asks for "
        f"{wish}. Choose another --cache{_way_back(name, old, source)}."
    )


def options_of(spec: CacheSpec) -> str:
    """Write the command-line options, beyond the defaults, that ask for this spec."""
    values = {name: spec.preprocessing.get(name) for name in ("fit", "window")}
    values["dtype"] = spec.dtype
    values["poolings"] = ",".join(spec.poolings)
    given = [
        f" {option} {values[name]}"
        for name, (option, default) in OPTIONS.items()
        if values.get(name) not in (None, default)
    ]
    return "".join(given)


def source_of(recorded: Mapping[str, Any]) -> str:
    """Name the encoder as the user named it: `source` or `source@revision`."""
    source, revision = recorded.get("source", "an unknown encoder"), recorded.get("revision")
    return f"{source}@{revision}" if revision else str(source)


def _create(
    path: Location,
    spec: CacheSpec,
    recorded: Mapping[str, Any],
    canary: Mapping[str, Any] | None,
) -> None:
    if not is_free(path):
        if "cache.json" in store_at(path).list():  # another process was faster
            return
        raise CacheError(f"{path} is not a cache and not empty. Choose another --cache.")
    if isinstance(path, Path):
        path.mkdir(parents=True, exist_ok=True)
    document = {"format": FORMAT, "version": VERSION, "spec": spec.as_dict()}
    laid = {} if canary is None else {"canary": dict(canary)}
    data = json_bytes({**document, "recorded": dict(recorded), **laid})
    store_at(path).put_if_absent("cache.json", data)


def _read_document(path: Location) -> dict[str, Any]:
    try:
        document = json.loads(read_file(path / "cache.json"))
    except FileNotFoundError:
        if isinstance(path, BucketPath) and not object_store.list_objects(path, limit=1):
            raise PathNotFoundError(
                f"no cache at {path}: make one with `medembed extract`"
            ) from None
        raise CacheError(
            f"{path} is not a cache: it has no cache.json. Name a directory that "
            "`medembed extract` made."
        ) from None
    except StorageError:  # it says how to mend it
        raise
    except OSError as error:
        raise CacheError(
            f"cannot read {path / 'cache.json'}: {error.strerror or error}. Make it readable, and "
            "run the command again."
        ) from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, "it is not JSON") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CacheError(
            f"{path} is not a cache: its cache.json is not of the format {FORMAT}. Name a "
            "directory that `medembed extract` made."
        )
    return document


def _way_back(name: str, value: Any, source: str) -> str:
    if name not in OPTIONS:
        return ""
    option, default = OPTIONS[name]
    wanted = source if name == "encoder" else _shown(value)
    return f", or drop {option}" if wanted == default else f", or give {option} {wanted}"


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, Mapping) else str(value)
