"""LoRA through peft: instead of each projection of a block, two narrow matrices beside it train.

A projection W is replaced by W + (alpha / rank) · B A; A is random, B starts at zero, and W is
fixed (Hu et al., LoRA, ICLR 2022). The learned product is finally added to W, so that only training
needs peft, which is an extra: `pip install 'medembed[lora]'`.

All linear layers of a block are adapted, those of its attention and of its MLP: adapting only the
attention is not compensated by a higher rank (Dettmers et al., QLoRA, NeurIPS 2023, section 4;
Biderman et al., LoRA Learns Less and Forgets Less, TMLR 2024). Alpha is twice the rank, as in the
latter: a constant factor, so that the rank can be changed independently. Alpha is not an option,
since it acts like the learning rate, which `--encoder-share` controls.
"""

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from medembed.core.errors import EncoderError, TrainingDataError
from medembed.core.system import missing_library
from medembed.encoders.torch_encoder import TorchEncoder
from medembed.finetuning.blocks import find_blocks
from medembed.finetuning.hyperparameters import Depth

__all__ = ["add_adapters", "alpha_of", "find_projections", "merge_adapters", "require_peft"]

_STREAM = 1 << 23  # of random numbers, separate from those for order, dropout and variations


def require_peft() -> None:
    """Refuse to continue if peft is not installed.

    Raises
    ------
    MissingLibraryError
        peft is not installed.
    """
    try:
        with _silence():
            import peft  # noqa: F401
    except ImportError as error:
        raise missing_library("--lora", "peft", "lora", "leave it out") from error


def alpha_of(rank: int) -> int:
    """Return LoRA's alpha for a rank; see above."""
    return 2 * rank


def find_projections(encoder: TorchEncoder, depth: Depth, rank: int) -> list[str]:
    """Return the linear layers that get adapters of a rank: all those of the last blocks.

    Returns
    -------
    list of str
        Their names in the model; none for depth 0.

    Raises
    ------
    EncoderError
        The blocks have convolutions, which these adapters do not cover.
    TrainingDataError
        The rank exceeds the width of a layer.
    """
    path, blocks = find_blocks(encoder)
    if any(isinstance(module, nn.Conv2d) for module in blocks.modules()):
        raise EncoderError(
            f"--lora adapts the projections of a vision transformer's blocks, and the blocks of "
            f"{encoder.source} have convolutions instead. Omit --lora: --unfreeze trains the "
            "blocks themselves."
        )
    found = {
        f"{path}.{i}.{name}": module
        for i in range(len(blocks) - depth.blocks, len(blocks))
        for name, module in blocks[i].named_modules()
        # Swin v2's position network is not a projection of tokens, and two columns wide.
        if isinstance(module, nn.Linear) and "position" not in name
    }
    for name, module in found.items():
        width = min(module.in_features, module.out_features)
        if rank > width:
            raise TrainingDataError(
                f"--lora {rank} is a higher rank than {name} of {encoder.source} can have, which "
                f"is {width} wide. Use at most {width}; 4 to 32 are usual."
            )
    return list(found)


def add_adapters(encoder: TorchEncoder, depth: Depth, rank: int, seed: int) -> list[str]:
    """Add adapters to the projections of the last blocks; only the adapters take gradients.

    The tower's output does not change until they are trained. Torch's generators are left
    unchanged.

    Returns
    -------
    list of str
        Names of the model's trainable parameters, two per projection.

    Raises
    ------
    EncoderError, TrainingDataError
        See `find_projections`.
    """
    projections = find_projections(encoder, depth, rank)
    encoder.model.requires_grad_(False)
    if not projections:
        return []
    with _silence(), torch.random.fork_rng(devices=[]):
        from peft import LoraConfig, inject_adapter_in_model

        drawn = np.random.SeedSequence([seed, _STREAM]).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(drawn >> 1))
        # A pattern of complete names: a list would also match names with an equal ending.
        pattern = "|".join(re.escape(name) for name in projections)
        config = LoraConfig(r=rank, lora_alpha=alpha_of(rank), target_modules=pattern)
        inject_adapter_in_model(config, encoder.model)
    return [name for name, own in encoder.model.named_parameters() if own.requires_grad]


@torch.no_grad()
def merge_adapters(tower: nn.Module) -> dict[str, torch.Tensor]:
    """Return the merged weights of the adapted layers, by their names without adapters.

    The tower keeps its adapters. One layer is copied at a time.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {}
    for name, module in tower.named_modules():
        if isinstance(module, BaseTunerLayer):
            with _silence():
                merged: Any = copy.deepcopy(module)
                merged.merge()
            found[f"{name}.weight"] = merged.get_base_layer().weight.detach()
    return found


@contextmanager
def _silence() -> Iterator[None]:
    """Silence peft's warnings, which concern its own formats and files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
