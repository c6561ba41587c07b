"""Where a cache or images lie: a local path, or a prefix of a bucket, such as s3://bucket/mura.

`Path("s3://bucket")` would become `s3:/bucket`, so that a location is parsed once, where a user
names it, and is one of two types from then on.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medembed.core.errors import ArgumentError
from medembed.core.files import as_path

__all__ = ["SCHEMES", "BucketPath", "Location", "as_location", "parse_location"]

SCHEMES = {
    "s3": "Amazon S3, and stores that speak its protocol",
    "gs": "Google Cloud Storage",
    "az": "Azure Blob Storage",
    "memory": "this process's memory, for tests",
}
UNTRIED = {"gs": " (never tried)"}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://?(.*)", re.DOTALL)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, order=True)
class BucketPath:
    """The name of an object, or a prefix of names, in a bucket.

    It can be joined and taken apart like a path, and stands where a path is asked for; what takes
    local files alone refuses it (`core.files.as_path`). `core.object_store` reads and writes what
    it names.

    Parameters
    ----------
    scheme : str
        One of `SCHEMES`.
    bucket : str
        The bucket, or on Azure the container.
    key : str
        The name in the bucket, without a slash at either end; empty for the bucket itself.
    size : int, optional
        The object's bytes, where a listing has told; takes no part in comparisons.
    """

    scheme: str
    bucket: str
    key: str = ""
    size: int | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.key}" if self.key else "")

    def __fspath__(self) -> str:
        return str(self)

    def __truediv__(self, name: str) -> "BucketPath":
        """Return the name below this one."""
        return BucketPath(self.scheme, self.bucket, f"{self.key}/{name}" if self.key else name)

    @property
    def name(self) -> str:
        """The last part, that of the bucket if there is no other."""
        return self.key.rpartition("/")[2] or self.bucket

    @property
    def stem(self) -> str:
        """The last part without its suffix."""
        return Path(self.name).stem

    @property
    def suffix(self) -> str:
        """The suffix of the last part, with its dot."""
        return Path(self.name).suffix

    @property
    def parent(self) -> "BucketPath":
        """What contains this name; of a bucket the bucket itself."""
        return BucketPath(self.scheme, self.bucket, self.key.rpartition("/")[0])

    def with_name(self, name: str) -> "BucketPath":
        """Return the name beside this one."""
        return self.parent / name

    def with_suffix(self, suffix: str) -> "BucketPath":
        """Return the name with another suffix."""
        return self.with_name(self.stem + suffix)


Location = Path | BucketPath
"""Where something lies."""


def parse_location(text: str) -> Location:
    """Read what a user wrote: a local path, or a URL such as `s3://bucket/prefix`.

    Raises
    ------
    ArgumentError
        A URL has a scheme that is not in `SCHEMES`, no bucket, credentials, or a name that no
        store keeps.

    Examples
    --------
    >>> parse_location("s3://bucket/mura/") / "cache.json"
    BucketPath(scheme='s3', bucket='bucket', key='mura/cache.json')
    >>> str(parse_location("runs/cache"))
    'runs/cache'
    """
    found = _URL.fullmatch(text)
    scheme = found[1].lower() if found else ""
    if found is None or not (scheme in SCHEMES or "://" in text):
        return Path(text)
    if scheme not in SCHEMES:
        known = ", ".join(
            f"{name}://{UNTRIED.get(name, '')}" for name in SCHEMES if name != "memory"
        )
        raise ArgumentError(
            f"{scheme}:// is no place that medembed reads. Give a local path, or one of {known}."
        )
    bucket, _, key = found[2].partition("/")
    if "@" in bucket or ":" in bucket:  # never shown; a secret key may hold slashes itself
        raise ArgumentError(
            f"a {scheme}:// address holds no credentials. Leave out what stands before the @, and "
            "let the provider's usual chain find them: environment variables, files, the machine."
        )
    parts = [part for part in key.split("/") if part]
    # (an empty bucket is mostly an empty variable: s3://$BUCKET/mura)
    if not _BUCKET.fullmatch(bucket) or not all(map(_is_part, parts)):
        raise ArgumentError(f"{text!r} names no place in a bucket. Write {scheme}://BUCKET/PREFIX.")
    return BucketPath(scheme, bucket, "/".join(parts))


def _is_part(part: str) -> bool:
    return part not in (".", "..") and not any(ord(c) < 32 or ord(c) == 127 for c in part)


def as_location(value: Any, what: str, otherwise: str = "") -> Location:
    """Return an argument as a location; a `Path` that swallowed a URL's slash is understood.

    Parameters
    ----------
    value : str or path-like
    what, otherwise : str
        As `core.files.as_path` takes them.

    Raises
    ------
    ArgumentError
        The argument has another type, or is a URL that `parse_location` refuses.
    """
    if isinstance(value, BucketPath):
        return value
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        if isinstance(text, str) and _URL.fullmatch(text):
            return parse_location(text)
    return as_path(value, what, otherwise)
