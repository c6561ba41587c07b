"""LoRA through peft: two narrow matrices beside each projection of a block train in its place.

A projection W does what W + (alpha / rank) · B A does; A is drawn, B begins at zero, and W stays
(Hu et al., LoRA, ICLR 2022). What was learnt is added to W in the end, so nothing but training
needs peft, which is an extra: `pip install 'medembed[lora]'`.

All linear layers of a block are adapted, those of its attention and of its MLP: with those of the
attention alone a higher rank does not make up for what is missing (Dettmers et al., QLoRA, NeurIPS
2023, section 4; Biderman et al., LoRA Learns Less and Forgets Less, TMLR 2024). Alpha is twice the
rank, as the latter have it: a constant factor, so that the rank can be changed alone. It is no
option, since it does what the rate does, and there is `--encoder-share` for that.
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

_STREAM = 1 << 23  # of random numbers, apart from those of order, dropout and variations


def require_peft() -> None:
    """Refuse where peft is not installed.

    Raises
    ------
    MissingLibraryError
        It is not.
    """
    try:
        with _silence():
            import peft  # noqa: F401
    except ImportError as error:
        raise missing_library("--lora", "peft", "lora", "leave it out") from error


def alpha_of(rank: int) -> int:
    """Give LoRA's alpha for a rank; see above."""
    return 2 * rank


def find_projections(encoder: TorchEncoder, depth: Depth, rank: int) -> list[str]:
    """Name the linear layers that get adapters of a rank: all of the last blocks.

    Returns
    -------
    list of str
        By the names that the model has for them; none of depth 0.

    Raises
    ------
    EncoderError
        Its blocks have convolutions, which these adapters would leave as they are.
    TrainingDataError
        The rank is higher than a layer is wide.
    """
    path, blocks = find_blocks(encoder)
    if any(isinstance(module, nn.Conv2d) for module in blocks.modules()):
        raise EncoderError(
            f"--lora adapts the projections of a vision transformer's blocks, and those of "
            f"{encoder.source} are convolutions, which have none. Leave it out: --unfreeze trains "
            "the blocks themselves."
        )
    found = {
        f"{path}.{i}.{name}": module
        for i in range(len(blocks) - depth.blocks, len(blocks))
        for name, module in blocks[i].named_modules()
        # Swin v2's network of positions is no projection of tokens, and two columns wide.
        if isinstance(module, nn.Linear) and "position" not in name
    }
    for name, module in found.items():
        width = min(module.in_features, module.out_features)
        if rank > width:
            raise TrainingDataError(
                f"--lora {rank} is a higher rank than {name} of {encoder.source} can have, which "
                f"is {width} wide. Give at most {width}; 4 to 32 are usual."
            )
    return list(found)


def add_adapters(encoder: TorchEncoder, depth: Depth, rank: int, seed: int) -> list[str]:
    """Put adapters beside the projections of the last blocks; they alone take gradients.

    The tower gives what it gave before, until they are trained. Torch's generators stay as they
    are.

    Returns
    -------
    list of str
        Names of the model's parameters that will train: two per projection.

    Raises
    ------
    EncoderError, TrainingDataError
        As `find_projections`.
    """
    projections = find_projections(encoder, depth, rank)
    encoder.model.requires_grad_(False)
    if not projections:
        return []
    with _silence(), torch.random.fork_rng(devices=[]):
        from peft import LoraConfig, inject_adapter_in_model

        drawn = np.random.SeedSequence([seed, _STREAM]).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(drawn >> 1))
        # A pattern of whole names: a list would also match names that end alike.
        pattern = "|".join(re.escape(name) for name in projections)
        config = LoraConfig(r=rank, lora_alpha=alpha_of(rank), target_modules=pattern)
        inject_adapter_in_model(config, encoder.model)
    return [name for name, own in encoder.model.named_parameters() if own.requires_grad]


@torch.no_grad()
def merge_adapters(tower: nn.Module) -> dict[str, torch.Tensor]:
    """Give what the adapted weights come to, by the names that they had without adapters.

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
    """Keep peft's warnings, which are about its own formats and files, from the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
