"""Stand-ins for a benchmark of extraction: radiographs of noise, and a device that sleeps."""

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from medembed.dataset.manifest import Manifest
from medembed.encoders.preprocessing import Preprocessing
from medembed.encoders.protocol import Encoder
from medembed.extraction.writer import Timeline

HALF = (0.5, 0.5, 0.5)
Rows = dict[str, np.ndarray]


def write_images(root: Path, n_images: int, height: int, width: int) -> Manifest:
    """Write distinct grey PNGs of smooth shapes and fine noise, and return their manifest."""
    root.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(n_images):
        generator = np.random.default_rng(number)
        coarse = Image.fromarray(generator.integers(0, 200, (8, 7), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
        noise = generator.integers(0, 16, (height, width), dtype=np.uint8)
        path = root / f"{number:06d}.png"
        Image.fromarray(np.clip(smooth.astype(np.uint16) + noise, 0, 255).astype(np.uint8)).save(
            path, compress_level=1
        )
        rows.append((path.name, hashlib.sha256(path.read_bytes()).hexdigest(), path.stem))
    names, digests, stems = zip(*rows, strict=True)
    table = {"image": names, "sha256": digests, "patient": stems, "study": stems}
    frame = pd.DataFrame({**table, "region": "hand", "split": "train"})
    frame.insert(5, "label", pd.array([0] * n_images, dtype="Int8"))
    return Manifest(frame, "study")


class SleepingEncoder:
    """A device that takes a fixed time for each batch without computing anything.

    A separate thread processes batches one after the other; the transfer of the next batch overlaps
    the forward pass of the previous one, as on a GPU with a copy stream. Any loss compared with
    `forward_seconds` is therefore due to the pipeline.
    """

    source, revision, fingerprint = "sleeping stand-in", None, "5" * 64
    device, precision, in_flight = "cpu", "fp32", 2

    def __init__(
        self, side: int, forward_seconds: float, transfer_seconds: float, timeline: Timeline
    ) -> None:
        self.preprocessing = Preprocessing(side, side, "stretch", "bilinear", HALF, HALF, 1 / 255)
        self.dimensions: Mapping[str, tuple[int, ...]] = {"mean": (1152,), "max": (1152,)}
        self.forward_seconds, self.transfer_seconds = forward_seconds, transfer_seconds
        self.n_forwards = 0
        self._timeline = timeline
        self._arriving: queue.Queue[tuple[np.ndarray, Future[Rows]]] = queue.Queue()
        self._arrived: queue.Queue[tuple[np.ndarray, Future[Rows]]] = queue.Queue()
        for work in (self._transfer, self._forward):
            threading.Thread(target=work, daemon=True).start()

    def encode(self, pixels: np.ndarray, poolings: Sequence[str]) -> Rows:
        """Return 1152 grey levels of each image at once: a canary does not sleep."""
        flat = pixels.reshape(len(pixels), -1)
        places = np.linspace(0, flat.shape[1] - 1, 1152).astype(int)
        return dict.fromkeys(poolings, flat[:, places].astype(np.float32) / 255)

    def submit(self, pixels: np.ndarray, poolings: Sequence[str]) -> Callable[[], Rows]:
        """Queue a batch for the transfer."""
        future: Future[Rows] = Future()
        self._arriving.put((pixels.copy(), future))
        return future.result

    def warm_up(
        self,
        poolings: Sequence[str],
        *,
        n_images: int,
        batch_size: int | None = None,
        on_status: Callable[[str], None] | None = None,
    ) -> int:
        """Return the batch size; there is nothing to warm up."""
        return batch_size or 8

    def reference(self) -> Encoder:
        """Return the encoder itself."""
        return self

    def _transfer(self) -> None:
        while True:
            item = self._arriving.get()
            start = time.monotonic()
            time.sleep(self.transfer_seconds)
            self._timeline.add("transfer", start, time.monotonic())
            self._arrived.put(item)

    def _forward(self) -> None:
        while True:
            pixels, future = self._arrived.get()
            start = time.monotonic()
            time.sleep(self.forward_seconds)
            self._timeline.add("forward", start, time.monotonic())
            self.n_forwards += 1
            future.set_result(self.encode(pixels, tuple(self.dimensions)))
