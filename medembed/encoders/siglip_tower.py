"""SigLIP's vision tower and Gemma's projector in torch alone.

Modules, names of tensors, and the order of every operation are transformers' own, so that results
are equal bit for bit, which a test verifies. Importing transformers takes as long as everything
else that `predict` does, and is left to towers with a rare activation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from medembed.core.system import require_libraries

__all__ = ["Projector", "SiglipConfig", "SiglipTower", "TowerOutput"]


def _gelu_new(x: torch.Tensor) -> torch.Tensor:
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": functional.gelu,
    "gelu_new": _gelu_new,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "relu": functional.relu,
    "silu": functional.silu,
}


def _find_activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return an activation by transformers' name for it; KeyError if it is unknown."""
    if name in _ACTIVATIONS:
        return _ACTIVATIONS[name]
    require_libraries(f"a tower with hidden_act {name!r}", ("transformers",), "encoders")
    from transformers.activations import ACT2FN

    found: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[name]
    return found


@dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    """A tower's architecture; fields and defaults are those of transformers.

    Raises
    ------
    ValueError
        An entry is of another type or sign, or not a number that a tower can be built with.
    """

    model_type: ClassVar[str] = "siglip_vision_model"

    hidden_act: str = "gelu_pytorch_tanh"
    hidden_size: int = 768
    image_size: int = 224
    intermediate_size: int = 3072
    layer_norm_eps: float = 1e-6
    num_attention_heads: int = 12
    num_channels: int = 3
    num_hidden_layers: int = 12
    patch_size: int = 16
    vision_use_head: bool = True

    def __post_init__(self) -> None:
        for name, kind in ((own.name, own.type) for own in fields(self)):
            value = getattr(self, name)
            if kind is int and (type(value) is not int or value < 1):
                raise ValueError(f"{name} {value!r} is not a positive number")
            if kind is not int and type(value) is not kind:
                raise ValueError(f"{name} {value!r} is not of type {kind.__name__}")  # type: ignore[union-attr]
        if not 0 < self.layer_norm_eps < 1:
            raise ValueError(f"layer_norm_eps {self.layer_norm_eps!r} is not between 0 and 1")
        try:
            _find_activation(self.hidden_act)
        except KeyError:
            raise ValueError(f"hidden_act {self.hidden_act!r} is unknown") from None
        if self.hidden_size % self.num_attention_heads or self.num_channels != 3:
            raise ValueError(
                f"hidden_size {self.hidden_size} for {self.num_attention_heads} heads and "
                f"{self.num_channels} channels cannot be built"
            )


@dataclass(frozen=True)
class TowerOutput:
    """What a tower returns.

    Attributes
    ----------
    last_hidden_state : Tensor
        (n, patches, d) after the post-layernorm.
    pooler_output : Tensor or None
        (n, d) of the attention head, if the tower has one.
    """

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor | None


class _Embeddings(nn.Module):
    """Patches of an image as tokens, with their positions."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        width, side = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, width, side, stride=side)
        n_patches = (config.image_size // side) ** 2
        # On the meta device a draw, or a count, would import torch's compiler or sympy: 1 s each.
        empty = torch.empty(n_patches, width)
        self.position_embedding = nn.Embedding(n_patches, width, _weight=empty)
        positions = torch.arange(n_patches, device="cpu").expand((1, -1))
        self.position_ids: torch.Tensor
        self.register_buffer("position_ids", positions, persistent=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        pixels = pixel_values.to(dtype=self.patch_embedding.weight.dtype)
        tokens = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        placed: torch.Tensor = tokens + self.position_embedding(self.position_ids)
        return placed


class _Attention(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.head_dim = width // config.num_attention_heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (
            project(hidden_states).view(shape).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        seen = functional.scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5)
        joined = seen.transpose(1, 2).reshape(hidden_states.shape).contiguous()
        projected: torch.Tensor = self.out_proj(joined)
        return projected


class _MLP(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.activation_fn = _find_activation(config.hidden_act)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        outer: torch.Tensor = self.fc2(self.activation_fn(self.fc1(hidden_states)))
        return outer


class _Block(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = _Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = _MLP(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        seen = hidden_states + self.self_attn(self.layer_norm1(hidden_states))
        thought: torch.Tensor = seen + self.mlp(self.layer_norm2(seen))
        return thought


class _Encoder(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for block in self.layers:
            hidden_states = block(hidden_states)
        return hidden_states


class _Pooler(nn.Module):
    """One learned query that attends to all tokens."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        self.attention = nn.MultiheadAttention(width, config.num_attention_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = _MLP(config)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        probe = self.probe.repeat(tokens.shape[0], 1, 1)
        pooled = self.attention(probe, tokens, tokens)[0]
        thought: torch.Tensor = pooled + self.mlp(self.layernorm(pooled))
        return thought[:, 0]


class SiglipTower(nn.Module):
    """The tower; its tensors have the names of `transformers.SiglipVisionModel`.

    Parameters
    ----------
    config : SiglipConfig
        The architecture. Weights have no meaning until they are loaded.
    """

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = _Pooler(config) if config.vision_use_head else None

    def forward(self, pixel_values: torch.Tensor) -> TowerOutput:
        """Return the tokens and, if there is a head, the pooled vector.

        Parameters
        ----------
        pixel_values : Tensor
            (n, 3, image_size, image_size), normalised.
        """
        tokens = self.post_layernorm(self.encoder(self.embeddings(pixel_values)))
        return TowerOutput(tokens, None if self.head is None else self.head(tokens))


class _RMSNorm(nn.Module):
    """Gemma's: computed in fp32, scaled by 1 + weight before it is rounded."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        exact = x.float()
        normed = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normed * (1.0 + self.weight.float())).type_as(x)


class Projector(nn.Module):
    """Gemma 3's projector; its tensors have the names of transformers' module.

    Parameters
    ----------
    vision : SiglipConfig
        The tower's architecture.
    width : int
        The language model's width.
    n_tokens : int
        Tokens that the language model receives of an image, a square number.
    """

    def __init__(self, vision: Any, width: int, n_tokens: int) -> None:
        super().__init__()
        self.mm_input_projection_weight = nn.Parameter(torch.zeros(vision.hidden_size, width))
        self.mm_soft_emb_norm = _RMSNorm(vision.hidden_size, vision.layer_norm_eps)
        self.side = vision.image_size // vision.patch_size
        self.avg_pool = nn.AvgPool2d(self.side // math.isqrt(n_tokens))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return (n, tokens of the language model, width) of (n, patches, d)."""
        grid = tokens.transpose(1, 2).reshape(len(tokens), -1, self.side, self.side).contiguous()
        pooled = self.avg_pool(grid).flatten(2).transpose(1, 2)
        normed = self.mm_soft_emb_norm(pooled)
        return torch.matmul(normed, self.mm_input_projection_weight).type_as(tokens)
