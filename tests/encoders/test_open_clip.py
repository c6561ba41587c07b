"""The oracle is open_clip's own model and transform, on small random checkpoints."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hub_server import Hub, ask, serving
from made_extraction import with_both_classes, write_images
from made_gemma import quiet
from PIL import Image
from safetensors.torch import load_file, save_file
from vision_libraries import import_open_clip

from medembed.cli import main
from medembed.core.errors import EncoderError
from medembed.encoders.catalogue import describe_families
from medembed.encoders.clip import ClipEncoder
from medembed.encoders.loading import load_encoder
from medembed.encoders.preprocessing import prepare
from medembed.encoders.stored_tensors import read_header
from medembed.encoders.text_tower import load_text_tower
from medembed.encoders.torch_encoder import TorchEncoder
from medembed.finetuning import finetune

open_clip = import_open_clip()

COLUMNS = 12  # of the space that images share with words
TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "patch_size": 8, "width": 24, "head_width": 8, "layers": 3}
TRUNK = {"timm_model_name": "test_vit", "image_size": 160}
# By name: the image tower's config, the model's further entries, the preprocessing.
VITS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "ViT-B-32": ({}, {}, {"mean": [0.5] * 3, "std": [0.25] * 3}),
    "quick-gelu": ({}, {"quick_gelu": True}, {}),
    "mlp-ratio": ({"mlp_ratio": 2.6667, "head_width": 12}, {}, {"interpolation": "bilinear"}),
    "sides": ({"image_size": [32, 32], "patch_size": [16, 16]}, {}, {"resize_mode": "squash"}),
    "fixed-positions": ({"pos_embed_type": "sin_cos_2d", "patch_dropout": 0.5}, {}, {}),
    "norm-last": ({"final_ln_after_pool": True, "output_tokens": True}, {}, {}),
}
TRUNKS: dict[str, dict[str, Any]] = {
    "BiomedCLIP": {"timm_pool": "", "timm_proj": "linear"},
    "average": {"timm_pool": "avg", "timm_proj": "mlp"},
    "SigLIP": {"timm_pool": "map", "timm_proj": "none"},
    "classifier": {"timm_pool": "token", "timm_proj": ""},
    "ResNet": {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"},
}


def make(
    directory: Path, vision: dict[str, Any], model: Any = None, images: Any = None
) -> torch.nn.Module:
    """Save a random checkpoint as open_clip's hub has it, and return its image tower."""
    config = {"embed_dim": COLUMNS, "vision_cfg": vision, "text_cfg": TEXT, **(model or {})}
    torch.manual_seed(0)
    known = {key: value for key, value in vision.items() if key != "output_tokens"}
    built = open_clip.CustomTextCLIP(**{**config, "vision_cfg": known}).eval()
    for key, tensor in built.state_dict().items():  # norms start as constants
        if tensor.is_floating_point():
            noise = 0.05 * torch.randn_like(tensor)
            tensor.add_(noise.abs() if key.endswith("running_var") else noise)
    directory.mkdir(parents=True, exist_ok=True)
    whole = {"model_cfg": config, "preprocess_cfg": images or {}}
    (directory / "open_clip_config.json").write_text(json.dumps(whole))
    tensors = {name: tensor.contiguous() for name, tensor in built.state_dict().items()}
    save_file(tensors, directory / "open_clip_model.safetensors")
    visual: torch.nn.Module = built.visual
    return visual


def load(place: Path, **options: Any) -> TorchEncoder:
    encoder = load_encoder(place, device="cpu", **options)
    assert isinstance(encoder, TorchEncoder)
    return encoder


def picture() -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (45, 45), dtype=np.uint8)


def transform(directory: Path) -> torch.Tensor:
    """Prepare a square picture, of which open_clip crops nothing, by open_clip's own means."""
    config = json.loads((directory / "open_clip_config.json").read_text())
    side = config["model_cfg"]["vision_cfg"]["image_size"]
    known = open_clip.transform.merge_preprocess_dict(
        open_clip.transform.PreprocessCfg(size=side), config["preprocess_cfg"]
    )
    asked = open_clip.transform.PreprocessCfg(**known)
    own = open_clip.transform.image_transform_v2(asked, is_train=False)
    values: torch.Tensor = own(Image.fromarray(picture()).convert("RGB"))[None]
    return values


