"""Two of SigLIP's products in a cheaper form, for bfloat16 on CUDA.

Neither changes what is computed beyond the rounding of a sum. In fp32, and on a CPU, a tower keeps
its own modules, and so its bits.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

__all__ = ["FusedMLP", "GreyPatches", "fuse", "gelu_agrees"]

_TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_python_tanh")


class GreyPatches(nn.Conv2d):
    """A patch embedding for images whose channels are all alike: a product of a third the width.

    Sum over channels c of w_c · x = (sum of w_c) · x, so a patch of 14 x 14 takes 196 columns
    rather than 588. It is computed in fp32, which costs less here than rounding the grey levels.
    """

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return what the convolution gives.

        Parameters
        ----------
        pixel_values : Tensor
            (n, 3, rows, columns), of which only the first channel is read.

        Returns
        -------
        Tensor
            float32 (n, width, rows of patches, columns of patches).
        """
        high, wide = self.kernel_size
        with torch.autocast(pixel_values.device.type, enabled=False):
            grey = pixel_values[:, 0].float()
            rows, columns = grey.shape[1] // high, grey.shape[2] // wide
            grey = grey[:, : rows * high, : columns * wide]
            patches = grey.reshape(len(grey), rows, high, columns, wide)
            patches = patches.permute(0, 1, 3, 2, 4).flatten(3)
            weight = self.weight.float().sum(dim=1).flatten(1)
            bias = None if self.bias is None else self.bias.float()
            return functional.linear(patches, weight, bias).permute(0, 3, 1, 2)


class FusedMLP(nn.Module):
    """A block's MLP whose GELU is the first product's epilogue, not a pass over its result."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.fc1, self.fc2 = mlp.fc1, mlp.fc2

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return fc2(gelu(fc1(x))), GELU by its tanh form."""
        flat = hidden_states.flatten(0, -2).to(self.fc1.weight.dtype)
        inner = torch._addmm_activation(self.fc1.bias, flat, self.fc1.weight.t(), use_gelu=True)
        outer: torch.Tensor = self.fc2(inner.reshape(*hidden_states.shape[:-1], -1))
        return outer


def fuse(model: Any, device: str, *, channels_alike: bool) -> list[str]:
    """Replace a SigLIP tower's modules by the cheaper ones that give its results on this device.

    Parameters
    ----------
    model : SiglipVisionModel
        In bfloat16 on `device`; its tensors stay, under the same names.
    channels_alike : bool
        Whether normalised images have three equal channels.

    Returns
    -------
    list of str
        What was replaced: "patches", "gelu".
    """
    replaced = []
    if channels_alike:
        old = model.embeddings.patch_embedding
        model.embeddings.patch_embedding = _with_tensors_of(old)
        replaced.append("patches")
    if model.config.hidden_act in _TANH_GELU and gelu_agrees(device):
        for block in model.encoder.layers:
            block.mlp = FusedMLP(block.mlp)
        replaced.append("gelu")
    return replaced


def gelu_agrees(device: str) -> bool:
    """Tell whether this device's fused GELU is the tanh form, to the resolution of bfloat16."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(64, 64, generator=generator) for _ in range(2))
    bias = torch.randn(64, generator=generator)
    own = [t.to(device, torch.bfloat16) for t in (bias, x, w)]
    try:
        fused = torch._addmm_activation(own[0], own[1], own[2].t(), use_gelu=True)
    except RuntimeError:  # not on this device
        return False
    exact = [t.double() for t in own]
    wanted = functional.gelu(torch.addmm(exact[0], exact[1], exact[2].t()), approximate="tanh")
    return bool((fused.double() - wanted).abs().max() <= 2**-8 * wanted.abs().max())


def _with_tensors_of(convolution: nn.Conv2d) -> GreyPatches:
    made = GreyPatches(1, 1, 1, device="meta")
    made.__dict__.update(convolution.__dict__)
    return made
