"""Train an autoencoder to reconstruct images, epoch by epoch, and keep the best epoch."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from medembed.autoencoder.checkpoint import SavedTraining
from medembed.autoencoder.images import TrainingImages
from medembed.core.errors import DeviceMemoryError, EncoderError
from medembed.core.schedule import rate_at
from medembed.encoders.autoencoder import Architecture, Autoencoder
from medembed.encoders.devices import Lanes, arithmetic, is_memory_error
from medembed.encoders.preprocessing import Preprocessing, channel_levels

__all__ = ["PATIENCE", "Training", "TrainingConfig", "mean_image_loss"]

PATIENCE = 10
"""Epochs without a lower held-out loss after which training ends."""
_WARM_UP = 0.05  # share of the steps
_WEIGHT_DECAY = 0.01
_LONGEST_GRADIENT = 1.0
_CHUNK = 256  # images summed at once
_PART = 8  # images of a batch that one CPU thread processes together


Results = dict[str, Tensor]
Work = Callable[[Tensor], Results]


@dataclass(frozen=True)
class TrainingConfig:
    """The settings of a training, which together with its images determine the result.

    Parameters
    ----------
    architecture : Architecture
    epochs, batch_size : int
        Maximum number of epochs; images per step.
    learning_rate : float
        The maximum learning rate, reached after the warm-up.
    device : str
        A torch device name.
    precision : {"fp32", "bf16"}
        Precision of the arithmetic; weights and losses are in fp32.
    seed : int
        Seed of the initial weights and the order of the images.
    """

    architecture: Architecture
    epochs: int
    batch_size: int
    learning_rate: float
    device: str
    precision: str
    seed: int


class Training:
    """A training in progress: the model, its optimiser and its results so far.

    The loss is the mean squared error of grey levels from 0 to 1. AdamW (Loshchilov and Hutter,
    "Decoupled Weight Decay Regularization", ICLR 2019) at the rates of `schedule.rate_at`.

    Parameters
    ----------
    asked : TrainingConfig
    images : TrainingImages
    preprocessing : Preprocessing
        How the images were prepared: the model receives the levels that extraction will use.

    Attributes
    ----------
    epochs : list of dict
        `loss` and `held_out_loss` of each epoch so far.
    best : dict of str to Tensor
        The model's tensors after the epoch of lowest held-out loss, on the CPU.
    """

    def __init__(
        self, asked: TrainingConfig, images: TrainingImages, preprocessing: Preprocessing
    ) -> None:
        self._asked, self._images = asked, images
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(asked.seed)
            model = Autoencoder(asked.architecture)
        # Faster than channels-first, on CPUs in either precision.
        self._model = model.to(asked.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), asked.learning_rate, weight_decay=_WEIGHT_DECAY
        )
        self._levels = torch.from_numpy(channel_levels(preprocessing)[0]).to(asked.device)
        self._lanes = Lanes() if asked.device == "cpu" else None
        self._n_steps = 0
        self.epochs: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}

    @property
    def best_epoch(self) -> int:
        """The epoch of lowest held-out loss, from 1; 0 before the first."""
        losses = [epoch["held_out_loss"] for epoch in self.epochs]
        return 1 + losses.index(min(losses)) if losses else 0

    @property
    def is_over(self) -> bool:
        """Whether all epochs are done, or the last `PATIENCE` brought no improvement."""
        n_done = len(self.epochs)
        return n_done >= self._asked.epochs or n_done - self.best_epoch >= PATIENCE

    def run_epoch(self, tick: Callable[[int], None]) -> None:
        """Train on every image once, and evaluate the held-out images.

        Parameters
        ----------
        tick : callable
            Called with the number of images of this epoch so far.

        Raises
        ------
        EncoderError
            The loss is not finite.
        DeviceMemoryError
            A batch does not fit the device.
        """
        generator = np.random.default_rng((self._asked.seed, len(self.epochs)))
        order = generator.permutation(self._images.learned)
        try:
            with _one_thread(self._asked.device):
                loss = self._learn(order, tick)
                held_out_loss = self._look(self._images.held_out)
        except (MemoryError, RuntimeError) as error:
            if not is_memory_error(error):
                raise
            raise DeviceMemoryError(
                f"a batch of {self._asked.batch_size} does not fit the memory of "
                f"{self._asked.device}. Give a smaller --batch-size, or fewer --widths."
            ) from error
        self.epochs.append({"loss": loss, "held_out_loss": held_out_loss})
        if self.best_epoch == len(self.epochs):
            self.best = {name: _kept(tensor) for name, tensor in self._model.state_dict().items()}

    @property
    def n_steps(self) -> int:
        """Steps of the optimiser so far."""
        return self._n_steps

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that `restore` needs to resume."""
        tensors = {f"best.{name}": tensor for name, tensor in self.best.items()}
        for name, tensor in self._model.state_dict().items():
            tensors[f"model.{name}"] = _kept(tensor)
        for place, moments in self._optimizer.state_dict()["state"].items():
            for name in ("exp_avg", "exp_avg_sq"):
                tensors[f"{name}.{place}"] = _kept(moments[name])
        return tensors

    def restore(self, saved: SavedTraining) -> None:
        """Resume an identical training, with equal results.

        Raises
        ------
        KeyError, RuntimeError
            The tensors are not those of this training.
        """
        tensors = saved.tensors
        self.epochs, self._n_steps = list(saved.epochs), saved.n_steps
        self.best = _part_of(tensors, "best.")
        self._model.load_state_dict(_part_of(tensors, "model."))
        first, second = _part_of(tensors, "exp_avg."), _part_of(tensors, "exp_avg_sq.")
        step = torch.tensor(float(self._n_steps))
        moments = {
            int(place): {"step": step.clone(), "exp_avg": mean, "exp_avg_sq": second[place]}
            for place, mean in first.items()
        }
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def _learn(self, order: np.ndarray, tick: Callable[[int], None]) -> float:
        self._model.train()
        total, n_seen = 0.0, 0
        for rows in _batches(order, self._asked.batch_size):
            for group in self._optimizer.param_groups:
                group["lr"] = self._asked.learning_rate * self._schedule()
            loss = self._descend(rows)
            nn.utils.clip_grad_norm_(self._model.parameters(), _LONGEST_GRADIENT)
            self._optimizer.step()
            self._n_steps += 1
            n_seen += len(rows)
            total += len(rows) * self._finite(loss)
            tick(n_seen)
        return total / n_seen

    def _descend(self, rows: np.ndarray) -> float:
        """Return a batch's loss, and leave its gradients in the parameters."""
        self._optimizer.zero_grad()
        loss = 0.0
        for share, found in self._compute(self._differentiate, rows):
            loss += share * float(found["loss"])
            for name, parameter in self._model.named_parameters():
                gradient = share * found[name]
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return loss

    def _look(self, places: np.ndarray) -> float:
        self._model.eval()
        loss = 0.0
        for rows in _batches(places, self._asked.batch_size):
            for share, found in self._compute(self._measure, rows):
                loss += share * len(rows) / len(places) * float(found["loss"])
        return self._finite(loss)

    def _compute(self, work: Work, rows: np.ndarray) -> Iterator[tuple[float, Results]]:
        """Yield the results of `work` on one or several parts of the images, and each part's share.

        On a CPU, parts of equal size run in parallel, each on one thread: the result's bits do not
        depend on the number of cores, and threads never wait for each other in a small product.
        """
        if self._lanes is None:
            yield 1.0, work(torch.from_numpy(self._images.pixels[rows]).to(self._asked.device))
            return
        parts = list(_batches(rows, _PART))
        collects = [self._lanes.submit(work, self._images.pixels[part]) for part in parts]
        for part, collect in zip(parts, collects, strict=True):
            found = {name: torch.from_numpy(values) for name, values in collect().items()}
            yield len(part) / len(rows), found

    def _differentiate(self, pixels: Tensor) -> Results:
        loss = self._loss(pixels)
        named = dict(self._model.named_parameters())
        gradients = torch.autograd.grad(loss, list(named.values()))
        return {"loss": loss.detach(), **dict(zip(named, gradients, strict=True))}

    @torch.inference_mode()
    def _measure(self, pixels: Tensor) -> Results:
        return {"loss": self._loss(pixels)}

    def _loss(self, pixels: Tensor) -> Tensor:
        grey = pixels[:, None]
        with arithmetic(self._asked.device, self._asked.precision):
            drawn = self._model(self._levels[grey.int()])
        return mse_loss(drawn.float(), grey.float() / 255)

    def _schedule(self) -> float:
        """Return the next step's learning rate as a share of the maximum."""
        n_in_epoch = -(-len(self._images.learned) // self._asked.batch_size)
        return rate_at(self._n_steps, self._asked.epochs * n_in_epoch, _WARM_UP)

    def _finite(self, loss: float) -> float:
        if not math.isfinite(loss):
            raise EncoderError(
                f"the loss is not finite in epoch {len(self.epochs) + 1}: training has diverged. "
                f"Give a smaller --lr than {self._asked.learning_rate:g}"
                f"{', or --precision fp32' if self._asked.precision != 'fp32' else ''}."
            )
        return loss


def mean_image_loss(images: TrainingImages) -> float:
    """Return the held-out loss of always predicting the mean of the training images.

    A constant code achieves this loss, so an autoencoder that does no better has collapsed.

    Returns
    -------
    float
        Mean squared error of grey levels from 0 to 1.
    """
    pixels = images.pixels
    total = np.zeros(pixels.shape[1:])
    for rows in _batches(images.learned, _CHUNK):
        total += pixels[rows].sum(axis=0, dtype=np.float64)
    mean = total / len(images.learned)
    squares = sum(
        float(((pixels[rows] - mean) ** 2).sum()) for rows in _batches(images.held_out, _CHUNK)
    )
    return squares / (255**2 * mean.size * len(images.held_out))


@contextmanager
def _one_thread(device: str) -> Iterator[None]:
    """Limit torch to one CPU thread outside the lanes: a sum's bits depend on their number."""
    usual = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def _batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _part_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, with the prefix removed."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
