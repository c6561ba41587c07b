"""The cache directory: one spec, many immutable shards, a list of failures."""

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from medembed.cache import failures, shards
from medembed.cache.failures import Failure
from medembed.cache.index import Index
from medembed.cache.spec import KEY_BYTES, CacheSpec, hex_from_keys, sortable
from medembed.errors import (
    CacheError,
    MissingRowsError,
    PathNotFoundError,
    ShardError,
    SpecMismatchError,
)
from medembed.files import json_bytes, sync_directory

__all__ = ["Cache", "create_cache", "open_cache", "options_of"]

FORMAT = "medembed-cache"
VERSION = 1
# Spec entry -> command-line option and its default. Entries without one follow from the encoder.
OPTIONS = {
    "encoder": ("--encoder", None),
    "fit": ("--fit", "stretch"),
    "poolings": ("--pool", "mean,max"),
    "dtype": ("--dtype", "float16"),
}


class Cache:
    """A directory of embeddings keyed by the SHA-256 of each image's bytes.

    Open one with `open_cache` or `create_cache`. Any number of processes may read and append at
    once: shards are immutable and appear whole.

    Attributes
    ----------
    path : Path
        The directory.
    spec : CacheSpec
        What all rows share.
    recorded : dict
        `source`, `revision`, `precision`, `device`, `versions` of the run that created the
        cache; told, never compared.
    """

    def __init__(self, path: Path, spec: CacheSpec, recorded: dict[str, Any]) -> None:
        self.path, self.spec, self.recorded = path, spec, recorded
        self._index = Index(path / "shards", spec)

    def __repr__(self) -> str:
        return f"Cache({str(self.path)!r})"

    @property
    def source(self) -> str:
        """Name the encoder as the user named it: `source` or `source@revision`."""
        return _source(self.recorded)

    def keys(self) -> np.ndarray:
        """Return the keys of all committed rows, sorted and unique: (n, 32) uint8.

        Raises
        ------
        ShardError
            The keys of a shard are damaged.
        """
        return self._index.refresh().keys()

    def is_done(self, keys: np.ndarray) -> np.ndarray:
        """Tell for each key, (n, 32) uint8, whether its row is in a committed shard: (n,) bool.

        This is the one place that decides it. The shards present now count, also those that
        other processes have added since the last call.
        """
        found, _, _ = self._index.refresh().locate(keys)
        return found

    def commit(self, keys: np.ndarray, embeddings: Mapping[str, np.ndarray]) -> Path:
        """Add rows as one shard and return its path; on any error nothing is added.

        Parameters
        ----------
        keys : (n, 32) uint8
            SHA-256 of each image's bytes, each once.
        embeddings : mapping of str to (n, ...) array
            One finite array per pooling of the spec, brought to the spec's dtype.

        Raises
        ------
        CacheError
            The rows do not fit the spec, or the directory cannot be written.
        """
        return shards.write_shard(self.path / "shards", keys, embeddings, self.spec)

    def read(
        self, keys: np.ndarray, poolings: Sequence[str], *, verify: bool = True
    ) -> dict[str, np.ndarray]:
        """Read rows in the order of `keys`, (n, ...) per pooling in the stored dtype.

        Raises
        ------
        MissingRowsError
            A key is not in the cache.
        CacheError
            A pooling is not in the cache, or a shard is damaged (`ShardError`).
        """
        self.check_poolings(poolings)
        outputs = {
            name: np.empty((len(keys), *self.spec.poolings[name]), self.spec.dtype)
            for name in poolings
        }
        self.read_into(keys, outputs, verify=verify)
        return outputs

    def read_into(
        self, keys: np.ndarray, outputs: Mapping[str, np.ndarray], *, verify: bool = True
    ) -> None:
        """Read rows into arrays of any float dtype, one (n, ...) array per pooling.

        Shards are read in parallel threads. A row that stands in two shards is read from the
        first of them by name. Raises as `read`.
        """
        self.check_poolings(list(outputs))
        found, owners, rows = self._index.refresh().locate(keys)
        if not found.all():
            raise MissingRowsError(
                f"{int((~found).sum())} of {len(keys)} rows are not in the cache at {self.path}"
            )

        def copy(owner: int) -> None:
            places = np.flatnonzero(owners == owner)
            path = self._index.paths[owner]
            shards.copy_rows(path, rows[places], places, outputs, verify=verify, spec=self.spec)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(copy, np.unique(owners).tolist()))

    def check_poolings(self, poolings: Sequence[str]) -> None:
        """Raise CacheError unless every pooling is in the cache; lists those that are."""
        for name in poolings:
            if name not in self.spec.poolings:
                raise CacheError(
                    f"cache at {self.path} has no pooling {name!r}; it has "
                    f"{', '.join(self.spec.poolings)}. Choose among these with --pool, or "
                    "extract again into another --cache."
                )

    def failures(self) -> dict[str, Failure]:
        """Return the known failures by sha256: the newest of each, without rows done since.

        Raises
        ------
        CacheError
            `failures.jsonl` holds a whole line that is not a failure.
        """
        known = failures.read_failures(self._failures_path)
        if not known:
            return known
        keys = np.frombuffer(bytes.fromhex("".join(known)), np.uint8).reshape(-1, KEY_BYTES)
        done = self.is_done(keys)
        return {sha: f for (sha, f), is_done in zip(known.items(), done, strict=True) if not is_done}

    def record_failures(self, new: Iterable[Failure]) -> None:
        """Append failures to `failures.jsonl`, durably.

        Raises
        ------
        CacheError
            The file cannot be written.
        """
        failures.append_failures(self._failures_path, new)

    def card(self) -> dict[str, Any]:
        """Describe the cache in JSON-able values: spec, provenance, rows, bytes, failures."""
        n_rows = len(self.keys())
        failed = self.failures().values()
        return {
            "path": str(self.path),
            "format": FORMAT,
            "version": VERSION,
            "rows": n_rows,
            "shards": len(self._index.paths),
            "bytes": sum(path.stat().st_size for path in self._index.paths),
            "spec": self.spec.as_dict(),
            "recorded": self.recorded,
            "failures": {
                stage: sum(failure.stage == stage for failure in failed)
                for stage in failures.STAGES
            },
        }

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Check every shard's bytes, spec and rows; return one line per problem.

        Every byte is hashed before HDF5 sees it. `progress(done, total)` counts shards.
        """
        problems = []
        seen = _Seen()
        paths = sorted((self.path / "shards").iterdir())
        for n_done, path in enumerate(paths, 1):
            if shards.is_shard_name(path.name):
                problems += self._check_shard(path, seen)
            elif path.suffix != ".partial":  # leftovers of a killed writer mean nothing
                problems.append(f"{path} is not a shard: its name is not 32 hex digits and .h5")
            if progress:
                progress(n_done, len(paths))
        return problems + seen.problems()

    @property
    def _failures_path(self) -> Path:
        return self.path / "failures.jsonl"

    def _check_shard(self, path: Path, seen: "_Seen") -> list[str]:
        try:
            keys, embeddings = shards.read_shard(path, spec=self.spec)
            if not np.array_equal(keys, shards.read_keys(path)):
                return [f"shard {path} names other keys in its header than in its rows"]
            shards.as_stored(embeddings, self.spec, len(keys))
        except ShardError as error:
            return [str(error)]
        except CacheError as error:
            return [f"shard {path}: {error}"]
        seen.add(path, keys)
        return []


def create_cache(
    path: str | os.PathLike[str], spec: CacheSpec, recorded: Mapping[str, Any]
) -> Cache:
    """Open the cache at `path` for rows of `spec`, creating it if it is not there.

    Several processes may do so at once: one creates it, all then compare specs with what is on
    disk.

    Raises
    ------
    SpecMismatchError
        The cache there holds rows made another way; the first difference is named.
    CacheError
        The directory holds something else, is of an unknown version, or cannot be written.
    """
    path = Path(path)
    try:
        if not (path / "cache.json").exists():
            _create(path, spec, recorded)
        (path / "shards").mkdir(exist_ok=True)
    except OSError as error:
        raise CacheError(
            f"cannot make a cache at {path}: {error.strerror or error}. Choose another --cache."
        ) from error
    cache = open_cache(path)
    _refuse_mismatch(cache, spec, recorded)
    return cache


def open_cache(path: str | os.PathLike[str]) -> Cache:
    """Open a cache that exists.

    Raises
    ------
    PathNotFoundError
        There is no directory at `path`.
    CacheError
        It is not a cache, or one of an unknown version.
    """
    path = Path(path)
    if not path.is_dir():
        raise PathNotFoundError(f"no cache at {path}: make one with `medembed extract`")
    document = _read_description(path)
    if document.get("version") != VERSION:
        raise CacheError(
            f"cache at {path} has format version {document.get('version')}; this medembed reads "
            f"version {VERSION}. Install the medembed that wrote it, or choose another --cache."
        )
    try:
        return Cache(path, CacheSpec.from_dict(document["spec"]), dict(document["recorded"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CacheError(f"{path / 'cache.json'} is damaged: {error!r}") from error


def options_of(spec: CacheSpec) -> str:
    """Write the command-line options, beyond the defaults, that ask for this spec."""
    values = {"fit": spec.preprocessing.get("fit"), "dtype": spec.dtype}
    values["poolings"] = ",".join(spec.poolings)
    given = [
        f" {option} {values[name]}"
        for name, (option, default) in OPTIONS.items()
        if values.get(name) not in (None, default)
    ]
    return "".join(given)


class _Seen:
    """Keys of the shards looked at so far, to find rows that stand twice."""

    def __init__(self) -> None:
        self.paths: list[Path] = []
        self.keys: list[np.ndarray] = []

    def add(self, path: Path, keys: np.ndarray) -> None:
        self.paths.append(path)
        self.keys.append(keys)

    def problems(self) -> list[str]:
        if not self.keys:
            return []
        keys = np.concatenate(self.keys)
        owners = np.repeat(np.arange(len(self.paths)), [len(k) for k in self.keys])
        order = np.argsort(sortable(keys), kind="stable")
        names = sortable(keys)[order]
        again = order[1:][names[1:] == names[:-1]]
        return [
            f"row {sha} stands in shard {self.paths[owner]} and in one before it"
            for sha, owner in zip(hex_from_keys(keys[again]), owners[again], strict=True)
        ]


def _create(path: Path, spec: CacheSpec, recorded: Mapping[str, Any]) -> None:
    if path.is_dir() and any(not _is_ours(entry) for entry in path.iterdir()):
        if (path / "cache.json").exists():  # another process was faster
            return
        raise CacheError(f"{path} is not a cache and not empty. Choose another --cache.")
    path.mkdir(parents=True, exist_ok=True)
    document = {"format": FORMAT, "version": VERSION, "spec": spec.as_dict()}
    data = json_bytes({**document, "recorded": dict(recorded)})
    partial = path / f".cache.json.{secrets.token_hex(8)}.partial"
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _publish(partial, path / "cache.json")
    finally:
        partial.unlink(missing_ok=True)
    sync_directory(path)


def _publish(partial: Path, path: Path) -> None:
    """Give a whole file its name unless another process has done so first."""
    try:
        os.link(partial, path)  # unlike a rename, fails where the name is taken
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not path.exists():
            os.replace(partial, path)


def _is_ours(entry: Path) -> bool:
    return entry.name == "shards" or entry.suffix == ".partial"


def _read_description(path: Path) -> dict[str, Any]:
    document: Any = None
    with contextlib.suppress(OSError, ValueError):
        document = json.loads((path / "cache.json").read_bytes())
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CacheError(
            f"{path} is not a cache: it has no cache.json of the format {FORMAT}. "
            "Choose another --cache."
        )
    return document


def _refuse_mismatch(cache: Cache, spec: CacheSpec, recorded: Mapping[str, Any]) -> None:
    difference = cache.spec.first_difference(spec)
    if difference is None:
        return
    name, theirs, ours = difference
    asked = f"{name}={_shown(ours)}"
    if name == "encoder":
        asked += f" ({_source(recorded)})"
    raise SpecMismatchError(
        f"cache at {cache.path} was made by {cache.source} with {name}={_shown(theirs)}; this run "
        f"asks for {asked}. Choose another --cache{_way_back(cache, name, theirs)}."
    )


def _way_back(cache: Cache, name: str, value: Any) -> str:
    if name not in OPTIONS:
        return ""
    option, default = OPTIONS[name]
    wanted = cache.source if name == "encoder" else _shown(value)
    return f", or drop {option}" if wanted == default else f", or give {option} {wanted}"


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, Mapping) else str(value)


def _source(recorded: Mapping[str, Any]) -> str:
    source, revision = recorded.get("source", "an unknown encoder"), recorded.get("revision")
    return f"{source}@{revision}" if revision else str(source)
