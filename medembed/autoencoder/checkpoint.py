"""The working directory of a training: beside the final one, and renamed once it is complete.

`OUT.partial/` holds `state.safetensors`, the state after the last complete epoch, from which the
training can be resumed. Nothing in it loads as an encoder.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from medembed.core.errors import PathNotFoundError, RunError
from medembed.core.files import hold_lock, require_plain, sync_directory, write_atomically

__all__ = ["CheckpointDir", "SavedTraining"]

_STATE = "state.safetensors"
_NOTES = "notes"  # the key of the state's metadata
_WHOLE = "encoder"
_LOCK = ".lock"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class SavedTraining:
    """The state of an unfinished training.

    Attributes
    ----------
    tensors : dict of str to Tensor
        The weights, the best ones so far, and the optimiser's moments.
    epochs : list of dict
        `loss` and `held_out_loss` of each epoch.
    n_steps : int
        Steps of the optimiser.
    images : str
        `TrainingImages.digest` of the images that it learns from.
    asked : dict
        Everything that determines the result, by option name.
    """

    tensors: Tensors
    epochs: list[dict[str, float]]
    n_steps: int
    images: str
    asked: dict[str, Any]

    def __post_init__(self) -> None:
        losses = [epoch[name] for epoch in self.epochs for name in ("loss", "held_out_loss")]
        is_right = (
            all(type(loss) is float and math.isfinite(loss) for loss in losses)
            and (type(self.n_steps) is int and self.n_steps >= 0)
            and isinstance(self.images, str)
            and isinstance(self.asked, dict)
        )
        if not is_right:
            raise ValueError("no training saves such a state")


class CheckpointDir:
    """The working directory beside `out` in which an encoder is trained.

    Parameters
    ----------
    out : Path
        The encoder's final directory.
    asked : mapping
        Everything that determines the result, by option name; an unfinished training is resumed
        only if it was started with equal values.

    Raises
    ------
    RunError
        `out` already exists.
    PathNotFoundError
        The parent directory does not exist.
    """

    def __init__(self, out: Path, asked: Mapping[str, Any]) -> None:
        if os.path.lexists(out):
            raise RunError(
                f"{out} already exists, and an encoder is written into a new directory. Choose "
                "another --out, or remove it."
            )
        if not out.absolute().parent.is_dir():
            raise PathNotFoundError(
                f"{out.parent} is not a directory to write {out.name} into. Create it, or choose "
                "another --out."
            )
        self.out, self.path = out, out.with_name(f"{out.name}.partial")
        self._asked = json.loads(json.dumps(asked))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the directory for writing; it is created, and removed if empty at the end.

        Raises
        ------
        RunError
            Another process trains here, or the unfinished training here has other options.
        """
        self.path.mkdir(exist_ok=True)
        refusal = RunError(
            f"{self.path} is being written by another process. Wait for it to end, or choose "
            "another --out."
        )
        with hold_lock(self.path / _LOCK, refusal):
            try:
                self._refuse_other()
                yield
            finally:
                self._leave()

    def load(self) -> SavedTraining | None:
        """Return the state last saved, or None if there is none or it is damaged."""
        try:
            require_plain(self.path / _STATE)
            with safe_open(self.path / _STATE, framework="pt", device="cpu") as file:
                notes = json.loads(file.metadata()[_NOTES])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return SavedTraining(tensors, **notes)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def save(
        self, tensors: Tensors, *, epochs: list[dict[str, float]], n_steps: int, images: str
    ) -> None:
        """Replace the saved state of the training, completely or not at all."""
        notes = {"epochs": epochs, "n_steps": n_steps, "images": images, "asked": self._asked}
        text = json.dumps(notes, allow_nan=False)
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_atomically(self.path / _STATE, save(whole, {_NOTES: text}))

    def discard(self) -> None:
        """Delete the state, because resuming from it would fail again."""
        (self.path / _STATE).unlink(missing_ok=True)

    def finish(self, files: Mapping[str, bytes], prove: Callable[[Path], str]) -> str:
        """Write the encoder's files, check that they load, and move them to their final place.

        Parameters
        ----------
        files : mapping of str to bytes
            File name -> content.
        prove : callable
            Called with the directory; raises if it does not hold a complete encoder.

        Returns
        -------
        str
            The return value of `prove`.

        Raises
        ------
        OSError
            The disk is full, or `out` has appeared meanwhile.
        """
        whole = self.path / _WHOLE
        shutil.rmtree(whole, ignore_errors=True)  # left by a process that was killed here
        whole.mkdir()
        for name, data in files.items():
            write_atomically(whole / name, data)
        proof = prove(whole)
        os.rename(whole, self.out)
        sync_directory(self.out.absolute().parent)
        self.discard()
        return proof

    def _refuse_other(self) -> None:
        loaded = self.load()
        if loaded is None or loaded.asked == self._asked:
            return
        held = loaded.asked
        name = next(n for n in (*self._asked, *held) if held.get(n) != self._asked.get(n))
        raise RunError(
            f"{self.path} holds an unfinished training with {_option(name, held)}; this one asks "
            f"for {_option(name, self._asked)}. Use equal options, choose another --out, or remove "
            f"{self.path}."
        )

    def _leave(self) -> None:
        """Remove our files that are no longer needed; leave all others."""
        for torn in self.path.glob(f".{_STATE}.*.partial"):
            torn.unlink()
        if not (self.path / _STATE).exists():
            shutil.rmtree(self.path / _WHOLE, ignore_errors=True)
            (self.path / _LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.path.rmdir()


def _option(name: str, asked: Mapping[str, Any]) -> str:
    value = asked.get(name)
    if name == "manifest":
        return f"a manifest of digest {str(value)[:12]}"
    if isinstance(value, list):
        value = ",".join(map(str, value))
    return f"--{name.replace('_', '-')} {value}"
