"""The oracle is transformers' own CLIP and image processor, on small random checkpoints."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hub_server import Hub, ask, serving
from made_extraction import with_both_classes, write_images
from made_gemma import quiet
from PIL import Image
from safetensors.torch import load_file, save_file

from medembed.core.errors import EncoderError
from medembed.encoders.loading import load_encoder
from medembed.encoders.preprocessing import prepare
from medembed.encoders.stored_tensors import read_header
from medembed.encoders.torch_encoder import TorchEncoder
from medembed.finetuning import finetune

SIDE = 32
VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": SIDE,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_clip(directory: Path) -> Any:
    torch.manual_seed(0)
    config = transformers.CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=12)
    model = transformers.CLIPModel(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    with quiet():
        model.save_pretrained(directory)
        processor.save_pretrained(directory)
    return model


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("checkpoints") / "clip"
    return directory, make_clip(directory)


def load(directory: Path, **options: Any) -> TorchEncoder:
    encoder = load_encoder(directory, device="cpu", **options)
    assert isinstance(encoder, TorchEncoder)
    return encoder


def test_every_pooling_equals_transformers(clip: tuple[Path, Any]) -> None:
    directory, model = clip
    rng = np.random.default_rng(7)
    square = [rng.integers(0, 256, (45, 45), dtype=np.uint8) for _ in range(2)]
    processor = transformers.CLIPImageProcessorPil.from_pretrained(directory)
    copies = [Image.fromarray(image).convert("RGB") for image in square]
    values = processor(copies, return_tensors="pt")["pixel_values"]
    encoder = load(directory)
    pixels = np.stack([prepare(image, encoder.preprocessing) for image in square])
    assert torch.equal(encoder.normalise(torch.from_numpy(pixels)), values)
    rows = encoder.encode(pixels, list(encoder.dimensions))
    with torch.inference_mode():
        seen = model.vision_model(pixel_values=values, output_hidden_states=True)
        embedded = model.get_image_features(pixel_values=values)
    last = seen.last_hidden_state
    cells = last[:, 1:].reshape(2, 4, 4, -1).flatten(1, 2)
    oracles = {"mean": last[:, 1:].mean(dim=1), "max": last[:, 1:].amax(dim=1), "grid4": cells}
    oracles |= {"cls": last[:, 0], "pooler": seen.pooler_output}
    for k, state in enumerate(seen.hidden_states[1:], 1):
        oracles |= {f"mean@{k}": state[:, 1:].mean(dim=1), f"cls@{k}": state[:, 0]}
        oracles[f"max@{k}"] = state[:, 1:].amax(dim=1)
    assert set(rows) == set(oracles)
    for name, oracle in oracles.items():
        # both attend by sdpa: equal bytes on some processors, rounded otherwise on others
        assert np.allclose(rows[name], oracle.numpy(), rtol=0, atol=2e-6), name
        assert rows[name].shape[1:] == encoder.dimensions[name]
    with torch.inference_mode():
        projected = model.visual_projection(torch.from_numpy(rows["pooler"]))
    known = embedded if isinstance(embedded, torch.Tensor) else embedded.pooler_output
    assert torch.allclose(projected, known, atol=1e-5)


def test_the_tower_alone_is_the_same_encoder(clip: tuple[Path, Any], tmp_path: Path) -> None:
    directory, model = clip
    with quiet():
        vision = transformers.CLIPVisionModel.from_pretrained(directory)
        vision.save_pretrained(tmp_path)
    for path in directory.glob("*processor*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    kind = json.loads((tmp_path / "config.json").read_text())["model_type"]
    assert kind == "clip_vision_model"
    assert load(tmp_path).fingerprint == load(directory).fingerprint
    assert model is not None


def test_only_the_image_towers_tensors_are_fetched(clip: tuple[Path, Any], tmp_path: Path) -> None:
    directory, _ = clip
    with serving(Hub()) as hub:
        files = {path.name: path.read_bytes() for path in directory.iterdir()}
        hub.put("openai/clip", files)
        [found] = ask(hub.address, tmp_path, "openai/clip", TEST_TOLD="1")
    path = Path(found["path"])
    assert "model.safetensors" not in found["files"]
    assert load(path).fingerprint == load(directory).fingerprint
    names = {tensor.name for tensor in read_header(path / "medembed-vision-tower.safetensors")}
    assert all(name.startswith("vision_model.") for name in names)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 2}, "one of 16 tensors that its config does not ask for"),
        ({"num_hidden_layers": 4}, "one of 16 missing tensors"),
        ({"image_size": 64}, "its processor makes images of 32 x 32"),
        ({"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
        ({"patch_size": 0}, "patch_size 0 is no positive number"),
        ({"hidden_size": 32, "num_attention_heads": 4}, "has shape"),
    ],
)
def test_a_config_that_is_not_of_the_weights_is_refused(
    clip: tuple[Path, Any], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    config = json.loads((clip[0] / "config.json").read_text())
    config["vision_config"] |= changes
    for path in clip[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EncoderError, match=said):
        load(tmp_path)


def test_a_changed_bit_is_another_encoder_and_a_nan_none(
    clip: tuple[Path, Any], tmp_path: Path
) -> None:
    for path in clip[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(clip[0] / "model.safetensors")
    tensors["vision_model.pre_layrnorm.bias"].view(torch.int32)[0] += 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load(tmp_path).fingerprint != load(clip[0]).fingerprint
    tensors["vision_model.pre_layrnorm.bias"].fill_(torch.nan)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match="not finite"):
        load(tmp_path)


def test_it_is_not_trained(clip: tuple[Path, Any], tmp_path: Path) -> None:
    encoder = load(clip[0])
    manifest = with_both_classes(write_images(tmp_path / "images", 24))
    with pytest.raises(EncoderError, match="model of timm, CLIP or open_clip"):
        finetune(manifest, tmp_path / "images", encoder, tmp_path / "out")