def run_both(
    directory: Path, visual: Any, blocks: Any
) -> tuple[dict[str, np.ndarray], torch.Tensor, list[torch.Tensor], TorchEncoder]:
    """Return the rows, open_clip's vector of the picture, and what its blocks gave."""
    encoder = load(directory)
    values = transform(directory)
    pixels = prepare(picture(), encoder.preprocessing)[None]
    assert torch.equal(encoder.normalise(torch.from_numpy(pixels)), values)
    taken: list[torch.Tensor] = []
    for block in blocks:
        block.register_forward_hook(lambda _module, _inputs, output: taken.append(output))
    with torch.inference_mode():
        embedded = visual(values)
    rows = encoder.encode(pixels, list(encoder.dimensions))
    assert {key: row.shape[1:] for key, row in rows.items()} == encoder.dimensions
    return rows, embedded, taken, encoder


def near(mine: Any, oracle: torch.Tensor) -> None:
    found = torch.as_tensor(mine)
    assert found.shape == oracle.shape
    assert (found - oracle).abs().max() <= 1e-5 * max(1.0, float(oracle.abs().max()))


@pytest.mark.parametrize("name", sorted(VITS))
def test_every_pooling_of_its_vit_equals_open_clips(tmp_path: Path, name: str) -> None:
    vision, model, images = VITS[name]
    visual: Any = make(tmp_path, {**VIT, **vision}, model, images)
    rows, embedded, taken, encoder = run_both(tmp_path, visual, visual.transformer.resblocks)
    near(torch.from_numpy(rows["pooler"]) @ visual.proj, embedded)
    oracles = {"cls": taken[-1][:, 0], "mean": taken[-1][:, 1:].mean(dim=1)}
    oracles["max"] = taken[-1][:, 1:].amax(dim=1)
    for k, tokens in enumerate(taken, 1):
        oracles |= {f"mean@{k}": tokens[:, 1:].mean(dim=1), f"cls@{k}": tokens[:, 0]}
        oracles[f"max@{k}"] = tokens[:, 1:].amax(dim=1)
    if "grid4" in rows:  # of 4 x 4 patches
        oracles["grid4"] = taken[-1][:, 1:]
    assert set(rows) - {"pooler"} == set(oracles)
    for key, oracle in oracles.items():
        near(rows[key], oracle)
    assert len(taken) == 3
    offered = {key if "@" not in key else f"{key.partition('@')[0]}@K" for key in rows}
    [listed] = [family for family in describe_families() if family["name"] == "open_clip"]
    assert offered | {"grid4"} == set(listed["poolings"])
    assert encoder.model.config.layer_norm_eps == visual.ln_post.eps


@pytest.mark.parametrize("name", sorted(TRUNKS))
def test_every_pooling_of_a_trunk_equals_open_clips(tmp_path: Path, name: str) -> None:
    visual: Any = make(tmp_path, {**TRUNK, **TRUNKS[name]})
    blocks = getattr(visual.trunk, "blocks", ())
    rows, embedded, taken, _ = run_both(tmp_path, visual, blocks)
    pooler = torch.from_numpy(rows["pooler"])
    with torch.inference_mode():
        near(visual.head(visual.trunk.get_classifier()(pooler)), embedded)
        seen = visual.trunk.forward_features(transform(tmp_path))
    tokens = seen.flatten(2).transpose(1, 2) if seen.ndim == 4 else seen
    n_before = 0 if seen.ndim == 4 else visual.trunk.num_prefix_tokens
    near(rows["mean"], tokens[:, n_before:].mean(dim=1))
    near(rows["max"], tokens[:, n_before:].amax(dim=1))
    assert ("cls" in rows) == (n_before == 1)
    for k, output in enumerate(taken[: len(blocks)], 1):
        assert np.array_equal(rows[f"mean@{k}"], output[:, n_before:].mean(dim=1).numpy())
        assert np.array_equal(rows[f"max@{k}"], output[:, n_before:].amax(dim=1).numpy())
        if n_before:
            assert np.array_equal(rows[f"cls@{k}"], output[:, 0].numpy())
    n_poolings = len([key for key in rows if "@" in key])
    assert n_poolings == len(blocks) * (3 if n_before else 2)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("open_clip") / "vit"
    make(directory, VIT)
    return directory


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("open_clip") / "trunk"
    make(directory, {**TRUNK, **TRUNKS["BiomedCLIP"]})
    return directory


