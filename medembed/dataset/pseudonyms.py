"""Names for patients and studies that only the holder of a key can compute.

A plain hash of a hospital's number protects nobody: there are few numbers, and trying them all
takes seconds. HMAC-SHA-256 (RFC 2104) with a secret key of 32 random bytes does protect, as long as
the key stays with those who may know the patients. The key is never part of a manifest.
"""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from medembed.core.errors import RecipeError
from medembed.core.files import open_plain, sync_directory

__all__ = ["Pseudonyms", "read_key"]

KEY_BYTES = 32
LEAST_KEY_BYTES = 16
MOST_KEY_BYTES = 4096
DIGITS = 20  # hex: the chance of a collision among 10 million names is 1 in 24 billion


class Pseudonyms:
    """Replace identifiers, or keep them if there is no key.

    Parameters
    ----------
    key : bytes or None
        None keeps every identifier as it is.
    """

    def __init__(self, key: bytes | None) -> None:
        self._key = key

    @property
    def hide(self) -> bool:
        """Whether identifiers are replaced."""
        return self._key is not None

    def name(self, kind: str, identifier: str) -> str:
        """Return the name of an identifier, 20 hex digits that also depend on its kind."""
        if self._key is None:
            return identifier
        message = f"{kind}\0{identifier}".encode()
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()[:DIGITS]


def read_key(path: Path | None) -> bytes:
    """Return the key in a file. A missing file is created with a new key.

    Without a path, the key is new and kept nowhere.

    Raises
    ------
    RecipeError
        The file cannot be read or written, or holds fewer than 16 bytes or more than 4,096.
    """
    if path is None:
        return secrets.token_bytes(KEY_BYTES)
    try:
        if not path.exists():
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(secrets.token_hex(KEY_BYTES) + "\n")
                file.flush()
                os.fsync(handle)  # names made with a lost key can never be made again
            sync_directory(path.parent)
        with open_plain(path) as opened:
            key = opened.read(MOST_KEY_BYTES + 1).strip()
    except OSError as error:
        raise RecipeError(f"key file {path} cannot be used: {error.strerror}.") from error
    if len(key) > MOST_KEY_BYTES:
        raise RecipeError(f"key file {path} has more than {MOST_KEY_BYTES} bytes: no key has.")
    if len(key) < LEAST_KEY_BYTES:
        raise RecipeError(
            f"key file {path} holds {len(key)} bytes; a key has at least {LEAST_KEY_BYTES}. Name a "
            "file that does not exist, and a key is written to it."
        )
    return key
