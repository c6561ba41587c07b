"""The cheaper products against transformers' own modules, on a small random tower."""

import copy
from typing import Any

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from medembed.encoders.devices import arithmetic, set_precision
from medembed.encoders.siglip import FusedMLP, GreyPatches, fuse, gelu_agrees


def tower(hidden_act: str = "gelu_pytorch_tanh") -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    return SiglipVisionModel(
        SiglipVisionConfig(
            **sizes,
            num_attention_heads=4,
            image_size=30,
            patch_size=14,
            vision_use_head=False,
            hidden_act=hidden_act,
        )
    ).eval()


def grey(n: int = 3, side: int = 30) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    levels = torch.randint(0, 256, (n, 1, side, side), generator=generator)
    return (levels / 255 - 0.5).div(0.5).expand(-1, 3, -1, -1)


@torch.inference_mode()
@pytest.mark.parametrize("side", [28, 30, 41])
def test_a_grey_images_patches_are_one_product_of_a_third_the_width(side: int) -> None:
    model = tower()
    convolution = model.embeddings.patch_embedding
    wanted = convolution.double()(grey(side=side).double())
    convolution.float()
    fuse(model, "cpu", channels_alike=True)
    product = model.embeddings.patch_embedding
    assert isinstance(product, GreyPatches)
    found = product(grey(side=side))
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_the_tensors_and_their_names_stay() -> None:
    model = tower()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert fuse(model, "cpu", channels_alike=True) == ["patches", "gelu"]
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@torch.inference_mode()
def test_images_whose_channels_differ_keep_the_convolution() -> None:
    model = tower()
    assert "patches" not in fuse(model, "cpu", channels_alike=False)
    assert not isinstance(model.embeddings.patch_embedding, GreyPatches)


@torch.inference_mode()
def test_a_fused_mlp_is_the_mlp_of_the_exact_gelu_on_a_cpu() -> None:
    """On a CPU torch fuses the exact form: a tower of that form shows that nothing else differs."""
    model = tower("gelu")
    set_precision(model, "bf16")
    block = copy.deepcopy(model.encoder.layers[0])
    tokens = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(2))
    with arithmetic("cpu", "bf16"):
        wanted, found = block.mlp(tokens), FusedMLP(block.mlp)(tokens)
    assert found.dtype == wanted.dtype == torch.bfloat16
    assert (found - wanted).abs().max() <= 2**-7 * wanted.abs().max()


@pytest.mark.parametrize(("approximate", "is_taken"), [("tanh", True), ("none", False)])
def test_a_gelu_of_another_form_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, approximate: str, is_taken: bool
) -> None:
    def epilogue(bias: Any, x: Any, w: Any, *, use_gelu: bool) -> torch.Tensor:
        assert use_gelu
        exact = torch.addmm(bias.double(), x.double(), w.double())
        scale = 0.0 if approximate == "tanh" else 0.02  # a library's coarser form
        return (torch.nn.functional.gelu(exact, approximate="tanh") + scale * exact).bfloat16()

    monkeypatch.setattr(torch, "_addmm_activation", epilogue)
    assert gelu_agrees("cpu") is is_taken
