"""The oracle is transformers' own model and image processor, on small random checkpoints."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from made_backbones import CONFIGS, save
from PIL import Image
from safetensors.torch import load_file, save_file

from medembed.core.errors import EncoderError
from medembed.encoders.loading import load_encoder
from medembed.encoders.preprocessing import prepare
from medembed.encoders.protocol import PipelinedEncoder

N_BEFORE = {"DeiT": 2, "DINOv3ViT": 4, "Dinov2": 1, "Dinov2WithRegisters": 5, "ViT": 1}
GRIDS = {"ConvNext": (8, 8), "ConvNextV2": (8, 8), "ResNet": (8, 8), "Swin": (5, 5)}
GRIDS |= {"Swinv2": (5, 5), "ViT": (9, 9)}


def images(n: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, 256, (90, 71), dtype=np.uint8) for _ in range(n)]


def theirs(model: Any, directory: Path) -> Any:
    processor = transformers.ViTImageProcessorPil.from_pretrained(directory)
    copies = [Image.fromarray(image).convert("RGB") for image in images()]
    with torch.no_grad():
        return model(pixel_values=processor(copies, return_tensors="pt")["pixel_values"])


def ours(encoder: PipelinedEncoder, poolings: list[str]) -> dict[str, np.ndarray]:
    prepared = np.stack([prepare(image, encoder.preprocessing) for image in images()])
    return encoder.encode(prepared, poolings)


def assert_equal(mine: np.ndarray, oracle: torch.Tensor) -> None:
    assert mine.shape == tuple(oracle.shape)
    assert mine.dtype == np.float32
    assert np.abs(mine - oracle.numpy()).max() <= 1e-5


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_pooling_equals_transformers(tmp_path: Path, family: str) -> None:
    model = save(tmp_path, family)
    seen = theirs(model, tmp_path)
    encoder = load_encoder(tmp_path, device="cpu", precision="fp32")
    assert isinstance(encoder, PipelinedEncoder)
    rows = ours(encoder, list(encoder.dimensions))
    last = seen.last_hidden_state
    tokens = (
        last.flatten(2).transpose(1, 2) if last.ndim == 4 else last[:, N_BEFORE.get(family, 0) :]
    )
    side = GRIDS.get(family, (4, 4))[0]
    assert tokens.shape[1] == side**2
    assert_equal(rows["mean"], tokens.mean(dim=1))
    assert_equal(rows["max"], tokens.amax(dim=1))
    grid = tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)
    cells = torch.nn.functional.adaptive_avg_pool2d(grid, 4).flatten(2).transpose(1, 2)
    assert_equal(rows["grid4"], cells)
    assert_equal(rows["pooler"], seen.pooler_output.flatten(1))
    assert ("cls" in rows) == (family in N_BEFORE)
    if "cls" in rows:
        assert_equal(rows["cls"], last[:, 0])
    assert {name: row.shape[1:] for name, row in rows.items()} == encoder.dimensions


def test_rad_dinos_processor_is_followed_without_its_crop(tmp_path: Path) -> None:
    """RAD-DINO is a DINOv2 whose processor scales the shortest edge, with statistics of its own."""
    model = save(tmp_path, "Dinov2", image_size=70)
    for path in tmp_path.glob("*processor*.json"):
        path.unlink()
    processor = transformers.BitImageProcessorPil(
        size={"shortest_edge": 70},
        crop_size={"height": 70, "width": 70},
        do_center_crop=True,
        image_mean=[0.5307] * 3,
        image_std=[0.2583] * 3,
        resample=3,
    )
    processor.save_pretrained(tmp_path)
    square = [image[:71, :71] for image in images()]
    copies = [Image.fromarray(image).convert("RGB") for image in square]
    with torch.no_grad():
        seen = model(pixel_values=processor(copies, return_tensors="pt")["pixel_values"])
    encoder: Any = load_encoder(tmp_path, device="cpu")
    prepared = np.stack([prepare(image, encoder.preprocessing) for image in square])
    rows = encoder.encode(prepared, ["cls", "mean"])
    assert_equal(rows["cls"], seen.last_hidden_state[:, 0])
    assert_equal(rows["mean"], seen.last_hidden_state[:, 1:].mean(dim=1))


def change_tensors(source: Path, target: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def change_config(source: Path, target: Path, **changes: object) -> Path:
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("backbones") / "vit"
    save(directory, "ViT")
    return directory


@pytest.mark.parametrize("family", ["ConvNext", "Dinov2", "ResNet", "Swin", "ViT"])
def test_a_classifier_is_read_as_the_backbone_it_is_built_on(
    tmp_path: Path, family: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = save(tmp_path / "classifier", family, "ForImageClassification")
    backbone = model.base_model
    with contextlib.redirect_stderr(io.StringIO()):
        backbone.save_pretrained(tmp_path / "bare")
    shutil.copy(tmp_path / "classifier" / "preprocessor_config.json", tmp_path / "bare")
    encoder = load_encoder(tmp_path / "classifier", device="cpu")
    last = theirs(backbone, tmp_path / "classifier").last_hidden_state
    tokens = (
        last.flatten(2).transpose(1, 2) if last.ndim == 4 else last[:, N_BEFORE.get(family, 0) :]
    )
    assert_equal(ours(encoder, ["max"])["max"], tokens.amax(dim=1))
    assert encoder.fingerprint == load_encoder(tmp_path / "bare", device="cpu").fingerprint
    assert capfd.readouterr() == ("", "")  # transformers would report the unused classifier


def test_a_pooler_of_random_numbers_is_never_offered(vit: Path, tmp_path: Path) -> None:
    save(tmp_path / "classifier", "ViT", "ForImageClassification")
    encoder = load_encoder(tmp_path / "classifier", device="cpu")
    usual = {name for name in encoder.dimensions if "@" not in name}
    assert usual == {"mean", "max", "grid4", "cls"}
    with pytest.raises(EncoderError, match="pooling pooler is not offered by classifier"):
        load_encoder(tmp_path / "classifier", device="cpu", poolings=["mean", "pooler"])
    assert load_encoder(vit, device="cpu", poolings=["pooler"]).dimensions["pooler"] == (24,)


def test_a_sharded_backbone_is_read_and_is_the_same(vit: Path, tmp_path: Path) -> None:
    model = transformers.ViTModel.from_pretrained(vit)
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(tmp_path, max_shard_size="10KB")
    shutil.copy(vit / "preprocessor_config.json", tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert load_encoder(tmp_path).fingerprint == load_encoder(vit).fingerprint
    shutil.copy(vit / "model.safetensors", tmp_path)
    with pytest.raises(EncoderError, match="Keep one of the two"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("change", ["bit", "architecture", "labels"])
def test_the_fingerprint_changes_with_the_backbone_alone(
    vit: Path, tmp_path: Path, change: str
) -> None:
    target = tmp_path / "changed"
    if change == "bit":
        change_tensors(vit, target, lambda t: t["layernorm.bias"].view(torch.int32)[1:2].add_(1))
    elif change == "labels":
        change_config(vit, target, id2label={"0": "normal"}, transformers_version="4.1")
    else:
        change_config(vit, target, layer_norm_eps=1e-5)
    same = load_encoder(target).fingerprint == load_encoder(vit).fingerprint
    assert same == (change == "labels")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop("layernorm.bias"), r"lacks layernorm\.bias, one of 1 missing"),
        (lambda t: t.update({"layernorm.bias": torch.full((24,), torch.nan)}), "not finite"),
        (lambda t: t.update({"layernorm.bias": torch.zeros(23)}), "cannot be loaded"),
        (lambda t: t.update({"layernorm.bias": torch.zeros(24, dtype=torch.int8)}), "quantised"),
    ],
)
def test_a_backbone_that_is_not_whole_is_refused(
    vit: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], None], said: str
) -> None:
    with pytest.raises(EncoderError, match=said):
        load_encoder(change_tensors(vit, tmp_path / "edited", edit))


@pytest.mark.parametrize("suffix", ["Model", "ForImageClassification"])
@pytest.mark.parametrize("family", ["ResNet", "ViT"])
def test_a_backbone_with_more_layers_than_its_config_is_refused(
    tmp_path: Path, family: str, suffix: str
) -> None:
    save(tmp_path / "whole", family, suffix)
    fewer = {"depths": [1, 1]} if family == "ResNet" else {"num_hidden_layers": 1}
    with pytest.raises(EncoderError, match=r"whole holds .*, one of \d+ tensors that its config"):
        load_encoder(change_config(tmp_path / "whole", tmp_path / "a" / "whole", **fewer))


def test_a_processor_of_another_size_is_refused_where_it_matters(vit: Path, tmp_path: Path) -> None:
    def shrink(directory: Path) -> Path:
        path = directory / "preprocessor_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "size": {"height": 70, "width": 84}}))
        return directory

    shutil.copytree(vit, tmp_path / "vit")
    with pytest.raises(EncoderError, match="vit cannot read the images of 70 x 84"):
        load_encoder(shrink(tmp_path / "vit"))
    model = save(tmp_path / "dino", "Dinov2")  # its positions are interpolated
    encoder = load_encoder(shrink(tmp_path / "dino"), device="cpu")
    tokens = theirs(model, tmp_path / "dino").last_hidden_state[:, 1:]
    assert tokens.shape[1] == 5 * 6
    assert_equal(ours(encoder, ["mean"])["mean"], tokens.mean(dim=1))


def test_weights_in_a_pickle_are_not_read(vit: Path, tmp_path: Path) -> None:
    shutil.copytree(vit, tmp_path / "pickled")
    tensors = load_file(vit / "model.safetensors")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(EncoderError, match="convert them to safetensors"):
        load_encoder(tmp_path / "pickled")


def test_code_of_a_checkpoint_is_never_run(vit: Path, tmp_path: Path) -> None:
    names = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    target = change_config(vit, tmp_path / "own", auto_map=names)
    (target / "own.py").write_text("raise SystemExit('the checkpoint ran its own code')\n")
    assert load_encoder(target).fingerprint == load_encoder(vit).fingerprint


@pytest.mark.parametrize("kind", ["blip", "bert", "no such type"])
def test_what_is_no_vision_backbone_is_named_with_those_that_are(
    vit: Path, tmp_path: Path, kind: str
) -> None:
    with pytest.raises(EncoderError, match=f"type '{kind}', which is not read.* dinov2, .* vit"):
        load_encoder(change_config(vit, tmp_path / "other", model_type=kind))


def test_a_config_that_cannot_be_built_is_one_line(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"config\.json of odd") as raised:
        load_encoder(change_config(vit, tmp_path / "odd", hidden_size="many"))
    assert "\n" not in str(raised.value)


def test_the_reference_of_a_bf16_backbone_is_the_checkpoint_in_fp32(vit: Path) -> None:
    encoder = load_encoder(vit, device="cpu", precision="bf16")
    reference = encoder.reference()
    assert reference.precision == "fp32"
    assert reference.fingerprint == encoder.fingerprint
    exact = ours(load_encoder(vit, device="cpu", precision="fp32"), ["mean"])["mean"]
    assert np.array_equal(ours(reference, ["mean"])["mean"], exact)
    assert 0 < np.abs(ours(encoder, ["mean"])["mean"] - exact).max() < 0.1
