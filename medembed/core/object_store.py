"""Read and write objects of a bucket: S3, Google Cloud Storage, Azure, or memory for tests.

obstore does the requests: one wheel for all providers, which puts an object only if its name is
free, on every one of them. Time-outs, 5xx, throttling, cut connections and expired credentials are
retried here, a bounded number of times, after random pauses that grow (full jitter, M. Brooker,
"Exponential backoff and jitter", AWS 2015). Errors are worded here too: those of the libraries hold
addresses, which on Azure may hold a signature.
"""

import errno
import os
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from medembed.core.errors import StorageError
from medembed.core.locations import BucketPath
from medembed.core.system import missing_library

__all__ = [
    "AHEAD",
    "MAX_TRIES",
    "Part",
    "StoredObject",
    "announcing",
    "copy_object",
    "create_object",
    "delete_objects",
    "find_object",
    "is_probe",
    "list_objects",
    "list_objects_in",
    "object_exists",
    "pause",
    "put_object",
    "read_object",
    "read_part",
    "read_range",
    "require_conditions",
    "set_announcer",
    "store_time",
]

AHEAD = 32
"""Requests in flight at once, for small objects: latency, not bandwidth, is what they wait for."""
MAX_TRIES = 8
"""Tries of one request: at most about a minute and a half of pauses."""
FIRST_PAUSE, MAX_PAUSE = 0.2, 30.0  # seconds: upper ends of the random pauses
# A whole shard has 64 MB: over a slow line it takes minutes, but never half of one in silence.
MAX_SECONDS, MAX_SILENCE = 900.0, 30.0
PROBE = ".probe-"
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_RETRIED = {"408", "409", "425", "429", "500", "502", "503", "504"}
_PASSING = re.compile(r"<Code>(RequestTimeout|SlowDown|InternalError|OperationAborted|Throttl)")
# Another's write to the name was under way (409), and may yet fail; obstore calls that existing.
_RACED = re.compile(r"<Code>(ConditionalRequestConflict|OperationAborted)")
_EXPIRED = re.compile(
    r"ExpiredToken|TokenRefreshRequired|RequestExpired|InvalidAuthenticationInfo|invalid_token"
)
_REMEDIES = {
    "401": "Renew the credentials, and run the command again: it goes on where it stopped.",
    "403": "Check that the credentials may list, read and write there, and run it again.",
    "301": "The bucket is in another region: set AWS_REGION.",
    "404": "Create it, or correct its name.",
}
Result = TypeVar("Result")


@dataclass(frozen=True)
class StoredObject:
    """An object of a listing.

    Parameters
    ----------
    path : BucketPath
        With its size.
    modified : datetime
        When it was written, by the store's clock.
    etag : str or None
        The store's tag of the content, if it has one and told it.
    """

    path: BucketPath
    modified: datetime
    etag: str | None = None


@dataclass(frozen=True)
class Part:
    """Some bytes of an object.

    Parameters
    ----------
    data : bytes
    size : int
        Of the whole object.
    etag : str or None
        As `StoredObject` has it.
    """

    data: bytes
    size: int
    etag: str | None


class _BeyondEndError(OSError):
    """A range begins where the object has ended."""


class _Bucket:
    """The connection to one bucket, shared by all threads of a process."""

    def __init__(self, scheme: str, bucket: str) -> None:
        self._scheme, self._bucket = scheme, bucket
        self._lock = threading.Lock()
        self._store: Any = None

    def store(self) -> Any:
        """Return obstore's object, made on first use."""
        with self._lock:
            if self._store is None:
                self._store = _connect(self._scheme, self._bucket)
            return self._store

    def renew(self, used: Any) -> None:
        """Forget the object that was refused, and ask for credentials again."""
        with self._lock:
            if self._store is used and self._scheme != "memory":
                self._store = None

    def call(self, path: BucketPath, work: Callable[[Any], Result]) -> Result:
        """Return what `work` returns, tried again while it fails in passing.

        Raises
        ------
        FileNotFoundError
            The object does not exist.
        FileExistsError
            It exists, and was to be created.
        StorageError
            The store refuses, or every try failed.
        """
        from obstore import exceptions as known

        for attempt in range(1, MAX_TRIES + 1):
            store = None
            try:
                store = self.store()
                return work(store)
            except StorageError:  # of how it is set up
                raise
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
                    raise _refused(path, "404", "there is no such bucket") from None
                missing = FileNotFoundError(errno.ENOENT, "no such object", str(path))
                raise missing from None
            except (known.BaseError, OSError, ValueError) as error:
                if isinstance(error, known.AlreadyExistsError) and not _RACED.search(str(error)):
                    raise FileExistsError(errno.EEXIST, "the object exists", str(path)) from None
                if "Could not parse path" in str(error):
                    unnamed = OSError(errno.EINVAL, "no object can have this name", str(path))
                    raise unnamed from None
                status, words = _explain(str(error))
                if status == "416":
                    raise _BeyondEndError(
                        errno.EINVAL, "the object is shorter", str(path)
                    ) from None
                has_expired = _EXPIRED.search(str(error)) is not None
                if attempt == 1 and status in ("400", "401", "403") and "(" not in words:
                    has_expired = True  # perhaps: the answer to a HEAD has no body that says so
                may_pass = has_expired or not status or status in _RETRIED
                may_pass = may_pass or _PASSING.search(str(error)) is not None
                is_setting = store is None or isinstance(error, ValueError)
                if not may_pass or attempt == MAX_TRIES or is_setting:
                    raise _refused(path, status, words, attempt) from None
                if has_expired:
                    self.renew(store)
            pause(attempt)
        raise AssertionError("unreachable")


