"""Hyperparameters of training, and the depths."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from medembed.core.errors import TrainingDataError

__all__ = ["ALL", "Depth", "Hyperparameters", "read_depths"]

ALL = "all"
"""The user's word for all blocks and the patch and position embeddings below them."""


@dataclass(frozen=True)
class Hyperparameters:
    """The hyperparameters of fine-tuning; `config.check_hyperparameters` has their bounds.

    Attributes
    ----------
    epochs : int
        Maximum number of epochs, at least 1.
    batch_size : int
        Images per step; batches of an epoch differ by at most one image.
    accumulate : int
        Parts that a batch is processed in sequentially: an equal step with less memory, except for
        batch norms, which see the parts.
    lr : float
        AdamW's learning rate (Loshchilov and Hutter, ICLR 2019) of the head, the highest.
    encoder_share : float
        Learning rate of the last block and the final norm, as a share of `lr`.
    decay : float
        Learning rate of each block, as a share of the next block's; the embeddings come below the
        first block. Layer-wise rates are Howard and Ruder's (ULMFiT, ACL 2018); 0.75 is BEiT's
        (Bao et al., ICLR 2022, its range 0.65 to 0.85).
    weight_decay : float
        AdamW's weight decay, only for matrices and filters: not for biases, norms and other
        vectors.
    warm_up : float
        Share of all steps in which the rates rise linearly; afterwards they fall along half a
        cosine (Loshchilov and Hutter, SGDR, ICLR 2017) to zero at the end of the last epoch.
    clip : float
        Largest norm of all gradients together (Pascanu et al., ICML 2013).
    patience : int
        Epochs without improvement on the held-out patients, after which training stops.
    augment, flips : bool
        Whether training images are augmented, and whether augmentation includes mirroring.
    checkpointing : bool
        Whether the blocks' activations are recomputed in the backward pass instead of stored.
    precision : {"fp32", "bf16"}
        Precision of the tower's products; weights, sums and the head are fp32.
    from_scratch : bool
        Whether the tower starts from random weights, drawn as its config specifies. All of it then
        has the head's learning rate.
    lora : int or None
        Rank of the adapters that train instead of the blocks; with None the blocks themselves
        train, with the norm after them. See `adapters`.
    """

    epochs: int = 20
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 1e-3
    encoder_share: float = 0.1
    decay: float = 0.75
    weight_decay: float = 0.01
    warm_up: float = 0.1
    clip: float = 1.0
    patience: int = 5
    augment: bool = True
    flips: bool = False
    checkpointing: bool = False
    precision: str = "fp32"
    from_scratch: bool = False
    lora: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the hyperparameters as JSON values; `lora` is left out if None.

        The question of a run from before LoRA thus stays unchanged.
        """
        values = asdict(self)
        if self.lora is None:
            del values["lora"]
        return values


@dataclass(frozen=True)
class Depth:
    """How much of an encoder trains.

    Attributes
    ----------
    blocks : int
        Number of last blocks that train, with the norm after them; 0 for the head alone.
    everything : bool
        Whether the embeddings and all other parts train as well.
    """

    blocks: int
    everything: bool = False

    def head(self, seed: int | None, lora: int | None = None) -> str:
        """Return the head's name in a run; `seed` only if there are several, `lora` its rank."""
        name = f"unfreeze-{self.blocks}" if lora is None else f"lora{lora}-{self.blocks}"
        return name if seed is None else f"{name}-s{seed}"


def read_depths(words: Sequence[str | int], n_blocks: int, source: str) -> list[Depth]:
    """Return the depths of `0,1,2,all` for an encoder of `n_blocks` blocks, shallowest first.

    Raises
    ------
    TrainingDataError
        There is no depth, or one is invalid, deeper than the encoder, or a duplicate.
    """
    depths: dict[int, Depth] = {}
    for word in words:
        depth = _read_depth(str(word).strip(), n_blocks, source)
        if depths.setdefault(depth.blocks, depth) != depth:
            raise TrainingDataError(
                f"--unfreeze asks for {n_blocks} blocks and for {ALL}, and {source} has "
                f"{n_blocks}: both would be recorded as that depth. Leave one out."
            )
    if not depths:
        raise TrainingDataError("no depth was given. Name at least one: --unfreeze 0,1,2.")
    return [depths[blocks] for blocks in sorted(depths)]


def _read_depth(word: str, n_blocks: int, source: str) -> Depth:
    if word == ALL:
        return Depth(n_blocks, everything=True)
    if not word.isascii() or not word.isdigit():
        raise TrainingDataError(
            f"--unfreeze {word!r} is not a depth. Give numbers of blocks and {ALL}, such as "
            f"0,1,2,{ALL}; {source} has {n_blocks} blocks."
        )
    if int(word) > n_blocks:
        raise TrainingDataError(
            f"--unfreeze {word} is deeper than {source}, which has {n_blocks} blocks. Give at most "
            f"{n_blocks}, or {ALL}."
        )
    return Depth(int(word))
