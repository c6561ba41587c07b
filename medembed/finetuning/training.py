"""Train one depth with one seed, evaluate each epoch on other patients, and keep the best.

After each epoch `write_state` writes one file that is complete or absent: parameters, AdamW's
moments and the best epoch's parameters as safetensors, counters as JSON in its metadata. Random
numbers depend only on seed, epoch and step, so their state is not stored.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from scipy.special import expit
from torch.nn import functional

from medembed.core.errors import DeviceMemoryError, TrainingDataError
from medembed.core.files import require_plain, write_atomically
from medembed.core.schedule import rate_at
from medembed.encoders.devices import free_memory, is_memory_error
from medembed.finetuning.batches import Images, PixelImages, compute_rows, take_ahead
from medembed.finetuning.blocks import parameter_groups
from medembed.finetuning.data_split import TrainRows
from medembed.finetuning.hyperparameters import Hyperparameters
from medembed.finetuning.network import Network
from medembed.heads.base import row_weights

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "Counters",
    "State",
    "Trained",
    "Trainer",
    "explaining_memory",
    "read_state",
    "write_state",
]

Tensors = dict[str, torch.Tensor]


@dataclass
class Counters:
    """The counters of a training.

    Attributes
    ----------
    epoch : int
        Number of completed epochs.
    best_epoch : int
        The best epoch, counted from 1; 0 before the first.
    best_key : list of float
        The best epoch's AUROC on the studies that judge it, and its negative loss; compared in
        this order.
    seconds : float
        Time spent so far.
    history : list of dict
        Per epoch `train_loss`, `loss` and `auroc`.
    """

    epoch: int = 0
    best_epoch: int = 0
    best_key: list[float] = field(default_factory=list)
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def _read_counters(text: str) -> Counters:
    """Read the JSON of counters; ValueError or TypeError if it is not theirs.

    By hand, since a machine that only trains and embeds may lack pydantic.
    """
    known = json.loads(text)
    found = Counters(**known)
    counts, numbers = (found.epoch, found.best_epoch), [found.seconds, *found.best_key]
    for epoch in found.history:
        numbers += epoch.values()
    if any(type(count) is not int or count < 0 for count in counts) or any(
        type(number) not in (int, float) for number in numbers
    ):
        raise ValueError("an epoch or a score is not a number")
    return found


@dataclass
class State:
    """Counters, and tensors by name: current, of the best epoch, and of AdamW."""

    counters: Counters
    now: Tensors
    best: Tensors
    moments: dict[str, Tensors]


def write_state(path: Path, key: str, state: State) -> None:
    """Write the state of the training named by `key`, replacing the previous one."""
    parts = {"now": state.now, "best": state.best}
    parts |= {f"adam.{moment}": tensors for moment, tensors in state.moments.items()}
    flat = {
        f"{part}/{name}": tensor.cpu().contiguous()
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }
    metadata = {"key": key, "counters": json.dumps(asdict(state.counters), allow_nan=False)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(flat, metadata))


def read_state(path: Path, key: str) -> State | None:
    """Return the state of the training named by `key`, or None if missing or damaged."""
    try:
        require_plain(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            if metadata.get("key") != key:
                return None
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        counters = _read_counters(metadata["counters"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        return None
    parts: dict[str, Any] = {}
    for full, tensor in flat.items():
        part, _, name = full.partition("/")
        parts.setdefault(part, {})[name] = tensor
    moments = {p.removeprefix("adam."): t for p, t in parts.items() if p.startswith("adam.")}
    return State(counters, parts.get("now", {}), parts.get("best", {}), moments)


MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what torch's AdamW keeps of each parameter
_ORDER, _DROPOUT = 1 << 20, 1 << 21  # streams of random numbers

Progress = Callable[[int, int], None]
OnStatus = Callable[[str], None]


@dataclass(frozen=True)
class Trained:
    """The result of a training; the network has its best epoch's weights.

    Attributes
    ----------
    counters : Counters
    score : float
        AUROC of the held-out patients' studies, which influenced no decision.
    held, tested : float64 arrays
        Probabilities of the held-out patients' images and of the test images, in the rows' order.
    """

    counters: Counters
    score: float
    held: NDArray[np.float64]
    tested: NDArray[np.float64]


class Trainer:
    """Trains a network.

    Parameters
    ----------
    network : Network
        The network, whose `recipe` holds the hyperparameters.
    rows : TrainRows
        The rows for training, held-out evaluation and test.
    images : Images
        The images of those rows.
    seed : int
        Determines order, dropout and augmentation.
    name : str
        The head's name, for messages.
    state_path : Path
        The file that stores the state after every epoch.
    key : str
        Hash of everything that determines the result: a state with another key is not resumed.
    """

    def __init__(
        self,
        network: Network,
        rows: TrainRows,
        images: Images,
        *,
        seed: int,
        name: str,
        state_path: Path,
        key: str,
    ) -> None:
        self.network, self.rows, self.images = network, rows, images
        self.recipe, self.device = network.recipe, network.encoder.device
        self._seed, self._name, self._path, self._key = seed, name, state_path, key
        self._groups = parameter_groups(network.encoder, network.head, self.recipe)
        self._rates = [group["lr"] for group in self._groups]
        names = [group.pop("names") for group in self._groups]
        self._optimizer = torch.optim.AdamW(self._groups)
        self._named = {
            name: parameter
            for group, own in zip(self._groups, names, strict=True)
            for name, parameter in zip(own, group["params"], strict=True)
        }
        y = rows.y[rows.fitted].astype(np.int64)
        weights = row_weights(np.array([0, 1]), np.array([0, 1]), "balanced", labels=y)
        self._weights = torch.tensor(weights, dtype=torch.float32, device=self.device)
        self._smoothing = 0.0
        self._counters = Counters()
        self._best: dict[str, torch.Tensor] = {}

    def train(
        self,
        *,
        label_smoothing: float = 0.0,
        progress: Progress | None = None,
        on_status: OnStatus | None = None,
    ) -> Trained:
        """Train until `patience` epochs bring no improvement on the patients who judge.

        Parameters
        ----------
        label_smoothing : float
            Label smoothing: labels become half of it and one minus half of it.

        Raises
        ------
        TrainingDataError
            A loss, a gradient or a prediction of the best epoch is not a finite number.
        DeviceMemoryError
            A batch does not fit the device.
        """
        self._smoothing = label_smoothing
        self._take_up(read_state(self._path, self._key))
        counters, recipe = self._counters, self.recipe
        with explaining_memory(self._name, recipe):
            while counters.epoch < recipe.epochs and not self._has_stopped():
                began = time.perf_counter()
                if on_status is not None:
                    on_status(self._describe())
                loss = self._train_epoch(counters.epoch + 1, progress)
                self._judge(loss)
                counters.seconds += time.perf_counter() - began
                write_state(self._path, self._key, self._state())
            self.network.load_trained(self._best)
            held, tested = self.rows.held, self.rows.tested
            logits = self.logits(np.concatenate([held, tested]))
        if not np.isfinite(logits).all():
            raise TrainingDataError(
                f"predictions of {self._name} for some images are not finite numbers. Lower "
                f"--lr{self._or_fp32}."
            )
        probability = expit(logits.astype(np.float64))
        score = self.rows.study_auroc(held, probability[: len(held)])
        return Trained(counters, score, probability[: len(held)], probability[len(held) :])

    @torch.no_grad()
    def logits(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the logits of some rows without augmentation, float32 (n,)."""
        self.network.set_training(False)
        size = -(-self.recipe.batch_size // self.recipe.accumulate)
        parts = compute_rows(self.network, self.images, rows, self.device, size)
        return np.concatenate([np.empty(0, np.float32), *parts])

    def _train_epoch(self, epoch: int, progress: Progress | None) -> float:
        """Take the steps of an epoch, and return the mean loss of its images."""
        recipe, fitted = self.recipe, self.rows.fitted
        self.network.set_training(True)
        order = np.random.default_rng([self._seed, _ORDER, epoch]).permutation(fitted)
        # Batches of one size: a small remainder would take an equally long and much noisier step.
        batches = np.array_split(order, self._n_steps)
        parts = [np.array_split(batch, min(recipe.accumulate, len(batch))) for batch in batches]
        total, done = 0.0, 0
        with closing(take_ahead(self.images, list(chain(*parts)), self.device)) as taking:
            for step, batch in enumerate(batches):
                self._set_rates((epoch - 1) * self._n_steps + step)
                with _seeded([self._seed, _DROPOUT, epoch, step], self.device):
                    loss = sum(
                        self._add_gradients(part, next(taking), len(batch), epoch)
                        for part in parts[step]
                    )
                self._step(loss, epoch, step)
                total += loss * len(batch)
                done += len(batch)
                if progress is not None:
                    progress(done, len(order))
        return total / len(order)

    def _add_gradients(
        self, part: NDArray[np.int64], images: torch.Tensor, n_batch: int, epoch: int
    ) -> float:
        """Add the gradients of a part's share of a batch's mean loss, and return that share."""
        if self.recipe.augment:
            assert isinstance(self.images, PixelImages)  # only these can be augmented
            flips = self.recipe.flips
            images = self.images.vary(images, part, seed=self._seed, epoch=epoch, flips=flips)
        y = torch.from_numpy(self.rows.y[part].astype(np.int64)).to(self.device)
        loss = self._losses(self.network(images), y).sum() / n_batch
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _losses(self, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return each image's cross-entropy times its class's weight ("balanced")."""
        aims = y.float() * (1 - self._smoothing) + self._smoothing / 2
        losses = functional.binary_cross_entropy_with_logits(logits, aims, reduction="none")
        return losses * self._weights[y]

    def _step(self, loss: float, epoch: int, step: int) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self._named.values(), self.recipe.clip)
        if not math.isfinite(loss) or not bool(torch.isfinite(norm)):
            what = "loss" if not math.isfinite(loss) else "gradient"
            raise TrainingDataError(
                f"the {what} of {self._name} is not a finite number at epoch {epoch}, step "
                f"{step + 1}. Lower --lr{self._or_fp32}."
            )
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    @property
    def _or_fp32(self) -> str:
        return ", or give --precision fp32" if self.recipe.precision == "bf16" else ""

    @property
    def _n_steps(self) -> int:
        return -(-len(self.rows.fitted) // self.recipe.batch_size)

    def _set_rates(self, step: int) -> None:
        factor = rate_at(step, self._n_steps * self.recipe.epochs, self.recipe.warm_up)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    def _judge(self, train_loss: float) -> None:
        """Finish an epoch: score it on the patients who judge, and keep it if it is the best."""
        counters, judging = self._counters, self.rows.judging
        logits = torch.from_numpy(self.logits(judging))
        y = torch.from_numpy(self.rows.y[judging].astype(np.int64))
        aims = functional.binary_cross_entropy_with_logits(logits, y.float(), reduction="none")
        loss = float((aims * self._weights.cpu()[y]).mean())
        if not math.isfinite(loss):
            raise TrainingDataError(
                f"the loss of {self._name} on held-out patients is not a finite number. Lower --lr."
            )
        auroc = self.rows.study_auroc(judging, expit(logits.numpy().astype(np.float64)))
        counters.epoch += 1
        counters.history.append({"train_loss": train_loss, "loss": loss, "auroc": auroc})
        key = [auroc, -loss]
        if not counters.best_key or key > counters.best_key:
            counters.best_key, counters.best_epoch = key, counters.epoch
            self._best = {n: t.clone() for n, t in self.network.trained_state().items()}

    def _has_stopped(self) -> bool:
        counters = self._counters
        return counters.epoch - counters.best_epoch >= self.recipe.patience

    def _describe(self) -> str:
        counters = self._counters
        text = f"{self._name}, epoch {counters.epoch + 1}/{self.recipe.epochs}"
        if counters.best_key:
            text += f", best AUROC {counters.best_key[0]:.3f}"
        return text

    def _state(self) -> State:
        moments: dict[str, dict[str, torch.Tensor]] = {moment: {} for moment in MOMENTS}
        for name, parameter in self._named.items():
            for moment, tensor in self._optimizer.state[parameter].items():
                moments[moment][name] = tensor
        return State(self._counters, self.network.trained_state(), self._best, moments)

    def _take_up(self, state: State | None) -> None:
        """Resume from an earlier process's state."""
        if state is None:
            return
        self._counters = state.counters
        self._best = {name: tensor.to(self.device) for name, tensor in state.best.items()}
        self.network.load_trained(state.now)
        for name, parameter in self._named.items():
            own = {m: t[name] for m, t in state.moments.items() if name in t}
            if own:
                self._optimizer.state[parameter] = {
                    moment: tensor if moment == "step" else tensor.to(self.device)
                    for moment, tensor in own.items()
                }


@contextmanager
def explaining_memory(name: str, recipe: Hyperparameters) -> Iterator[None]:
    """Turn any out-of-memory error into DeviceMemoryError, with the way out."""
    try:
        yield
        return
    except (MemoryError, RuntimeError) as error:
        if not is_memory_error(error):
            raise
    # Not inside the handler: the error's frames hold the tensors that are to be freed.
    free_memory()
    raise DeviceMemoryError(
        f"{name}: a batch of {recipe.batch_size} in {recipe.accumulate} part(s) does not fit the "
        "device's memory. Give a larger --accumulate, --checkpointing or a smaller --batch-size."
    )


@contextmanager
def _seeded(stream: list[int], device: str) -> Iterator[None]:
    """Make torch draw from a separate stream for this step, and restore its generators."""
    seed = int(np.random.SeedSequence(stream).generate_state(1, np.uint64)[0] >> 1)
    devices: list[Any] = [torch.cuda.current_device()] if device == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