_buckets: dict[tuple[str | None, ...], _Bucket] = {}
_lock = threading.Lock()


def _bucket_of(path: BucketPath) -> _Bucket:
    # A forked child must not use its parent's connections, nor a test those of the one before.
    key = (path.scheme, path.bucket, str(os.getpid()), *map(os.environ.get, _ENDPOINTS))
    if path.scheme == "memory":
        key = (path.scheme, path.bucket)
    with _lock:
        return _buckets.setdefault(key, _Bucket(path.scheme, path.bucket))


def pause(attempt: int) -> None:
    """Wait before another try: a random time, up to one that doubles with each attempt."""
    time.sleep(random.uniform(0, min(MAX_PAUSE, FIRST_PAUSE * 2**attempt)))  # nosec B311 # jitter


def list_objects(prefix: BucketPath, limit: int | None = None) -> list[StoredObject]:
    """Return the objects below a prefix, at any depth, in the store's order.

    Parameters
    ----------
    limit : int, optional
        Stop once at least this many have been read.

    Raises
    ------
    StorageError
        The store cannot be asked.
    """
    obstore = _obstore(prefix)

    def read(store: Any) -> list[StoredObject]:
        found: list[StoredObject] = []
        for chunk in obstore.list(store, prefix.key or None):
            for entry in chunk:
                path = BucketPath(prefix.scheme, prefix.bucket, entry["path"], entry["size"])
                found.append(StoredObject(path, entry["last_modified"]))
            if limit is not None and len(found) >= limit:
                break
        return found

    return _bucket_of(prefix).call(prefix, read)


def list_objects_in(prefix: BucketPath) -> list[BucketPath]:
    """Return the objects directly below a prefix, as `list_objects` does.

    What stands for the prefix itself, as consoles make it for a "folder", is left out.
    """
    return [found.path for found in list_objects(prefix) if found.path.parent == prefix]


def object_exists(path: BucketPath) -> bool:
    """Tell whether there is an object of exactly this name."""
    return find_object(path) is not None


def find_object(path: BucketPath) -> StoredObject | None:
    """Return the object of exactly this name, or None."""
    obstore = _obstore(path)
    try:
        found = _bucket_of(path).call(path, lambda store: obstore.head(store, path.key))
    except FileNotFoundError:
        return None
    sized = BucketPath(path.scheme, path.bucket, path.key, found["size"])
    return StoredObject(sized, found["last_modified"], found.get("e_tag"))


def read_object(path: BucketPath, *, max_bytes: int | None = None) -> bytes:
    """Return an object's content.

    Raises
    ------
    FileNotFoundError
        There is no such object.
    OSError
        It has more than `max_bytes` bytes (EFBIG), and none is read.
    StorageError
        The store refuses, or keeps failing.
    """
    obstore = _obstore(path)

    def read(store: Any) -> bytes | int:
        result = obstore.get(store, path.key)
        n_bytes = int(result.meta["size"])
        if max_bytes is not None and n_bytes > max_bytes:
            return n_bytes
        data: bytes = result.bytes().to_bytes()
        if len(data) != n_bytes:
            raise OSError("the answer ended early")
        return data

    data = _bucket_of(path).call(path, read)
    if isinstance(data, int):
        raise OSError(
            errno.EFBIG, f"it has {data:,} bytes; at most {max_bytes:,} are read", str(path)
        )
    return data