def copy(source: Path, target: Path, **vision: Any) -> Path:
    """Copy a checkpoint, with other entries in its tower's config."""
    target.mkdir(parents=True)
    config = json.loads((source / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"] |= vision
    (target / "open_clip_config.json").write_text(json.dumps(config))
    weights = "open_clip_model.safetensors"
    (target / weights).write_bytes((source / weights).read_bytes())
    return target


def edit(source: Path, target: Path, change: Any) -> Path:
    copy(source, target)
    tensors = load_file(source / "open_clip_model.safetensors")
    change(tensors)
    save_file(tensors, target / "open_clip_model.safetensors")
    return target


def test_the_same_tower_of_transformers_is_the_same_encoder(vit: Path, tmp_path: Path) -> None:
    encoder = load(vit)
    assert isinstance(encoder, ClipEncoder)
    with quiet():
        encoder.model.save_pretrained(tmp_path)
    images = encoder.preprocessing
    known = {"size": {"height": 32, "width": 32}, "image_mean": images.mean}
    known |= {"image_std": images.std, "resample": 3, "image_processor_type": "ViTImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(known))
    other = load(tmp_path)
    assert other.fingerprint == encoder.fingerprint
    assert other.preprocessing == images


@pytest.mark.parametrize("which", ["vit", "trunk"])
def test_the_fingerprint_is_of_the_tower_alone(
    which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(which)
    usual = load(source).fingerprint

    def change_words(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if name in ("visual.proj", "visual.head.proj.weight") or name.startswith("text."):
                tensors[name] += 1

    def turn(tensors: dict[str, torch.Tensor]) -> None:
        name = "visual.ln_post.bias" if which == "vit" else "visual.trunk.norm.bias"
        tensors[name].view(torch.int32)[0] += 1

    assert load(edit(source, tmp_path / "words", change_words)).fingerprint == usual
    assert load(edit(source, tmp_path / "turned", turn)).fingerprint != usual
    pickled = copy(source, tmp_path / "pickled")
    weights = pickled / "open_clip_model.safetensors"
    wrapped = {f"module.{name}": tensor for name, tensor in load_file(weights).items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, pickled / "open_clip_pytorch_model.bin")
    weights.unlink()
    assert load(pickled).fingerprint == usual
    told = CliRunner().invoke(main, ["doctor", "--encoder", str(pickled)]).stdout
    assert "pickled (open_clip), on this machine" in " ".join(told.split())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": [1, 1, 1, 1]}, "is a ResNet of open_clip's own"),
        ({"attentional_pool": True}, "is a ViT with attentional_pool True"),
        ({"ls_init_value": 1e-5}, "is a ViT with ls_init_value"),
        ({"pool_type": "avg"}, "is a ViT with pool_type avg"),
        ({"qk_norm": True}, "is a ViT with qk_norm True"),
        ({"newly_made": 1}, "a tower with newly_made in its config"),
        ({"width": 0}, "whose width, head_width or mlp_ratio"),
        ({"head_width": 100}, "whose width, head_width or mlp_ratio"),
        ({"layers": 2}, "one of 16 tensors that its config does not ask for"),
        ({"layers": 4}, "one of 16 missing tensors"),
        ({"layers": "many"}, "num_hidden_layers|many"),
        ({"image_size": 64}, "has shape"),
        ({"image_size": [32, 64]}, "image_size"),
        ({"image_size": "big"}, "is not a fixed height and width"),
        ({"timm_model_name": "no_such_model"}, "does not have"),
        ({"timm_model_name": "test_vit", "timm_pool": "rot_attn"}, "timm_pool 'rot_attn'"),
    ],
)
def test_a_config_of_another_tower_is_refused(
    vit: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(EncoderError, match=said):
        load(copy(vit, tmp_path / "changed", **changes))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("visual.ln_pre.bias"), "the image tower lacks pre_layrnorm.bias"),
        (lambda t: t.update({"visual.ln_pre.bias": torch.zeros(3)}), r"has shape \(3,\)"),
        (lambda t: t["visual.ln_pre.bias"].fill_(torch.nan), "not finite"),
        (lambda t: t.update({"visual.more": torch.zeros(3)}), "holds more, one of 1"),
        (
            lambda t: t.update({"visual.transformer.resblocks.0.attn.in_proj_bias": torch.ones(7)}),
            "no three equal",
        ),
        (lambda t: [t.pop(n) for n in list(t) if n[:7] == "visual."], "holds no image tower"),
    ],
)
def test_weights_that_are_not_the_towers_are_refused(
    vit: Path, tmp_path: Path, change: Any, said: str
) -> None:
    with pytest.raises(EncoderError, match=said):
        load(edit(vit, tmp_path / "edited", change))


class Payload:
    """Writes a file where a pickle is read without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_state_dict_that_would_run_code_is_refused(vit: Path, tmp_path: Path) -> None:
    place = copy(vit, tmp_path / "unsafe")
    (place / "open_clip_model.safetensors").unlink()
    with pytest.raises(EncoderError, match=r"neither open_clip_model.* nor open_clip_pytorch_mode"):
        load(place)
    torch.save({"x": Payload(tmp_path / "ran")}, place / "open_clip_pytorch_model.bin")
    with pytest.raises(EncoderError, match="reading it would run code"):
        load(place)
    assert not (tmp_path / "ran").exists()


def test_a_config_that_names_another_model_goes_first(vit: Path, tmp_path: Path) -> None:
    (copy(vit, tmp_path / "both") / "config.json").write_text("{}")
    assert load(tmp_path / "both").fingerprint == load(vit).fingerprint
    (tmp_path / "both" / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(EncoderError, match="neither preprocessor_config"):
        load(tmp_path / "both")


@pytest.mark.parametrize("which", ["vit", "ResNet"])
def test_only_the_image_towers_tensors_are_fetched(vit: Path, tmp_path: Path, which: str) -> None:
    place = vit
    if which == "ResNet":  # which counts its training steps in integers, of no use
        place = tmp_path / "resnet"
        make(place, {**TRUNK, **TRUNKS["ResNet"]})
    files = {path.name: path.read_bytes() for path in place.iterdir()}
    files["open_clip_pytorch_model.bin"] = b"not asked for"
    with serving(Hub()) as hub:
        hub.put("laion/clip", files)
        [described] = ask(hub.address, tmp_path / "other", "laion/clip", TEST_DESCRIBE="1")
        [found] = ask(hub.address, tmp_path, "laion/clip", TEST_TOLD="1")
        assert not hub.asked("GET", ".bin")
    assert found["files"] == ["medembed-image-tower.safetensors", "open_clip_config.json"]
    path = Path(found["path"])
    assert load(path).fingerprint == load(place).fingerprint
    tensors = read_header(path / "medembed-image-tower.safetensors")
    assert all(tensor.name.startswith("visual.") for tensor in tensors)
    assert described["tower_bytes"] == sum(tensor.stop - tensor.start for tensor in tensors)


def test_a_state_dict_is_fetched_where_there_is_nothing_else(vit: Path, tmp_path: Path) -> None:
    config = (vit / "open_clip_config.json").read_bytes()
    torch.save(load_file(vit / "open_clip_model.safetensors"), tmp_path / "weights.bin")
    body = (tmp_path / "weights.bin").read_bytes()
    name = "open_clip_pytorch_model.bin"
    with serving(Hub()) as hub:
        hub.put("a/pickled", {"open_clip_config.json": config, name: body})
        hub.put("a/bare", {"open_clip_config.json": config})
        [told] = ask(hub.address, tmp_path, "a/pickled", TEST_DESCRIBE="1")
        found, bare = ask(hub.address, tmp_path, "a/pickled", "a/bare", TEST_TOLD="1")
        [words] = ask(hub.address, tmp_path / "words", "a/pickled", TEST_WORDS="1")
    assert (told["fetched"], told["tower_bytes"]) == (False, len(body))
    assert found["files"] == ["open_clip_config.json", name]
    assert load(Path(found["path"])).fingerprint == load(vit).fingerprint
    assert f"open_clip_model.safetensors or {name}" in bare["error"]
    assert words["files"] == ["open_clip_config.json"]
    [offline] = ask(hub.address, tmp_path, "a/pickled")  # the hub has gone
    assert offline["files"] == found["files"]


def test_neither_words_nor_training_are_of_open_clip(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="of open_clip, whose text towers are not read"):
        load_text_tower(vit)
    manifest = with_both_classes(write_images(tmp_path / "images", 24))
    with pytest.raises(EncoderError, match="model of timm, CLIP or open_clip"):
        finetune(manifest, tmp_path / "images", load(vit), tmp_path / "out")


def test_the_vit_needs_no_library_of_its_own_and_a_trunk_names_timm(vit: Path, trunk: Path) -> None:
    script = (
        "import sys\nfrom medembed.encoders.loading import load_encoder\n"
        "print(load_encoder(sys.argv[1], device='cpu').fingerprint)"
    )
    command = [sys.executable, "-c", script]
    ran = subprocess.run([*command, str(vit)], capture_output=True, text=True)
    assert ran.stdout.strip() == load(vit).fingerprint
    ended = subprocess.run([*command, str(trunk)], capture_output=True, text=True)
    assert "pip install 'medembed[timm]'" in ended.stderr
