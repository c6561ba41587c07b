"""The tower in torch alone equals that of transformers, which is not imported for it."""

from typing import Any

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

from medembed.core.errors import MissingLibraryError
from medembed.encoders.devices import arithmetic, set_precision
from medembed.encoders.siglip_tower import Projector, SiglipConfig, SiglipTower

SIZES = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "image_size": 56, "patch_size": 14}


def pair(**more: Any) -> tuple[Any, SiglipTower]:
    """Return transformers' tower with random weights, and ours with the same."""
    torch.manual_seed(0)
    theirs = SiglipVisionModel(SiglipVisionConfig(**SIZES, **more)).eval()
    for parameter in theirs.parameters():  # biases and norms are constant otherwise
        parameter.data += 0.05 * torch.randn_like(parameter)
    ours = SiglipTower(SiglipConfig(**SIZES, **more)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def pixels(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 3, 56, 56, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "act",
    ["gelu_pytorch_tanh", "gelu", "gelu_new", "quick_gelu", "relu", "silu", "gelu_fast"],
)
def test_every_bit_is_transformers_own(act: str, precision: str) -> None:
    theirs, ours = pair(hidden_act=act, vision_use_head=True)
    for model in (theirs, ours):
        set_precision(model, precision)
    with arithmetic("cpu", precision):
        wanted, found = theirs(pixel_values=pixels()), ours(pixel_values=pixels())
    assert torch.equal(found.last_hidden_state, wanted.last_hidden_state)
    assert torch.equal(found.pooler_output, wanted.pooler_output)
    assert found.last_hidden_state.std() > 0.1


def test_gradients_are_equal_too() -> None:
    theirs, ours = pair(vision_use_head=False)
    for model in (theirs, ours):
        model(pixel_values=pixels()).last_hidden_state.square().mean().backward()
    wanted = {name: own.grad for name, own in theirs.named_parameters()}
    for name, own in ours.named_parameters():
        assert torch.equal(own.grad, wanted[name]), name


@torch.inference_mode()
@pytest.mark.parametrize("n_tokens", [1, 4, 16])
def test_the_projector_is_gemmas(n_tokens: int) -> None:
    vision = SiglipConfig(**SIZES)

    class Config:
        vision_config = vision
        text_config = type("Text", (), {"hidden_size": 20})
        mm_tokens_per_image = n_tokens

    theirs, ours = Gemma3MultiModalProjector(Config), Projector(vision, 20, n_tokens)
    for parameter in theirs.parameters():
        parameter.data = torch.randn_like(parameter)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    tokens = torch.randn(2, 16, 48)
    for dtype in (torch.float32, torch.bfloat16):
        found = ours(tokens.to(dtype).float())
        assert found.shape == (2, n_tokens, 20)
        assert torch.equal(found, theirs(tokens.to(dtype).float()))


def test_defaults_are_those_of_transformers() -> None:
    ours, theirs = SiglipConfig(), SiglipVisionConfig()
    for name in SiglipConfig.__dataclass_fields__:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.model_type == theirs.model_type


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"hidden_size": 0}, "hidden_size 0 is not a positive number"),
        ({"image_size": [56, 56]}, r"image_size \[56, 56\] is not a positive number"),
        ({"num_hidden_layers": True}, "num_hidden_layers True is not a positive number"),
        ({"hidden_act": "sinus"}, "hidden_act 'sinus' is unknown"),
        ({"hidden_act": None}, "hidden_act None is not of type str"),
        ({"layer_norm_eps": 1}, "layer_norm_eps 1 is not of type float"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps nan is not between 0 and 1"),
        ({"vision_use_head": "no"}, "vision_use_head 'no' is not of type bool"),
        ({"num_attention_heads": 5}, "hidden_size 48 for 5 heads and 3 channels cannot be built"),
        ({"num_channels": 1}, "hidden_size 48 for 4 heads and 1 channels cannot be built"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(entry: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SiglipConfig(**{**SIZES, **entry})


def test_a_rare_activation_without_transformers_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("medembed.core.system.find_spec", lambda name: None)
    with pytest.raises(MissingLibraryError, match=r"hidden_act 'mish'.*medembed\[encoders\]"):
        SiglipConfig(**SIZES, hidden_act="mish")
