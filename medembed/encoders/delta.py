"""The tensors in which an adapted encoder differs from its base."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from medembed.core.errors import EncoderError
from medembed.encoders.base_ref import CHANGED_FILE, BaseRef
from medembed.encoders.checkpoint_files import holds_file, weight_files
from medembed.encoders.fingerprint import Digest, open_tensors, read_tensor
from medembed.encoders.torch_encoder import TorchEncoder

__all__ = ["INTEGERS", "DeltaWeights", "find_changed", "put_in", "read_changes"]

INTEGERS = ("I64",)  # batch norms count their training's batches in whole numbers

Named = tuple[str, str, torch.Tensor]
"""A tensor's canonical name, its dtype in the words of safetensors, its values."""


@dataclass(frozen=True)
class DeltaWeights:
    """Changed tensors that replace those of a base.

    Attributes
    ----------
    tensors : mapping of str to (str, Tensor)
        Canonical name to stored dtype and values, on the CPU.
    base : BaseRef
        The base that they belong to.
    source : str
        The adapted encoder, for messages.
    """

    tensors: Mapping[str, tuple[str, torch.Tensor]]
    base: BaseRef
    source: str

    def over(self, stored: Iterable[Named]) -> Iterator[tuple[Named, Named]]:
        """Yield each of a base's tensors and its replacement, often the tensor itself.

        Raises
        ------
        EncoderError
            A changed tensor has another shape than the base's, or no counterpart in the base.
        """
        left = set(self.tensors)
        for name, dtype, tensor in stored:
            own = self.tensors.get(name, (dtype, tensor))
            if own[1].shape != tensor.shape:
                raise EncoderError(
                    f"{self.source}: {name} has shape {tuple(own[1].shape)}, its base's has "
                    f"{tuple(tensor.shape)}. Its base is another encoder than it was."
                )
            left.discard(name)
            yield (name, dtype, tensor), (name, *own)
        if left:
            raise EncoderError(
                f"{self.source} changes {min(left)}, one of {len(left)} tensors that its base does "
                "not have. Its base is another encoder than it was."
            )

    def require(self, base: str, adapted: str) -> None:
        """Refuse a base other than that of training, and damaged changed tensors.

        Parameters
        ----------
        base, adapted : str
            Fingerprints of the base and the adapted encoder as read.

        Raises
        ------
        EncoderError
            A fingerprint differs from the recorded one.
        """
        if base != self.base.fingerprint:
            raise EncoderError(
                f"{self.source} rests on an encoder of fingerprint {self.base.fingerprint[:12]}…, "
                f"and what is there now has {base[:12]}…. Give it the base that it was trained on."
            )
        if self.base.adapted is not None and adapted != self.base.adapted:
            raise EncoderError(
                f"{CHANGED_FILE} of {self.source} is not what training wrote: the encoder's "
                f"fingerprint is {adapted[:12]}…, recorded is {self.base.adapted[:12]}…. Restore "
                "the file, or fine-tune again."
            )


def put_in(stored: Iterable[Named], changes: DeltaWeights | None, base: Digest) -> Iterator[Named]:
    """Yield a base's tensors with changed ones substituted, and add the base's to its digest."""
    if changes is None:
        yield from stored
        return
    for before, after in changes.over(stored):
        base.add_tensor(*before)
        yield after


def read_changes(directory: Path, base: BaseRef) -> DeltaWeights:
    """Return the changed tensors of the adapted encoder in `directory`.

    Raises
    ------
    EncoderError
        The file is missing or damaged, or a value is not finite.
    """
    source = directory.resolve().name
    if not holds_file(directory / CHANGED_FILE):
        raise EncoderError(f"{source} lacks {CHANGED_FILE}. Restore it, or fine-tune again.")
    with ExitStack() as stack:
        file = open_tensors(stack, directory / CHANGED_FILE)
        names = file.keys()
        read = {name: read_tensor(file, name, source, integers=INTEGERS) for name in names}
    return DeltaWeights(read, base, source)


def find_changed(encoder: TorchEncoder) -> tuple[dict[str, torch.Tensor], bool]:
    """Return an encoder's tensors that differ from those of the checkpoint it was loaded from.

    Returns
    -------
    tensors : dict of str to Tensor
        By canonical name, on the CPU: the differing tensors, or all of them.
    is_whole : bool
        Whether these are all tensors, so that no base is needed: if every tensor has changed, or if
        transformers names some differently than the checkpoint does.
    """
    assert encoder.origin is not None
    tensors = encoder.stored_tensors()
    same = set()
    found = set()
    with ExitStack() as stack:
        for path in weight_files(encoder.origin.weights.path, encoder.part):
            file = open_tensors(stack, path)
            for stored in file.keys():  # noqa: SIM118
                name = encoder.canonical_name(stored)
                if name is None or name not in tensors:
                    continue
                found.add(name)
                before = file.get_tensor(stored)
                if torch.equal(before.to(tensors[name].dtype), tensors[name]):
                    same.add(name)
    if not same or set(tensors) - found:
        return tensors, True
    return {name: tensor for name, tensor in tensors.items() if name not in same}, False
