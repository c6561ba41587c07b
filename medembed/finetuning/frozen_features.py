"""The trunk cache: the output of the frozen blocks, computed once per image and stored.

The blocks below the deepest unfrozen one do not change, so an epoch only needs to compute the
blocks above. The cache has the format of stage 1, with one "pooling", the tokens, and the trunk as
its encoder, and is written, verified and resumed like any cache.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from medembed.cache.embeddings import MappedRows, map_rows
from medembed.cache.index import keys_from_column
from medembed.cache.store import Cache, create_cache, open_cache
from medembed.core.errors import CacheError, TrainingDataError
from medembed.core.files import json_digest
from medembed.core.locations import Location
from medembed.dataset.manifest import Manifest
from medembed.encoders.devices import arithmetic, guard_memory
from medembed.encoders.protocol import Encoder
from medembed.encoders.torch_encoder import TorchEncoder
from medembed.extraction import extract, spec_of
from medembed.finetuning.blocks import cut_trunk
from medembed.finetuning.hyperparameters import Depth
from medembed.images.load import DEFAULT_LIMITS, Limits

if TYPE_CHECKING:
    from medembed.encoders.preprocessing import Preprocessing

__all__ = [
    "TOKENS",
    "TRUNK_DTYPE",
    "PipelinedTrunk",
    "TokenImages",
    "TrunkEncoder",
    "choose_cut",
    "fill_trunk_cache",
    "make_trunk",
]

TOKENS = "tokens"
TRUNK_DTYPE = "float32"
"""Default dtype of stored tokens."""
_BATCH = 8
_HOST_BYTES = 2**29
"""Bytes of a batch's float32 tokens: two batches are in progress, and two wait to be written."""


