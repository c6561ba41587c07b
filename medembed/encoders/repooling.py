"""Pool patch tokens anew, with gradients: what a tower would give, were its last tokens others."""

from collections.abc import Sequence
from typing import Any

import torch

from medembed.core.errors import EncoderError
from medembed.encoders.poolings import Features, pool, token_poolings
from medembed.encoders.precision import arithmetic
from medembed.encoders.torch_encoder import TorchEncoder

__all__ = ["refuse_unpoolable", "repool"]


def repool(
    encoder: TorchEncoder, tokens: torch.Tensor, grid: tuple[int, int], poolings: Sequence[str]
) -> torch.Tensor:
    """Pool tokens as the encoder pools those of an image; gradients flow to them.

    Parameters
    ----------
    tokens : Tensor
        float32 (n, rows * columns, d), on the encoder's device: as `Features.tokens`, of an image
        or of none.
    grid : tuple of int
        Rows and columns.
    poolings : sequence of str
        None of those that `refuse_unpoolable` refuses.

    Returns
    -------
    Tensor
        float32 (n, columns of all poolings): side by side, cells one after the other.
    """
    with arithmetic(encoder.device, encoder.precision):
        vectors = {
            name: _pool_by_tower(encoder, tokens, grid, name)
            for name in poolings
            if name not in token_poolings(0, grid)
        }
    pooled = pool(Features(tokens, grid, vectors), poolings)
    return torch.cat([pooled[name].flatten(1) for name in poolings], dim=1)


def refuse_unpoolable(encoder: TorchEncoder, poolings: Sequence[str]) -> None:
    """Refuse poolings that are no function of the patch tokens.

    A class token has gathered what it says in the blocks below: it does not read the last patch
    tokens, so that nothing can be said of the part of each without guessing.

    Raises
    ------
    EncoderError
        Names the pooling, or those on offer where there is none of its name.
    """
    encoder.check_poolings(poolings)
    for name in poolings:
        # Towers with a class token make their pooler of it too.
        if "cls" in encoder.dimensions and name in ("cls", "pooler"):
            raise EncoderError(
                f"pooling {name} of {encoder.source} is its class token, which has gathered from "
                "all patches in the blocks below: there is no part of it that is one patch's. "
                "Explain a model on mean, max or grid4."
            )


def _pool_by_tower(
    encoder: TorchEncoder, tokens: torch.Tensor, grid: tuple[int, int], name: str
) -> torch.Tensor:
    model: Any = encoder.model
    if name == "projector":
        vectors: torch.Tensor = encoder.projector(tokens)  # type: ignore[attr-defined]
    elif (head := getattr(model, "head", None)) is not None:  # SigLIP's, by attention
        vectors = head(tokens)
    elif (pooler := getattr(model, "pooler", None)) is None:  # ConvNeXt's: a norm of the mean
        vectors = model.layernorm(tokens.mean(dim=1))
    elif model.config.model_type == "resnet":
        vectors = pooler(tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)).flatten(1)
    else:  # Swin's
        vectors = pooler(tokens.transpose(1, 2)).flatten(1)
    return vectors
