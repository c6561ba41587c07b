"""Every error that medembed raises on purpose.

MedembedError
├── ArgumentError          an argument of the Python interface has a wrong type (TypeError)
├── MissingLibraryError    a library that an extra brings is not installed (ImportError)
├── PathNotFoundError      a file or directory named by the user does not exist (FileNotFoundError)
├── StorageError           object storage refuses, fails or cannot be reached (OSError)
├── RecipeError            a recipe cannot be read or does not fit the image root (ValueError)
├── ManifestError          a manifest breaks its rules; lists all problems (ValueError)
├── ImageError             a file is not one complete, still image (ValueError)
├── EncoderError           a checkpoint cannot serve as an encoder (ValueError)
│   ├── DeviceMemoryError  a batch does not fit the device's memory (MemoryError)
│   └── NonFiniteError     some embeddings of a batch are not finite; holds all of them
├── CacheError             a cache directory is not usable (RuntimeError)
│   ├── SpecMismatchError  rows made with different specs would be mixed (ValueError)
│   ├── ShardError         a shard is damaged or does not match its name (OSError)
│   └── MissingRowsError   rows are neither embedded nor listed as failed (LookupError)
├── TrainingDataError      labels, patients or columns do not allow this training (ValueError)
├── RunError               a run directory is incomplete or belongs to another question (ValueError)
└── ModelError             a packaged classifier is damaged or does not fit (ValueError)

A message names the thing, the value and the way out.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "ArgumentError",
    "CacheError",
    "DeviceMemoryError",
    "EncoderError",
    "ImageError",
    "ManifestError",
    "MedembedError",
    "MissingLibraryError",
    "MissingRowsError",
    "ModelError",
    "NonFiniteError",
    "PathNotFoundError",
    "RecipeError",
    "RunError",
    "ShardError",
    "SpecMismatchError",
    "StorageError",
    "TrainingDataError",
]


class MedembedError(Exception):
    """Base of all errors raised on purpose; `str()` is a message for users."""


class ArgumentError(MedembedError, TypeError):
    """An argument is neither an object of the expected type nor a path to one."""


class MissingLibraryError(MedembedError, ImportError):
    """A library that an extra brings is not installed; the message names the extra."""


class PathNotFoundError(MedembedError, FileNotFoundError):
    """A path that the user named does not exist or is of the wrong kind."""


class StorageError(MedembedError, OSError):
    """Object storage refuses a request, keeps failing, or cannot be reached."""


class RecipeError(MedembedError, ValueError):
    """A recipe cannot be read, or the image root does not hold what it describes."""


class ManifestError(MedembedError, ValueError):
    """A manifest breaks its rules.

    Attributes
    ----------
    problems : tuple of str
        One line per problem, complete.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join([message, *(f"  - {problem}" for problem in self.problems)]))


class ImageError(MedembedError, ValueError):
    """A file cannot become a grey array; the message is the reason.

    Attributes
    ----------
    since : int
        The `images_version` that first refused such a file; see `images.versions`.
    """

    def __init__(self, message: str, since: int = 1) -> None:
        self.since = since
        super().__init__(message)


class EncoderError(MedembedError, ValueError):
    """A reference, checkpoint or device cannot serve as an encoder."""


class DeviceMemoryError(EncoderError, MemoryError):
    """A batch does not fit the memory of the encoder's device; a smaller one may."""


class NonFiniteError(EncoderError):
    """Some embeddings of a batch hold NaN or infinite values.

    Attributes
    ----------
    rows : dict of str to ndarray
        Embeddings of every image of the batch, by pooling.
    is_finite : bool array of shape (n,)
        Which images are finite under every pooling.
    """

    def __init__(
        self, message: str, rows: "dict[str, NDArray[np.floating]]", is_finite: "NDArray[np.bool_]"
    ) -> None:
        self.rows, self.is_finite = rows, is_finite
        super().__init__(message)


class CacheError(MedembedError, RuntimeError):
    """A cache directory is missing, foreign or of an unknown version."""


class SpecMismatchError(CacheError, ValueError):
    """Rows of two different specs would be mixed; the message names the first difference."""


class ShardError(CacheError, OSError):
    """A shard's bytes do not match its name, or its layout does not match the spec."""


class MissingRowsError(CacheError, LookupError):
    """Manifest rows are neither embedded nor listed as failed."""


class TrainingDataError(MedembedError, ValueError):
    """Labels, patients or columns do not allow the requested training."""


class RunError(MedembedError, ValueError):
    """A run directory is incomplete, foreign, or belongs to another question."""


class ModelError(MedembedError, ValueError):
    """A packaged classifier is damaged, of an unknown version, or does not fit the data."""