class TrunkEncoder:
    """The first blocks of an encoder, as a `protocol.Encoder` whose one pooling is the tokens.

    Parameters
    ----------
    encoder : TorchEncoder
        The encoder in fp32, which is copied.
    n_blocks : int
        Number of blocks in the trunk.
    precision : {"fp32", "bf16"}
        Precision of products, as in training.
    """

    def __init__(self, encoder: TorchEncoder, n_blocks: int, precision: str) -> None:
        self._encoder = encoder.copy()
        cut_trunk(self._encoder, n_blocks)
        self.source, self.revision = encoder.source, encoder.revision
        self.preprocessing: Preprocessing = encoder.preprocessing
        self.device, self.precision = encoder.device, precision
        self.fingerprint = json_digest([encoder.fingerprint, "trunk", n_blocks, precision])
        size = self.preprocessing
        black = np.zeros((1, size.height, size.width), np.uint8)
        self.dimensions = {TOKENS: self.encode(black, [TOKENS])[TOKENS].shape[1:]}

    def encode(self, pixels: np.ndarray, poolings: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the tokens of prepared images, float32 (n, …); see `protocol.Encoder.encode`."""
        return guard_memory(
            lambda: self._run(pixels),
            f"the trunk of {self.source} does not fit the memory of {self.device} with a batch of "
            f"{len(pixels)}; a smaller one may.",
        )

    def _run(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        tokens = self._compute(torch.from_numpy(np.array(pixels)).to(self.device))
        return {TOKENS: tokens[TOKENS].cpu().numpy()}

    @torch.inference_mode()
    def _compute(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tokens of uint8 (n, height, width) on the device, float32."""
        with arithmetic(self.device, self.precision):
            seen = self._encoder.model(pixel_values=self._encoder.normalise(images))
            return {TOKENS: seen.last_hidden_state.float()}


class PipelinedTrunk(TrunkEncoder):
    """A trunk whose device receives the next batch before the previous one is done.

    It is a `protocol.PipelinedEncoder`, on the GPU of the process that created it.
    """

    @property
    def in_flight(self) -> int:
        """Number of batches that may be submitted and not yet collected."""
        return self._encoder.runner.in_flight

    def submit(
        self, pixels: np.ndarray, poolings: Sequence[str]
    ) -> Callable[[], dict[str, np.ndarray]]:
        """Start to compute a batch; see `protocol.PipelinedEncoder.submit`."""
        return self._encoder.runner.submit(self._compute, pixels)

    def encode(self, pixels: np.ndarray, poolings: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the tokens of prepared images, float32 (n, …); see `protocol.Encoder.encode`."""
        return self.submit(pixels, poolings)()

    def warm_up(
        self,
        poolings: Sequence[str],
        *,
        n_images: int,
        batch_size: int | None = None,
        on_status: Callable[[str], None] | None = None,
    ) -> int:
        """Return the batch size that fits the device, and whose tokens fit 512 MB of the host.

        See `protocol.PipelinedEncoder.warm_up`.
        """
        if batch_size is not None:
            return batch_size
        if on_status is not None:
            on_status("Warming up")
        size = self.preprocessing
        most = max(1, _HOST_BYTES // (4 * math.prod(self.dimensions[TOKENS])))

        def run(n: int) -> None:
            self.encode(np.zeros((n, size.height, size.width), np.uint8), poolings)

        chosen = self._encoder.runner.choose_batch(run, size.height * size.width, n_images)
        return min(chosen, most)

    def reference(self) -> Encoder:
        """Return the trunk itself: its cache has no canary, and its name includes the precision."""
        return self


def make_trunk(encoder: TorchEncoder, n_blocks: int, precision: str) -> TrunkEncoder:
    """Return the trunk of an encoder, pipelined on CUDA; see `TrunkEncoder`.

    On other devices all cores, or the whole device, compute one batch at a time.

    Raises
    ------
    DeviceMemoryError
        The trunk does not fit the device together with the encoder.
    """
    kind = PipelinedTrunk if encoder.device == "cuda" else TrunkEncoder
    return guard_memory(
        lambda: kind(encoder, n_blocks, precision),
        f"the trunk of {encoder.source} does not fit the memory of {encoder.device} beside the "
        "encoder. Close what else uses it, or choose another --device.",
    )


class TokenImages:
    """A trunk's tokens, read from the mapped shards of its cache.

    Parameters
    ----------
    cache : Cache
    rows : DataFrame
        Rows with a column `sha256`, all in the cache.
    """

    def __init__(self, cache: Cache, rows: pd.DataFrame) -> None:
        self._mapped: MappedRows = map_rows(cache, keys_from_column(rows["sha256"]), TOKENS)

    def take(self, rows: np.ndarray, device: str) -> torch.Tensor:
        """Return the tokens of rows, (n, …) in the stored dtype; see `Images.take`."""
        return torch.from_numpy(self._mapped.take(rows)).to(device)


def choose_cut(depths: Sequence[Depth], n_blocks: int, source: str) -> int:
    """Return how many blocks stay frozen at every depth and thus form the trunk.

    Raises
    ------
    TrainingDataError
        There is nothing to store.
    """
    deepest = depths[-1]
    if deepest.everything or deepest.blocks == n_blocks:
        raise TrainingDataError(
            f"--trunk-cache keeps the output of the frozen blocks, and --unfreeze asks for all "
            f"{n_blocks} of {source}. Omit it, or ask for fewer blocks."
        )
    if not deepest.blocks:
        raise TrainingDataError(
            "--trunk-cache serves depths of 1 and more: with --unfreeze 0 and no augmentation the "
            "embeddings are computed once anyway. Omit --trunk-cache."
        )
    return n_blocks - deepest.blocks


def fill_trunk_cache(
    directory: Path,
    encoder: TrunkEncoder,
    manifest: Manifest,
    image_root: Location,
    *,
    dtype: str = TRUNK_DTYPE,
    limits: Limits = DEFAULT_LIMITS,
    progress: Callable[[int, int], None] | None = None,
    on_status: Callable[[str], None] | None = None,
) -> Cache:
    """Compute the tokens of all images missing from the cache, and check the existing ones.

    Caches of several encoders, cuts and precisions share `directory`, each in a subdirectory.

    Parameters
    ----------
    directory : Path
        Created if it does not exist.
    manifest : Manifest
        The requested rows.
    dtype : {"float32", "float16"}
        Dtype of the stored tokens.
    on_status : callable, optional
        Called with the size before computation starts.

    Raises
    ------
    CacheError
        The disk is too small, a shard is damaged, or a value does not fit the dtype.
    PathNotFoundError, ManifestError, EncoderError
        See `extraction.extract`.
    """
    spec = spec_of(encoder, [TOKENS], dtype)
    path = directory / spec.digest()[:16]
    path.parent.mkdir(parents=True, exist_ok=True)
    recorded = {"source": encoder.source, "revision": encoder.revision}
    recorded |= {"precision": encoder.precision, "device": encoder.device}
    create_cache(path, spec, recorded)
    n_images = manifest.rows["sha256"].nunique()
    if on_status is not None:
        shape = " × ".join(map(str, encoder.dimensions[TOKENS]))
        size = spec.row_bytes() * n_images / 1e6
        on_status(f"Trunk cache, {n_images:,} × {shape} {dtype}, {size:,.1f} MB")
    extract(
        manifest,
        image_root,
        encoder,
        path,
        poolings=[TOKENS],
        dtype=dtype,
        batch_size=None if isinstance(encoder, PipelinedTrunk) else _batch_size(encoder),
        limits=limits,
        progress=progress,
    )
    cache = open_cache(path)
    problems = cache.verify()
    if problems:
        raise CacheError(
            f"trunk cache at {path} is damaged: {problems[0]} Remove that directory and run the "
            "command again to rebuild it."
        )
    return cache


def _batch_size(encoder: TrunkEncoder) -> int:
    """Return a batch size of 8, or less for images of more than 262,144 numbers each."""
    return max(1, min(_BATCH, _BATCH * 2**18 // math.prod(encoder.dimensions[TOKENS])))
