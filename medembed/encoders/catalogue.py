"""The families of encoders that tests hold against the library that they come from.

Sizes and licences are those of the named checkpoints' cards when this list was written; nothing is
asked of the hub.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypedDict

from medembed.core.poolings import POOLINGS

__all__ = ["FAMILIES", "Family", "FamilyDocument", "describe_families"]

_TOKENS = ("mean", "max", "grid4")
_CLASSED = (*_TOKENS, "pooler", "cls")


@dataclass(frozen=True)
class Family:
    """Checkpoints that are read alike.

    Attributes
    ----------
    name : str
        How the family is called.
    examples : tuple of str
        What `--encoder` takes.
    kinds : tuple of str
        `model_type` in their `config.json`; empty where they have none.
    pixels : str
        Side of the images.
    poolings : tuple of str
        What can be stored; `grid4` only of at least 4 x 4 tokens, `pooler` only if the checkpoint
        holds its weights.
    has_layers : bool
        Whether `--layers` stores what its blocks give.
    licence : str
        As the card has it.
    is_gated : bool
        Whether the hub asks for terms to be accepted.
    extra : str or None
        The extra of medembed that it needs.
    oracle : str
        What the tests compare it with.
    """

    name: str
    examples: tuple[str, ...]
    kinds: tuple[str, ...]
    pixels: str
    poolings: tuple[str, ...]
    has_layers: bool
    licence: str
    is_gated: bool = False
    extra: str | None = "encoders"
    oracle: str = "transformers"


FAMILIES = (
    Family(
        "MedGemma",
        ("google/medgemma-4b-pt", "google/medgemma-4b-it", "google/medgemma-27b-it"),
        ("gemma3",),
        "896",
        (*_TOKENS, "projector"),
        has_layers=True,
        licence="Health AI Developer Foundations",
        is_gated=True,
    ),
    Family(
        "MedSigLIP",
        ("google/medsiglip-448",),
        ("siglip", "siglip_vision_model"),
        "448",
        (*_TOKENS, "pooler"),
        has_layers=True,
        licence="Health AI Developer Foundations",
        is_gated=True,
    ),
    Family(
        "SigLIP",
        ("google/siglip-base-patch16-224", "google/siglip-so400m-patch14-384"),
        ("siglip", "siglip_vision_model"),
        "224 to 512",
        (*_TOKENS, "pooler"),
        has_layers=True,
        licence="Apache-2.0",
    ),
    Family(
        "CLIP",
        ("openai/clip-vit-large-patch14", "openai/clip-vit-base-patch16"),
        ("clip", "clip_vision_model"),
        "224",
        _CLASSED,
        has_layers=True,
        licence="MIT, by its repository",
    ),
    Family(
        "RAD-DINO",
        ("microsoft/rad-dino",),
        ("dinov2",),
        "518",
        _CLASSED,
        has_layers=True,
        licence="MIT (before 2025 MSRLA), for research",
    ),
    Family(
        "DINOv2",
        ("facebook/dinov2-base", "facebook/dinov2-with-registers-base"),
        ("dinov2", "dinov2_with_registers"),
        "224",
        _CLASSED,
        has_layers=True,
        licence="Apache-2.0",
    ),
    Family(
        "DINOv3",
        ("facebook/dinov3-vitb16-pretrain-lvd1689m",),
        ("dinov3_vit",),
        "224",
        _CLASSED,
        has_layers=True,
        licence="DINOv3 License",
        is_gated=True,
    ),
    Family(
        "ViT, DeiT",
        ("google/vit-base-patch16-224", "facebook/deit-base-patch16-224"),
        ("vit", "deit"),
        "224",
        _CLASSED,
        has_layers=True,
        licence="Apache-2.0",
    ),
    Family(
        "ResNet, ConvNeXt",
        ("microsoft/resnet-50", "facebook/convnext-base-224", "facebook/convnextv2-base-22k-224"),
        ("resnet", "convnext", "convnextv2"),
        "224",
        (*_TOKENS, "pooler"),
        has_layers=True,
        licence="Apache-2.0",
    ),
    Family(
        "Swin",
        ("microsoft/swin-base-patch4-window7-224", "microsoft/swinv2-base-patch4-window8-256"),
        ("swin", "swinv2"),
        "224, 256",
        (*_TOKENS, "pooler"),
        has_layers=True,
        licence="Apache-2.0",
    ),
    Family(
        "open_clip",
        ("a directory with open_clip_config.json",),
        (),
        "224",
        _CLASSED,
        has_layers=True,
        licence="as its card says",
        oracle="open_clip",
    ),
    Family(
        "BiomedCLIP",
        ("microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",),
        (),
        "224",
        _CLASSED,
        has_layers=True,
        licence="MIT",
        extra="timm",
        oracle="open_clip",
    ),
    Family(
        "timm's ViT, DeiT, EVA",
        (
            "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k",
            "timm/eva02_base_patch14_448.mim_in22k_ft_in22k",
        ),
        (),
        "as its config says",
        _CLASSED,
        has_layers=True,
        licence="as its card says",
        extra="timm",
        oracle="timm",
    ),
    Family(
        "timm",
        ("timm/densenet169.tv_in1k", "timm/tf_efficientnet_lite0.in1k"),
        (),
        "as its config says",
        _CLASSED,
        has_layers=False,
        licence="as its card says",
        extra="timm",
        oracle="timm",
    ),
    Family(
        "torchvision",
        ("densenet169-b2777c0a.pth", "resnet50-0676ba61.pth"),
        (),
        "224",
        (*_TOKENS, "pooler"),
        has_layers=False,
        licence="BSD-3-Clause",
        extra="timm",
        oracle="torchvision",
    ),
    Family(
        "your own",
        ("a directory of `medembed autoencoder`", "a directory of `medembed finetune`"),
        ("medembed-autoencoder",),
        "as trained",
        _TOKENS,
        has_layers=False,
        licence="yours",
        extra=None,
        oracle="a round trip",
    ),
    Family(
        "demo",
        ("demo",),
        (),
        "128",
        _TOKENS,
        has_layers=True,
        licence="Apache-2.0",
        oracle="transformers",
    ),
)


class FamilyDocument(TypedDict):
    """A family as JSON values; poolings of blocks are `mean@K`."""

    name: str
    examples: list[str]
    kinds: list[str]
    pixels: str
    poolings: list[str]
    layers: bool
    licence: str
    gated: bool
    extra: str | None
    oracle: str


def describe_families() -> Iterator[FamilyDocument]:
    """Yield each family as JSON values; poolings of blocks as `mean@K`."""
    for family in FAMILIES:
        per_block = [
            f"{name}@K"
            for name in family.poolings
            if family.has_layers and POOLINGS[name].is_per_block
        ]
        yield {
            "name": family.name,
            "examples": list(family.examples),
            "kinds": list(family.kinds),
            "pixels": family.pixels,
            "poolings": [*family.poolings, *per_block],
            "layers": family.has_layers,
            "licence": family.licence,
            "gated": family.is_gated,
            "extra": family.extra,
            "oracle": family.oracle,
        }
