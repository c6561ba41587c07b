"""The interface of encoders."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypedDict, runtime_checkable

import numpy as np

from medembed.core.errors import EncoderError, NonFiniteError
from medembed.encoders.preprocessing import Preprocessing

__all__ = [
    "DescribedEncoder",
    "Encoder",
    "EncoderExecution",
    "PipelinedEncoder",
    "check_rows",
    "refuse_non_finite",
]


@runtime_checkable
class Encoder(Protocol):
    """A frozen tower that turns prepared images into pooled vectors.

    Extraction needs nothing else; a `PipelinedEncoder` keeps its device busier.

    Attributes
    ----------
    source : str
        Hub id, name of a local directory, or `demo`; never a path of this machine.
    revision : str or None
        The hub's commit, if any.
    fingerprint : str
        SHA-256 (hex) over what determines the embeddings: the weights and the architecture.
        Equal fingerprints mean equal towers, independent of the storage format.
    preprocessing : Preprocessing
        How `prepare` must process an image before `encode`.
    dimensions : mapping of str to tuple of int
        Every available pooling, with the shape of one image's vector.
    device : str
        The device of the tower: `cpu`, `cuda`, `mps`.
    precision : {"fp32", "bf16"}
        Arithmetic of the tower; poolings are always computed in fp32.
    """

    @property
    def source(self) -> str: ...  # noqa: D102 - described above

    @property
    def revision(self) -> str | None: ...  # noqa: D102

    @property
    def fingerprint(self) -> str: ...  # noqa: D102

    @property
    def preprocessing(self) -> Preprocessing: ...  # noqa: D102

    @property
    def dimensions(self) -> Mapping[str, tuple[int, ...]]: ...  # noqa: D102

    @property
    def device(self) -> str: ...  # noqa: D102

    @property
    def precision(self) -> str: ...  # noqa: D102

    def encode(self, pixels: np.ndarray, poolings: Sequence[str], /) -> dict[str, np.ndarray]:
        """Return the embeddings of a batch.

        Parameters
        ----------
        pixels : ndarray
            uint8 (n, height, width), prepared.
        poolings : sequence of str
            Names of `dimensions`.

        Returns
        -------
        dict of str to ndarray
            pooling -> float32 (n, ...), a row of the shape `dimensions[pooling]` for each image,
            all finite, in the order of `pixels`.
            In fp32 on a CPU, for constant n, a row does not depend on the others.

        Raises
        ------
        DeviceMemoryError
            The batch does not fit the device's memory; a smaller one may.
        NonFiniteError
            Some rows hold NaN or infinite values; the error holds all rows, and marks these.
        EncoderError
            The shape, the dtype or a pooling is wrong.
        """
        ...


@runtime_checkable
class PipelinedEncoder(Encoder, Protocol):
    """An encoder whose device accepts the next batch before the previous one is done.

    Attributes
    ----------
    in_flight : int
        Number of batches that may be submitted and not yet collected; more would waste memory.
    """

    @property
    def in_flight(self) -> int: ...  # noqa: D102

    def submit(
        self, pixels: np.ndarray, poolings: Sequence[str]
    ) -> Callable[[], dict[str, np.ndarray]]:
        """Start to embed a batch; return a function that waits for the result of `encode`.

        `pixels` is copied before this returns, so the caller may overwrite it. This method and the
        returned function raise like `encode`. Results may be collected once, in any order.
        """
        ...

    def warm_up(
        self,
        poolings: Sequence[str],
        *,
        n_images: int,
        batch_size: int | None = None,
        on_status: Callable[[str], None] | None = None,
    ) -> int:
        """Prepare the device for `n_images`, and return the batch size to use.

        Chooses the batch size from the device's free memory unless it is given, and compiles the
        tower if that pays off for `n_images`.

        Parameters
        ----------
        on_status : callable, optional
            Called with a word or two for the progress bar when a step takes a while.
        """
        ...

    def reference(self) -> Encoder:
        """Return this tower in fp32 on its device, or the encoder itself if it is in fp32."""
        ...


def check_rows(
    encoder: Encoder, found: Mapping[str, np.ndarray], poolings: Sequence[str], n: int, n_used: int
) -> dict[str, np.ndarray]:
    """Return the first `n_used` rows of an encoder's result for `n` images, after checking them.

    Raises
    ------
    EncoderError
        A pooling is missing, is not an array of numbers, or has another shape than `dimensions`.
    NonFiniteError
        A used row holds NaN or infinity.
    """
    rows = {}
    for name in poolings:
        values = found[name] if isinstance(found, Mapping) and name in found else None
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
            what = f"an array of {values.dtype}" if isinstance(values, np.ndarray) else "no array"
            raise EncoderError(f"encoder {encoder.source} gave {what} for pooling {name}")
        expected = (n, *encoder.dimensions[name])
        if values.shape != expected:
            raise EncoderError(
                f"encoder {encoder.source} gave pooling {name} in shape {values.shape} for {n} "
                f"images; it must be {expected}"
            )
        rows[name] = values[:n_used]
    refuse_non_finite(rows, f"in {encoder.precision}")
    return rows


class EncoderExecution(TypedDict):
    """How an encoder runs."""

    device: str
    card: str | None
    """The GPU's name."""
    precision: str
    attention: str | None
    """The kernel found to be the fastest."""
    compiled: bool


@runtime_checkable
class DescribedEncoder(Encoder, Protocol):
    """An encoder that reports how it runs."""

    def describe(self) -> EncoderExecution:
        """Return how it runs."""
        ...


def refuse_non_finite(rows: Mapping[str, np.ndarray], where: str = "") -> None:
    """Raise NonFiniteError unless every row is finite under every pooling.

    Parameters
    ----------
    rows : mapping of str to ndarray
        pooling -> (n, …).
    where : str
        End of the sentence, such as "in bf16. Try --precision fp32".
    """
    finite = {
        name: np.isfinite(values).reshape(len(values), -1).all(axis=1)
        for name, values in rows.items()
    }
    for name, is_finite in finite.items():
        if not is_finite.all():
            first = int(np.flatnonzero(~is_finite)[0])
            raise NonFiniteError(
                f"{(~is_finite).sum()} of {len(is_finite)} {name} embeddings are not finite"
                f"{f' {where}' if where else ''}; the first is at position {first}.",
                dict(rows),
                np.logical_and.reduce(list(finite.values())),
            )