def read_range(path: BucketPath, start: int, stop: int) -> tuple[bytes, int]:
    """Return bytes `start` to `stop` of an object, as many as it has, and the object's size.

    Raises like `read_object`.
    """
    part = read_part(path, start, stop)
    return part.data, part.size


def read_part(path: BucketPath, start: int, stop: int, *, etag: str | None = None) -> Part:
    """Return bytes `start` to `stop` of an object, as many as it has.

    Parameters
    ----------
    etag : str, optional
        What an earlier part of the object said, so that parts of two contents are never joined.

    Raises
    ------
    OSError
        The object has another tag by now; else like `read_object`.
    """
    obstore = _obstore(path)

    def read(store: Any) -> Part:
        result = obstore.get(store, path.key, options={"range": (start, stop)})
        size = int(result.meta["size"])
        data: bytes = result.bytes().to_bytes()
        if len(data) != max(0, min(stop, size) - start):
            raise OSError("the answer ended early")
        return Part(data, size, result.meta.get("e_tag"))

    try:
        part = _bucket_of(path).call(path, read)
    except _BeyondEndError:
        found = find_object(path)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", str(path)) from None
        part = Part(b"", found.path.size or 0, found.etag)
    if etag and part.etag != etag:
        raise OSError(errno.EIO, "the object was replaced while it was read", str(path))
    return part


def put_object(path: BucketPath, data: bytes) -> None:
    """Write an object, in place of an older one."""
    obstore = _obstore(path)

    _bucket_of(path).call(
        path, lambda store: obstore.put(store, path.key, data, use_multipart=False)
    )


def create_object(path: BucketPath, data: bytes) -> bool:
    """Write an object unless its name is taken; return whether this call wrote it.

    An answer that is lost leaves it open who wrote the object; then it counts as taken, and the
    caller compares what is there with `data`.

    Raises
    ------
    StorageError
        The store refuses, or keeps failing.
    """
    obstore = _obstore(path)

    def create(store: Any) -> None:
        obstore.put(store, path.key, data, mode="create", use_multipart=False)

    try:
        _bucket_of(path).call(path, create)
    except FileExistsError:
        return False
    return True


def copy_object(source: BucketPath, target: BucketPath) -> None:
    """Copy an object within its bucket, without reading it."""
    obstore = _obstore(source)

    _bucket_of(source).call(source, lambda store: obstore.copy(store, source.key, target.key))


def delete_objects(paths: Iterable[BucketPath]) -> None:
    """Delete objects; one that is gone already is none's error."""

    def delete(path: BucketPath) -> None:
        obstore = _obstore(path)
        with suppress(FileNotFoundError):
            _bucket_of(path).call(path, lambda store: obstore.delete(store, [path.key]))

    paths = list(paths)
    if paths:
        with ThreadPoolExecutor(min(AHEAD, len(paths))) as pool:
            list(pool.map(delete, paths))


def require_conditions(prefix: BucketPath) -> None:
    """Prove that the store creates an object only where its name is free.

    Without that two workers could overwrite each other. Two objects of one name are tried, and
    removed again.

    Raises
    ------
    StorageError
        The second replaced the first, or the store knows no such condition.
    """
    probe = prefix / f"{PROBE}{secrets.token_hex(8)}"
    first, second = b"first", b"second"
    try:
        if not create_object(probe, first):  # the answer of the first try was lost
            first = read_object(probe)
        is_kept = not create_object(probe, second) and read_object(probe) == first
    finally:
        with suppress(OSError):  # a bucket that keeps everything
            delete_objects([probe])
    if not is_kept:
        raise StorageError(
            f"the store of {prefix} does not honour conditional writes (If-None-Match: *): of two "
            "objects of one name the second replaced the first, and so could two workers replace "
            "each other's rows. Use a store that does, as S3, Google Cloud Storage and Azure do, "
            "or extract into a local --cache and copy that with the store's own client: reading "
            "needs no conditions."
        )


def store_time(prefix: BucketPath) -> datetime:
    """Return the time by the clock of a store, which is what an object's age is counted in.

    Raises
    ------
    StorageError
        The store refuses, or keeps failing.
    """
    probe = prefix / f"{PROBE}{secrets.token_hex(8)}"
    try:
        put_object(probe, b"")
        found = find_object(probe)
    finally:
        with suppress(OSError):
            delete_objects([probe])
    return found.modified if found else datetime.now(UTC)


