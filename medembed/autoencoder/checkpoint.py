"""The working directory of a training: beside the final one, and renamed once it is complete.

`OUT.partial/` holds `state.safetensors`, the state after the last complete epoch, from which the
training can be resumed. Nothing in it loads as an encoder.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from medembed.core.errors import PathNotFoundError, RunError
from medembed.core.files import hold_lock, require_plain, sync_directory, write_atomically

__all__ = ["CheckpointDir"]

_STATE = "state.safetensors"
_NOTES = "notes"  # the key of the state's metadata
_WHOLE = "encoder"
_LOCK = ".lock"

Tensors = dict[str, torch.Tensor]


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

    def load(self) -> tuple[Tensors, dict[str, Any]] | None:
        """Return the tensors and notes last saved, or None if there are none or unreadable."""
        try:
            require_plain(self.path / _STATE)
            with safe_open(self.path / _STATE, framework="pt", device="cpu") as file:
                notes = json.loads(file.metadata()[_NOTES])
                return {name: file.get_tensor(name) for name in file.keys()}, notes  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def save(self, tensors: Tensors, notes: Mapping[str, Any]) -> None:
        """Replace the saved state of the training, completely or not at all."""
        text = json.dumps({**notes, "asked": self._asked}, allow_nan=False)
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
        held = loaded[1].get("asked") if loaded else None
        if not isinstance(held, dict) or held == self._asked:
            return
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