def is_probe(path: BucketPath) -> bool:
    """Tell whether an object is what a run left that died while it tried conditions."""
    return path.name.startswith(PROBE)


Announcer = Callable[[str, str], AbstractContextManager[Callable[[int, int], None]]]
_announcer: list[Announcer] = []


def set_announcer(announcer: Announcer) -> None:
    """Have `announcer(words, unit)` show the progress of downloads; by default nothing is shown.

    It returns a context manager whose value is called as progress(done, total) with what `unit`
    names in the plural, such as "bytes".
    """
    _announcer[:] = [announcer]


def announcing(
    words: str, unit: str = "bytes"
) -> AbstractContextManager[Callable[[int, int], None]]:
    """Return the context manager that shows a download, which `words` describe with its size."""
    return _announcer[0](words, unit) if _announcer else nullcontext(lambda done, total: None)


def _obstore(path: BucketPath) -> Any:
    """Return obstore, which only who uses a bucket has to have, and imports."""
    try:
        import obstore
    except ImportError:
        raise missing_library(str(path), "obstore", "cloud") from None
    return obstore


def _connect(scheme: str, bucket: str) -> Any:
    from obstore import store as stores

    client: Any = {
        "timeout": timedelta(seconds=MAX_SECONDS),
        "read_timeout": timedelta(seconds=MAX_SILENCE),
        "connect_timeout": timedelta(seconds=MAX_SILENCE),
    }
    common: Any = {"client_options": client, "retry_config": {"max_retries": 0}}
    if scheme == "memory":
        return stores.MemoryStore()
    if scheme == "gs":
        return stores.GCSStore(bucket, **common)
    if scheme == "az":
        return stores.AzureStore(bucket, **common)
    named = next((name for name in _ENDPOINTS if os.environ.get(name)), None)
    settings: Any = {"checksum_algorithm": "sha256"}
    if named:
        endpoint = os.environ[named]
        if not re.fullmatch(r"https?://[^\s/]+\S*", endpoint):  # obstore would panic
            raise StorageError(f"{named} is not an address such as https://host:9000. Correct it.")
        settings["endpoint"] = endpoint
        client["allow_http"] = endpoint.startswith("http://")
    return stores.S3Store(bucket, config=settings, credential_provider=_aws_credentials(), **common)


def _aws_credentials() -> Any:
    """Return boto3's chain (profiles, SSO, roles), or None where the environment has it all."""
    if os.environ.get("AWS_ACCESS_KEY_ID") or os.environ.get("AWS_SKIP_SIGNATURE"):
        return None
    try:
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:  # without boto3: the machine's own
        return None
    try:
        return Boto3CredentialProvider(ttl=timedelta(minutes=5))
    except ValueError:  # it finds none
        return None
    except BotoCoreError as error:  # such as a profile that does not exist
        raise StorageError(f"no credentials for S3: {error!s:.200}. Correct ~/.aws.") from None


def _explain(text: str) -> tuple[str, str]:
    """Return the HTTP status in a library's message, or "", and what it says, without addresses."""
    text = text.partition("\n\nDebug source")[0]
    failed = re.search(r"External \w+ credential provider: (\w{1,60})", text)
    if failed:  # whose message may hold anything
        return "", f"could not get credentials ({failed[1]})"
    one = re.search(r"\(code: (\w{1,60})\)", text)  # of several objects to be deleted
    if one:
        return "403" if one[1] == "AccessDenied" else "", f"it answered {one[1]}"
    if "redirect without LOCATION" in text:
        return "301", "it answered with status 301"
    status = re.search(r"status code: (\d{3})", text)
    code = re.search(r"<Code>(\w{1,60})</Code>", text)
    if status:
        named = f" ({code[1]})" if code else ""
        return status[1], f"it answered with status {status[1]}{named}"
    words = text.rpartition(" - ")[2] if " - " in text else text.partition("\n")[0]
    words = re.sub(r"\S*(://|\?)\S*", "…", words)
    return "", words[:200].strip()


def _refused(path: BucketPath, status: str, words: str, tries: int = 1) -> StorageError:
    times = f", {tries} times" if tries > 1 else ""
    remedy = _REMEDIES.get(
        status, "Check the network, the address and the credentials, and run the command again."
    )
    where = f"{path.scheme}://{path.bucket}" if status == "404" else str(path)
    return StorageError(f"{where} cannot be reached: {words}{times}. {remedy}")
